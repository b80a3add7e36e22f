"""Low-rank products whose cost follows a rank that is known only at run time.

The rank picks one of a few branches, each of which slices the factors at its
bucket's edge, a static rank, and masks what is left beyond the rank:

  edges e_1 < .. < e_n = R;   r runs in the first e_i >= r

One compilation serves all ranks. Forward and backward choose on their own,
within a `custom_vjp`: differentiated as it is, a switch would keep the
intermediates of all branches. So it has no forward mode and no second
derivatives; `maestro.ops.xla` has. Under `vmap`, ranks of a batch are masks:
all branches would be computed otherwise.

  y = (x u_r) v_r + b        h = x u_r
  dx = (g v_r^T) u_r^T       du_r = x^T (g v_r^T)       dv_r = h^T g

Beyond the rank, du and dv are zero to the bit. Above break-even a branch
multiplies u_r v_r out first, as `maestro.ops.xla` does.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from maestro.ops import xla
from maestro.ops.cpu import unroll

BUCKETS = 8


def pays(rows: Any, n_in: int, n_out: int) -> bool:
  """Whether a switch is at most a tenth slower than a mask at any rank.

  On the careful side of what forward and backward passes took on CPUs
  (docs/performance.md): of small layers, and of many rows, branches copy about
  as much as they save. A batch of unknown size (`jax.export`) is too small.
  """
  few = isinstance(rows, int) and rows <= 2 * max(n_in, n_out)
  return few and n_in * n_out >= 1 << 15


def edges(full_rank: int) -> tuple[int, ...]:
  """The static ranks of the branches, rising, the last one R."""
  n = min(BUCKETS, full_rank)
  return tuple(-(-full_rank * i // n) for i in range(1, n + 1))


def _branch(rank: Any, full_rank: int) -> Any:
  found = jnp.searchsorted(jnp.asarray(edges(full_rank)), rank)
  return found.astype(jnp.int32)


def _cut(u, v, rank, edge: int):
  """The factors of a branch, and which of its components are live."""
  live = jnp.arange(edge) < rank
  return (
    jnp.where(live, u[:, :edge], jnp.zeros((), u.dtype)),
    jnp.where(live[:, None], v[:edge], jnp.zeros((), v.dtype)),
    live,
  )


def _pad(x: jax.Array, axis: int, size: Any) -> jax.Array:
  """Fills an axis up with zeros, to a size that may be unknown."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)


# ---------------------------------------------------------------------------
# One branch, of a static edge; x [B, in], g [B, out]
# ---------------------------------------------------------------------------


def _multiplied(x, u, v, edge: int) -> bool:
  return xla.multiply_out(x.shape[0], u.shape[0], edge, v.shape[1])


def _kept(x, u, v) -> Any:
  """How many numbers a branch keeps to go back: those of u v, or of h.

  Of a batch of unknown size, a number that is unknown, too.
  """
  every = edges(u.shape[1])
  last = max((e for e in every if not _multiplied(x, u, v, e)), default=0)
  product = u.shape[0] * v.shape[1] if last < every[-1] else 0
  return max(product, x.shape[0] * last)


def _forward_at(edge: int, precision: Any, x, u, v, rank):
  """(y [B, out], what the backward pass of the same branch needs, flat)."""
  product = functools.partial(jnp.dot, precision=precision)
  u_r, v_r, _ = _cut(u, v, rank, edge)
  if _multiplied(x, u, v, edge):
    kept = product(u_r, v_r)
    y = product(x, kept)
  else:
    kept = product(x, u_r)
    y = product(kept, v_r)
  return y, _pad(kept.reshape(-1), 0, _kept(x, u, v))


