"""Pallas kernels for TPUs of low-rank products of a rank known at run time.

Two of them make all of `maestro.ops.pallas_tpu`, over a leading axis of groups:

  chain   y = (a first_r) second_r + bias, and h = a first_r where training:
          the product, and, with the factors swapped and both transposed, the
          gradient for the inputs, dx = (g v_r^T) u_r^T
  wgrad   a^T c_r of h's gradient, du = x^T dh_r, or transposed, dv = h_r^T g

Ranks are prefetched as scalars: they bound the grid and pick the blocks that
are copied in, so that what lies beyond the rank's last block costs nothing. A
TPU walks through a grid in order, last axis fastest, and copies a block when
its index is not that of the step before; steps beyond a group's own rank thus
repeat the last index.

Blocks that stick out of an array are filled with anything, NaN too, as are
numbers beyond the rank: `where` masks them, a product with zero would not.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# What blocks and sums may take of a core's vector memory, beside intermediate
# values: a v4 has 16 MB, a v5e 128 MB.
_VMEM = 9 << 20


class Blocks(NamedTuple):
  """Sizes of the blocks into which a kernel cuts its arrays.

  An axis of at most its block's size is one block; else the sizes of rows are
  multiples of 16, the others of 128, as TPUs tile memory.
  """

  rows: int = 512
  a: int = 1024  # of the contracted channels
  rank: int = 128
  out: int = 1024


@dataclasses.dataclass(frozen=True)
class Kernel:
  """How kernels are built, beside the shapes.

  Attributes:
    transposed: see `chain` and `wgrad`.
    precision: of the products, "default" or "highest".
    interpret: as for `pl.pallas_call`.
    blocks: None chooses them by the shapes.
  """

  transposed: bool = False
  precision: lax.Precision = lax.Precision.DEFAULT
  interpret: Any = False
  blocks: Blocks | None = None

  def swapped(self) -> "Kernel":
    """The same for the transposed operands."""
    return dataclasses.replace(self, transposed=not self.transposed)


def _cut(most: Blocks, sizes: Blocks) -> Blocks:
  return Blocks(*(min(m, n) for m, n in zip(most, sizes, strict=True)))


def blocks_of(sizes: Blocks, itemsize: int, *, wgrad: bool = False) -> Blocks:
  """Chooses blocks that fit the memory beside the accumulators.

  Args:
    sizes: of the whole axes (rows, contracted channels, R, outputs); `wgrad`
      has no outputs.
    itemsize: bytes of a number.
    wgrad: whether it is for `wgrad`.
  """
  most = Blocks(rank=128 if sizes.rank <= 512 else 256)
  while True:
    found = _cut(most, sizes)
    fits = _held(found, sizes.rank, itemsize, wgrad) <= _VMEM
    if fits or (most.rows, most.a) == (16, 128):
      return found
    # The sums of `chain` are for its rows, those of `wgrad` for its channels.
    if most.a > 128 and (wgrad or most.a > most.rows or most.rows == 16):
      most = most._replace(a=most.a // 2, out=most.out // 2)
    else:
      most = most._replace(rows=most.rows // 2)


def _held(b: Blocks, full_rank: int, itemsize: int, wgrad: bool) -> int:
  """Bytes in vector memory: two of every block, and accumulators."""
  ranks = pl.cdiv(full_rank, b.rank) * b.rank
  if wgrad:
    moved = b.rows * (b.a + b.rank) + b.a * b.rank
    return 2 * itemsize * moved + 4 * b.a * ranks
  moved = b.rows * (b.a + b.out + b.rank) + b.rank * (b.a + b.out)
  return 2 * itemsize * moved + 4 * b.rows * (ranks + b.out)


def active_blocks(ranks: jax.Array, full_rank: int, block: int) -> jax.Array:
  """How many blocks hold numbers up to each rank; 1 at rank 0, too."""
  most = pl.cdiv(full_rank, block)
  return jnp.clip((ranks + (block - 1)) // block, 1, most).astype(jnp.int32)


def _inside(x: jax.Array, axis: int, first: Any, size: Any) -> jax.Array:
  """Zeroes what is at or beyond `size`, if x begins at `first` of the axis."""
  index = lax.broadcasted_iota(jnp.int32, x.shape, axis) + first
  return jnp.where(index < size, x, jnp.zeros((), x.dtype))


def _group(x: jax.Array) -> Callable[[Any], Any]:
  """The index of a group in an array that has an entry for each, or for all."""
  return (lambda g: 0) if x.shape[0] == 1 else (lambda g: g)


def _shape(shape: tuple[int, ...], like: jax.Array) -> jax.ShapeDtypeStruct:
  """An output's; within `jax.shard_map` it varies over what `like` does."""
  kind = getattr(jax.typeof(like), "manual_axis_type", None)
  if kind is None:
    return jax.ShapeDtypeStruct(shape, like.dtype)
  return jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=kind)


