"""Gradient accumulation: the gradient of a batch, in micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maestro import trees


def unrolls(mesh: Mesh) -> bool:
  """Whether repetitions within a program are unrolled: on CPUs.

  There the gradient of a convolution inside a loop is many times slower than
  outside of it, and rounds differently. Elsewhere a loop compiles once, however
  often it runs.
  """
  return mesh.devices.flat[0].platform == "cpu"


def micro_batches(batch: Any, k: int) -> Any:
  """Turns arrays [b, ...] into [k, b / k, ...].

  Micro-batch i is the examples i, i + k, i + 2 k, ... So each device that has a
  part of the batch has its part of every micro-batch, and nothing is sent.
  """
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape((len(x) // k, k, *x.shape[1:])), 0, 1),
    batch,
  )


def mean_gradient(
  function: Callable,
  params: Any,
  carried: Any,
  batch: Any,
  k: int,
  *,
  unroll: bool,
) -> tuple[Any, Any, Any]:
  """Returns (means, gradient, carried) over the micro-batches, in order.

  All means are over the micro-batches, which are of one size, and are taken in
  float32.

  Args:
    function: (params, carried, micro-batch, its index) -> ((values, carried),
      gradient for params), both of float32; carried, such as batch statistics,
      goes from one micro-batch to the next.
    params: of the gradient.
    carried: before the first micro-batch.
    batch: arrays [b, ...].
    k: how many micro-batches it is made of.
    unroll: whether without a loop, see `unrolls`.
  """

  def one(so_far: Any, part: Any) -> tuple[Any, None]:
    carried, sums = so_far
    i, micro = part
    (values, carried), grads = function(params, carried, micro, i)
    grown = jax.tree.map(
      lambda a, b: a + b.astype(a.dtype), sums, (values, grads)
    )
    return (carried, grown), None

  parts = micro_batches(batch, k)
  first = jnp.int32(0), jax.tree.map(lambda x: x[0], parts)
  (values, _), grads = jax.eval_shape(function, params, carried, first[1], 0)
  sums = jax.tree.map(
    lambda x: jnp.zeros(x.shape, trees.wide_dtype(x.dtype)), (values, grads)
  )
  so_far = (carried, sums)
  if unroll:
    for i in range(k):
      part = jnp.int32(i), jax.tree.map(lambda x, i=i: x[i], parts)
      so_far, _ = one(so_far, part)
      # One after the other: what a micro-batch needs is free for the next one.
      so_far, parts = jax.lax.optimization_barrier((so_far, parts))
  else:
    so_far, _ = jax.lax.scan(one, so_far, (jnp.arange(k), parts))
  carried, sums = so_far
  values, grads = jax.tree.map(lambda x: x / k, sums)
  return values, grads, carried
