"""Chooses the rank of each layer of a trained run for budgets.

  python -m maestro.allocate --workdir=runs/lenet_od_maestro \
      --budgets=macs:0.8,macs:0.5
  python -m maestro.allocate --workdir=runs/lenet_od_maestro \
      --checkpoint=discover --rule=dp --budgets=params:0.3,latency_ms:0.2

Budgets are written kind:value: params, macs and bytes are fractions of the
dense network's, latency_ms is the time of a forward pass on this device. None
is ever exceeded. Rules:

  uniform    the same fraction of each layer's rank
  threshold  components above one importance, the same for all layers
  energy     the same fraction of each layer's energy (singular values squared)
  greedy     removes the slice of ranks that hurts the loss least for what it
             saves, until the budget is met (the paper's)
  dp         dynamic programming over the losses of cutting single layers

greedy and dp measure losses on one batch of training examples. The networks
are judged on the validation split, with batch-norm statistics of their own.
Components are first brought into the order of what losing them does to the
loss, on 512 training examples, unless --noreorder is given.
Writes pareto.json and pareto.png to --out; each of the file's rows is a profile
({"ranks": ...}) as well.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
from absl import flags

from maestro import cli
from maestro.cost.budget import Budget
from maestro.deploy.choose import RULES, Options, allocate
from maestro.deploy.reorder import before_cuts
from maestro.errors import UserError
from maestro.report import pareto
from maestro.runs import provenance
from maestro.runs import workdir as workdir_lib
from maestro.training import opened


def _define_flags() -> None:
  # Not at import: other command lines that use this module have their own.
  cli.define_allow_import()
  flags.DEFINE_string("workdir", None, "Directory of the run.")
  flags.DEFINE_string(
    "data_dir", None, "Prepared data; the default is TFDS_DATA_DIR."
  )
  flags.DEFINE_list("budgets", [], "Budgets, e.g. macs:0.8,macs:0.5.")
  flags.DEFINE_enum("rule", "greedy", RULES, "How ranks are chosen.")
  flags.DEFINE_enum(
    "checkpoint",
    "final",
    opened.CHECKPOINTS,
    "The newest, or the end of discover, which is ordered but not settled.",
  )
  flags.DEFINE_bool(
    "reorder",
    None,
    "First bring components into fisher order; the default, but for nested"
    " runs.",
  )
  flags.DEFINE_string(
    "out", None, "Where results go; the default is WORKDIR/pareto."
  )
  texts = {
    "batch": "Training examples on which greedy and dp measure losses.",
    "evaluations": "About how many passes of the batch a search may cost; by"
    " default, as many as take some ten minutes on two CPU cores, 40 to 1000.",
    "multiple_of": "Ranks are multiples of it, or those of whole layers.",
    "seed": "Chooses the batch.",
    "latency_batch_size": "Examples of a forward pass, for latency_ms.",
    "latency_repeats": "Passes of which the median is taken, for latency_ms.",
  }
  for name, default in dataclasses.asdict(Options()).items():
    flags.DEFINE_integer(name, default, texts[name])


def main(argv: list[str]) -> None:
  """Allocates, as the flags say."""
  values = flags.FLAGS
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  if not values.workdir or not values.budgets:
    name = "budgets=macs:0.5" if values.workdir else "workdir=RUN"
    raise UserError(f"--{name} is missing")
  budgets = [Budget.parse(text) for text in values.budgets]
  names = (field.name for field in dataclasses.fields(Options))
  options: dict[str, Any] = {name: values[name].value for name in names}
  run = opened.open_run(values.workdir, values.checkpoint, values.data_dir)
  dataset = opened.data_of(run)
  start = time.monotonic()
  read, run = run, before_cuts(run, dataset, values.reorder)
  rows = allocate(
    run,
    budgets,
    dataset,
    rule=values.rule,
    log=functools.partial(print, flush=True),
    **options,
  )
  out = pathlib.Path(values.out or run.workdir / "pareto")
  out.mkdir(parents=True, exist_ok=True)
  device = jax.devices()[0]
  record = {
    "run": str(run.workdir),
    "checkpoint": values.checkpoint,
    "step": run.step,
    "rule": values.rule,
    "reorder": run is not read,
    "options": options,
    "git": provenance.git_commit(),
    "device": f"{device.platform}: {device.device_kind}",
    "seconds": time.monotonic() - start,
    "rows": rows,
  }
  workdir_lib.write_json(out / "pareto.json", record)
  pareto.draw(record, out / "pareto.png")
  print(
    f"\n{pareto.table(rows)}\n\n{out / 'pareto.json'}, {out / 'pareto.png'}"
  )


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