def _backward_at(edge: int, precision: Any, x, u, v, rank, kept, g):
  """(dx, du, dv), the latter two zero beyond the rank."""
  full_rank = u.shape[1]
  product = functools.partial(jnp.dot, precision=precision)
  u_r, v_r, live = _cut(u, v, rank, edge)

  def unpacked(*shape: int) -> jax.Array:
    return kept[: math.prod(shape)].reshape(shape)

  if _multiplied(x, u, v, edge):
    kernel = product(x.T, g)
    dx = product(g, unpacked(u.shape[0], v.shape[1]).T)
    du = jnp.where(live, product(kernel, v_r.T), jnp.zeros((), u.dtype))
    dv = product(u_r.T, kernel)
    dv = jnp.where(live[:, None], dv, jnp.zeros((), v.dtype))
  else:
    dh = product(g, v_r.T)
    dx = product(dh, u_r.T)
    du = product(x.T, dh)
    dv = product(unpacked(x.shape[0], edge).T, g)
  return dx, _pad(du, 1, full_rank), _pad(dv, 0, full_rank)


# ---------------------------------------------------------------------------
# All branches
# ---------------------------------------------------------------------------


def _switched(at: Callable, precision: Any) -> Callable:
  """Runs `at` in the branch of the rank, which is its fourth argument."""

  def chosen(*args):
    u, rank = args[1], args[3]
    branches = [
      functools.partial(at, edge, precision) for edge in edges(u.shape[1])
    ]
    if len(branches) == 1:
      return branches[0](*args)
    return lax.switch(_branch(rank, u.shape[1]), branches, *args)

  def masked(*args):
    return at(args[1].shape[1], precision, *args)

  return _unless_batched(chosen, masked)


def _unless_batched(chosen: Callable, masked: Callable) -> Callable:
  """Is `chosen` up to where its fourth argument is batched, then `masked`."""

  @custom_vmap
  def run(*args):
    return chosen(*args)

  @run.def_vmap
  def _(axis_size, in_batched, *args):
    axes = [0 if batched else None for batched in in_batched]
    over = functools.partial(jax.vmap, in_axes=axes, axis_size=axis_size)
    if in_batched[3]:
      out = over(masked)(*args)
    else:
      out = _unless_batched(over(chosen), over(masked))(*args)
    return out, jax.tree.map(lambda _: True, out)

  return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _dot(x, u, v, rank, precision):
  return _switched(_forward_at, precision)(x, u, v, rank)[0]


def _dot_forward(x, u, v, rank, precision):
  y, kept = _switched(_forward_at, precision)(x, u, v, rank)
  return y, (x, u, v, rank, kept)


def _dot_backward(precision, saved, g):
  x, u, v, rank, kept = saved
  dx, du, dv = _switched(_backward_at, precision)(x, u, v, rank, kept, g)
  return dx, du, dv, np.zeros(jnp.shape(rank), jax.dtypes.float0)


_dot.defvjp(_dot_forward, _dot_backward)


def dot(x, u, v, rank, *, bias, precision):
  """See `maestro.ops.lowrank_dot`; rank is None or an int32 scalar."""
  if rank is None or not u.shape[1]:  # nothing to choose
    return xla.dot(x, u, v, rank, bias=bias, precision=precision)
  # Branches must agree on types, whichever of their products comes first.
  dtype = jnp.result_type(x, u, v)
  rows = x.reshape((math.prod(x.shape[:-1]), x.shape[-1])).astype(dtype)
  y: Any = _dot(rows, u.astype(dtype), v.astype(dtype), rank, precision)
  return xla.add_bias(y.reshape((*x.shape[:-1], v.shape[1])), bias)


def conv(x, u, v, rank, *, groups, bias, precision, **windows):
  """See `maestro.ops.lowrank_conv`: the windows side by side, and a product.

  A convolution's backward pass within a branch is a hundred times slower on
  CPUs than outside of one. Groups have ranks of their own: masks.
  """
  if rank is None or groups > 1 or not u.shape[-1]:
    options = {"groups": groups, "bias": bias, "precision": precision}
    return xla.conv(x, u, v, rank, **options, **windows)
  columns = unroll(x, u.shape[:-2], **windows)
  u = u.reshape((math.prod(u.shape[:-1]), u.shape[-1]))
  return dot(columns, u, v, rank, bias=bias, precision=precision)
