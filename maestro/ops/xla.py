"""Low-rank products in plain XLA: they define the semantics.

A traced rank masks both factors, so that numbers beyond the rank, NaN too,
reach neither the output nor a gradient. It costs the full rank; what is
smaller in the arrays is also faster.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from maestro.ops.cpu import convolution
from maestro.trees import mask_factor


def add_bias(y, bias):
  if bias is None:
    return y
  return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def multiply_out(rows: Any, n_in: int, rank: int, n_out: int) -> bool:
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
  (n_in, r), n_out = u.shape, v.shape[1]
  if multiply_out(math.prod(x.shape[:-1]), n_in, r, n_out):
    kernel = jnp.dot(u, v, precision=precision)
    return add_bias(jnp.dot(x, kernel, precision=precision), bias)
  h = jnp.dot(x, u, precision=precision)
  y = jnp.dot(h, v, precision=precision)
  return add_bias(y, bias)


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

  def convolve(x, u) -> Any:
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
    if multiply_out(rows, n_in, u.shape[-1], n_out):
      return add_bias(convolve(x, jnp.dot(u, v, precision=precision)), bias)
  if u.shape[-1]:
    h = convolve(x, u)
  else:  # XLA has no convolution to zero channels, but it has its shape
    wide = jax.ShapeDtypeStruct((*u.shape[:-1], groups), u.dtype)
    shape = jax.eval_shape(convolve, x, wide).shape
    h = jnp.zeros((*shape[:-1], 0), u.dtype)
  if groups > 1:
    h = h.reshape((*h.shape[:-1], groups, rank_axis))
    y = jnp.einsum("...gr,gro->...go", h, v, precision=precision)
    y = y.reshape((*y.shape[:-2], groups * v.shape[-1]))
  else:
    y = jnp.dot(h, v, precision=precision)
  return add_bias(y, bias)
