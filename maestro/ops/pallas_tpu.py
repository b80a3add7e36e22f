"""Low-rank products on TPUs whose cost follows a rank known only at run time.

The kernels of `maestro.ops.tpu_kernels` neither read nor multiply blocks beyond
the rank:

  y = (x u_r) v_r + b        h = x u_r         dh = g v_r^T
  dx = dh u_r^T              du_r = x^T dh     dv_r = h^T g

One compilation serves all ranks. Beyond the rank, du and dv are zero to the
bit, and numbers of u and v, NaN too, are never used. Sums are in float32; h and
dh are rounded to the type of the factors, as between two products of XLA.

Where a program is compiled for something else than TPUs, masks take the place
of the kernels. There is no forward mode and there are no second derivatives;
`maestro.ops.xla` has them. Under `vmap` ranks may differ: the batch becomes an
axis of the kernels' grids. Rows may be divided over devices (`divided`): each
computes its own, and the factors' gradients are summed over all.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from maestro.ops import xla
from maestro.ops.cpu import unroll

TYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
_BLOCK = 128  # of the rank: ranks of one block cost the same


class _Divided(NamedTuple):
  """Which axes of a mesh divide the rows of products."""

  mesh: jax.sharding.Mesh
  axes: tuple[str, ...]

  @property
  def size(self) -> int:
    return math.prod(self.mesh.shape[name] for name in self.axes)


_divided = contextvars.ContextVar[_Divided | None]("divided", default=None)


@contextlib.contextmanager
def divided(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> Iterator[None]:
  """Products that are traced within run on each device with its own rows.

  XLA does not look into a kernel, and would gather all rows on every device.
  (JAX's `custom_partitioning`, by which a kernel could tell it, is not
  implemented for TPUs: https://github.com/jax-ml/jax/issues/38196.) Within
  `jax.shard_map` rows are divided already, and this has no effect.

  Args:
    mesh: of devices; factors are whole on each of them.
    axes: over which rows are divided; a number of rows which does not divide
      is computed whole on every device.
  """
  token = _divided.set(_Divided(mesh, axes))
  try:
    yield
  finally:
    _divided.reset(token)


def _precision(precision: Any, dtype: Any) -> lax.Precision:
  """The kernels': one pass of bfloat16 by default, or as exact as float32.

  Products of bfloat16 numbers are exact in float32 in any case.

  Raises:
    ValueError: it is none of `lax.Precision`, the same for both factors.
  """
  if precision is None:
    config: Any = jax.config
    precision = config.jax_default_matmul_precision
  if isinstance(precision, tuple | list) and len(set(precision)) == 1:
    precision = precision[0]
  precision = lax.Precision(precision or "default")
  if precision == lax.Precision.DEFAULT or dtype != jnp.float32:
    return lax.Precision.DEFAULT
  return lax.Precision.HIGHEST


def pays(
  rows: Any, n_in: int, full_rank: int, n_out: int, dtype: Any, precision: Any
) -> bool:
  """Whether kernels can, and do less than masks except in R's last block.

  By counting, not by measurement: R holds several blocks, so that there is
  something to skip; masks would take two products too (`xla.multiply_out`); and
  there are rows enough to fill the matrix units. A batch of unknown size
  (`jax.export`) is too small.
  """
  try:
    _precision(precision, dtype)
  except ValueError:
    return False
  return (
    dtype in TYPES
    and isinstance(rows, int)
    and min(rows, n_in, n_out) >= _BLOCK
    and full_rank >= 2 * _BLOCK
    and not xla.multiply_out(rows, n_in, full_rank, n_out)
  )


# ---------------------------------------------------------------------------
# The kernels' operations, [G, ..] arrays: on TPUs, or by masks
# ---------------------------------------------------------------------------


def _kernels() -> Any:
  from maestro.ops import tpu_kernels  # Pallas takes a while to import

  return tpu_kernels


def _cut(x: jax.Array, axis: int, ranks: jax.Array) -> jax.Array:
  """Zeroes what is beyond each group's rank along an axis of [G or 1, ..]."""
  index = lax.broadcasted_iota(jnp.int32, (1, *x.shape[1:]), axis)
  live = index < ranks[:, None, None]
  return jnp.where(live, x, jnp.zeros((), x.dtype))


def _chain_by_masks(a, first, second, bias, ranks, how, *, keep):
  """As `tpu_kernels.chain`."""
  product = functools.partial(jnp.matmul, precision=how.precision)
  first = _cut(first, 1 if how.transposed else 2, ranks)
  second = _cut(second, 2 if how.transposed else 1, ranks)
  if how.transposed:
    first, second = first.mT, second.mT
  h = product(a, first)
  y = product(h, second)
  y = y if bias is None else y + bias
  return (y, h) if keep else (y,)


def _wgrad_by_masks(a, c, ranks, how):
  """As `tpu_kernels.wgrad`."""
  a, c = (c, a) if how.transposed else (a, c)
  product = jnp.matmul(a.mT, c, precision=how.precision)
  return _cut(product, 1 if how.transposed else 2, ranks)


def _for_platform(kernel: Callable, masks: Callable, how: Any) -> Callable:
  """Either, as the program is compiled for a TPU or for something else."""
  if how.interpret:
    return kernel

  def run(*args):
    return lax.platform_dependent(*args, tpu=kernel, default=masks)

  return run


def _chain(a, first, second, bias, rank, how, over, *, keep):
  """y, and h if it is kept, of two-dimensional arrays and a scalar rank."""
  given = () if bias is None else (bias[None],)

  def adapt(form):
    def run(a, first, second, *rest):
      *given, ranks = rest
      bias = given[0] if given else None
      return form(a, first, second, bias, ranks, how, keep=keep)

    return run

  run = _for_platform(adapt(_kernels().chain), adapt(_chain_by_masks), how)
  run = _over_devices(run, over, summed=False)
  out = _over_groups(run, rows_fold=over is None)(
    *(x[None] for x in (a, first, second)), *given, rank[None]
  )
  return tuple(x[0] for x in out)


def _wgrad(a, c, rank, how, over):
  def adapt(form):
    return lambda a, c, ranks: (form(a, c, ranks, how),)

  run = _for_platform(adapt(_kernels().wgrad), adapt(_wgrad_by_masks), how)
  run = _over_devices(run, over, summed=True)
  (out,) = _over_groups(run, rows_fold=False)(a[None], c[None], rank[None])
  return out[0]


# ---------------------------------------------------------------------------
# Batches of products, and of devices
# ---------------------------------------------------------------------------


def _over_groups(run: Callable, rows_fold: bool) -> Callable:
  """Under `vmap`, `run` gets more groups; if just its rows differ, more rows.

  Args:
    run: takes arrays [G or 1, ..], the last one the ranks [G]; returns a tuple
      of [G, ..].
    rows_fold: whether axis 1 of the first argument and of the outputs are rows,
      each of which is computed alone, all on one device.
  """

  @custom_vmap
  def call(*args):
    return run(*args)

  @call.def_vmap
  def _(size, in_batched, *args):
    first, *rest = args
    groups = args[-1].shape[-1]
    alone = in_batched[0] and not any(in_batched[1:])
    if rows_fold and groups == 1 and alone:
      rows = first.shape[2]
      folded = first.reshape((1, size * rows, *first.shape[3:]))
      out = call(folded, *rest)
      shapes = [(size, 1, rows, *x.shape[2:]) for x in out]
    else:
      merged = [
        _merge(x, batched, size, groups, i == len(rest))
        for i, (x, batched) in enumerate(zip(args, in_batched, strict=True))
      ]
      out = call(*merged)
      shapes = [(size, groups, *x.shape[1:]) for x in out]
    out = tuple(x.reshape(s) for x, s in zip(out, shapes, strict=True))
    return out, (True,) * len(out)

  return call


def _merge(x, batched: bool, size: int, groups: int, every: bool) -> jax.Array:
  """[size, G or 1, ..] or [G or 1, ..] to [size G, ..].

  What all share stays [1, ..], unless `every` group is to have an entry.
  """
  if not batched and x.shape[0] == 1 and not every:
    return x
  rest = x.shape[1 + batched :]
  x = x if batched else x[None]
  return jnp.broadcast_to(x, (size, groups, *rest)).reshape((-1, *rest))


def _over_devices(run: Callable, over: Any, summed: bool) -> Callable:
  """Divides rows, axis 1, over devices.

  Args:
    run: as for `_over_groups`.
    over: which (`_Divided`), or None.
    summed: whether outputs are sums over the rows of the first two arguments;
      else they have the rows of the first one.
  """
  if over is None:
    return run
  rows = jax.P(None, over.axes)

  def local(*args):
    out = run(*args)
    return lax.psum(out, over.axes) if summed else out

  def call(*args):
    if args[0].shape[1] % over.size:
      return run(*args)  # all of them on every device
    many = 2 if summed else 1
    return jax.shard_map(
      local,
      mesh=over.mesh,
      in_specs=(rows,) * many + (jax.P(),) * (len(args) - many),
      out_specs=jax.P() if summed else rows,
      check_vma=False,
    )(*args)

  return call


# ---------------------------------------------------------------------------
# The product and its gradients
# ---------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _dot(x, u, v, bias, rank, how, over):
  return _chain(x, u, v, bias, rank, how, over, keep=False)[0]


def _dot_forward(x, u, v, bias, rank, how, over):
  y, h = _chain(x, u, v, bias, rank, how, over, keep=True)
  return y, (x, u, v, bias, rank, h)


def _dot_backward(how, over, saved, g):
  x, u, v, bias, rank, h = saved
  back = how.swapped()
  dx, dh = _chain(g, v, u, None, rank, back, over, keep=True)
  du = _wgrad(x, dh, rank, how, over)
  dv = _wgrad(g, h, rank, back, over)
  db = None
  if bias is not None:
    db = jnp.sum(g, 0, dtype=jnp.float32, keepdims=True).astype(bias.dtype)
  return dx, du, dv, db, np.zeros(jnp.shape(rank), jax.dtypes.float0)


_dot.defvjp(_dot_forward, _dot_backward)


def _together(*arrays: Any) -> list[Any]:
  """Within `jax.shard_map`, lets all arrays vary over what any of them does.

  So that a factor which all devices share gets the sum of their gradients.
  """
  kinds = [
    getattr(jax.typeof(x), "manual_axis_type", None)
    for x in arrays
    if x is not None
  ]
  axes = frozenset().union(*(k.varying for k in kinds if k is not None))

  def varying(x):
    if x is None or not axes:
      return x
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(sorted(missing)), to="varying")

  return [varying(x) for x in arrays]


