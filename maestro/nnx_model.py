"""A model of `flax.nnx` as a Linen module, whose layers run on factors.

  model = maestro.factored(net)  # net: nnx.Module
  layers = maestro.layers(model, x)
  params = model.init(key, x)["params"]  # those that net has
  params = maestro.decompose(params, [maestro.Rule()], layers)

Each call merges a copy of the model, in which every variable has the value that
Linen's collections hold, and every layer that can be factored is called as the
layer of `maestro.nn` at its path. So all that reads a Linen model reads this
one, and the model itself is not changed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as linen
import jax
import numpy as np
from flax import nnx
from flax.core import Scope
from flax.nnx.nn import dtypes

from maestro import nn as lowrank_nn
from maestro.trees import LowRankError

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
  """Holds a model for a Linen module, which would look into it otherwise."""

  module: nnx.Module


def mirror(model: nnx.Module) -> "Mirror":
  """Returns a Linen module that runs a model on variables from outside.

  Raises:
    LowRankError: the model is no nnx.Module, or cannot be called.
  """
  if not isinstance(model, nnx.Module) or not callable(model):
    raise LowRankError(
      "factored() takes an nnx.Module that can be called, got a"
      f" {type(model).__name__}"
    )
  return Mirror(Net(model))


class Mirror(linen.Module):
  """Runs an nnx model on Linen's variables: made by `maestro.factored`.

  `init` gives the values that the model has; its params and batch_stats mirror
  the attributes of its modules, {"blocks": {"0": {"up": {"kernel": ...}}}}.

  Attributes:
    net: the model.
  """

  net: Net

  @linen.compact
  def __call__(self, *args: Any, train: bool = False, **kwargs: Any):
    """Calls the model.

    Args:
      *args: of the model.
      train: calls `train()` or `eval()` of the model's copy before, whatever
        the model's own mode is; it is an argument of the model, too, if that
        has one of this name.
      **kwargs: of the model.

    Raises:
      LowRankError: the model uses the kernel of a factored layer by itself; or
        it trains on random numbers, and no stream "dropout" of them is given.

    Caches and counts of the model are as they were before each call.
    """
    module, (graph, state) = self.net.module, nnx.split(self.net.module)
    mirrored = _layers(module)
    flat = dict(nnx.to_flat_state(state))
    values = {}
    for path, variable in flat.items():
      if isinstance(variable, nnx.Variable):  # else an array, a constant
        own = self._held if path[:-1] in mirrored else self._hold
        variable = variable.replace(own(path, variable))
      values[path] = variable
    copy = nnx.merge(graph, nnx.from_flat_state(values))
    copy.train() if train else copy.eval()
    if "train" in inspect.signature(type(module).__call__).parameters:
      kwargs["train"] = train
    if train:
      self._check_random(copy)
    found = dict(nnx.iter_graph(copy))
    for path, run in mirrored.items():
      run.into(found[path], self._scope(path), flat)
    if lowrank_nn.BATCH_ALONE.get():
      for node in found.values():
        if isinstance(node, nnx.BatchNorm):
          node.momentum = 0.0
    result = copy(*args, **kwargs)
    self._keep(copy)
    if self.is_initializing():  # those of layers that have run as nnx does, too
      for path, variable in flat.items():
        scope, name = self._scope(path[:-1]), str(path[-1])
        if path[:-1] in mirrored and not scope.has_variable("params", name):
          scope.put_variable("params", name, variable[...])
    return result

  def _scope(self, path: Path) -> Scope:
    scope = self.scope
    assert scope is not None
    for name in path:
      scope = scope.push(str(name), reuse=True)
    return scope

  def _held(self, path: Path, variable: Any) -> Any:
    """The value of a layer's own variable, if it is dense."""
    held = self._scope(path[:-1]).get_variable("params", str(path[-1]))
    return variable[...] if held is None else held

  def _hold(self, path: Path, variable: Any) -> Any:
    """The value of a variable that is no layer's."""
    value, scope = variable[...], self._scope(path[:-1])
    if isinstance(variable, nnx.Param):
      return scope.param(str(path[-1]), lambda _: value)
    if isinstance(variable, nnx.BatchStat):
      name = str(path[-1])
      return scope.variable("batch_stats", name, lambda: value).value
    if isinstance(variable, nnx.RngKey) and self.has_rng("dropout"):
      key = jax.random.key_data(self.make_rng("dropout"))
      key = jax.random.wrap_key_data(key)
      return jax.random.split(key, value.shape) if value.shape else key
    return value

  def _check_random(self, copy: nnx.Module) -> None:
    """Raises if the same random numbers would be drawn in each call."""
    if self.is_initializing() or self.has_rng("dropout"):
      return
    for path, _ in nnx.to_flat_state(nnx.state(copy, nnx.RngKey)):
      raise LowRankError(
        f"{'/'.join(map(str, path))} draws random numbers in training: give"
        ' apply rngs={"dropout": key}'
      )

  def _keep(self, copy: nnx.Module) -> None:
    """Stores what the call has made of statistics, where they may change."""
    if self.is_initializing() or not self.is_mutable_collection("batch_stats"):
      return
    state = nnx.to_flat_state(nnx.state(copy, nnx.BatchStat))
    for path, variable in state:
      scope = self._scope(path[:-1])
      scope.put_variable("batch_stats", str(path[-1]), variable[...])


