"""Convolutions on CPUs, as products where XLA's own are slow."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# XLA:CPU takes some sixty times as long as a product for outputs of 2 x 2
# pixels, a little longer at 4 x 4 unless channels get fewer, and longer for the
# channels of raw images; see docs/performance.md.
_FEWEST_PIXELS, _FEW_PIXELS = 4, 16
_FEW_CHANNELS = 3
_MOST_NUMBERS = 1 << 26  # in patches of few channels: 256 MB of float32

# Its gradient for the kernel takes 5 times as long as products at 32 x 32
# pixels, 1.7 times at 16 x 16, and no longer at 8 x 8.
_MANY_PIXELS = 100

_portable = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
  """Traces forward passes whose program is for other platforms as well.

  Each platform then gets its own form of a convolution as the program is
  lowered; else the host's backend decides, as it is traced.
  """
  token = _portable.set(True)
  try:
    yield
  finally:
    _portable.reset(token)


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
  """Computes `lax.conv_general_dilated`, on CPUs by products where those win.

  One product, of shifted slices of the padded input side by side with the
  kernel as a matrix, for windows of one pixel, outputs of few pixels and inputs
  of few channels. For outputs of many pixels, XLA's convolution with a gradient
  of its own for the kernel, a product for each offset of the window; that has
  no forward-mode derivative. On accelerators it is XLA's alone.
  """
  layout = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
  last, n = x.ndim - 1, x.ndim - 2
  channels_last = layout == lax.ConvDimensionNumbers(
    (0, last, *range(1, last)), (last, n, *range(n)), (0, last, *range(1, last))
  )
  lhs_dilation = tuple(lhs_dilation or (1,) * n)
  rhs_dilation = tuple(rhs_dilation or (1,) * n)
  strides = tuple(strides)
  plain = functools.partial(
    lax.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    **options,
  )
  if (
    (_portable.get() or jax.default_backend() == "cpu")
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
    precision = options.get("precision")
    if min(pixels, default=0) > 0 and (few or one):

      def products(x, kernel):
        return _product(x, kernel, strides, padding, rhs_dilation, precision)

      if _portable.get():
        return lax.platform_dependent(x, kernel, cpu=products, default=plain)
      return products(x, kernel)
    simple = {k for k, v in options.items() if v is not None} <= {"precision"}
    if simple and math.prod(pixels) >= _MANY_PIXELS and x.dtype == kernel.dtype:
      pads = tuple(map(tuple, padding))
      return _large(strides, pads, rhs_dilation, precision, x, kernel)
  return plain(x, kernel)


def _channels_last(x, kernel, strides, padding, dilation, precision):
  """XLA's convolution of [b, *space, in] with [*window, in, out]."""
  last, n = x.ndim - 1, x.ndim - 2
  numbers = lax.ConvDimensionNumbers(
    (0, last, *range(1, last)), (last, n, *range(n)), (0, last, *range(1, last))
  )
  return lax.conv_general_dilated(
    x,
    kernel,
    strides,
    padding,
    rhs_dilation=dilation,
    dimension_numbers=numbers,
    precision=precision,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _large(strides, padding, dilation, precision, x, kernel):
  """`_channels_last` with the gradients of `_large_backward`."""
  return _channels_last(x, kernel, strides, padding, dilation, precision)


def _large_forward(strides, padding, dilation, precision, x, kernel):
  y = _channels_last(x, kernel, strides, padding, dilation, precision)
  return y, (x, kernel)


def _large_backward(strides, padding, dilation, precision, saved, g):
  """Returns XLA's gradient for x; for the kernel, a product for each offset.

  dK[o] = sum over b, p of  x[b, p * stride + o * dilation]^T g[b, p]
  """
  x, kernel = saved
  n_in, n_out = kernel.shape[-2:]
  _, transpose = jax.vjp(
    lambda x: _channels_last(x, kernel, strides, padding, dilation, precision),
    x,
  )
  edges = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
  padded, rows = lax.pad(x, jnp.zeros((), x.dtype), edges), g.reshape(-1, n_out)
  # Accumulated in at least float32, as XLA's own gradient is.
  wide = jnp.promote_types(x.dtype, jnp.float32)
  parts = []
  for offset in np.ndindex(*kernel.shape[:-2]):
    start = [o * d for o, d in zip(offset, dilation, strict=True)]
    stop = [
      a + (size - 1) * s + 1
      for a, size, s in zip(start, g.shape[1:-1], strides, strict=True)
    ]
    seen = lax.slice(
      padded, (0, *start, 0), (x.shape[0], *stop, n_in), (1, *strides, 1)
    )
    part = lax.dot_general(
      seen.reshape(-1, n_in),
      rows,
      (((0,), (0,)), ((), ())),
      precision=precision,
      preferred_element_type=wide,
    )
    parts.append(part.astype(kernel.dtype))
  return transpose(g)[0], jnp.stack(parts).reshape(kernel.shape)


_large.defvjp(_large_forward, _large_backward)


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
