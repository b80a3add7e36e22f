"""Reads a Flax model by intercepting the calls of its layers."""

import contextlib
import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from flax.errors import FlaxError

from maestro import trees
from maestro.nn import (
  BATCH_ALONE,
  general_axes,
  path_of,
  recording,
  window_of,
)
from maestro.products import products
from maestro.trees import LayerSpec, LowRankError


def mode(model: Any, *, train: bool) -> dict[str, bool]:
  """Returns the arguments by which a model is told whether it trains.

    {"train": train}  or  {"deterministic": not train}  or  {}

  as its `__call__` names them; one that names none does the same in both.
  """
  named = inspect.signature(type(model).__call__).parameters
  known = {"train": train, "training": train, "deterministic": not train}
  return {name: value for name, value in known.items() if name in named}


@contextlib.contextmanager
def batch_statistics() -> Iterator[None]:
  """Makes batch norm store the statistics of the batch alone.

  Within it, the `batch_stats` that a model applied with train=True returns are
  those of its batch, not a moving average, whatever each layer's momentum is.
  """

  def intercept(next_call, args, kwargs, context):
    module = context.module
    if not isinstance(module, nn.BatchNorm):
      return next_call(*args, **kwargs)
    momentum = module.momentum
    object.__setattr__(module, "momentum", 0.0)  # modules are frozen
    try:
      return next_call(*args, **kwargs)
    finally:
      object.__setattr__(module, "momentum", momentum)

  token = BATCH_ALONE.set(True)
  try:
    with nn.intercept_methods(intercept):
      yield
  finally:
    BATCH_ALONE.reset(token)


@contextlib.contextmanager
def at_most(most: float) -> Iterator[None]:
  """Stops a model that has more modules than so many, by a ValueError."""
  modules = set()

  def intercept(next_call, args, kwargs, context):
    modules.add(context.module.path)
    if len(modules) > most:
      raise ValueError(f"more than {most} modules, for far fewer tensors")
    return next_call(*args, **kwargs)

  with nn.intercept_methods(intercept):
    yield


