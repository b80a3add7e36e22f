"""The schema of a run: what config files hold, parsed and checked once."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from maestro.lowrank import Rule
from maestro.methods import controllers
from maestro.methods.table import Method, parse_method
from maestro.parallel import rules as placements
from maestro.parallel.mesh import MeshShape
from maestro.schema import (
  ConfigError,
  Count,
  Natural,
  Positive,
  Range,
  Rate,
  Share,
  Weight,
  bind,
)
from maestro.training.durations import Clock, Duration, Periods

PHASES = ("discover", "settle")

# Keys that may be None, as absent: to a workdir, as of a run before there were
# such keys, both are the same config.
UNSET = ("accumulate", "deterministic", "label_smoothing", "remat")


@dataclasses.dataclass(frozen=True)
class Phase:
  """One part of a run: what is sampled, penalised and shrunk, for how long.

  Attributes:
    schedule: learning-rate schedule of this phase, see `training.optim`.
    lam: lambda, the weight of the group lasso.
    sampler: ordered-dropout sampler, see `maestro.sampling`.
    epochs: its length.
    length: its length in any unit, such as "steps:5000" (see
      `training.durations`), in place of epochs.
    shrink: whether ranks are lowered at the phase's end, and before it
    shrink_every: so often, such as "steps:500"; None is after each epoch.
  """

  schedule: Mapping
  epochs: Natural | None = None
  length: str | None = None
  lam: Weight = 0.0
  sampler: Mapping = dataclasses.field(default_factory=lambda: {"name": "full"})
  shrink: bool = False
  shrink_every: str | None = None


@dataclasses.dataclass(frozen=True)
class Truncate:
  """When shrunken factors are really cut, with params and optimizer state.

  Attributes:
    max_compilations: bound on the programs (train steps, evaluations and
      recalibrations of batch norm) that a run may compile; cuts that would
      exceed it are left to the masks. 5 are needed without any cut.
    min_saving: fraction of the stored MACs that a cut within the discover
      phase must save. The start of the settle phase always cuts.
    multiple_of: ranks are rounded up to a multiple of this.
  """

  max_compilations: Annotated[int, Range("[5, inf)")] = 8
  min_saving: Share = 0.25
  multiple_of: Count = 1


@dataclasses.dataclass(frozen=True)
class FullPass:
  """A second, full-rank pass in every step, which teaches the sampled one.

  loss = CE(full, y) + (1 - distill) CE(sampled, y)
         + distill T^2 KL(full || sampled)

  Attributes:
    distill: weight in [0, 1] of the soft targets against the labels.
    temperature: T.
  """

  distill: Share = 0.5
  temperature: Positive = 1.0


@dataclasses.dataclass(frozen=True)
class Checkpointing:
  """How often state is saved and how much of it is kept.

  Attributes:
    every_epochs: a checkpoint at the end of every so many epochs; the ends of
      both phases are always saved.
    every: the same in any unit, such as "steps:500", in place of every_epochs.
    keep: the newest so many are kept, and always the end of discover.
  """

  every_epochs: Count = 1
  every: str | None = None
  keep: Count = 2


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
    accumulate: micro-batches of which a step is made; as many divide its batch,
      and their gradients are averaged (`docs/large_runs.md`).
    method: a name in `maestro.methods.METHODS`, such as "maestro" (the default)
      or "dense" for the same run without factors; or a mapping of that name and
      pieces of `Method` that replace its own.
    budget: of the final network, such as "macs:0.25", in place of the method's;
      a dense baseline leaves it aside.
    rules: sections of `maestro.Rule`: which layers are decomposed.
    remat: "none" keeps what a backward pass needs; "all" computes the forward
      pass again, and "dots" or "dots_with_no_batch_dims", policies of
      `jax.checkpoint`, all of it but products.
    ema: decay of a moving average of the weights, such as 0.999, which is what
      is evaluated and left behind; None keeps none.
    seed: of all random numbers, see `maestro.training.streams`.
    loss: "cross_entropy" or "squared_error".
    label_smoothing: part of a label that is spread over all classes, in
      training alone: what is evaluated has none.
    lasso: "hierarchical" (the paper) or "flat".
    lasso_cost: "macs" or "params": its groups count what their components cost;
      None, the paper, is the same for all layers.
    threshold: components of lower importance are removed by shrinking.
    truncate: when factors are cut.
    full_pass: full-rank pass and distillation; None is off.
    init_from: workdir of another run, whose newest checkpoint is the start; or
      a .safetensors file, see `training.stored`.
    checkpoint: how often, and how many.
    eval_every_epochs: evaluation on the validation split.
    eval_every: the same in any unit, in place of eval_every_epochs.
    batch_norm_examples: training examples from which batch statistics are
      computed anew before a factored network is evaluated; None is all.
    log_every_steps: training metrics; None is once an epoch.
    log_every: the same in any unit, in place of log_every_steps.
    steps_per_dispatch: steps per call of the device; None is 1 on CPUs, and up
      to 16 on accelerators.
    deterministic: whether GPUs add in a fixed order, so that a run repeats to
      the bit; other devices do.
    mesh: how many devices share the batch and the parameters.
    placement: where parameters lie on the mesh, by path; the first rule that
      matches holds, and where none does, the defaults of `parallel.rules`.
  """

  model: Mapping
  data: Mapping
  discover: Phase
  settle: Phase
  optimizer: Mapping
  batch_size: Count
  method: Method
  accumulate: Count = 1
  remat: Literal["none", "all", "dots", "dots_with_no_batch_dims"] = "none"
  ema: Annotated[float, Range("(0, 1)")] | None = None
  budget: str | None = None
  rules: tuple[Rule, ...] = (Rule(),)
  seed: Annotated[int, Range("[0, 4294967296)")] = 0
  loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
  label_smoothing: Rate = 0.0
  lasso: Literal["hierarchical", "flat"] = "hierarchical"
  lasso_cost: Literal["macs", "params"] | None = None
  threshold: Weight = 1e-5
  truncate: Truncate = Truncate()
  full_pass: FullPass | None = None
  init_from: str | None = None
  checkpoint: Checkpointing = Checkpointing()
  eval_every_epochs: Count = 1
  eval_every: str | None = None
  batch_norm_examples: Count | None = 4096
  log_every_steps: Count | None = None
  log_every: str | None = None
  steps_per_dispatch: Count | None = None
  deterministic: bool = False
  mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
  placement: tuple[placements.Rule, ...] = ()

  @property
  def micro_batch(self) -> int:
    """Examples that run at a time, over all devices."""
    return self.batch_size // self.accumulate