def _params(held: int) -> pltpu.CompilerParams:
  """Of a grid whose first two axes may run on two cores at once."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    vmem_limit_bytes=max(2 * held, 16 << 20),
  )


# ---------------------------------------------------------------------------
# y = (a first_r) second_r + bias
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChainGrid:
  """The steps of `chain`: (groups, rows, shrinking then growing, rank).

  Attributes:
    sizes: of the whole axes.
    blocks: into which they are cut.
    transposed: as for `chain`.
  """

  sizes: Blocks
  blocks: Blocks
  transposed: bool

  @property
  def counts(self) -> Blocks:
    return Blocks(*map(pl.cdiv, self.sizes, self.blocks))

  def _shrinking(self, p, k, active):
    """(block of the contraction, of the rank); it stays once y's turn comes."""
    n = self.counts.a
    return jnp.minimum(p, n - 1), jnp.where(
      p < n, jnp.minimum(k, active), active
    )

  def _growing(self, p, k, active):
    """(block of the rank, of the outputs); the first until y's turn comes."""
    n = self.counts.a
    k = jnp.where(p < n, 0, jnp.minimum(k, active))
    return k, jnp.maximum(p - n, 0)

  def a(self, g, b, p, k, active):
    return g, b, self._shrinking(p, k, active)[0]

  def first(self, g, b, p, k, active):
    i, k = self._shrinking(p, k, active)
    return (g, k, i) if self.transposed else (g, i, k)

  def second(self, g, b, p, k, active):
    k, j = self._growing(p, k, active)
    return (g, j, k) if self.transposed else (g, k, j)

  def bias(self, g, b, p, k, active):
    return g, 0, self._growing(p, k, active)[1]

  def y(self, g, b, p, k, active):
    return g, b, self._growing(p, k, active)[1]

  def h(self, g, b, p, k, active):
    """Moves on only when a block is complete, in the last shrinking step."""
    last = self.counts.a - 1
    k = jnp.minimum(k, active)
    return g, b, jnp.where(p < last, 0, jnp.where(p == last, k, active))

  def spec(self, name: str, array: Any, block: tuple[int, int]) -> Any:
    """The blocks of an operand (`array`), or of an output (None)."""
    index = getattr(self, name)

    def map_(g, b, p, k, ranks, actives):
      own = g if array is None else _group(array)(g)
      return index(own, b, p, k, actives[g] - 1)

    return pl.BlockSpec((None, *block), map_)


def _chain_kernel(ranks, actives, a, first, second, *refs, grid, how, bias):
  """One step; refs: (bias), y, (h), h's and y's accumulators."""
  given = refs[0] if bias else None
  y, *h, h_sum, y_sum = refs[bias:]
  g, p, k = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  rank, active = ranks[g], actives[g]
  sizes, blocks, n = grid.sizes, grid.blocks, grid.counts.a
  contracted = 1 if how.transposed else 0
  dot = functools.partial(
    lax.dot_general,
    dimension_numbers=(((1,), (contracted,)), ((), ())),
    precision=how.precision,
    preferred_element_type=jnp.float32,
  )

  @pl.when((p < n) & (k < active))
  def _():
    rows, factor = a[...], first[...]
    if sizes.a % blocks.a:
      rows = _inside(rows, 1, p * blocks.a, sizes.a)
      factor = _inside(factor, contracted, p * blocks.a, sizes.a)
    part = dot(rows, factor)
    if n > 1:
      part = jnp.where(p == 0, part, h_sum[k] + part)
    h_sum[k] = part

    @pl.when(p == n - 1)
    def _():
      done = _inside(part, 1, k * blocks.rank, rank)
      h_sum[k] = done
      for ref in h:
        ref[...] = done.astype(ref.dtype)

  @pl.when((p >= n) & (k < active))
  def _():
    factor = _inside(second[...], contracted, k * blocks.rank, rank)
    part = dot(h_sum[k].astype(factor.dtype), factor)
    y_sum[...] = jnp.where(k == 0, part, y_sum[...] + part)

    @pl.when(k == active - 1)
    def _():
      total = y_sum[...]
      if given is not None:
        total += given[...].astype(jnp.float32)
      y[...] = total.astype(y.dtype)