def dot(
  x, u, v, rank, *, bias, precision, interpret: Any = False, blocks: Any = None
):
  """See `maestro.ops.lowrank_dot`; rank is None or an int32 scalar.

  Args:
    x: [.., in].
    u: [in, R].
    v: [R, out].
    rank: see there.
    bias: see there.
    precision: see there; "high" counts as "highest".
    interpret: runs the kernels without a TPU, as for `pallas.pallas_call`.
    blocks: sizes of the kernels' blocks (`tpu_kernels.Blocks`); None chooses.

  Raises:
    ValueError: the types or the precision are none of the kernels'.
  """
  rows = math.prod(x.shape[:-1])
  sizes = (rows, *u.shape, v.shape[1])
  if rank is None or not isinstance(rows, int) or 0 in sizes:
    return xla.dot(x, u, v, rank, bias=bias, precision=precision)
  dtype = jnp.result_type(x, u, v)
  if dtype not in TYPES:
    raise ValueError(
      f"lowrank_dot: the kernels multiply float32 or bfloat16, not {dtype}; use"
      " implementation='xla'"
    )
  try:
    exact = _precision(precision, dtype)
  except ValueError as error:
    raise ValueError(
      f"lowrank_dot: precision={precision!r} is not known to the kernels; use"
      " 'default' or 'highest', or implementation='xla'"
    ) from error
  how = _kernels().Kernel(precision=exact, interpret=interpret, blocks=blocks)
  within = bias if bias is not None and bias.dtype == dtype else None
  y: Any = _dot(
    *_together(
      x.reshape((rows, x.shape[-1])).astype(dtype),
      u.astype(dtype),
      v.astype(dtype),
      None if within is None else within[None],
    ),
    jnp.asarray(rank, jnp.int32),
    how,
    None if jax.sharding.get_abstract_mesh().manual_axes else _divided.get(),
  )
  y = y.reshape((*x.shape[:-1], v.shape[1]))
  return y if within is not None else xla.add_bias(y, bias)


def conv(x, u, v, rank, *, groups, bias, precision, interpret=False, **windows):
  """See `maestro.ops.lowrank_conv`: windows of one pixel by `dot`.

  Others, and groups, are masked: most of their time is in the convolution to
  the rank's channels, for which there is no kernel.
  """
  if rank is None or groups > 1 or math.prod(u.shape[:-2]) > 1:
    options = {"groups": groups, "bias": bias, "precision": precision}
    return xla.conv(x, u, v, rank, **options, **windows)
  x = unroll(x, u.shape[:-2], **windows)
  options = {"bias": bias, "precision": precision, "interpret": interpret}
  return dot(x, u.reshape(u.shape[-2:]), v, rank, **options)
