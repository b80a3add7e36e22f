"""Checks arguments and chooses the implementation of a low-rank product."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maestro.ops import switch, xla
from maestro.trees import check_rank

Rank = int | Int[Array, "*lead"] | np.integer | None
IMPLEMENTATIONS = {"xla": xla, "switch": switch}

_preferred: contextvars.ContextVar[str] = contextvars.ContextVar(
  "preferred", default="xla"
)


@contextlib.contextmanager
def prefer(implementation: str) -> Iterator[None]:
  """Products that are traced within use this one where it pays.

  Those that name an implementation keep theirs. "xla" is everyone's default:
  it has all derivatives, and its products divide over devices. "switch" pays
  for a traced rank of a dense layer, see `switch.pays`, on one CPU device; its
  cost follows the rank.

  Raises:
    ValueError: there is none of this name.
  """
  token = _preferred.set(_known(implementation))
  try:
    yield
  finally:
    _preferred.reset(token)


def _known(implementation: str) -> str:
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r} is unknown; use None (choose) or one"
      f" of {sorted(IMPLEMENTATIONS)}"
    )
  return implementation


def _choose(implementation: str | None, pays: bool) -> Any:
  """The module of an implementation; `pays` says whether a switch does."""
  if implementation is None:
    preferred = _preferred.get()
    implementation = "xla" if preferred == "switch" and not pays else preferred
  return IMPLEMENTATIONS[_known(implementation)]


def _prefix(u: jax.Array, v: jax.Array, rank: Rank, lead: int):
  """Slices the factors to a static rank; returns what is left to mask."""
  full_rank = u.shape[-1]
  if rank is None:
    return u, v, None
  check_rank(rank, full_rank, "argument rank")
  if isinstance(rank, int | np.integer):
    v = jax.lax.slice_in_dim(v, 0, int(rank), axis=lead)
    return u[..., : int(rank)], v, None
  return u, v, jnp.clip(rank, 0, full_rank)


def lowrank_dot(
  x: Float[Array, "*batch n"],
  u: Float[Array, "n R"],
  v: Float[Array, "R m"],
  rank: Rank = None,
  *,
  bias: Float[Array, " m"] | None = None,
  precision: Any = None,
  implementation: str | None = None,
) -> Float[Array, "*batch m"]:
  """Computes y = (x @ u[:, :r]) @ v[:r] + bias.

  Forms u @ v only where that takes fewer MACs, which is above break-even.

  Args:
    x: inputs.
    u: first factor.
    v: second factor.
    rank: r. None is the full rank; a Python int slices (smaller products); an
      int32 scalar array masks (one compilation for all ranks). Concrete ranks
      out of [0, R] raise, traced ones are clipped. Rank 0 gives the bias.
    bias: added to every row.
    precision: as for `jax.numpy.dot`.
    implementation: "xla" masks a traced rank, at the cost of the full one;
      "switch" runs at the next of a few static ranks, so that its cost follows
      the rank, and has first derivatives by reverse mode only; None is "xla",
      or what `prefer` says.
  """
  if x.shape[-1] != u.shape[0] or u.shape[1] != v.shape[0]:
    raise ValueError(
      f"lowrank_dot: shapes do not fit: x {x.shape}, u {u.shape}, v {v.shape};"
      " expected x [..., in], u [in, R], v [R, out]"
    )
  u, v, rank = _prefix(u, v, rank, 0)
  rows = math.prod(x.shape[:-1])
  pays = rank is not None and switch.pays(rows, u.shape[0], v.shape[1])
  return _choose(implementation, pays).dot(
    x, u, v, rank, bias=bias, precision=precision
  )


def lowrank_conv(
  x: Float[Array, "batch *space n"],
  u: Float[Array, "*window R"],
  v: Float[Array, "*R m"],
  rank: Rank = None,
  *,
  strides: Sequence[int] | None = None,
  padding: str | Sequence[tuple[int, int]] = "SAME",
  input_dilation: Sequence[int] | None = None,
  kernel_dilation: Sequence[int] | None = None,
  groups: int = 1,
  bias: Float[Array, " c"] | None = None,
  precision: Any = None,
  implementation: str | None = None,
) -> Float[Array, "batch *out c"]:
  """Convolves to r channels with u, then maps them to the outputs with v.

  Args:
    x: inputs, channels last.
    u: [*window, in, R]; grouped: [G, *window, in / G, R].
    v: [R, out]; grouped: [G, R, out / G].
    rank: as for `lowrank_dot`; an array of shape [G] if grouped (or a scalar).
    strides: of the first convolution, one per spatial axis; None is 1.
    padding: "SAME", "VALID" or (low, high) per spatial axis.
    input_dilation: one per spatial axis; None is 1.
    kernel_dilation: one per spatial axis; None is 1.
    groups: G; output channels are group-major, as in `lax` and Flax.
    bias: [out], added to every pixel.
    precision: as for `lax.conv_general_dilated`.
    implementation: as for `lowrank_dot`; "switch" lays the windows side by side
      and multiplies them, which takes as much memory as the windows. None is
      never a switch.

  Returns:
    [batch, *out space, out]; its shape does not depend on the rank.
  """
  lead = 0 if groups == 1 else 1
  n = x.ndim - 2
  inputs = u.shape[-2] * groups if u.ndim >= 2 else None
  fits = (
    u.ndim == lead + n + 2
    and v.ndim == lead + 2
    and inputs == x.shape[-1]
    and v.shape[lead] == u.shape[-1]
    and (not lead or u.shape[0] == v.shape[0] == groups)
  )
  if not fits:
    raise ValueError(
      f"lowrank_conv: shapes do not fit: x {x.shape}, u {u.shape},"
      f" v {v.shape}, groups {groups}; expected u [*window, in, R] and v"
      " [R, out], with a leading axis of groups if there are several"
    )
  u, v, rank = _prefix(u, v, rank, lead)
  if lead and rank is not None:
    rank = jnp.broadcast_to(rank, (groups,))
  ones = (1,) * n
  return _choose(implementation, pays=False).conv(
    x,
    u,
    v,
    rank,
    strides=tuple(strides or ones),
    padding=padding,
    input_dilation=tuple(input_dilation or ones),
    kernel_dilation=tuple(kernel_dilation or ones),
    groups=groups,
    bias=bias,
    precision=precision,
  )
