"""Cuts networks out of a trained run, checks them, writes their directory."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import maestro
from maestro import data as data_lib
from maestro import lowrank, trees
from maestro.cost import budget as budget_lib
from maestro.cost.count import Cost, count_cost
from maestro.cost.latency import measure_latencies
from maestro.deploy import (
  artifact,
  card,
  onnx,
  packing,
  rounding,
  slices,
  stablehlo,
  verify,
)
from maestro.deploy import files as safetensors_io
from maestro.deploy.directory import (
  CARD,
  FORMAT,
  FORMAT_VERSION,
  METADATA,
  STABLEHLO,
  WEIGHTS,
)
from maestro.deploy.packing import Profile
from maestro.deploy.sizes import ExportError as ExportError
from maestro.deploy.sizes import Size as Size
from maestro.deploy.sizes import choose_sizes as choose_sizes
from maestro.deploy.sizes import own_sizes
from maestro.models import MODELS
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.report.tables import text_table
from maestro.runs.provenance import git_commit
from maestro.training import build, opened

_BATCHES = (1, 64)  # at which latency is measured


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
  """A network cut out of a run.

  Attributes:
    size: that was asked for.
    variables: {"params": ...} and, where it has them, {"batch_stats": ...}.
    record: its entry in config.json, to which later stages add.
  """

  size: Size
  variables: dict[str, Any]
  record: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
  """How a network is exported.

  Attributes:
    tolerance: largest relative difference to the masked network, in float32.
    keep_statistics: keeps the run's batch-norm statistics, which belong to
      other ranks, instead of computing them anew from training data.
    stablehlo: writes model.stablehlo, of the largest size.
    onnx: writes ONNX of every size, if jax2onnx is installed.
    repeats: forward passes of which the latency is the median; 0 measures none.
    int8: stores weights as int8, as many of them as `int8_tolerance` allows.
    int8_tolerance: largest relative difference to the network in float32, of
      the same batch-norm statistics, on random inputs.
  """

  tolerance: float = 1e-4
  keep_statistics: bool = False
  stablehlo: bool = True
  onnx: bool = False
  repeats: int = 30
  int8: bool = False
  int8_tolerance: float = 1e-2


def export(
  run: opened.Run,
  out: str | os.PathLike,
  sizes: Sequence[Size] = (),
  *,
  checkpoint: str = "final",
  dataset: data_lib.Dataset | None = None,
  options: Options = Options(),
  log: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Writes networks of one run, nested and the largest first, to a directory.

  Args:
    run: from `maestro.training.opened.open_run`.
    out: directory to make; an earlier export there is replaced.
    sizes: what to cut out; () is the run at its own ranks, or all levels of a
      nested one.
    checkpoint: which one `run` is, for the record.
    dataset: of the run; None leaves out what needs data.
    options: see `Options`.
    log: called with lines about the progress.

  Returns:
    The content of config.json.

  Raises:
    ExportError: the directory is something else, data is needed but not there,
      or a network differs from the masked one by more than the tolerance.
    UserError: sizes are not nested, or a weight is factorised twice.
  """
  out = pathlib.Path(out).absolute()
  artifact.check_target(out)
  if options.onnx:
    onnx.check_installed()
  sizes = sizes or own_sizes(run)
  # Before anything that takes long.
  packing.check_nested(
    [Profile(s.name, trees.flatten_ranks(s.ranks), {}) for s in sizes]
  )
  # The statistics of a dense run belong to it; those of a factored one were
  # gathered while its ranks were sampled.
  fresh = bool(run.batch_stats and run.ranks) and not options.keep_statistics
  fresh = fresh and any(size.batch_stats is None for size in sizes)
  if fresh and dataset is None:
    raise ExportError(
      f"the batch-norm statistics of {run.workdir} must be computed anew for"
      f" the ranks of the export, from training data of {run.facts.data!r},"
      " which is not there; prepare it, or keep the run's by --keep_statistics"
    )
  outputs = verify.make_outputs(run.model, run.facts.example)
  cuts = []
  for size in sizes:
    cuts.append(_cut(run, size, outputs, options.tolerance))
    record = cuts[-1].record
    log(
      f"{size.name}: {record['params']:,} parameters, {record['macs']:,} MACs,"
      f" {record['difference']['masked']:.1e} from the masked network"
    )
  if dataset is not None:
    cuts = _with_data(run, cuts, dataset, fresh)
  else:
    log("no data set: not evaluated")
  forms = {}
  if options.int8:
    cuts, forms = _round(run, cuts, options.int8_tolerance)
    if dataset is not None:  # by the statistics that it was compared with
      cuts = _with_data(run, cuts, dataset, fresh=False)
  config = _describe(run, cuts, checkpoint, fresh)
  config["weights"] = forms
  _add_latency(run, cuts, config, options.repeats)
  with artifact.new_directory(out) as new:
    _write(run, new, cuts, config, options, outputs)
    slices.write(new, config, run.layers)
    text = card.make_card(config, out.name)
    (new / CARD).write_text(text, encoding="utf-8")
    artifact.write_config(new, config)
  log("\n" + text_table(card.rows(config)) + "\n")
  for line in card.checks(config):
    log(f"difference {line}")
  for line in card.slower(config):
    log(line)
  log(f"wrote {out}")
  return config


