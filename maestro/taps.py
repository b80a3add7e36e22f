"""What the layers of a Flax model see: rows of inputs, gradients behind."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maestro import ops, trees
from maestro.introspect import outermost, spec_of
from maestro.nn import general_axes, pad_input, path_of, per_axis, window_of


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
    given = (*args, *kwargs.values())
    if context.method_name == "__call__" and given:
      rows = _rows(context.module, given[0])
      if rows is not None and context.module.sow("captured", "inputs", rows):
        paths.add(path_of(context.module))
    return next_call(*args, **kwargs)

  with nn.intercept_methods(outermost(record)):
    _, state = model.apply(variables, *inputs, mutable=["captured"], **kwargs)
  found = dict(state).get("captured", {})
  return {path: trees.get(found, path)["inputs"] for path in sorted(paths)}


def apply_tapped(
  model: nn.Module,
  variables: Any,
  taps: Any,
  statistic: Callable[[str, jax.Array, jax.Array], Any],
  *inputs: Any,
  **kwargs: Any,
) -> Any:
  """Runs a model such that gradients with respect to taps are statistics.

    d loss / d taps[path] = sum over calls of statistic(path, x, g)

  x [*groups, N, n_in] are the rows that the layer's kernel multiplies, as of
  `capture_inputs`, and g [*groups, N, n_out] the loss's gradient with respect
  to the layer's outputs. A table's use as logits (`attend`), y = q K^T, is the
  other way round: x [N, n_in] is the gradient at the logits, and g [N, n_out]
  the queries q. So the kernel's gradient is always the sum of x^T g, where an
  index stands for a row that is 1 there.

  The outputs, and all other gradients, are those of `model.apply`. A layer
  under `nn.scan` needs variable_axes={"params": 0, "captured": 0}; its taps
  lead with the scan's axis.

  Args:
    model: a Flax Linen module.
    variables: of the model; layers may be dense or factored.
    taps: {path: tree of zeros}, of what `statistic` returns.
    statistic: see above; traced.
    *inputs: of the model.
    **kwargs: passed on to the model, e.g. train=False.
  """

  def tap(
    module: nn.Module, method: str, x: jax.Array, y: jax.Array, zero: Any
  ):
    path = path_of(module)

    @jax.custom_vjp
    def identity(x, y, zero):
      del x, zero
      return y

    def forward(x, y, zero):
      del zero
      return y, x

    def backward(x, g):
      if jnp.issubdtype(x.dtype, jnp.inexact):
        none = jnp.zeros_like(x)
      else:
        none = np.zeros(x.shape, jax.dtypes.float0)
      if method == "attend":
        rows, out = (a.reshape((-1, a.shape[-1])) for a in (g, x))
      else:
        rows, out = _rows(module, x), _output_rows(module, x, g)
        assert rows is not None  # as it is a layer
      return none, g, statistic(path, rows, out)

    identity.defvjp(forward, backward)
    return identity(x, y, zero)

  def intercept(next_call, args, kwargs, context):
    y = next_call(*args, **kwargs)
    given, module = (*args, *kwargs.values()), context.module
    method = context.method_name
    if method in ("__call__", "attend") and given:
      zero = module.get_variable("captured", "tap")
      if zero is not None and spec_of(module, given[0]) is not None:
        return tap(module, method, given[0], y, zero)
    return y

  tree: dict = {}
  for path, zero in taps.items():
    node = tree
    for name in path.split("/") if path else ():
      node = node.setdefault(name, {})
    node["tap"] = zero
  with nn.intercept_methods(outermost(intercept)):
    return model.apply({**variables, "captured": tree}, *inputs, **kwargs)


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


def _output_rows(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
  """Lays out a layer's outputs as `_rows` does its inputs: [*groups, N, out].

  Args:
    module: the layer.
    x: its input.
    y: of the shape of its output.
  """
  if isinstance(module, nn.Conv) and module.feature_group_count > 1:
    g = module.feature_group_count
    return jnp.moveaxis(y.reshape((-1, g, y.shape[-1] // g)), 1, 0)
  if isinstance(module, nn.DenseGeneral):
    axis, batch = general_axes(module, x.ndim)
    groups = tuple(x.shape[a] for a in batch)
    n_out = math.prod(y.shape[x.ndim - len(axis) :])
    return y.reshape((*groups, -1, n_out))
  return y.reshape((-1, y.shape[-1]))