def parse(config: Mapping[str, Any]) -> Config:
  """Turns nested mappings into a `Config`, checking every key.

  Raises:
    ConfigError: names the key and what was expected.
  """
  if not isinstance(config, Mapping):
    raise ConfigError(
      f"config: a {type(config).__name__}, expected a mapping of sections"
    )
  config = dict(config)
  devices = config.pop("num_devices", None)  # of runs before there were meshes
  if devices is not None:
    if "mesh" in config:
      raise ConfigError(
        "config.num_devices: config.mesh says the same; leave num_devices out"
      )
    config["mesh"] = {"data": devices}
  for key in UNSET:
    if config.get(key, "absent") is None:
      del config[key]
  method = parse_method(config.get("method", "maestro"))
  budget = config.get("budget")
  if budget is not None and method.decompose is not None:  # dense has none
    method = dataclasses.replace(method, budget=budget)
  c = Config(**bind(Config, config | {"method": method}, "config"))
  clock_of(c, 1)  # whatever an epoch is, no training stays none
  if c.batch_size % c.accumulate:
    fits = [k for k in range(1, c.batch_size + 1) if not c.batch_size % k]
    nearest = min(fits, key=lambda k: abs(k - c.accumulate))
    raise ConfigError(
      f"config.accumulate: {c.accumulate} micro-batches of equal size do not"
      f" make up config.batch_size={c.batch_size}; {nearest} do"
    )
  if c.full_pass and c.full_pass.distill and c.loss != "cross_entropy":
    raise ConfigError(
      "config.full_pass.distill: soft targets need config.loss="
      '"cross_entropy"; set it to 0'
    )
  if c.label_smoothing and c.loss != "cross_entropy":
    raise ConfigError(
      f"config.label_smoothing: {c.label_smoothing:g}, but"
      f" config.loss={c.loss!r} has no labels; set it to 0"
    )
  if method.controller is not None and not c.discover.shrink:
    raise ConfigError(
      "config.discover.shrink: False, but config.method.controller looks at the"
      " ranks that fall; set it to True"
    )
  if c.ema is not None and method.nested is not None:
    raise ConfigError(
      f"config.ema: {c.ema}, but the levels that config.method trains have"
      " batch statistics of their own, which are not averaged; set it to None"
    )
  if method.decompose == "settle" and not length_of(c, "settle").value:
    raise ConfigError(
      "config.settle.epochs: 0, but config.method decomposes at the start of"
      ' settle; raise it, or set config.method.decompose to "end"'
    )
  return c


def length_of(c: Config, phase: str) -> Duration:
  """How long a phase is, in the unit that the config gives."""
  section, where = getattr(c, phase), f"config.{phase}"
  if section.epochs is None and section.length is None:
    raise ConfigError(f"{where}.epochs: missing key, and no {where}.length")
  default = f"epochs:{section.epochs}"
  return Duration.parse(section.length, f"{where}.length", default)


def clock_of(c: Config, steps_per_epoch: int) -> Clock:
  """The lengths of both phases, in steps."""
  lengths = [length_of(c, phase) for phase in PHASES]
  return Clock(steps_per_epoch, c.batch_size).of(*lengths)


def periods_of(c: Config, clock: Clock) -> Periods:
  """Steps from one log, evaluation, checkpoint or shrinking to the next."""

  def steps(text: str | None, default: str, where: str) -> int:
    length = Duration.parse(text, where, default)
    if not length.value:
      raise ConfigError(f"{where}: {text!r} is never; set it to more than 0")
    return clock.steps(length)

  logs = c.log_every is not None or c.log_every_steps is not None
  shrink = dict.fromkeys(PHASES, "epochs:1")
  if c.method.controller is not None:
    updates = controllers.options_of(c.method.controller).updates
    shrink["discover"] = f"steps:{max(clock.discover // updates, 1)}"
  return Periods(
    log=steps(c.log_every, f"steps:{c.log_every_steps}", "config.log_every")
    if logs
    else None,
    evaluate=steps(
      c.eval_every, f"epochs:{c.eval_every_epochs}", "config.eval_every"
    ),
    save=steps(
      c.checkpoint.every,
      f"epochs:{c.checkpoint.every_epochs}",
      "config.checkpoint.every",
    ),
    shrink={
      name: steps(
        phase.shrink_every, shrink[name], f"config.{name}.shrink_every"
      )
      for name in PHASES
      if (phase := getattr(c, name)).shrink
    },
  )