@dataclasses.dataclass(frozen=True)
class _Layer:
  """How a layer is run: as a class of `maestro.nn` with some options."""

  path: Path
  made: Callable[..., linen.Module]
  weight: str

  def into(self, layer: nnx.Module, scope: Scope, flat: Mapping) -> None:
    """Makes the copy's layer run on what a scope holds."""
    inits = {}
    names = {self.weight: f"{self.weight}_init", "bias": "bias_init"}
    for name, option in names.items():
      if (variable := flat.get((*self.path, name))) is not None:
        inits[option] = functools.partial(_value, variable[...])
    if scope.has_variable("params", "u"):
      delattr(layer, self.weight)
    ran: Any = layer
    layer.__class__ = _RUNS[type(layer)]
    ran.run_as = self.made(parent=scope, **inits)
    ran.runs = _Run("/".join(map(str, self.path)), _raw(layer, self.weight))


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
  """What a layer of a copy is.

  Attributes:
    path: of the layer.
    held: its weight as it went in; the model may have changed it since.
  """

  path: str
  held: Any


def _raw(layer: nnx.Module, weight: str) -> Any:
  """The array of a layer's weight; None if it is factored."""
  variable = vars(layer).get(weight)
  return None if variable is None else variable.get_value()


def _running(base: Any, weight: str = "kernel") -> Any:
  """The subclass of a layer's class that runs as the layer of `maestro.nn`.

  Unless the model has changed its weight (by a norm of it, or within one of
  nnx's transforms, where it is another array): then as nnx does.
  """

  class Layer(base):
    run_as: Any
    runs: _Run

    def __call__(self, inputs, *args, **kwargs):
      if _raw(self, weight) is self.runs.held:
        return self.run_as(inputs)
      return super().__call__(inputs, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
      if name != weight:
        raise AttributeError(f"{base.__name__} has no attribute {name!r}")
      raise LowRankError(
        f"layer {self.runs.path!r}: the model reads its {name!r} outside of the"
        " layer, and it is factored; leave it dense by"
        f" Rule({self.runs.path!r}, decompose=False)"
      )

  return Layer


class _Embed(_running(nnx.Embed, "embedding")):
  def attend(self, query, *args, **kwargs):
    if _raw(self, "embedding") is self.runs.held:
      return self.run_as.attend(query)
    return super().attend(query, *args, **kwargs)


_RUNS = {
  nnx.Linear: _running(nnx.Linear),
  nnx.LinearGeneral: _running(nnx.LinearGeneral),
  nnx.Conv: _running(nnx.Conv),
  nnx.Embed: _Embed,
}


def _value(value: jax.Array, key: Any, shape: Any, dtype: Any) -> jax.Array:
  del key, shape, dtype
  return value


def _layers(module: nnx.Module) -> dict[Path, _Layer]:
  """The layers that are run as those of `maestro.nn`, by their paths.

  Subclasses, layers that are given another product, and such whose parameters
  are stacked stay what they are.
  """
  found = {}
  for path, layer in nnx.iter_graph(module):
    if type(layer) in _RUNS and (made := _made(layer)) is not None:
      weight = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
      found[path] = _Layer(path, made, weight)
  return found


def _made(layer: Any) -> Callable[..., linen.Module] | None:
  """Makes a layer's counterpart; None if there is none."""
  common = {"dtype": layer.dtype, "param_dtype": layer.param_dtype}
  if isinstance(layer, nnx.Embed):
    shape = (layer.num_embeddings, layer.features)
    if layer.embedding.shape != shape or not _plain(layer):
      return None
    return functools.partial(lowrank_nn.Embed, *shape, **common)
  common |= {"precision": layer.precision, "use_bias": layer.use_bias}
  if isinstance(layer, nnx.Linear):
    shape = (layer.in_features, layer.out_features)
    if layer.kernel.shape != shape or not _plain(layer):
      return None
    return functools.partial(lowrank_nn.Dense, shape[1], **common)
  if isinstance(layer, nnx.LinearGeneral):
    shape = (*layer.in_features, *layer.out_features)
    if layer.batch_axis or layer.kernel.shape != shape or not _plain(layer):
      return None
    return functools.partial(
      lowrank_nn.DenseGeneral, layer.out_features, layer.axis, **common
    )
  if layer.kernel.shape != layer.kernel_shape or not _plain(layer):
    return None
  return functools.partial(
    lowrank_nn.Conv,
    layer.out_features,
    layer.kernel_size,
    layer.strides,
    layer.padding,
    input_dilation=layer.input_dilation,
    kernel_dilation=layer.kernel_dilation,
    feature_group_count=layer.feature_group_count,
    mask=None if layer.mask is None else np.asarray(layer.mask),
    **common,
  )


def _plain(layer: Any) -> bool:
  """Whether a layer multiplies and promotes as the others of its class do."""
  own = {
    "dot_general": jax.lax.dot_general,
    "conv_general_dilated": jax.lax.conv_general_dilated,
    "promote_dtype": dtypes.promote_dtype,
    "dot_general_cls": None,
    "preferred_element_type": None,
  }
  return all(getattr(layer, k, None) in (None, v) for k, v in own.items())
