"""Low-rank products in plain XLA: they define the semantics.

A traced rank masks both factors, so that numbers beyond the rank, NaN too,
reach neither the output nor a gradient. It costs the full rank; what is
smaller in the arrays is also faster.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maestro.lowrank import mask_factor


def _add_bias(y, bias):
  if bias is None:
    return y
  return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def _multiply_out(rows: Any, n_in: int, rank: int, n_out: int) -> bool:
  """True if u @ v and one product take fewer MACs than two products.

  That is so above break-even, rank > in * out / (in + out), for enough rows:
  where training starts, at full rank, factors then cost what a kernel costs.
  A batch of unknown size (`jax.export`) is taken as too small.
  """
  if not isinstance(rows, int):
    return False
  whole = rows * n_in * n_out + n_in * rank * n_out
  return whole < rows * rank * (n_in + n_out)


def dot(x, u, v, rank, *, bias, precision):
  """See `maestro.ops.lowrank_dot`; rank is None or an int32 scalar."""
  if rank is not None:
    u, v = mask_factor(u, "u", rank), mask_factor(v, "v", rank)
  if _multiply_out(math.prod(x.shape[:-1]), *u.shape, v.shape[1]):
    kernel = jnp.dot(u, v, precision=precision)
    return _add_bias(jnp.dot(x, kernel, precision=precision), bias)
  h = jnp.dot(x, u, precision=precision)
  y = jnp.dot(h, v, precision=precision)
  return _add_bias(y, bias)


def conv(
  x,
  u,
  v,
  rank,
  *,
  strides,
  padding,
  input_dilation,
  kernel_dilation,
  groups,
  bias,
  precision,
):
  """See `maestro.ops.lowrank_conv`; rank is None, or int32 () or [G]."""
  if rank is not None:
    u, v = mask_factor(u, "u", rank), mask_factor(v, "v", rank)
  if groups > 1:  # [G, *window, in / G, R] -> [*window, in / G, G R]
    rank_axis = u.shape[-1]  # no -1 in a reshape: it may be 0
    u = jnp.moveaxis(u, 0, -2)
    u = u.reshape((*u.shape[:-2], groups * rank_axis))
  last = x.ndim - 1
  space = tuple(range(1, last))
  numbers = lax.ConvDimensionNumbers(
    lhs_spec=(0, last, *space),
    rhs_spec=(last, last - 1, *range(last - 1)),
    out_spec=(0, last, *space),
  )

  def convolve(x, u):
    return convolution(
      x,
      u,
      strides,
      padding,
      lhs_dilation=input_dilation,
      rhs_dilation=kernel_dilation,
      dimension_numbers=numbers,
      feature_group_count=groups,
      precision=precision,
    )

  if groups == 1:
    whole = (*u.shape[:-1], v.shape[-1])
    n_in, n_out = math.prod(whole[:-1]), whole[-1]
    rows = math.prod(
      jax.eval_shape(convolve, x, jax.ShapeDtypeStruct(whole, u.dtype)).shape[
        :-1
      ]
    )
    if _multiply_out(rows, n_in, u.shape[-1], n_out):
      return _add_bias(convolve(x, jnp.dot(u, v, precision=precision)), bias)
  if u.shape[-1]:
    h = convolve(x, u)
  else:  # XLA has no convolution to zero channels, but it has its shape
    wide = jax.ShapeDtypeStruct((*u.shape[:-1], groups), u.dtype)
    shape = jax.eval_shape(convolve, x, wide).shape
    h = jnp.zeros((*shape[:-1], 0), jnp.result_type(x, u))
  if groups > 1:
    h = h.reshape((*h.shape[:-1], groups, rank_axis))
    y = jnp.einsum("...gr,gro->...go", h, v, precision=precision)
    y = y.reshape((*y.shape[:-2], groups * v.shape[-1]))
  else:
    y = jnp.dot(h, v, precision=precision)
  return _add_bias(y, bias)


# ---------------------------------------------------------------------------
# A convolution as one product, where XLA's own is slow
# ---------------------------------------------------------------------------

# XLA:CPU takes some sixty times as long as a product for outputs of 2 x 2
# pixels, a little longer at 4 x 4 unless channels get fewer, and longer for the
# channels of raw images; see docs/performance.md.
_FEWEST_PIXELS, _FEW_PIXELS = 4, 16
_FEW_CHANNELS = 3
_MOST_NUMBERS = 1 << 26  # in patches of few channels: 256 MB of float32


def convolution(
  x,
  kernel,
  strides,
  padding,
  *,
  lhs_dilation,
  rhs_dilation,
  dimension_numbers,
  feature_group_count,
  **options,
):
  """Computes `lax.conv_general_dilated`, on CPUs by a product if that is fast.

  That is the case for windows of one pixel, for outputs of few pixels and for
  inputs of few channels: there, shifted slices of the padded input, side by
  side, are multiplied with the kernel as a matrix. On accelerators XLA's
  convolution is always used.
  """
  layout = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
  last, n = x.ndim - 1, x.ndim - 2
  channels_last = layout == lax.ConvDimensionNumbers(
    (0, last, *range(1, last)), (last, n, *range(n)), (0, last, *range(1, last))
  )
  lhs_dilation = tuple(lhs_dilation or (1,) * n)
  rhs_dilation = tuple(rhs_dilation or (1,) * n)
  strides = tuple(strides)
  if (
    jax.default_backend() == "cpu"
    and channels_last
    and feature_group_count == 1
    and set(lhs_dilation) <= {1}
    and kernel.size
  ):
    window = kernel.shape[:n]
    spans = [(k - 1) * d + 1 for k, d in zip(window, rhs_dilation, strict=True)]
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(x.shape[1:-1], spans, strides, padding)
    pixels = [
      (size + low + high - span) // stride + 1
      for size, (low, high), span, stride in zip(
        x.shape[1:-1], padding, spans, strides, strict=True
      )
    ]
    patch = math.prod(window) * x.shape[-1]
    numbers = x.shape[0] * math.prod(pixels) * patch
    most = _FEWEST_PIXELS
    if kernel.shape[-1] >= x.shape[-1]:
      most = _FEW_PIXELS
    few = math.prod(pixels) <= most or (
      x.shape[-1] <= _FEW_CHANNELS
      and isinstance(numbers, int)  # not so if the batch is of unknown size
      and numbers <= _MOST_NUMBERS
    )
    one = math.prod(window) == 1 and not any(map(any, padding))
    if min(pixels, default=0) > 0 and (few or one):
      return _product(
        x, kernel, strides, padding, rhs_dilation, options["precision"]
      )
  return lax.conv_general_dilated(
    x,
    kernel,
    strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    **options,
  )


def _product(x, kernel, strides, padding, dilation, precision):
  """Multiplies patches [b, *pixels, window in] with [window in, out]."""
  n = kernel.ndim - 2
  x = unroll(x, kernel.shape[:n], strides, padding, (1,) * n, dilation)
  kernel = kernel.reshape((math.prod(kernel.shape[:-1]), kernel.shape[-1]))
  return jnp.dot(x, kernel, precision=precision)


def unroll(
  x: jax.Array,
  window: Sequence[int],
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  input_dilation: Sequence[int],
  kernel_dilation: Sequence[int],
) -> jax.Array:
  """Lays a convolution's windows side by side.

    [b, *space, in] -> [b, *pixels, window * in], in the order of a kernel

  By slices of the padded input, which copy exactly, where a convolution with an
  identity may round. Sizes are one per spatial axis, as for
  `lax.conv_general_dilated`.
  """
  spans = [
    (k - 1) * d + 1 for k, d in zip(window, kernel_dilation, strict=True)
  ]
  space = [
    (size - 1) * d + 1
    for size, d in zip(x.shape[1:-1], input_dilation, strict=True)
  ]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(space, spans, strides, padding)
  edges = [
    (low, high, d - 1)
    for (low, high), d in zip(padding, input_dilation, strict=True)
  ]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
  patches = []
  for offset in np.ndindex(*window):
    start = [o * d for o, d in zip(offset, kernel_dilation, strict=True)]
    stop = [
      a + max(0, (size - span) // s + 1) * s - s + 1
      for a, size, span, s in zip(
        start, x.shape[1:-1], spans, strides, strict=True
      )
    ]
    patches.append(
      lax.slice(
        x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)
      )
    )
  return lax.concatenate(patches, x.ndim - 1)
