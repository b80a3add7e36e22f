"""Opens what a run has left behind: its network, and what is known of it."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from maestro import data as data_lib
from maestro import introspect as nn
from maestro.errors import UserError
from maestro.runs import checkpoint
from maestro.runs import workdir as workdir_lib
from maestro.schema import bind
from maestro.training.build import Facts, make_model
from maestro.training.config import Config, clock_of, parse
from maestro.training.results import Ledger
from maestro.trees import LayerSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A trained network, as a checkpoint of its run holds it.

  Attributes:
    workdir: where it is.
    config: parsed.
    facts: about its data set, which need not be there.
    model: the Flax module.
    layers: {path: LayerSpec} of the model.
    step: of the checkpoint.
    params: host arrays, factors as they are stored.
    batch_stats: host arrays, {} without normalisation.
    ranks: the current ranks, {} for a dense network.
    levels: of a nested network, as in `TrainState`; {} for one size.
  """

  workdir: pathlib.Path
  config: Config
  facts: Facts
  model: Any
  layers: Mapping[str, LayerSpec]
  step: int
  params: Any
  batch_stats: Any
  ranks: Any
  levels: Any = dataclasses.field(default_factory=dict)


CHECKPOINTS = ("final", "discover")


def _read_facts(path: pathlib.Path) -> Facts | None:
  if not path.exists():
    return None
  try:
    values = workdir_lib.read_json(path, keys={"input_shape": list})
    values["input_shape"] = tuple(values["input_shape"])
    return Facts(**bind(Facts, values, str(path)))
  except UserError as error:
    print(f"{error}; read anew from the data set")
    return None


def check_data(workdir: pathlib.Path, found: Facts) -> None:
  """Raises UserError if a workdir has begun on other data than is there."""
  saved = workdir / "checkpoints"
  if saved.is_dir() and checkpoint.list_steps(saved):
    facts = _read_facts(workdir / "facts.json")
    if facts is not None:
      facts.check(found, workdir)


def data_of(run: Run) -> data_lib.Dataset:
  """Reads the data set of a run.

  Raises:
    DataError: it is not there, or damaged.
    UserError: it is not what the run was trained on.
  """
  dataset = data_lib.make(**run.config.data)
  run.facts.check(Facts.of(dataset), run.workdir)
  return dataset


def open_run(
  workdir: str | os.PathLike, which: str = "final", data_dir: str | None = None
) -> Run:
  """Opens a run's newest checkpoint, or the one at the end of discover.

  Args:
    workdir: directory of a run, finished or not.
    which: "final", the newest checkpoint, or "discover", the last one before
      settling, which has the ordering that any-size deployment needs.
    data_dir: where prepared data is; None is TFDS_DATA_DIR, as ever. Not what
      the workdir's own config says: that may be another's.

  Raises:
    UserError: there is no run or no such checkpoint, or it is broken.
  """
  workdir = pathlib.Path(workdir)
  if which not in CHECKPOINTS:
    raise UserError(
      f"--checkpoint: {which!r} is unknown; use one of {CHECKPOINTS}"
    )
  if not (workdir / "config.json").exists():
    raise UserError(
      f"{workdir / 'config.json'} is missing: --workdir must name the directory"
      " of a run"
    )
  c = parse(workdir_lib.read_json(workdir / "config.json"))
  if "data_dir" in c.data or data_dir is not None:
    c = dataclasses.replace(c, data={**c.data, "data_dir": data_dir})
  facts = _read_facts(workdir / "facts.json")
  if facts is None:  # damaged, or a run of a version that did not write them
    facts = Facts.of(data_lib.make(**c.data))
  directory = workdir / "checkpoints"
  steps = checkpoint.list_steps(directory)
  step = max(steps, default=None)
  if which == "discover":
    n = facts.train_examples // c.batch_size
    ledger = {}
    if step is not None:  # a method may have ended it early
      ledger = checkpoint.load_params(directory, step)[3].get("ledger", {})
    step = Ledger.load(ledger, clock_of(c, n)).discover_steps
    if step not in steps or not step:
      raise UserError(
        f"{directory} has no checkpoint of the end of discover (step {step});"
        f" there are {steps}. Train on, or use --checkpoint=final"
      )
  params, batch_stats, ranks, _ = checkpoint.load_params(directory, step)
  model = make_model(c, facts)
  return Run(
    workdir=workdir,
    config=c,
    facts=facts,
    model=model,
    layers=nn.layers(model, facts.example),
    step=int(step or 0),  # load_params has raised if there is none
    params=params,
    batch_stats=batch_stats,
    ranks=ranks,
    levels=checkpoint.load_levels(directory, int(step or 0)),
  )
