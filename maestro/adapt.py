"""Runs an unmodified Flax Linen model on factors, by intercepting its layers.

  model = maestro.factored(model)
  layers = maestro.layers(model, x)
  params = maestro.decompose(params, [maestro.Rule()], layers)
  y = model.apply({"params": params, "ranks": ranks}, x)

Within the calls of such a model, a layer of `flax.linen` whose parameters hold
`u` and `v` computes as the layer of `maestro.nn` of the same name; one that
holds a kernel is run as it is. On its way in, each rank joins the parameters of
its layer. So a rank is stacked, sliced, shared and recomputed as they are, by
whatever transform the model uses, and no transform has to name it.
"""

import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict, freeze
from flax.errors import ScopeParamNotFoundError

from maestro import nn as lowrank_nn
from maestro import trees
from maestro.nn import RANK, path_of, stays_dense
from maestro.trees import LowRankError


def _function(method: Any) -> Callable:
  """What is written in the class, without Flax's handling of its state."""
  return method.__wrapped__


# What runs in the place of a method of Flax's: (module, that method, *inputs).
_RUNS: dict[Callable, Callable] = {
  _function(nn.Dense.__call__): lowrank_nn.dense,
  _function(nn.DenseGeneral.__call__): lowrank_nn.dense_general,
  _function(nn.Conv.__call__): lowrank_nn.conv,
  _function(nn.Embed.setup): lowrank_nn.embed_setup,
  _function(nn.Embed.__call__): lowrank_nn.embed,
  _function(nn.Embed.attend): lowrank_nn.attend,
}
_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Embed)
_OURS = (
  lowrank_nn.Dense,
  lowrank_nn.DenseGeneral,
  lowrank_nn.Conv,
  lowrank_nn.Embed,
)


def factored(model: Any) -> Any:
  """Returns a model like `model`, which runs on decomposed parameters.

  Its parameters, arguments, methods and results are those of `model`, which is
  not changed. With variables {"params": p, "ranks": r}, it is the same function
  as `model` with the parameters `merge(mask(p, r), layers)`, and gradients
  beyond a rank are zero. Ranks may be traced. Without factors, it is `model`,
  up to the rounding of an `OptimizedLSTMCell`, which runs as the `LSTMCell` of
  the same parameters, so that its eight layers are layers.

  `maestro.layers` of the result lists what can be factored. Of a bound result,
  call methods, not submodules: `bound.encoder(x)` does not know of factors,
  `model.apply(variables, x, method=lambda m, x: m.encoder(x))` does.

  Args:
    model: a Flax Linen module that is not bound, or a class of such, to be
      made within another module: `maestro.factored(Block)(features=4)`. Or an
      `nnx.Module`, which becomes a Linen module, see `maestro.nnx_model`.

  Raises:
    LowRankError: `model` is something else, or of a class that was made of a
      factored one. When called: a rank names a layer without factors, or does
      not fit it; or a layer that is called, or a parameter that is read outside
      of its layer, is factored, and what the model does with it cannot be
      followed; says by which rule it stays dense.
  """
  if inspect.isclass(model) and issubclass(model, nn.Module):
    return _class_of(model)
  if not isinstance(model, nn.Module):
    if any(c.__module__.startswith("flax.nnx.") for c in type(model).__mro__):
      from maestro import nnx_model  # imported where it is used

      net: Any = model
      return nnx_model.mirror(net)
    raise LowRankError(
      "factored() takes a Flax Linen module or its class, or an nnx.Module, got"
      f" a {type(model).__name__}"
    )
  if model.scope is not None or isinstance(model.parent, nn.Module):
    raise LowRankError(
      f"factored() takes a module that belongs to no other, and this"
      f" {type(model).__name__} has a parent; within a module, wrap the class:"
      f" maestro.factored({type(model).__name__})(...)"
    )
  return _remade(type(model), _fields(model))


def _fields(model: nn.Module) -> dict[str, Any]:
  return {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.init and field.name != "parent"
  }


def _remade(cls: type[nn.Module], fields: Mapping[str, Any]) -> nn.Module:
  return _class_of(cls)(parent=None, **fields)


# On a class, what was made of it; on that, what it was made of. So the two live
# as long as each other, which they would not in a cache.
_MADE, _MADE_OF = "_maestro_factored", "_maestro_factored_of"


