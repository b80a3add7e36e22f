"""Builds what a config describes."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.errors import FlaxError

from maestro import data as data_lib
from maestro import introspect as nn
from maestro import ops, sampling, streams, targets
from maestro.adapt import factored
from maestro.cost.count import Cost, count_cost
from maestro.data.dataset import example_lengths
from maestro.errors import UserError
from maestro.methods import bind as methods
from maestro.methods.subject import Subject
from maestro.models import MODELS
from maestro.parallel.mesh import BATCH, Mesh, batch_devices, make_mesh
from maestro.parallel.rules import Placement
from maestro.runs import compiler
from maestro.schema import ConfigError, bind
from maestro.training import (
  levels,
  losses,
  optim,
  schedules,
  start,
  stored,
  translate,
)
from maestro.training.accumulate import unrolls
from maestro.training.batch_norm import make_recalibrate
from maestro.training.config import (
  PHASES,
  Config,
  clock_of,
  length_of,
  periods_of,
)
from maestro.training.durations import Clock, Periods
from maestro.training.evaluate import Evaluate, make_evaluate
from maestro.training.facts import Facts
from maestro.training.feed import Feed, make_feed
from maestro.training.judge import make_judge
from maestro.training.levels import Level
from maestro.training.state import TrainState, new_state
from maestro.training.step import make_dispatch, make_step
from maestro.trees import LayerSpec, LowRankError, Tree


def make_model(c: Config, facts: Facts) -> Any:
  """Builds config.model for a data set.

  A model of the user's own runs on factors by `maestro.factored`.
  """
  where = "config.model"
  make, options = targets.choose(MODELS, c.model, where)
  given, takes = {}, inspect.signature(make).parameters
  if "num_classes" in takes and "num_classes" not in options:
    if facts.num_classes is None:
      raise ConfigError(
        f"{targets.shown(c.model, where)} classifies, but the targets of"
        f" {facts.data!r} are not classes"
      )
    given = {"num_classes": facts.num_classes}
  if (facts.num_classes is None) == (c.loss == "cross_entropy"):
    raise ConfigError(
      f"config.loss: {c.loss!r} does not fit the targets of {facts.data!r};"
      ' classes need "cross_entropy", vectors "squared_error"'
    )
  model = make(**bind(make, options, where, tuple(given)), **given)
  try:
    return factored(model) if targets.is_own(c.model) else model
  except LowRankError as error:
    raise ConfigError(f"{targets.shown(c.model, where)}: {error}") from error


@runtime_checkable
class Forward(Protocol):
  """What a forward pass over data reads of a config, or of its stand-in."""

  @property
  def loss(self) -> str: ...
  @property
  def micro_batch(self) -> int: ...
  @property
  def batch_norm_examples(self) -> int | None: ...


def make_evaluator(
  c: Forward, model: Any, dataset: data_lib.Dataset, mesh: Mesh
) -> Evaluate:
  """Makes the evaluation of a config's networks; exact."""
  # Large batches are fast, but for logits of every token; they must also split
  # over the devices.
  least = 0 if losses.of_tokens(dataset.train.targets) else 500
  batch_size = -(-max(c.micro_batch, least) // mesh.size) * mesh.size
  return make_evaluate(
    model,
    loss=c.loss,
    preprocess=dataset.preprocess,
    batch_size=batch_size,
    mesh=mesh,
  )


def make_score(
  c: Forward, model: Any, dataset: data_lib.Dataset, mesh: Mesh
) -> Callable[[Any, data_lib.Split], dict[str, float]]:
  """Makes what a finished network is judged by: its evaluation, and BLEU."""
  evaluate = make_evaluator(c, model, dataset, mesh)
  return translate.make_score(evaluate, model, dataset)


def make_recalibrator(
  c: Forward, model: Any, dataset: data_lib.Dataset, mesh: Mesh
) -> Callable[[Any], Any]:
  """Returns recalibrate(variables) -> variables with their own statistics.

  Without batch_stats, variables come back as they are.
  """
  recalibrate = make_recalibrate(
    model,
    preprocess=dataset.preprocess,
    batch_size=min(c.micro_batch, len(dataset.train)),
    examples=c.batch_norm_examples,
    mesh=mesh,
  )

  def with_statistics(variables: Any) -> Any:
    if "batch_stats" not in variables:
      return variables
    return variables | {"batch_stats": recalibrate(variables, dataset.train)}

  return with_statistics


# ---------------------------------------------------------------------------
# A training run
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
  """What a config describes, built: what an epoch needs, and no config.

  Attributes:
    mesh: the devices.
    placement: where parameters lie on them.
    dataset: its splits, in host memory.
    facts: about the data set.
    model: the Flax module.
    layers: {path: LayerSpec} of the model.
    dense: cost of the dense network.
    method: what config.method stands for.
    clock: how long the phases are, in steps.
    steps_per_dispatch: steps a call of the device.
    periods: steps from one log, evaluation, ... to the next.
    macs_per_example: of a step, in MACs of a forward pass.
    taught: whether a step of a level trains the largest one, too.
    initial: () -> (dense params, batch_stats) to start from.
    new_state: (optimizer, params, batch_stats, ranks) -> TrainState at step 0.
    feed: () -> what gives each step its data; to be closed.
    optimizer: steps of discover -> (learning rate's schedule, optimizer).
    program: (phase, steps of discover, steps) -> compiled steps; of a level, if
      one is given, see `training.levels`.
    level: step -> the level that a nested network trains in it.
    evaluate: (variables, split) -> metrics.
    score: the same of a finished network, with what is slow to find out.
    recalibrate: variables -> variables with batch statistics of their own.
    judge: how many training examples -> (variables -> their loss).
  """

  mesh: Mesh
  placement: Placement
  dataset: data_lib.Dataset
  facts: Facts
  model: Any
  layers: Mapping[str, LayerSpec]
  dense: Cost
  method: methods.Bound
  clock: Clock
  steps_per_dispatch: int
  periods: Periods
  macs_per_example: int
  taught: bool
  initial: Callable[[], tuple[Tree, Tree]]
  new_state: Callable[..., TrainState]
  feed: Callable[[], Feed]
  optimizer: Callable[
    [int], tuple[Callable[[int], Any], optax.GradientTransformation]
  ]
  program: Callable[..., Callable]
  level: Callable[[int], int]
  evaluate: Evaluate
  score: Callable[[Tree, data_lib.Split], dict[str, float]]
  recalibrate: Callable[[Tree], Tree]
  judge: Callable[[int], Callable[..., float]]


def check(c: Config, devices: Sequence[Any] | None = None) -> None:
  """Checks what needs no data: devices, the method's pieces, the optimizer.

  Raises:
    UserError: names the key.
  """
  if c.deterministic:
    compiler.use_deterministic_ops()
  make_mesh(c.mesh, devices)
  methods.check(c.method, settings(c))
  periods_of(c, clock_of(c, 1))
  for name in PHASES:  # whether a warm-up fits, only the data can tell
    if length_of(c, name).value:
      schedules.bind(name, getattr(c, name).schedule)
  optim.make(c.optimizer, optax.constant_schedule(0.0), {})


def make_training(
  c: Config,
  devices: Sequence[Any] | None = None,
  dataset: data_lib.Dataset | None = None,
) -> Training:
  """Builds what a config describes, of what is there or what is given.

  Raises:
    UserError: a section does not fit, or data is missing or damaged.
  """
  mesh, dataset = make_mesh(c.mesh, devices), dataset or data_lib.make(**c.data)
  facts = Facts.of(dataset)
  model = make_model(c, facts)
  _check_fit(c, model, facts, dataset.train.targets)
  layers = nn.layers(model, facts.example)
  n = _steps_per_epoch(c, len(dataset.train), batch_devices(mesh))
  clock = clock_of(c, n)
  _schedule(c, clock)  # tells a warm-up that does not fit
  shapes = jax.eval_shape(model.init, jax.random.key(0), facts.example)
  dense = count_cost(layers, shapes["params"])
  placement = Placement(mesh, layers, c.placement)
  placement.check(shapes["params"])
  random = functools.partial(start.random, c.seed, model, facts.example)
  evaluate = make_evaluator(c, model, dataset, mesh)
  method = methods.bind(
    c.method,
    settings(c),
    Subject(
      model=model,
      layers=layers,
      dense=dense,
      shapes=shapes["params"],
      initial=lambda: random()[0],
      batches=functools.partial(batches, dataset),
      key=streams.stream(c.seed, "factors"),
      calibration=streams.stream(c.seed, "calibration"),
      classifies=facts.num_classes is not None,
    ),
  )

  @functools.cache
  def optimizer(discover: int):
    schedule = _schedule(c, clock, discover)
    tx = optim.make(c.optimizer, schedule, layers)
    return schedule, method.optimizer(tx, schedule, discover)

  @functools.cache
  def program(
    phase: str, discover: int, steps: int, level: Level | None = None
  ) -> Callable:
    step = make_step(
      model,
      optimizer(discover)[1],
      loss=c.loss,
      preprocess=dataset.preprocess,
      sampler=method.samplers[phase],
      batch_size=c.batch_size,
      steps_per_epoch=clock.steps_per_epoch,
      lam=method.lams[phase],
      penalty=method.penalty,
      # Before the chain there is nothing to teach.
      full_pass=None if method.nested and phase == "discover" else c.full_pass,
      placement=placement,
      level=level,
      accumulate=c.accumulate,
      remat=c.remat,
      ema=c.ema,
      label_smoothing=c.label_smoothing,
      lengths=dataset.lengths,
    )
    # A context is a decorator, too: within it the step is traced.
    implementation = _implementation(method.samplers[phase], mesh)
    prefer = ops.prefer(implementation, mesh=mesh, rows=BATCH)
    return make_dispatch(prefer(step), steps)

  return Training(
    mesh=mesh,
    placement=placement,
    dataset=dataset,
    facts=facts,
    model=model,
    layers=layers,
    dense=dense,
    method=method,
    clock=clock,
    steps_per_dispatch=_dispatch_size(c, dataset, n, mesh),
    periods=periods_of(c, clock),
    # A backward pass is taken as two forward passes.
    macs_per_example=6 if c.full_pass and not method.nested else 3,
    taught=bool(c.full_pass and method.nested),
    initial=(
      functools.partial(_stored, c.init_from, model, facts, layers, shapes)
      if c.init_from
      else random
    ),
    new_state=functools.partial(
      new_state, c.seed, c.loss, averages=c.ema is not None
    ),
    feed=functools.partial(make_feed, dataset, c.seed, clock, mesh),
    optimizer=optimizer,
    program=program,
    level=levels.draws(
      c.seed,
      method.nested.options.shares if method.nested else (1.0,),
      clock.steps_per_epoch,
    ),
    evaluate=evaluate,
    score=translate.make_score(evaluate, model, dataset),
    recalibrate=make_recalibrator(c, model, dataset, mesh),
    judge=lambda examples: make_judge(
      model,
      loss=c.loss,
      preprocess=dataset.preprocess,
      split=dataset.train,
      examples=examples,
      seed=c.seed,
    ),
  )


def _stored(
  source: str,
  model: Any,
  facts: Facts,
  layers: Mapping[str, LayerSpec],
  shapes: Tree,
) -> tuple[Tree, Tree]:
  """Dense params, and batch_stats, of a file or of another run's workdir."""
  if source.endswith(stored.SUFFIX):
    return stored.read(source, model, facts.example, layers)
  return start.trained(source, layers, shapes["params"])


# What a network raises of inputs that are not for it.
_UNFIT = (AttributeError, IndexError, TypeError, ValueError, FlaxError)


def _check_fit(c: Config, model: Any, facts: Facts, wanted: Any) -> None:
  """Raises unless a model takes a data set's inputs and predicts its targets.

  A row of labels is predicted one by one, a class or a vector as a whole.
  """
  names = targets.shown(c.model, "config.model")
  inputs = f"{facts.input_dtype}{list(facts.input_shape)}"
  remedy = f"choose another, or other data than {facts.data!r}"
  try:
    y = jax.eval_shape(
      functools.partial(_trained, model), jax.random.key(0), facts.example
    )
  except UserError:  # of an option, which it names
    raise
  except _UNFIT as error:
    text = str(error).strip().partition("\n")[0]
    raise ConfigError(
      f"{names} does not take inputs {inputs} of an example ({text}); {remedy}"
    ) from error
  shape = (1, *wanted.shape[1:])
  if facts.num_classes is not None:
    shape = (*shape, facts.num_classes)
  if getattr(y, "shape", None) != shape:
    found = list(y.shape[1:]) if hasattr(y, "shape") else type(y).__name__
    raise ConfigError(
      f"{names} makes {found} of an example, {inputs}, where the targets need"
      f" {list(shape[1:])}; {remedy}"
    )


def _trained(model: Any, key: jax.Array, x: jax.Array) -> Any:
  """What a model makes in training of what training keeps of its variables."""
  variables = model.init(key, x)
  kept = {k: v for k, v in variables.items() if k in ("params", "batch_stats")}
  told, rngs = nn.mode(model, train=True), {"dropout": key}
  return model.apply(kept, x, **told, rngs=rngs, mutable=["batch_stats"])[0]


def settings(c: Config) -> methods.Settings:
  """What the rest of a config says to its method."""
  phases = {name: getattr(c, name) for name in PHASES}
  return methods.Settings(
    rules=c.rules,
    samplers={name: phase.sampler for name, phase in phases.items()},
    lams={name: phase.lam for name, phase in phases.items()},
    lasso=c.lasso,
    lasso_cost=c.lasso_cost,
    threshold=c.threshold,
    momentum=c.optimizer.get("momentum") or 0.0,
  )


def _schedule(
  c: Config, clock: Clock, end: int | None = None
) -> optax.Schedule:
  sections = {name: getattr(c, name).schedule for name in PHASES}
  return schedules.make(sections, clock, end)


def _steps_per_epoch(c: Config, n: int, devices: int) -> int:
  if c.batch_size > n:
    raise ConfigError(
      f"config.batch_size: {c.batch_size} is larger than the training split of"
      f" ({targets.shown(c.data, 'config.data')}), {n} examples"
    )
  if c.batch_size % devices:
    nearest = _nearest(c.batch_size, devices)
    raise ConfigError(
      f"config.batch_size: {c.batch_size} cannot be split over {devices}"
      f" devices; {nearest} can, or change config.mesh"
    )
  if c.micro_batch % devices:
    nearest = _nearest(c.batch_size, devices * c.accumulate)
    raise ConfigError(
      f"config.accumulate: micro-batches of {c.micro_batch}, of {c.accumulate}"
      f" a batch, cannot be split over {devices} devices; with"
      f" config.batch_size={nearest} they can, or change config.mesh"
    )
  return n // c.batch_size


def _nearest(size: int, devices: int) -> int:
  """The multiple of a number of devices that is nearest to a batch size."""
  return max(round(size / devices), 1) * devices


def _dispatch_size(
  c: Config, dataset: data_lib.Dataset, steps_per_epoch: int, mesh: Mesh
) -> int:
  """1 where loops are slow; else a divisor, for one program a phase."""
  if dataset.stream is not None:
    if c.steps_per_dispatch not in (None, 1):
      raise ConfigError(
        f"config.steps_per_dispatch: {c.steps_per_dispatch} steps cannot go in"
        f" one dispatch, as batches of {dataset.name!r} come one by one; leave"
        " it out"
      )
    return 1
  if c.steps_per_dispatch is not None:
    return c.steps_per_dispatch
  if unrolls(mesh):
    return 1
  return max(k for k in range(1, 17) if steps_per_epoch % k == 0)


def _implementation(sampler: Callable, mesh: Mesh) -> str:
  """Of products: one whose cost follows the ranks, where all fall in a step.

  Layers that are divided over devices are left to XLA.
  """
  function = getattr(sampler, "func", sampler)
  if function is not sampling.independent or mesh.shape["model"] > 1:
    return "xla"
  return ops.follows_rank(mesh.devices.flat[0].platform, mesh.size)


def batches(dataset: data_lib.Dataset, examples: int) -> Iterable[jax.Array]:
  """Preprocesses a fixed choice of training examples.

  Texts come by length, each batch cut to the least of the lengths that holds
  it: what layers see is little padding.
  """
  split = dataset.train
  order = data_lib.choice(0, len(split))[:examples]
  size = 64 if losses.of_tokens(split.targets) else 256
  longest = None
  if dataset.lengths is not None:
    longest = example_lengths(split)
    order = order[np.argsort(longest[order], kind="stable")]
  for first in range(0, len(order), size):
    rows = np.sort(order[first : first + size])
    x = split.inputs[rows]
    if dataset.lengths is not None and longest is not None:
      n = dataset.lengths[np.searchsorted(dataset.lengths, longest[rows].max())]
      x = x[..., :n]
    yield dataset.preprocess(jnp.asarray(x))