def spec_of(module: nn.Module, x: jax.Array) -> LayerSpec | None:
  """Describes the kernel of a layer, from its attributes and its input."""
  if isinstance(module, nn.Conv):
    g = module.feature_group_count
    return LayerSpec(
      "conv",
      (*window_of(module), x.shape[-1] // g),
      (module.features // g,),
      groups=(g,) if g > 1 else (),
    )
  if isinstance(module, nn.Embed):
    return LayerSpec("embed", (module.num_embeddings,), (module.features,))
  if isinstance(module, nn.DenseGeneral):
    axis, batch = general_axes(module, x.ndim)
    features = module.features
    return LayerSpec(
      "dense",
      tuple(x.shape[a] for a in axis),
      (features,) if isinstance(features, int) else tuple(features),
      groups=tuple(x.shape[a] for a in batch),
    )
  if isinstance(module, nn.Dense):
    return LayerSpec("dense", (x.shape[-1],), (module.features,))
  return None


def _has_batch(module: nn.Module, x: jax.Array) -> bool:
  """Whether axis 0 of a layer's input can be the batch."""
  if isinstance(module, nn.Conv):
    return x.ndim > len(window_of(module)) + 1
  if isinstance(module, nn.DenseGeneral):
    axis, batch = general_axes(module, x.ndim)
    return 0 not in (*axis, *batch)
  return x.ndim > 1 or isinstance(module, nn.Embed)


@dataclasses.dataclass
class _Use:
  """What a trace of the model tells of one module.

  Attributes:
    spec: of its kernel; None if the module is no layer that can be factored.
    macs: of its own products, as they are run.
    real: of these, without products with zeros put between inputs.
    rows: numbers that it looks up.
    batched: whether all of its inputs can have the batch as axis 0.
    altered: whether its kernel is changed before it is multiplied.
    masked: whether that is by a mask of its own, which its factors have too.
    outside: whether another module multiplies by its kernel, or transposes it.
  """

  spec: LayerSpec | None
  macs: int = 0
  real: int = 0
  rows: int = 0
  batched: bool = True
  altered: bool = False
  masked: bool = False
  outside: bool = False


_MARK = "maestro_use_"


def _uses(model: nn.Module, variables: Any, inputs: Any) -> dict[str, _Use]:
  """Traces a model, {path: what it uses}, in order of use."""
  paths: list[str] = []
  uses: dict[str, _Use] = {}

  def record(next_call, args, kwargs, context):
    module, path = context.module, path_of(context.module)
    if any("/" in name for name in module.path):
      raise LowRankError(
        f"module {path!r}: its name holds a '/', which joins the names of a"
        " path; name it otherwise"
      )
    given: list[Any] = [*args, *kwargs.values(), None]
    x = given[0]
    layer = context.method_name in ("__call__", "attend")
    spec = spec_of(module, x) if layer and hasattr(x, "ndim") else None
    use = uses.setdefault(path, _Use(spec))
    if spec is not None:
      use.spec = use.spec or spec
      use.batched &= _has_batch(module, x)
      # A mask on the kernel is the layer's own, also when it is factored.
      use.masked |= getattr(module, "mask", None) is not None
    paths.append(path)
    with jax.named_scope(f"{_MARK}{len(paths) - 1}."):
      return next_call(*args, **kwargs)

  # Through the interceptor, also a subclass's super().__call__ is seen: the
  # same module within the same call must count once.
  leaves, treedef = jax.tree.flatten(inputs)
  traced = [i for i, x in enumerate(leaves) if hasattr(x, "shape")]

  def apply(variables, arrays):
    whole = list(leaves)  # train=False and the like are no arrays
    for i, x in zip(traced, arrays, strict=True):
      whole[i] = x
    args, kwargs = jax.tree.unflatten(treedef, whole)
    with nn.intercept_methods(outermost(record)):
      return model.apply(
        variables,
        *args,
        **kwargs,
        rngs={"params": jax.random.key(0)},
        mutable=True,
      )

  arrays = [leaves[i] for i in traced]
  kernels = {}
  for i, (path, _) in enumerate(jax.tree.leaves_with_path(variables)):
    names = [str(getattr(k, "key", "")) for k in path]
    if names[0] == "params" and names[-1] in ("kernel", "embedding"):
      kernels[i] = "/".join(names[1:-1])
  tracked = range(len(jax.tree.leaves((variables, arrays))))
  tracked = [i in kernels for i in tracked]
  outside: set[str] = set()
  for product in products(apply, (variables, arrays), tracked):
    marks = re.findall(rf"{_MARK}(\d+)\.", product.scope)
    path = paths[int(marks[-1])] if marks else ""
    use = uses.setdefault(path, _Use(None))
    use.macs += product.macs
    use.real += product.real
    use.rows += product.rows
    use.altered |= path in {kernels[i] for i in product.changed}
    # By another module, which finds no kernel in a factored layer.
    found = product.same | product.moved
    outside.update({kernels[i] for i in found} - {path})
  for path in outside & uses.keys():
    uses[path].outside = True
  return uses


def layers(model: nn.Module, *inputs: Any, **kwargs: Any):
  """Lists the linear maps of a model: {path: LayerSpec}, in order of use.

  Traces the model (nothing is computed) on example inputs, whose first axis is
  the batch. Dense, DenseGeneral, Conv and Embed, of `maestro.nn` or of
  `flax.linen`, can be decomposed; other modules that multiply (transposed
  convolutions, attention's products of activations) are of kind "other".

  What a layer costs is read off the trace: all calls of it, all trips of a
  scan, whatever axis its rows are on. Under `nn.scan` or `nn.vmap` with
  parameters stacked on axis 0, a layer is listed once, with the stacked sizes
  in `stack`.

  Args:
    model: a Flax Linen module.
    *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`s.
    **kwargs: passed on to the model, e.g. train=False.

  Raises:
    LowRankError: parameters are stacked on another axis than 0, or a module's
      name holds a "/".
  """
  variables = jax.eval_shape(
    lambda args: model.init(jax.random.key(0), *args, **kwargs), inputs
  )
  variables = meta.unbox(variables)
  given = jax.tree.map(_abstract, (inputs, kwargs))
  arrays = jax.tree.leaves(inputs)
  n = arrays[0].shape[0] if arrays and getattr(arrays[0], "ndim", 0) else 1
  uses = _uses(model, variables, given)
  one, divide = uses, 1
  if n > 1 and all(use.batched for use in uses.values() if use.spec):
    try:
      example = jax.tree.map(lambda x: _first(x, n), given)
      one = _uses(model, variables, example)
    except (TypeError, ValueError, AssertionError, FlaxError):
      divide = n  # the batch's size is written into the model
  found = {}
  for path, use in uses.items():
    macs, rows = one[path].macs // divide, one[path].rows // divide
    if use.spec is None:
      if real := one[path].real // divide:
        found[path] = LayerSpec("other", (), (), positions=real)
      continue
    spec = _stacked(path, use.spec, variables.get("params", {}))
    if spec is not None:
      size = math.prod(spec.lead) * spec.n_in * spec.n_out
      found[path] = dataclasses.replace(
        spec,
        positions=macs // max(size, 1),
        lookups=rows // max(math.prod(spec.lead) * spec.n_out, 1),
        altered=(use.altered and not use.masked) or use.outside,
      )
  return found


def _abstract(x: Any) -> Any:
  if hasattr(x, "shape") and hasattr(x, "dtype"):
    dtype = x.dtype
    if isinstance(dtype, np.dtype):  # keys have others
      dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(x.shape, dtype)
  return x


def _first(x: Any, n: int) -> Any:
  """The abstract first example of a batch of n."""
  if getattr(x, "shape", ())[:1] != (n,):
    return x
  return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)


def _stacked(path: str, spec: LayerSpec, params: Any) -> LayerSpec | None:
  """Adds the scan axes that a layer's kernel has; None if it has no kernel."""
  node = trees.get(params, path)
  kernel = node.get(spec.weight) if node else None
  if kernel is None:
    return None
  shape = tuple(kernel.shape)
  stack = shape[: len(shape) - len(spec.kernel_shape)]
  if shape != (*stack, *spec.kernel_shape):
    raise LowRankError(
      f"layer {path!r}: its kernel is {shape}, of which {spec.kernel_shape}"
      " was expected to be the last axes; stack scanned parameters on axis 0"
    )
  return dataclasses.replace(spec, stack=stack)


def outermost(interceptor):
  """Hides calls of a module's own method from within that same method."""
  active: list[tuple[int, str]] = []

  def intercept(next_call, args, kwargs, context):
    call = (id(context.module), context.method_name)
    if call in active:
      return next_call(*args, **kwargs)
    active.append(call)
    try:
      return interceptor(next_call, args, kwargs, context)
    finally:
      active.pop()

  return intercept


def check_ranks(
  model: nn.Module, variables: Any, ranks: Any, *inputs: Any, **kwargs: Any
) -> None:
  """Raises if the model would not read one of the ranks, under eval_shape.

  A mistyped path, or `ranks` missing from a scan's `variable_axes`, would
  otherwise run at full rank without a word.

  Raises:
    LowRankError: names the layers whose rank is not read.
  """
  with recording() as read:
    jax.eval_shape(
      lambda v, r, *x: model.apply({**v, "ranks": r}, *x, **kwargs),
      variables,
      ranks,
      *inputs,
    )
  unread = sorted(set(trees.flatten_ranks(ranks)) - read)
  if unread:
    raise LowRankError(
      f"ranks of {unread} are read by no layer, which would run at full rank;"
      " check the path, that the layer is of maestro.nn or the model is"
      " maestro.factored(model), and, without it, that a scan or vmap has"
      ' variable_axes={"params": 0, "ranks": 0}, and nn.RNN'
      ' variable_broadcast=("params", "ranks")'
    )