def _class_of(cls: type[nn.Module]) -> type[nn.Module]:
  """Returns the subclass that runs on factors: one for each class."""
  if _MADE_OF in vars(cls):
    return cls
  if (plain := getattr(cls, _MADE_OF, None)) is not None:
    raise LowRankError(
      f"{cls.__name__} is a subclass, or a transform, of a class that is"
      " factored already, and its own methods would not be: make it of"
      f" {plain.__name__} as it was, and call factored() on what results"
    )
  if _MADE not in vars(cls):
    made = _make_class(cls)
    setattr(made, _MADE_OF, cls)
    setattr(cls, _MADE, made)
  return vars(cls)[_MADE]


def _make_class(cls: type[nn.Module]) -> type[nn.Module]:
  """Makes the subclass, each method of which is mapped and then intercepted."""

  # Positional-only, as the user's own arguments may have these names.
  def call_on_factors(self, function, /, *args, **kwargs):
    return function(self, *args, **kwargs)

  @property
  def variables(self):  # as they were given: ranks are no parameters
    given: Any = super(base, self)
    found = given.variables
    shown = _remove_ranks(found)
    return freeze(shown) if isinstance(found, FrozenDict) else shown

  # Under the name of the class: by it, Flax names modules that have none.
  head = {
    name: getattr(cls, name)
    for name in ("__module__", "__qualname__", "__doc__")
  }
  own = {"call_on_factors": call_on_factors, "variables": variables}
  base = type(cls.__name__, (cls,), {**head, **own})
  names = _methods(base)
  mapped = nn.map_variables(
    base,
    ("params", "ranks"),
    trans_in_fn=_insert_ranks,
    trans_out_fn=_remove_ranks,
    mutable=True,
    methods=names,
  )
  methods = {name: _intercepted(getattr(mapped, name)) for name in names}

  @nn.nowrap
  def apply(self, variables, *args, method=None, **kwargs):
    function = getattr(method, "__func__", method)
    if callable(function) and function not in methods.values():
      # Of the model that was given, or of a module in general.
      method = lambda m, /, *args, **kwargs: m.call_on_factors(  # noqa: E731
        function, *args, **kwargs
      )
    return mapped.apply(self, variables, *args, method=method, **kwargs)

  @nn.nowrap
  def reduce(self, protocol):
    if self.scope is not None or _MADE_OF not in vars(type(self)):
      return object.__reduce_ex__(self, protocol)
    return _remade, (cls, _fields(self))  # no import finds the class itself

  body = {**head, **methods, "apply": apply, "__reduce_ex__": reduce}
  return type(cls.__name__, (mapped,), body)


def _methods(cls: type[nn.Module]) -> list[str]:
  """Names of the methods that a user of the class may call on variables."""
  fields = {field.name for field in dataclasses.fields(cls)}
  own = [
    name
    for name in dir(cls)
    if not hasattr(nn.Module, name) and name not in fields
  ]
  names = [name for name in own if not name.startswith("__")]
  if hasattr(cls, "__call__"):  # noqa: B004 (of its instances)
    names.append("__call__")
  return [
    name
    for name in names
    if inspect.isfunction(method := inspect.getattr_static(cls, name))
    # What Flax does not handle (nn.nowrap) reads no variables.
    and hasattr(method, "__wrapped__")
  ]


# ---------------------------------------------------------------------------
# Ranks among the parameters
# ---------------------------------------------------------------------------