# ---------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------


def _cut(
  run: opened.Run, size: Size, outputs: Callable, tolerance: float
) -> Cut:
  """Extracts a network, compares it with the masked one, counts its cost."""
  norms = _norms(run)
  if size.batch_stats:
    norms = {"batch_stats": size.batch_stats}
  # Jitted: one compilation, where op by op there would be hundreds.
  small = jax.jit(lambda p: lowrank.extract(p, size.ranks, run.layers))(
    run.params
  )
  found = verify.difference(
    outputs({"params": run.params, **norms}, size.ranks),
    outputs({"params": small, **norms}),
  )
  what = f"{size.name}: the extracted network"
  verify.check(found, tolerance, what, "the masked one")
  cost = count_cost(run.layers, small)
  flat = trees.flatten_ranks(size.ranks)
  record = {
    "name": size.name,
    "budget": size.budget,
    "ranks": {path: np.asarray(rank).tolist() for path, rank in flat.items()},
    "forms": {layer.path: layer.form for layer in cost.layers},
    **_totals(cost),
    "difference": {"masked": found},
    "metrics": {},
    "latency_ms": {},
  }
  return Cut(size, {"params": small, **norms}, record)


def _round(
  run: opened.Run, cuts: Sequence[Cut], tolerance: float
) -> tuple[list[Cut], dict[str, list[str]]]:
  """Rounds weights to int8: networks, and which weights are and are not.

  Each keeps the batch-norm statistics of its float32 weights, so that what is
  compared is what is written.
  """
  networks = [cut.variables for cut in cuts]
  outputs = verify.make_outputs(run.model, run.facts.example, n=32)
  pairs, forms = rounding.fit(
    run.params, _profiles(cuts), run.layers, networks, outputs, tolerance
  )
  done = []
  for cut, (variables, found) in zip(cuts, pairs, strict=True):
    record = dict(cut.record, float32={"metrics": cut.record["metrics"]})
    record["difference"] = record["difference"] | {"int8": found}
    done.append(Cut(cut.size, variables, record))
  return done, forms


def _norms(run: opened.Run) -> dict[str, Any]:
  return {"batch_stats": run.batch_stats} if run.batch_stats else {}


def _totals(cost: Cost) -> dict[str, int]:
  return {kind: getattr(cost, kind) for kind in budget_lib.COSTS}


def _with_data(
  run: opened.Run, cuts: Sequence[Cut], dataset: data_lib.Dataset, fresh: bool
) -> list[Cut]:
  """Gives networks their own batch statistics, then evaluates them."""
  c, mesh = run.config, make_mesh(MeshShape(data=1))
  recalibrate = build.make_recalibrator(c, run.model, dataset, mesh)
  evaluate = build.make_score(c, run.model, dataset, mesh)
  done = []
  for cut in cuts:
    own = cut.size.batch_stats is not None
    variables = cut.variables
    if fresh and not own:
      variables = recalibrate(variables)
    splits = {"val": dataset.val, "test": dataset.test}
    scores = {name: evaluate(variables, x) for name, x in splits.items()}
    record = cut.record | {"metrics": scores}
    done.append(Cut(cut.size, variables, record))
  return done


def _add_latency(
  run: opened.Run, cuts: Sequence[Cut], config: dict, repeats: int
) -> None:
  """Measures the dense network, the factors not merged, and each export."""
  norms = _norms(run)
  dense = jax.jit(lambda p: lowrank.merge(p, run.layers))(run.params)
  config["dense"] = _totals(count_cost(run.layers, dense))
  timed: list[tuple[dict, Any]] = [
    (config["dense"], {"params": dense, **norms})
  ]
  if len(cuts) == 1 and run.ranks:
    factors = lowrank.truncate(run.params, cuts[0].size.ranks)
    config["factored"] = _totals(count_cost(run.layers, factors))
    timed.append((config["factored"], {"params": factors, **norms}))
  timed += [(cut.record, cut.variables) for cut in cuts]
  for record, _ in timed:
    record["latency_ms"] = {}
  for batch in _BATCHES if repeats else ():
    times = measure_latencies(
      run.model,
      [form for _, form in timed],
      run.facts.example,
      batch_size=batch,
      repeats=repeats,
    )
    for (record, _), ms in zip(timed, times, strict=True):
      record["latency_ms"][str(batch)] = ms


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------


