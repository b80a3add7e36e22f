"""Checks arguments and chooses the implementation of a low-rank product."""

import contextlib
import contextvars
import functools
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maestro.ops import pallas_tpu, switch, xla
from maestro.trees import check_rank

Rank = int | Int[Array, "*lead"] | np.integer | None
IMPLEMENTATIONS = {
  "xla": xla,
  "switch": switch,
  "pallas_tpu": pallas_tpu,
  "interpret": types.SimpleNamespace(
    dot=functools.partial(pallas_tpu.dot, interpret=True),
    conv=functools.partial(pallas_tpu.conv, interpret=True),
  ),
}

# What runs products of a traced rank whose cost follows it: where, and when it
# is worth it (of what is preferred; what is named is used in any case).
#
# | implementation | devices        | products of a traced rank               |
# |----------------|----------------|-----------------------------------------|
# | switch         | one CPU        | dense, >= 2^15 weights, few rows        |
# | pallas_tpu     | TPUs           | dense and 1 x 1, R >= 256, below        |
# |                |                | break-even, >= 128 rows, in and out     |
# | xla            | all others     | all others                              |
_DEVICES = {("cpu", False): "switch"}
_DEVICES |= {("tpu", several): "pallas_tpu" for several in (False, True)}

_preferred: contextvars.ContextVar[str] = contextvars.ContextVar(
  "preferred", default="xla"
)


@contextlib.contextmanager
def prefer(
  implementation: str,
  *,
  mesh: jax.sharding.Mesh | None = None,
  rows: tuple[str, ...] = (),
) -> Iterator[None]:
  """Products that are traced within use this one where it pays.

  Those that name an implementation keep theirs. "xla" is everyone's default:
  it has all derivatives, and its products divide over devices. Of a traced rank
  "switch" pays for dense layers on one CPU device, see `switch.pays`, and
  "pallas_tpu" on TPUs, see `pallas_tpu.pays`; their cost follows the rank.

  Args:
    implementation: see `lowrank_dot`.
    mesh: of the devices over which rows are divided; kernels cannot tell.
    rows: its axes that divide them.

  Raises:
    ValueError: there is none of this name.
  """
  token = _preferred.set(_known(implementation))
  try:
    if mesh is None or mesh.size == 1:
      yield
    else:
      with pallas_tpu.divided(mesh, rows):
        yield
  finally:
    _preferred.reset(token)


def follows_rank(platform: str, devices: int = 1) -> str:
  """What to prefer where ranks fall as a program runs; "xla" has nothing.

  Args:
    platform: "cpu", "gpu" or "tpu".
    devices: over which rows are divided.
  """
  return _DEVICES.get((platform, devices > 1), "xla")


def _known(implementation: str) -> str:
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r} is unknown; use None (choose) or one"
      f" of {sorted(IMPLEMENTATIONS)}"
    )
  return implementation


class _Sizes(NamedTuple):
  """Of a product x u_r v_r of a traced rank, and how it is computed."""

  rows: Any
  n_in: int
  full_rank: int
  n_out: int
  dtype: Any
  precision: Any


def _pays(implementation: str, sizes: _Sizes, conv: bool) -> bool:
  """Whether it is worth to prefer this one over "xla"."""
  if implementation == "switch":
    return not conv and switch.pays(sizes.rows, sizes.n_in, sizes.n_out)
  return implementation != "pallas_tpu" or pallas_tpu.pays(*sizes)


def _choose(
  implementation: str | None, sizes: _Sizes | None, conv: bool = False
) -> Any:
  """The module of an implementation; None is what is preferred and pays."""
  if implementation is None:
    implementation = _preferred.get()
    if sizes is None or not _pays(implementation, sizes, conv):
      implementation = "xla"
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
    implementation: "xla" masks a traced rank, at the cost of the full one; the
      others have first derivatives by reverse mode only, and a cost that
      follows the rank: "switch" runs at the next of a few static ranks,
      "pallas_tpu" by kernels for TPUs, of float32 or bfloat16 (elsewhere by
      masks), "interpret" by the same kernels, slowly, on any device. None is
      "xla", or what `prefer` says. A static rank is sliced in any case.
  """
  if x.shape[-1] != u.shape[0] or u.shape[1] != v.shape[0]:
    raise ValueError(
      f"lowrank_dot: shapes do not fit: x {x.shape}, u {u.shape}, v {v.shape};"
      " expected x [..., in], u [in, R], v [R, out]"
    )
  u, v, rank = _prefix(u, v, rank, 0)
  sizes = None
  if rank is not None:
    rows, dtype = math.prod(x.shape[:-1]), jnp.result_type(x, u, v)
    (n_in, full_rank), n_out = u.shape, v.shape[1]
    sizes = _Sizes(rows, n_in, full_rank, n_out, dtype, precision)
  return _choose(implementation, sizes).dot(
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
      and multiplies them, which takes as much memory as the windows; kernels
      are for windows of one pixel without groups, others are masked. None is
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
  sizes = None
  if rank is not None and not lead and math.prod(u.shape[:-2]) == 1:
    rows = math.prod(x.shape[:-1]) // math.prod(strides or ones)
    dtype = jnp.result_type(x, u, v)
    (n_in, full_rank), n_out = u.shape[-2:], v.shape[-1]
    sizes = _Sizes(rows, n_in, full_rank, n_out, dtype, precision)
  return _choose(implementation, sizes, conv=True).conv(
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
