"""Convolutions on CPUs, as products where XLA's own are slow."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maestro.trees import wide_dtype

# XLA:CPU takes some sixty times as long as a product for outputs of 2 x 2
# pixels, a little longer at 4 x 4 unless channels get fewer, and longer for the
# channels of raw images; see docs/performance.md.
_FEWEST_PIXELS, _FEW_PIXELS = 4, 16
_FEW_CHANNELS = 3
_MOST_NUMBERS = 1 << 26  # in patches of few channels: 256 MB of float32

# Its gradient for the kernel takes 2 to 9 times as long as products of blocks
# at 32 x 32 and 16 x 16 pixels, 1.3 times at 8 x 8, and no longer at 4 x 4.
_MANY_PIXELS = 64
_BLOCK = 1 << 19  # numbers of a block's matrices: 2 MB of float32

_portable = contextvars.ContextVar("portable", default=False)
_target = contextvars.ContextVar[str | None]("target", default=None)


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


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
  """Traces programs as a host of "tpu" or "gpu" would, whatever this one is."""
  token = _target.set(platform)
  try:
    yield
  finally:
    _target.reset(token)


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
  of few channels; else XLA's convolution. For outputs of many pixels with a
  gradient of its own for the kernel, a sum of products of blocks of examples;
  that has no forward-mode derivative. On accelerators it is XLA's alone.
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
    (_portable.get() or (_target.get() or jax.default_backend()) == "cpu")
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
    form = _channels_last
    if min(pixels, default=0) > 0 and (few or one):
      form = _product
    how = _How(strides, tuple(map(tuple, padding)), rhs_dilation, precision)
    simple = {k for k, v in options.items() if v is not None} <= {"precision"}
    if form is _product and _portable.get():
      ours = functools.partial(form, how)
      return lax.platform_dependent(x, kernel, cpu=ours, default=plain)
    if simple and math.prod(pixels) >= _MANY_PIXELS and x.dtype == kernel.dtype:
      return _large(form, how, x, kernel)
    if form is _product:
      return form(how, x, kernel)
  return plain(x, kernel)


class _How(NamedTuple):
  """What a convolution does, an entry per spatial axis."""

  strides: tuple[int, ...]
  padding: tuple[tuple[int, ...], ...]  # (low, high) each
  dilation: tuple[int, ...]
  precision: Any


def _channels_last(how, x, kernel):
  """XLA's convolution of [b, *space, in] with [*window, in, out]."""
  last, n = x.ndim - 1, x.ndim - 2
  numbers = lax.ConvDimensionNumbers(
    (0, last, *range(1, last)), (last, n, *range(n)), (0, last, *range(1, last))
  )
  return lax.conv_general_dilated(
    x,
    kernel,
    how.strides,
    how.padding,
    rhs_dilation=how.dilation,
    dimension_numbers=numbers,
    precision=how.precision,
  )


def _product(how, x, kernel):
  """Multiplies patches [b, *pixels, window in] with [window in, out]."""
  n = kernel.ndim - 2
  x = unroll(
    x, kernel.shape[:n], how.strides, how.padding, (1,) * n, how.dilation
  )
  kernel = kernel.reshape((math.prod(kernel.shape[:-1]), kernel.shape[-1]))
  return jnp.dot(x, kernel, precision=how.precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _large(form, how, x, kernel):
  """`form`, `_product` or `_channels_last`, with `_large_backward`."""
  return form(how, x, kernel)


def _large_forward(form, how, x, kernel):
  return form(how, x, kernel), (x, kernel)


def _large_backward(form, how, saved, g):
  """Returns the form's own gradient for x; for the kernel, a sum over blocks.

  A block is as many examples as a core's cache holds beside their shifted
  copies, and takes one product (see `_shifted`). On several devices the batch
  may be split among them, and is one block.
  """
  x, kernel = saved
  window, images = kernel.shape[:-2], x.shape[0]
  shifted = functools.partial(_shifted, how, window)
  # Accumulated in at least float32, as XLA's own gradient is.
  wide = wide_dtype(x.dtype)

  def product(x, g):
    return lax.dot_general(
      *shifted(x, g),
      (((0,), (0,)), ((), ())),
      precision=how.precision,
      preferred_element_type=wide,
    )

  def add(total, pair):
    return total + product(*pair), None

  one = jax.eval_shape(shifted, x[:1], g[:1])
  block = images
  if isinstance(images, int) and jax.device_count() == 1:
    block = _divisor(images, _BLOCK // sum(math.prod(n.shape) for n in one))
  if block == images:
    total = product(x, g)
  else:
    zeros = jnp.zeros([n.shape[1] for n in one], wide)
    blocks = [v.reshape(-1, block, *v.shape[1:]) for v in (x, g)]
    total, _ = lax.scan(add, zeros, blocks)
  n_in, n_out = kernel.shape[-2:]
  total = total.reshape(-1, n_in, total.shape[1] // n_out, n_out)
  total = jnp.moveaxis(total, 2, 0).reshape(kernel.shape).astype(kernel.dtype)
  _, transpose = jax.vjp(lambda x: form(how, x, kernel), x)
  return transpose(g)[0], total


_large.defvjp(_large_forward, _large_backward)


def _shifted(how, window, x, g):
  """Returns matrices whose product is a convolution's gradient for its kernel.

    dK[r, c] = sum over b, q, p of  x[b, q, p * stride + c]^T g[b, q - r, p]

  with r an offset of the window along the first axis of space and c along the
  others. The one matrix is x with each c, [b * q * p, c * in], the other is g
  with each r, [b * q * p, r * out]: for a window of 3 x 3, three copies of each
  in place of nine of x. Under a stride along the first axis x has every offset.
  """
  n, rows = len(window), window[0] if how.strides[0] == 1 else 1
  others = (window[0] // rows, *window[1:])
  x = unroll(x, others, how.strides, how.padding, (1,) * n, how.dilation)
  step, zero = how.dilation[0], jnp.zeros((), g.dtype)
  none = [(0, 0, 0)] * n
  g = lax.concatenate(
    [
      lax.pad(g, zero, [none[0], (r * step, (rows - 1 - r) * step, 0), *none])
      for r in range(rows)
    ],
    n + 1,
  )
  return x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])


def _divisor(number, most):
  """Returns the largest divisor of a number that is at most `most`, or 1."""
  fits = [d for d in range(1, number + 1) if number % d == 0 and d <= most]
  return max(fits, default=1)


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
