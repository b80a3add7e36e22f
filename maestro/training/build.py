"""Builds what a config describes, and opens what a run has left behind."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maestro import data as data_lib
from maestro import introspect as nn
from maestro.errors import UserError
from maestro.models import MODELS
from maestro.parallel.mesh import Mesh
from maestro.runs import checkpoint
from maestro.runs import workdir as workdir_lib
from maestro.sampling import SAMPLERS
from maestro.schema import ConfigError, bind, choose
from maestro.training.batch_norm import make_recalibrate
from maestro.training.config import Config, parse
from maestro.training.evaluate import make_evaluate
from maestro.trees import LayerSpec


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a model must know of its data set; kept in a workdir's facts.json.

  Attributes:
    data: name of the data set.
    input_shape: of one preprocessed example.
    input_dtype: of preprocessed examples.
    num_classes: None for regression.
    normalization: {"mean": ..., "std": ...} of pixels in [0, 1]; None if
      inputs are taken as they are.
    train_examples: size of the training split.
  """

  data: str
  input_shape: tuple[int, ...]
  input_dtype: str
  num_classes: int | None
  normalization: Mapping[str, Any] | None
  train_examples: int

  @classmethod
  def of(cls, dataset: data_lib.Dataset) -> "Facts":
    """Reads them from a data set."""
    inputs = dataset.train.inputs
    x = jax.eval_shape(
      dataset.preprocess,
      jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype),
    )
    options = getattr(dataset.preprocess, "keywords", {})
    scale = {k: options[k] for k in ("mean", "std") if k in options}
    return cls(
      data=dataset.name,
      input_shape=tuple(x.shape[1:]),
      input_dtype=str(x.dtype),
      num_classes=dataset.num_classes,
      normalization=workdir_lib.plain(scale) or None,
      train_examples=len(dataset.train),
    )

  @property
  def example(self) -> jax.ShapeDtypeStruct:
    """The abstract value of one preprocessed example, batch axis 1."""
    return jax.ShapeDtypeStruct((1, *self.input_shape), self.input_dtype)


def make_model(c: Config, facts: Facts) -> Any:
  """Builds config.model for a data set."""
  where = "config.model"
  cls, options = choose(MODELS, c.model, where)
  given = {}
  if "num_classes" in cls.__dataclass_fields__:
    if facts.num_classes is None:
      raise ConfigError(
        f"{where}.name: {c.model['name']!r} classifies, but the targets of"
        f" {facts.data!r} are not classes"
      )
    given = {"num_classes": facts.num_classes}
  if (facts.num_classes is None) == (c.loss == "cross_entropy"):
    raise ConfigError(
      f"config.loss: {c.loss!r} does not fit the targets of {facts.data!r};"
      ' classes need "cross_entropy", vectors "squared_error"'
    )
  return cls(**bind(cls, options, where, tuple(given)), **given)


def make_sampler(c: Config, phase: str) -> Callable:
  """Returns sampler(key, ranks) of a phase, "discover" or "settle"."""
  return sampler(getattr(c, phase).sampler, f"config.{phase}.sampler")


def sampler(section: Mapping[str, Any], where: str) -> Callable:
  """Builds the ranks' sampler from a section at a path of the config."""
  function, options = choose(SAMPLERS, section, where)
  options = bind(function, options, where, ("key", "ranks"))
  chosen = functools.partial(function, **options)
  try:  # a wrong value shows now, not within the first step
    chosen(jax.random.key(0), {"rank": jnp.ones((), jnp.int32)})
  except ValueError as error:
    raise ConfigError(f"{where}: {error}") from error
  return chosen


def make_evaluator(
  c: Config, model: Any, dataset: data_lib.Dataset, mesh: Mesh
) -> Callable:
  """Returns evaluate(variables, split) -> metrics for a config; exact."""
  # Large batches are fast; they must also split over the devices.
  batch_size = -(-max(c.batch_size, 500) // mesh.size) * mesh.size
  return make_evaluate(
    model,
    loss=c.loss,
    preprocess=dataset.preprocess,
    batch_size=batch_size,
    mesh=mesh,
  )


def make_recalibrator(
  c: Config, model: Any, dataset: data_lib.Dataset, mesh: Mesh
) -> Callable[[Any], Any]:
  """Returns recalibrate(variables) -> variables with their own statistics.

  Without batch_stats, variables come back as they are.
  """
  recalibrate = make_recalibrate(
    model,
    preprocess=dataset.preprocess,
    batch_size=min(c.batch_size, len(dataset.train)),
    examples=c.batch_norm_examples,
    mesh=mesh,
  )

  def with_statistics(variables: Any) -> Any:
    if "batch_stats" not in variables:
      return variables
    return variables | {"batch_stats": recalibrate(variables, dataset.train)}

  return with_statistics


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


def open_run(
  workdir: str | os.PathLike, which: str = "final", data_dir: str | None = None
) -> Run:
  """Opens a run's newest checkpoint, or the one at the end of discover.

  Args:
    workdir: directory of a run, finished or not.
    which: "final", the newest checkpoint, or "discover", the last one before
      settling, which has the ordering that any-size deployment needs.
    data_dir: where prepared data is, if not where the run found it.

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
  if data_dir is not None:
    c = dataclasses.replace(c, data={**c.data, "data_dir": data_dir})
  facts = _read_facts(workdir / "facts.json")
  if facts is None:  # damaged, or a run of a version that did not write them
    facts = Facts.of(data_lib.make(**c.data))
  directory = workdir / "checkpoints"
  steps = checkpoint.list_steps(directory)
  step = max(steps, default=None)
  if which == "discover":
    epochs = c.discover.epochs
    if step is not None:  # a method may have ended it early
      ledger = checkpoint.load_params(directory, step)[3].get("ledger", {})
      epochs = ledger.get("discover_epochs", epochs)
    step = epochs * (facts.train_examples // c.batch_size)
    if step not in steps or not epochs:
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
    step=int(step),  # load_params has raised if there is none
    params=params,
    batch_stats=batch_stats,
    ranks=ranks,
  )
