"""From a config to typed options: Python signatures are the schema.

A config section is splatted into the function or dataclass that consumes it,
so that every key is used exactly once. `bind` checks names and simple types
first and turns what is wrong into an error that names the key.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from maestro.lowrank import Rule
from maestro.methods.table import METHODS, Method
from maestro.schema import ConfigError, bind, choose


@dataclasses.dataclass(frozen=True)
class Phase:
  """One part of a run: what is sampled, penalised and shrunk, for how long.

  Attributes:
    epochs: its length.
    schedule: learning-rate schedule of this phase, see `training.optim`.
    lam: lambda, the weight of the group lasso.
    sampler: ordered-dropout sampler, see `maestro.sampling`.
    shrink: whether ranks are lowered after each epoch.
  """

  epochs: int
  schedule: Mapping
  lam: float = 0.0
  sampler: Mapping = dataclasses.field(default_factory=lambda: {"name": "full"})
  shrink: bool = False


@dataclasses.dataclass(frozen=True)
class Truncate:
  """When shrunken factors are really cut, with params and optimizer state.

  Attributes:
    max_compilations: bound on the programs (train steps, evaluations and
      recalibrations of batch norm) that a run may compile; cuts that would
      exceed it are left to the masks.
    min_saving: fraction of the stored MACs that a cut within the discover
      phase must save. The start of the settle phase always cuts.
    multiple_of: ranks are rounded up to a multiple of this.
  """

  max_compilations: int = 8
  min_saving: float = 0.25
  multiple_of: int = 1


@dataclasses.dataclass(frozen=True)
class FullPass:
  """A second, full-rank pass in every step, which teaches the sampled one.

  loss = CE(full, y) + (1 - distill) CE(sampled, y)
         + distill T^2 KL(full || sampled)

  Attributes:
    distill: weight in [0, 1] of the soft targets against the labels.
    temperature: T.
  """

  distill: float = 0.5
  temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Checkpointing:
  """How often state is saved and how much of it is kept.

  Attributes:
    every_epochs: a checkpoint at the end of every so many epochs; the ends of
      both phases are always saved.
    keep: the newest so many are kept, and always the end of discover.
  """

  every_epochs: int = 1
  keep: int = 2


@dataclasses.dataclass(frozen=True)
class Config:
  """A run. See configs/ for examples; sections are documented at their types.

  Attributes:
    model: name and options of a model in `maestro.models.MODELS`.
    data: name and options of a data set in `maestro.data.DATASETS`.
    discover: the phase that finds ranks.
    settle: the phase that trains at the ranks found; 0 epochs is the paper.
    optimizer: name and options, see `maestro.training.optim.make`.
    batch_size: examples per step, over all devices.
    method: a name in `maestro.methods.METHODS`, such as "maestro", or "dense"
      for the same run without factors; or a mapping of that name and pieces of
      `Method` that replace its own.
    rules: sections of `maestro.Rule`: which layers are decomposed.
    seed: of initial weights, samplers and the order of examples.
    loss: "cross_entropy" or "squared_error".
    lasso: "hierarchical" (the paper) or "flat".
    threshold: components of lower importance are removed by shrinking.
    truncate: when factors are cut.
    full_pass: full-rank pass and distillation; None is off.
    init_from: workdir of another run, whose newest checkpoint is the start.
    checkpoint: how often, and how many.
    eval_every_epochs: evaluation on the validation split.
    batch_norm_examples: training examples from which batch statistics are
      computed anew before a factored network is evaluated; None is all.
    log_every_steps: training metrics; None is once an epoch.
    steps_per_dispatch: steps per call of the device; None is 1 on CPUs, and up
      to 16 on accelerators.
    num_devices: devices to split the batch over; None is all.
  """

  model: Mapping
  data: Mapping
  discover: Phase
  settle: Phase
  optimizer: Mapping
  batch_size: int
  method: str | Mapping = "maestro"
  rules: Sequence[Mapping] = ({"path": ".*"},)
  seed: int = 0
  loss: str = "cross_entropy"
  lasso: str = "hierarchical"
  threshold: float = 1e-5
  truncate: Truncate = dataclasses.field(default_factory=Truncate)
  full_pass: FullPass | None = None
  init_from: str | None = None
  checkpoint: Checkpointing = dataclasses.field(default_factory=Checkpointing)
  eval_every_epochs: int = 1
  batch_norm_examples: int | None = 4096
  log_every_steps: int | None = None
  steps_per_dispatch: int | None = None
  num_devices: int | None = None

  @property
  def pieces(self) -> Method:
    """What config.method stands for."""
    section = self.method
    if isinstance(section, str):
      section = {"name": section}
    method, options = choose(METHODS, section, "config.method")
    return dataclasses.replace(method, **bind(Method, options, "config.method"))

  @property
  def epochs(self) -> int:
    """Epochs of both phases."""
    return self.discover.epochs + self.settle.epochs


_SECTIONS = {
  "discover": Phase,
  "settle": Phase,
  "truncate": Truncate,
  "full_pass": FullPass,
  "checkpoint": Checkpointing,
}


def _check(ok: bool, message: str) -> None:
  if not ok:
    raise ConfigError(message)


def parse(config: Mapping[str, Any]) -> Config:
  """Turns nested mappings into a `Config`, checking every key.

  Raises:
    ConfigError: names the key and what was expected.
  """
  values = bind(Config, config, "config")
  for key, cls in _SECTIONS.items():
    if values.get(key) is not None:
      values[key] = cls(**bind(cls, values[key], f"config.{key}"))
  c = Config(**values)
  _ = c.pieces  # a wrong name shows now
  for key, low in {
    "batch_size": 1,
    "eval_every_epochs": 1,
    "batch_norm_examples": 1,
    "log_every_steps": 1,
    "steps_per_dispatch": 1,
    "seed": 0,
    "threshold": 0,
  }.items():
    value = getattr(c, key)
    _check(
      value is None or value >= low,
      f"config.{key}: {value} is below {low}",
    )
  for name, phase in (("discover", c.discover), ("settle", c.settle)):
    _check(
      phase.epochs >= 0, f"config.{name}.epochs: {phase.epochs} is negative"
    )
    _check(
      0 <= phase.lam < float("inf"),
      f"config.{name}.lam: {phase.lam} is no finite weight >= 0",
    )
  _check(
    c.discover.epochs + c.settle.epochs > 0,
    "config.discover.epochs and config.settle.epochs are both 0: no training",
  )
  _check(
    c.lasso in ("hierarchical", "flat"),
    f'config.lasso: {c.lasso!r} is unknown; use "hierarchical" or "flat"',
  )
  _check(
    c.truncate.multiple_of >= 1,
    f"config.truncate.multiple_of: {c.truncate.multiple_of} is below 1",
  )
  _check(
    c.truncate.max_compilations >= 5,
    "config.truncate.max_compilations:"
    f" {c.truncate.max_compilations} is below 5, which a run needs without"
    " any cut (a train step and an evaluation per phase, and the final model)",
  )
  _check(
    c.checkpoint.keep >= 1 and c.checkpoint.every_epochs >= 1,
    "config.checkpoint: keep and every_epochs must be at least 1",
  )
  if c.full_pass is not None:
    _check(
      0 <= c.full_pass.distill <= 1 and c.full_pass.temperature > 0,
      "config.full_pass: distill must be in [0, 1] and temperature above 0",
    )
    _check(
      c.loss == "cross_entropy" or c.full_pass.distill == 0,
      "config.full_pass.distill: soft targets need config.loss="
      '"cross_entropy"; set it to 0',
    )
  return c


def parse_rules(sections: Sequence[Mapping]) -> list[Rule]:
  """Turns config.rules into `Rule`s."""
  return [
    Rule(**bind(Rule, section, f"config.rules[{i}]"))
    for i, section in enumerate(sections)
  ]