def chain(
  a: jax.Array,
  first: jax.Array,
  second: jax.Array,
  bias: jax.Array | None,
  ranks: jax.Array,
  how: Kernel,
  *,
  keep: bool,
) -> tuple[jax.Array, ...]:
  """Computes (a first_r) second_r + bias for each group.

  Operands other than the ranks may have one entry for all groups.

  Args:
    a: [G, rows, n].
    first: [G, n, R], or transposed [G, R, n].
    second: [G, R, m], or transposed [G, m, R].
    bias: [G, 1, m], or None.
    ranks: [G], int32, within [0, R].
    how: how to build it.
    keep: whether h = a first_r is returned, too.

  Returns:
    y [G, rows, m], and h [G, rows, R]: zero beyond the rank up to the end of
    the rank's last block, not written beyond it.
  """
  rows, n = a.shape[1:]
  axes = (1, 0) if how.transposed else (0, 1)
  full_rank, m = first.shape[1 + axes[1]], second.shape[1 + axes[1]]
  sizes = Blocks(rows, n, full_rank, m)
  blocks = _cut(how.blocks or blocks_of(sizes, a.dtype.itemsize), sizes)
  grid = ChainGrid(sizes, blocks, how.transposed)
  counts, groups = grid.counts, ranks.shape[0]
  actives = active_blocks(ranks, full_rank, blocks.rank)

  def factor(*block):
    return tuple(block[i] for i in axes)

  operands = [
    (a, "a", (blocks.rows, blocks.a)),
    (first, "first", factor(blocks.a, blocks.rank)),
    (second, "second", factor(blocks.rank, blocks.out)),
  ]
  if bias is not None:
    operands.append((bias, "bias", (1, blocks.out)))
  outputs = [("y", (groups, rows, m), (blocks.rows, blocks.out))]
  if keep:
    outputs.append(("h", (groups, rows, full_rank), (blocks.rows, blocks.rank)))
  held = _held(blocks, full_rank, a.dtype.itemsize, False)
  return pl.pallas_call(
    functools.partial(_chain_kernel, grid=grid, how=how, bias=bias is not None),
    out_shape=tuple(_shape(shape, a) for _, shape, _ in outputs),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(groups, counts.rows, counts.a + counts.out, jnp.max(actives)),
      in_specs=[grid.spec(name, x, block) for x, name, block in operands],
      out_specs=tuple(grid.spec(name, None, b) for name, _, b in outputs),
      scratch_shapes=[
        pltpu.VMEM((counts.rank, blocks.rows, blocks.rank), jnp.float32),
        pltpu.VMEM((blocks.rows, blocks.out), jnp.float32),
      ],
    ),
    compiler_params=_params(held),
    cost_estimate=_cost(groups * rows * (n + m), full_rank, a, first, second),
    interpret=how.interpret,
    name="maestro_chain",
  )(ranks, actives, *(x for x, *_ in operands))


def _cost(products: int, full_rank: int, *arrays: jax.Array) -> pl.CostEstimate:
  """As at half of the ranks, which is all that is known beforehand."""
  read = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
  return pl.CostEstimate(
    flops=products * full_rank, bytes_accessed=read, transcendentals=0
  )


