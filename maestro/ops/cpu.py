"""Convolutions on CPUs, as products where XLA's own are slow."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
