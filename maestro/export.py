"""Cuts a smaller network out of a trained run, checks it, writes it.

  python -m maestro.export --workdir=runs/lenet_od --out=lenet_any_size
  python -m maestro.export --workdir=runs/digits_od --out=digits_small
  python -m maestro.export --workdir=runs/digits_od_maestro \
      --checkpoint=discover --budget=macs:0.3 --out=digits_third
  python -m maestro.export --workdir=runs/digits_od_maestro \
      --checkpoint=discover --profiles=0.8,0.6,0.4,0.25 --out=digits_any

Truncates the factors, merges the layers whose dense kernel is cheaper, compares
with the masked network (an error above --tolerance), computes batch-norm
statistics anew, evaluates, measures the latency, and writes a directory that
stands alone: model.safetensors, config.json, slices.json, README.md and
model.stablehlo. Load it by maestro.load(directory), or the StableHLO by
jax.export, without maestro.

Without --budget, --ranks or --profiles, the checkpoint's own ranks are kept; of
a nested run (--config.method=nested), all levels that were trained.
--profiles are fractions of the dense network's MACs; one file then holds all of
them, and loading one reads only its part. docs/export.md says more.
"""

import pathlib

from absl import flags

from maestro import cli
from maestro import data as data_lib
from maestro.deploy import artifact
from maestro.deploy import choose as allocate
from maestro.deploy.export import STABLEHLO, Options, choose_sizes, export
from maestro.deploy.reorder import before_cuts
from maestro.errors import UserError
from maestro.training import opened


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  cli.define_allow_import()
  flags.DEFINE_string("workdir", None, "Directory of the run.")
  flags.DEFINE_string("out", None, "Directory to write.")
  flags.DEFINE_enum(
    "checkpoint", "final", opened.CHECKPOINTS, "Which checkpoint to cut."
  )
  flags.DEFINE_string(
    "budget", None, "kind:value, e.g. macs:0.5 (of the dense network's)."
  )
  flags.DEFINE_string("ranks", None, 'A file {"ranks": {layer: rank}}.')
  flags.DEFINE_list("profiles", [], "Fractions of the dense network's MACs.")
  flags.DEFINE_enum(
    "rule",
    None,
    allocate.RULES,
    "How ranks are chosen; the default is greedy, and dp for --profiles.",
  )
  flags.DEFINE_bool(
    "reorder",
    None,
    "First bring components into the order of what losing them does to the"
    " loss, on 512 training examples; the default, where ranks are cut and data"
    " is there, but for nested runs.",
  )
  flags.DEFINE_string(
    "data_dir", None, "Prepared data; the default is TFDS_DATA_DIR."
  )
  default = Options()
  flags.DEFINE_float(
    "tolerance",
    default.tolerance,
    "Largest relative difference to the masked network.",
    lower_bound=0.0,
  )
  flags.DEFINE_bool(
    "keep_statistics",
    default.keep_statistics,
    "Keep the run's batch-norm statistics, which are of other ranks.",
  )
  flags.DEFINE_bool("stablehlo", default.stablehlo, f"Write {STABLEHLO}.")
  flags.DEFINE_bool(
    "onnx", default.onnx, "Write ONNX of every size; needs jax2onnx."
  )
  flags.DEFINE_bool("int8", default.int8, "Store weights as int8.")
  flags.DEFINE_float(
    "int8_tolerance",
    default.int8_tolerance,
    "Largest relative difference that int8 makes; weights that would make it"
    " larger stay as they are.",
    lower_bound=0.0,
  )
  flags.DEFINE_integer(
    "repeats",
    default.repeats,
    "Passes of which the latency is the median; 0 measures none.",
    lower_bound=0,
  )


def main(argv: list[str]) -> None:
  """Exports, as the flags say."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  if not values.workdir or not values.out:
    raise UserError("--workdir=RUN and --out=DIRECTORY are needed")
  out = pathlib.Path(values.out)
  artifact.check_target(out)  # before anything that takes long
  run = opened.open_run(values.workdir, values.checkpoint, values.data_dir)
  try:
    dataset = opened.data_of(run)
  except data_lib.DataError as error:
    print(f"without the data set: {error}")
    dataset = None
  if values.budget or values.ranks or values.profiles or values.reorder:
    run = before_cuts(run, dataset, values.reorder)
  sizes = choose_sizes(
    run,
    budget=values.budget,
    ranks=values.ranks,
    profiles=values.profiles,
    rule=values.rule,
    dataset=dataset,
    log=print,
  )
  export(
    run,
    out,
    sizes,
    checkpoint=values.checkpoint,
    dataset=dataset,
    options=Options(
      tolerance=values.tolerance,
      keep_statistics=values.keep_statistics,
      stablehlo=values.stablehlo,
      repeats=values.repeats,
      onnx=values.onnx,
      int8=values.int8,
      int8_tolerance=values.int8_tolerance,
    ),
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