def _insert_ranks(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Puts each rank of the collection `ranks` beside its layer's factors.

  {"params": {"fc": {"u": .., "v": ..}}, "ranks": {"fc": {"rank": 3}}}
  -> {"params": {"fc": {"u": .., "v": .., RANK: 3}}}
  """
  variables = dict(variables)
  ranks = variables.pop("ranks", None)
  if not ranks:
    return variables
  params = variables.get("params", {})
  changes = {
    path: {**(trees.get(params, path) or {}), RANK: jnp.asarray(rank)}
    for path, (_, rank) in trees.paired(params, ranks).items()
  }
  return variables | {"params": trees.replace(params, changes)}


def _remove_ranks(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Inverts `_insert_ranks`."""
  found: dict[str, Any] = {}

  def visit(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    rest = {}
    for name, x in node.items():
      if isinstance(x, Mapping):
        rest[name] = visit(x, f"{path}/{name}" if path else name)
      elif name == RANK:
        found[path] = x
      else:
        rest[name] = x
    return rest

  variables = dict(variables)
  if "params" in variables:
    variables["params"] = visit(variables["params"], "")
  if found:
    variables["ranks"] = trees.unflatten_ranks(found)
  return variables


# ---------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------


_active = contextvars.ContextVar("factored_model_runs", default=False)


def _intercepted(method: Callable) -> Callable:
  @functools.wraps(method)
  def run(self, /, *args, **kwargs):
    if _active.get():  # the model around this one sees its layers
      return method(self, *args, **kwargs)
    calls = _Calls()
    token = _active.set(True)
    try:
      with nn.intercept_methods(calls.intercept):
        y = method(self, *args, **kwargs)
    except (AttributeError, KeyError) as error:
      calls.explain(error, self)
      raise
    finally:
      _active.reset(token)
    calls.check()
    return y

  return run


def _lstm(module: nn.Module, call: Callable, *args: Any, **kwargs: Any) -> Any:
  """Runs an OptimizedLSTMCell, which joins kernels, as an LSTMCell."""
  del call
  return _function(nn.LSTMCell.__call__)(module, *args, **kwargs)


class _Calls:
  """The layers that hold factors within one call of a model.

  Attributes:
    called: {path: name of the class} of those of which a method was called.
    read: paths of those that computed with their factors.
    tables: paths of embeddings that have factors in the place of a table.
  """

  def __init__(self):
    self.called: dict[str, str] = {}
    self.read: set[str] = set()
    self.tables: set[str] = set()

  def intercept(self, next_call, args, kwargs, context):
    module = context.module
    function: Any = getattr(context.orig_method, "func", None)
    if function is _function(nn.OptimizedLSTMCell.__call__):
      return _lstm(module, next_call, *args, **kwargs)
    if module.scope is None or isinstance(module, _OURS):
      return next_call(*args, **kwargs)
    ours = isinstance(module, _LAYERS) and lowrank_nn.is_factored(module)
    if not ours and not module.has_variable("params", RANK):
      return next_call(*args, **kwargs)
    path, name = path_of(module), type(module).__name__
    setup = context.method_name == "setup"
    if module.is_initializing():
      raise LowRankError(
        f"layer {path!r}: {name} has a parameter `u` of its own, for which"
        " factors would be mistaken; give it another name"
      )
    if setup:
      if not module.has_variable("params", "embedding"):
        self.tables.add(path)
    else:
      self.called[path] = name
    run = _RUNS.get(function) if ours else None
    try:
      if run is None:
        return next_call(*args, **kwargs)
      y = run(module, next_call, *args, **kwargs)
    except ScopeParamNotFoundError as error:
      raise _unread(path, name) from error
    if not setup:
      self.read.add(path)
    return y

  def check(self) -> None:
    """Raises if a layer was called that does not know of its factors."""
    for path in sorted(self.called.keys() - self.read):
      raise _unread(path, self.called[path])

  def explain(self, error: Exception, module: nn.Module) -> None:
    """Raises a better error for a weight that is read outside of its layer."""
    if isinstance(error, KeyError) and error.args[:1] in (
      ("kernel",),
      ("embedding",),
    ):
      (name,) = error.args[:1]
      paths = self.tables
      if name == "kernel":
        paths = _without_kernel(module) - self.tables
      if paths := sorted(paths):
        raise LowRankError(
          f"the model reads {name!r} out of the parameters of a layer that"
          f" holds factors instead, one of {paths}; for the first,"
          f" {stays_dense(paths[0])}"
        ) from error
    elif '"embedding"' in str(error) and self.tables:
      path, *_ = sorted(self.tables)
      raise LowRankError(
        f"layers {sorted(self.tables)}: the model reads the table of an"
        " embedding outside of the layer, where it holds factors instead; let"
        f" it call `attend`, or {stays_dense(path)}"
      ) from error


def _without_kernel(module: nn.Module) -> set[str]:
  """Paths of the layers in a bound module that hold factors alone."""
  params = module.variables.get("params", {})
  nodes = trees.walk(params, path_of(module))
  return {path for path, node in nodes if "kernel" not in node}


def _unread(path: str, name: str) -> LowRankError:
  return LowRankError(
    f"layer {path!r}: {name} computes in its own way and does not read the"
    f" factors that its parameters hold; {stays_dense(path)}"
  )