# ---------------------------------------------------------------------------
# a^T c_r
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WgradGrid:
  """The steps of `wgrad`: (groups, tiles of channels, rows then zeros, rank).

  For each tile all of the rank's blocks are summed over the rows, so that `a`
  is read once. Then come steps that write zeros: `width` blocks of them a row.

  Attributes:
    sizes: of the whole axes; no outputs.
    blocks: into which they are cut.
    transposed: as for `wgrad`.
  """

  sizes: Blocks
  blocks: Blocks
  transposed: bool

  @property
  def counts(self) -> Blocks:
    return Blocks(*map(pl.cdiv, self.sizes, self.blocks))

  def dead(self, p, k, active, width):
    """Which block of the rank a step fills with zeros, once all are summed."""
    return active + (p - self.counts.rows) * width + k

  def a(self, g, i, p, k, active, width):
    return g, jnp.minimum(p, self.counts.rows - 1), i

  def c(self, g, i, p, k, active, width):
    n = self.counts.rows
    k = jnp.where(p < n, jnp.minimum(k, active - 1), active - 1)
    return g, jnp.minimum(p, n - 1), k

  def out(self, g, i, p, k, active, width):
    """Moves on only when a block is complete, from the last rows on."""
    n, most = self.counts.rows, self.counts.rank - 1
    summed = jnp.where(p < n - 1, 0, jnp.minimum(k, active - 1))
    dead = jnp.minimum(self.dead(p, k, active, width), most)
    k = jnp.where(p < n, summed, dead)
    return (g, k, i) if self.transposed else (g, i, k)

  def spec(self, name: str, array: Any, block: tuple[int, int]) -> Any:
    """The blocks of an operand (`array`), or of the output (None)."""
    index = getattr(self, name)

    def map_(g, i, p, k, ranks, actives, width):
      own = g if array is None else _group(array)(g)
      return index(own, i, p, k, actives[g], width[0])

    return pl.BlockSpec((None, *block), map_)


def _wgrad_kernel(ranks, actives, width, a, c, out, total, *, grid, how):
  """One step."""
  g, p, k = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  active = actives[g]
  sizes, blocks, n = grid.sizes, grid.blocks, grid.counts.rows

  @pl.when((p < n) & (k < active))
  def _():
    one, other = a[...], c[...]
    if sizes.rows % blocks.rows:
      one = _inside(one, 0, p * blocks.rows, sizes.rows)
      other = _inside(other, 0, p * blocks.rows, sizes.rows)
    if how.transposed:
      one, other = other, one
    part = lax.dot_general(
      one,
      other,
      (((0,), (0,)), ((), ())),
      precision=how.precision,
      preferred_element_type=jnp.float32,
    )
    if n > 1:
      part = jnp.where(p == 0, part, total[k] + part)
    total[k] = part

    @pl.when(p == n - 1)
    def _():
      axis = 0 if how.transposed else 1
      done = _inside(part, axis, k * blocks.rank, ranks[g])
      out[...] = done.astype(out.dtype)

  dead = grid.dead(p, k, active, width[0])

  @pl.when((p >= n) & (dead < grid.counts.rank))
  def _():
    out[...] = jnp.zeros_like(out)


def wgrad(
  a: jax.Array, c: jax.Array, ranks: jax.Array, how: Kernel
) -> jax.Array:
  """Computes a^T c_r, or transposed c_r^T a, for each group.

  Operands other than the ranks may have one entry for all groups.

  Args:
    a: [G, rows, n].
    c: [G, rows, R]; never read beyond the rank's last block.
    ranks: [G], int32, within [0, R].
    how: how to build it.

  Returns:
    [G, n, R], or transposed [G, R, n]: zero beyond the rank.
  """
  rows, n = a.shape[1:]
  groups, full_rank = ranks.shape[0], c.shape[2]
  sizes = Blocks(rows, n, full_rank, 1)
  chosen = blocks_of(sizes, a.dtype.itemsize, wgrad=True)
  blocks = _cut(how.blocks or chosen, sizes)
  grid = WgradGrid(sizes, blocks, how.transposed)
  counts = grid.counts
  actives = active_blocks(ranks, full_rank, blocks.rank)
  width = jnp.max(actives)
  dead = pl.cdiv(counts.rank - jnp.min(actives), width)

  def factor(*pair):
    return pair[::-1] if how.transposed else pair

  held = _held(blocks, full_rank, a.dtype.itemsize, True)
  return pl.pallas_call(
    functools.partial(_wgrad_kernel, grid=grid, how=how),
    out_shape=_shape((groups, *factor(n, full_rank)), a),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(groups, counts.a, counts.rows + dead, width),
      in_specs=[
        grid.spec("a", a, (blocks.rows, blocks.a)),
        grid.spec("c", c, (blocks.rows, blocks.rank)),
      ],
      out_specs=grid.spec("out", None, factor(blocks.a, blocks.rank)),
      scratch_shapes=[
        pltpu.VMEM((counts.rank, *factor(blocks.a, blocks.rank)), jnp.float32)
      ],
    ),
    compiler_params=_params(held),
    cost_estimate=_cost(groups * rows * n, full_rank, a, c),
    interpret=how.interpret,
    name="maestro_wgrad",
  )(ranks, actives, width[None], a, c)