def _architecture(run: opened.Run) -> tuple[str, dict[str, Any] | None]:
  """The name and options by which `MODELS` makes the model again.

  Of a network that no run has trained they are those of the module. Of a class
  of the user's own, or with options that JSON has not, it is that of the class,
  without options: such an export is loaded with `model=`.
  """
  section, kind = dict(run.config.model), type(run.model)
  name = section.pop("name", None)
  options = {k: v for k, v in section.items() if v is not None}
  if MODELS.get(name) is kind:
    if "num_classes" in kind.__dataclass_fields__:
      options["num_classes"] = run.facts.num_classes
    return name, options
  for name, cls in MODELS.items():
    if cls is kind:
      fields = {f.name for f in dataclasses.fields(kind) if f.init}
      options = {k: getattr(run.model, k) for k in fields - {"name", "parent"}}
      if all(map(_is_plain, options.values())):
        return name, {k: v for k, v in sorted(options.items()) if v is not None}
  return kind.__name__, None


def _is_plain(value: Any) -> bool:
  if isinstance(value, tuple | list):
    return all(map(_is_plain, value))
  return value is None or type(value) in (bool, int, float, str)


def _describe(
  run: opened.Run, cuts: Sequence[Cut], checkpoint: str, fresh: bool
) -> dict[str, Any]:
  """Begins config.json."""
  facts = run.facts
  name, options = _architecture(run)
  device = jax.devices()[0]
  kept = "computed anew for each size, from training data"
  if not fresh:
    kept = "the run's own" if run.batch_stats else "none, as nothing needs them"
    if run.batch_stats and any(cut.size.batch_stats for cut in cuts):
      kept = "those that each level was trained with"
  return {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    **card.labels(run.model),
    "model": {"name": name, "options": options},
    "data": facts.data,
    "num_classes": facts.num_classes,
    **({"vocabulary": facts.vocabulary} if facts.vocabulary else {}),
    "input": {
      "shape": facts.input_shape,
      "dtype": facts.input_dtype,
      "normalization": facts.normalization,
    },
    "source": {
      "workdir": str(run.workdir),
      "checkpoint": checkpoint,
      "step": run.step,
      "git": git_commit(),
      "maestro": maestro.__version__,
      "jax": jax.__version__,
      "device": f"{device.platform}: {device.device_kind}",
    },
    "statistics": kept,
    "dense": {},
    "profiles": [cut.record for cut in cuts],
    "stablehlo": None,
  }


def _write(
  run: opened.Run,
  new: pathlib.Path,
  cuts: Sequence[Cut],
  config: dict[str, Any],
  options: Options,
  outputs: Callable,
) -> None:
  """Writes all but the card, and compares it with what is in memory."""
  tensors, config["tensors"] = packing.pack(
    run.params,
    _profiles(cuts),
    run.layers,
    int8=config["weights"].get("int8", ()),
  )
  header = safetensors_io.write(new / WEIGHTS, tensors, METADATA)
  config["header_sha256"] = artifact.sha256(header)
  if options.stablehlo:
    hlo = _write_stablehlo(run, new, cuts[0], outputs, options.tolerance)
    config["stablehlo"] = {"profile": cuts[0].size.name, **hlo}
  if options.onnx:
    networks = {cut.size.name: cut.variables for cut in cuts}
    config["onnx"] = onnx.write_sizes(
      new, run.model, networks, run.facts.example, options.tolerance
    )
  artifact.write_config(new, config)
  for cut in cuts:
    name, record = cut.size.name, cut.record
    loaded = artifact.read(new, model=run.model, profile=name)
    found = verify.difference(outputs(cut.variables), outputs(loaded.variables))
    verify.check(found, options.tolerance, f"{name}: the file", "the network")
    record["difference"]["reloaded"] = found
    record["read_bytes"] = loaded.bytes_read


def _profiles(cuts: Sequence[Cut]) -> list[Profile]:
  return [
    Profile(
      cut.size.name, cut.record["ranks"], cut.variables.get("batch_stats", {})
    )
    for cut in cuts
  ]


def _write_stablehlo(
  run: opened.Run,
  new: pathlib.Path,
  cut: Cut,
  outputs: Callable,
  tolerance: float,
) -> dict[str, Any]:
  """Writes model.stablehlo, and compares it with the network."""
  path, example = new / STABLEHLO, run.facts.example
  record = stablehlo.write(path, run.model, cut.variables, example)
  again = stablehlo.read(path)(verify.make_inputs(example, model=run.model))
  sizes = [leaf.dtype.itemsize for leaf in jax.tree.leaves(again)]
  exact = jax.default_backend() == "cpu" and min(sizes) >= 4
  if not exact:
    tolerance = max(tolerance, 3e-2)  # its products are in less than float32
  found = verify.difference(outputs(cut.variables), again)
  verify.check(found, tolerance, STABLEHLO, "the exported network")
  return record | {"difference": found}
