"""A run without its data and devices: states as shapes, programs compiled.

What a program takes can be read from it before there is anything to run it on.
The program is the loop's own: `build.make_training` makes it, of the sizes of a
data set and of devices that may not be there.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maestro import data as data_lib
from maestro import lowrank, trees
from maestro.lowrank import Rule
from maestro.methods.decomposers import DECOMPOSERS
from maestro.methods.table import METHODS
from maestro.ops.cpu import tracing_for
from maestro.parallel.mesh import BATCH, batch_devices
from maestro.training import build, levels
from maestro.training.build import Training
from maestro.training.config import Config
from maestro.training.levels import Level
from maestro.training.rounds import dispatch_size
from maestro.training.state import TrainState
from maestro.trees import Tree

SHARES = (1.0, 0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class Form:
  """A form in which a network trains.

  Attributes:
    name: "dense", or "factored" and which part of the full ranks.
    share: that part, rounded up in each layer; None if dense.
    trained: whether the config's own run has steps in this form; the ranks that
      it comes to in training are not known before, and are taken for full.
  """

  name: str
  share: float | None
  trained: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Abstract:
  """One program of a run, and what it is given, as shapes on devices.

  Attributes:
    training: the run.
    state: TrainState of jax.ShapeDtypeStruct with shardings.
    data: what a step takes, likewise.
    program: the loop's compiled steps, (state, data) -> (state, losses).
    steps: that it makes.
    platform: of the devices.
  """

  training: Training
  state: TrainState
  data: dict[str, jax.ShapeDtypeStruct]
  program: Any
  steps: int
  platform: str

  def lower(self) -> Any:
    """Lowers the program, as it goes to the compiler of its platform."""
    with tracing_for(self.platform):
      return self.program.lower(self.state, self.data)

  @property
  def batch_bytes(self) -> int:
    """Of a preprocessed batch and its targets, on each device."""
    x, y = self.training.facts.example, self.data["targets"]
    one = math.prod(x.shape) * x.dtype.itemsize
    one += math.prod(y.shape[1:]) * y.dtype.itemsize
    size = self.training.clock.batch_size
    return one * size // batch_devices(self.training.mesh)


def forms(c: Config) -> list[Form]:
  """Dense, and factored at parts of the ranks, for a config's method."""
  found = [Form("dense", None, c.method.decompose != "start")]
  factors = c.method.decompose in ("start", "settle")
  own = 1.0
  if c.method.ranks.get("name") == "fraction":
    own = float(c.method.ranks.get("fraction", 1.0))
  for share in sorted({*SHARES, own}, reverse=True):
    name = f"factored, {share:g} of the ranks"
    found.append(Form(name, share, factors and share == own))
  return found


def training_of(c: Config, form: Form, devices: Sequence[Any]) -> Training:
  """Builds a run in which a form trains, on devices that need not be there.

  That is the config's own, where its method trains that form; else the same
  recipe by the method "dense", or "fixed" for factors.

  Raises:
    UserError: names the key that does not fit.
  """
  m = c.method
  if form.share is None and m.decompose == "start":
    m = METHODS["dense"]
  elif form.share is not None and m.decompose not in ("start", "settle"):
    m = METHODS["fixed"]
  c = dataclasses.replace(c, method=m, init_from=None)  # of the same shapes
  build.check(c, devices)
  return build.make_training(c, devices, data_lib.outline(**c.data))


def abstract(c: Config, form: Form, devices: Sequence[Any]) -> Abstract:
  """Builds the program that trains a form.

  Args:
    c: the config, whose mesh is over `devices`.
    form: of `forms`.
    devices: from `parallel.topology`, or those that are there.

  Raises:
    UserError: names the key that does not fit.
  """
  t = training_of(c, form, devices)
  phase, level = _phase(t, form), None
  params, stats = jax.eval_shape(t.initial)
  _, tx = t.optimizer(t.clock.discover)
  ranks, chain, controls = {}, {}, {}
  if form.share is not None:
    nested = t.method.nested
    stored = 1.0 if nested else form.share
    params = _factored(c, t, params, stored)
    ranks = jax.eval_shape(
      functools.partial(lowrank.full_ranks, layers=t.layers), params
    )
    if t.method.controller is not None:
      controls = dict.fromkeys(("lam", "force"), _struct((), np.float32))
    if nested is not None:
      profiles = [_profile(t, c, share) for share in SHARES]
      chain = jax.eval_shape(
        lambda stats: levels.stacked(profiles, stats, t.layers), stats
      )
      level = _level(t, profiles, form.share)
  state = jax.eval_shape(
    functools.partial(t.new_state, tx),
    *(params, stats, ranks, chain, controls),
  )
  steps = 1 if level is not None else dispatch_size(t, 0, t.clock.total)
  return Abstract(
    training=t,
    state=_placed(state, t.placement.shardings(state, state.params)),
    data=_data(t),
    program=t.program(phase, t.clock.discover, steps, level),
    steps=steps,
    platform=t.mesh.devices.flat[0].platform,
  )


def _phase(t: Training, form: Form) -> str:
  if form.share is not None and t.method.decompose_at == "settle":
    return "settle"
  return "discover" if t.clock.discover else "settle"


def _profile(t: Training, c: Config, share: float) -> dict[str, int]:
  """Ranks of the layers that the config selects, rounded up."""
  chosen = lowrank.resolve(c.rules, t.layers)
  return {
    path: max(math.ceil(share * rank), 1)
    for path, rank in chosen.items()
    if rank is not None
  }


def _factored(c: Config, t: Training, params: Tree, share: float) -> Tree:
  profile = _profile(t, c, share)
  rules = [Rule(re.escape(path), rank) for path, rank in profile.items()]
  how = lowrank.decompose
  if c.method.decomposer.get("name") == "adapter":  # which keeps the kernels
    how = functools.partial(
      DECOMPOSERS["adapter"], moments=None, key=jax.random.key(0)
    )
  return jax.eval_shape(lambda p: how(p, rules, t.layers), params)


def _level(t: Training, profiles: Sequence[dict], share: float) -> Level:
  ranks = {
    path: np.full(t.layers[path].lead, rank, np.int32)
    for path, rank in profiles[SHARES.index(share)].items()
  }
  return Level(SHARES.index(share), trees.unflatten_ranks(ranks))


def _data(t: Training) -> dict[str, jax.ShapeDtypeStruct]:
  """What a step takes: see `training.feed`."""
  split, n = t.dataset.train, len(t.dataset.train)
  if t.dataset.stream is not None:
    n, parts = t.clock.batch_size, NamedSharding(t.mesh, PartitionSpec(BATCH))
    shapes = {
      "inputs": _struct((n, *split.inputs.shape[1:]), split.inputs.dtype),
      "targets": _struct((n, *split.targets.shape[1:]), split.targets.dtype),
    }
    return _placed(shapes, dict.fromkeys(shapes, parts))
  whole = NamedSharding(t.mesh, PartitionSpec())
  shapes = {
    "inputs": _struct(split.inputs.shape, split.inputs.dtype),
    "targets": _struct(split.targets.shape, split.targets.dtype),
    "order": _struct((n,), np.int32),
  }
  return _placed(shapes, dict.fromkeys(shapes, whole))


def _struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
  dtype = jax.dtypes.canonicalize_dtype(dtype)
  return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _placed(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=s, weak_type=getattr(x, "weak_type", False)
    ),
    tree,
    shardings,
  )
