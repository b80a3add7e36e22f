"""Reads a Flax model by intercepting the calls of its layers."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maestro import ops, trees
from maestro.nn import (
  general_axes,
  pad_input,
  path_of,
  per_axis,
  recording,
  window_of,
)
from maestro.trees import LayerSpec, LowRankError


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

  with nn.intercept_methods(intercept):
    yield


def _spec(module: nn.Module, x: jax.Array, y: jax.Array) -> LayerSpec | None:
  """Describes a layer from its attributes and its input and output shapes."""
  if isinstance(module, nn.Conv):
    window = window_of(module)
    g = module.feature_group_count
    # All axes of one example; without a batch axis, y is one example.
    space = y.shape[y.ndim > len(window) + 1 : -1]
    return LayerSpec(
      "conv",
      (*window, x.shape[-1] // g),
      (module.features // g,),
      groups=(g,) if g > 1 else (),
      positions=math.prod(space),
    )
  if isinstance(module, nn.Embed):
    return LayerSpec(
      "embed",
      (module.num_embeddings,),
      (module.features,),
      positions=0,
      lookups=math.prod(x.shape[1:]),
    )
  if isinstance(module, nn.DenseGeneral):
    axis, batch = general_axes(module, x.ndim)
    features = module.features
    rest = [a for a in range(x.ndim) if a not in axis and a not in batch]
    return LayerSpec(
      "dense",
      tuple(x.shape[a] for a in axis),
      (features,) if isinstance(features, int) else tuple(features),
      groups=tuple(x.shape[a] for a in batch),
      positions=math.prod(x.shape[a] for a in rest if a != 0),
    )
  if isinstance(module, nn.Dense):
    return LayerSpec(
      "dense",
      (x.shape[-1],),
      (module.features,),
      positions=math.prod(x.shape[1:-1]),
    )
  return None


def layers(model: nn.Module, *inputs: Any, **kwargs: Any):
  """Lists the linear maps of a model: {path: LayerSpec}, in order of use.

  Runs the model's `init` abstractly (nothing is computed) on example inputs,
  whose first axis is the batch. Layers are Dense, DenseGeneral, Conv and Embed
  of this module or of `flax.linen`.

  A layer that is called several times adds up its positions. Under `nn.scan`
  or `nn.vmap` with parameters stacked on axis 0, a layer is listed once, with
  the stacked sizes in `stack`; a layer whose one set of parameters is reused by
  every step of a scan counts as one call.

  Args:
    model: a Flax Linen module.
    *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`s.
    **kwargs: passed on to the model, e.g. train=False.
  """
  records: dict[str, list[LayerSpec]] = {}

  def record(next_call, args, kwargs, context):
    y = next_call(*args, **kwargs)
    module, method = context.module, context.method_name
    path = path_of(module)
    if method == "__call__" and args:
      spec = _spec(module, args[0], y)
      if spec is not None:
        records.setdefault(path, []).append(spec)
    elif method == "attend" and isinstance(module, nn.Embed):
      spec = LayerSpec(
        "embed",
        (module.num_embeddings,),
        (module.features,),
        positions=math.prod(args[0].shape[1:-1]),
      )
      records.setdefault(path, []).append(spec)
    return y

  # Through the interceptor, also a subclass's super().__call__ is seen: the
  # same module within the same call must count once.
  def init(*inputs):
    with nn.intercept_methods(_outermost(record)):
      return model.init(jax.random.key(0), *inputs, **kwargs)

  params = jax.eval_shape(init, *inputs).get("params", {})
  found = {}
  for path, calls in records.items():
    spec = calls[0]
    node = trees.get(params, path)
    kernel = node.get(spec.weight) if node else None
    if kernel is None:
      continue
    shape = tuple(kernel.shape)
    stack = shape[: len(shape) - len(spec.kernel_shape)]
    if shape != (*stack, *spec.kernel_shape):
      raise LowRankError(
        f"layer {path!r}: its kernel is {shape}, of which {spec.kernel_shape}"
        " was expected to be the last axes; stack scanned parameters on axis 0"
      )
    counted = calls[:1] if stack else calls  # scan may trace its body twice
    found[path] = LayerSpec(
      spec.kind,
      spec.inputs,
      spec.outputs,
      stack=stack,
      groups=spec.groups,
      positions=sum(call.positions for call in counted),
      lookups=sum(call.lookups for call in counted),
    )
  return found


def _outermost(interceptor):
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


def _rows(module: nn.Module, x: jax.Array) -> jax.Array | None:
  """Lays out what a layer's kernel multiplies: [*groups, N, n_in], by copying.

  An embedding's are the indices that it looks up, [N]. None for other modules.
  """
  if isinstance(module, nn.Conv):
    return _patches(module, x)
  if isinstance(module, nn.Embed):
    return x.reshape(-1)
  if isinstance(module, nn.DenseGeneral):
    axis, batch = general_axes(module, x.ndim)
    rest = [a for a in range(x.ndim) if a not in axis and a not in batch]
    groups = tuple(x.shape[a] for a in batch)
    n_in = math.prod(x.shape[a] for a in axis)
    x = jnp.transpose(x, (*batch, *rest, *axis))
    return x.reshape((*groups, -1, n_in))
  if isinstance(module, nn.Dense):
    return x.reshape((-1, x.shape[-1]))
  return None


def _patches(module: nn.Conv, x: jax.Array) -> jax.Array:
  """Unrolls a convolution's input: [(G,) N, window * in / G]."""
  window = window_of(module)
  n = len(window)
  dilation = per_axis(module.kernel_dilation, n)
  x = x.reshape((-1, *x.shape[x.ndim - n - 1 :]))
  x, padding = pad_input(x, module.padding, window, dilation)
  y = ops.unroll(
    x,
    window,
    per_axis(module.strides, n),
    padding,
    per_axis(module.input_dilation, n),
    dilation,
  )
  g, size, n_in = module.feature_group_count, math.prod(window), x.shape[-1]
  if g == 1:
    return y.reshape((-1, size * n_in))
  y = y.reshape((-1, size, g, n_in // g))
  return jnp.moveaxis(y, 2, 0).reshape((g, -1, size * (n_in // g)))


def capture_inputs(
  model: nn.Module, variables: Any, *inputs: Any, **kwargs: Any
) -> dict[str, tuple[jax.Array, ...]]:
  """Runs a model and returns the rows that each layer's kernel multiplies.

    {path: ([*groups, N, n_in], ...)}, one array for each call of the layer

  A convolution's input is unrolled in the order of its kernel, (*window, in);
  an embedding's is the indices it looks up, int [N]; its use as logits
  (`attend`) is not captured. A layer under `nn.scan` appears only if the scan
  has variable_axes={"params": 0, "captured": 0}; its array then leads with the
  scan's axis. Can be traced.

  Args:
    model: a Flax Linen module.
    variables: of the model; layers may be dense or factored.
    *inputs: of the model.
    **kwargs: passed on to the model, e.g. train=False.
  """
  paths: set[str] = set()

  # Sown, not kept aside: so a value leaves `remat` and `scan` as they allow.
  def record(next_call, args, kwargs, context):
    if context.method_name == "__call__" and args:
      rows = _rows(context.module, args[0])
      if rows is not None and context.module.sow("captured", "inputs", rows):
        paths.add(path_of(context.module))
    return next_call(*args, **kwargs)

  with nn.intercept_methods(_outermost(record)):
    _, state = model.apply(variables, *inputs, mutable=["captured"], **kwargs)
  found = state.get("captured", {})
  return {path: trees.get(found, path)["inputs"] for path in sorted(paths)}


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
      " check the path, that the layer is of maestro.nn, and that a scan has"
      ' variable_axes={"params": 0, "ranks": 0}'
    )
