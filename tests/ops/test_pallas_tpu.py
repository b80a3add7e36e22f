"""Products by kernels for TPUs, in their interpreters, and transformed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from maestro import ops
from maestro.ops import pallas_tpu
from maestro.ops.tpu_kernels import Blocks

# (rows, in, R, out) and the kernels' blocks: such as divide all axes, and such
# as leave a rest of each; one block of everything, of one row; rank one.
CASES = {
  "divided": ((16, 24, 16, 16), Blocks(8, 8, 4, 8)),
  "rests": ((13, 11, 13, 19), Blocks(8, 4, 4, 8)),
  "one block": ((1, 7, 5, 11), None),
  "rank one": ((5, 4, 1, 3), None),
}
masked = functools.partial(ops.lowrank_dot, implementation="xla")
dot = functools.partial(ops.lowrank_dot, implementation="interpret")
by_masks = functools.partial(ops.lowrank_dot, implementation="pallas_tpu")


def kernels(case, **options):
  """The product by kernels with a case's blocks, as `ops.lowrank_dot`.

  With interpret=False by the masks that take their place on CPUs.
  """
  options = {"interpret": True, "blocks": CASES[case][1]} | options

  def dot(x, u, v, rank, *, bias=None):
    rank = jnp.clip(rank, 0, u.shape[1])
    kind = {"bias": bias, "precision": None}
    return pallas_tpu.dot(x, u, v, rank, **kind, **options)

  return dot


def ranks_of(full_rank, block):
  """0, 1, R, and both sides of the edges between blocks."""
  edges = range(block, full_rank + 1, block)
  near = [e + d for e in edges for d in (-1, 0, 1)]
  return sorted({0, 1, *(r for r in near if r <= full_rank), full_rank})


def arrays(shape, dtype=np.float32):
  rows, n_in, full_rank, n_out = shape
  rng = np.random.default_rng(0)
  sizes = (rows, n_in), (n_in, full_rank), (full_rank, n_out), (rows, n_out)
  return tuple(
    jnp.asarray(rng.standard_normal(size), dtype) for size in (*sizes, (n_out,))
  )


def reference(x, u, v, g, bias, rank):
  """y, dx, du, dv, db in float64."""
  x, u, v, g, bias = (np.asarray(a, np.float64) for a in (x, u, v, g, bias))
  full_rank, u, v = u.shape[1], u[:, :rank], v[:rank]
  beyond = (0, full_rank - rank)
  du = np.pad(x.T @ (g @ v.T), ((0, 0), beyond))
  dv = np.pad((x @ u).T @ g, (beyond, (0, 0)))
  return x @ u @ v + bias, (g @ v.T) @ u.T, du, dv, g.sum(0)


def both_ways(dot, x, u, v, g, bias, rank):
  """The output y, and the gradients of <y, g>."""
  y, back = jax.vjp(
    lambda x, u, v, b: dot(x, u, v, rank, bias=b), x, u, v, bias
  )
  return y, *back(g)


def check(found, wanted, rank, bar):
  for name, a, b in zip(
    ("y", "dx", "du", "dv", "db"), found, wanted, strict=True
  ):
    a = np.asarray(a, np.float64)
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    assert a.shape == b.shape and error <= bar, (name, rank, error)
  du, dv = (np.asarray(a, np.float32) for a in found[2:4])
  assert not du[:, rank:].any() and not dv[rank:].any(), rank  # to the bit


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  ("case", "dtype", "interpret"),
  [
    ("divided", "float32", True),
    ("rests", "float32", True),
    ("rests", "bfloat16", True),
    ("one block", "bfloat16", True),
    ("rank one", "float32", True),
    ("rests", "float32", False),
    ("rests", "bfloat16", False),
  ],
)
def test_outputs_and_gradients_at_every_rank(
  case, dtype, interpret, jit, counted
):
  shape, blocks = CASES[case]
  x, u, v, g, bias = arrays(shape, dtype)
  form = kernels(case, interpret=interpret)
  traced = counted(functools.partial(both_ways, form))
  run = jit(traced)
  bar = 1e-5 if dtype == "float32" else 1e-2
  poisons = itertools.cycle((np.nan, np.inf))
  for rank in ranks_of(shape[2], blocks.rank if blocks else shape[2]):
    poison = next(poisons)  # beyond the rank
    dirty = u.at[:, rank:].set(poison), v.at[rank:].set(poison)
    found = run(x, *dirty, g, bias, jnp.int32(rank))
    assert {a.dtype for a in found} == {jnp.dtype(dtype)}
    check(found, reference(x, u, v, g, bias, rank), rank, bar)
  for given, rank in ((99, shape[2]), (-2, 0)):  # clipped
    found = run(x, u, v, g, bias, jnp.int32(given))
    check(found, reference(x, u, v, g, bias, rank), rank, bar)
  assert traced.times == 1


@pytest.mark.parametrize("interpret", [True, False])
def test_gradients_beyond_the_rank_are_zero_though_inputs_overflow(
  interpret, jit
):
  x, u, v, g, bias = arrays(CASES["divided"][0])
  form = kernels("divided", interpret=interpret)
  run = jit(functools.partial(both_ways, form))
  x, g = x.at[3, 2].set(np.inf), g.at[5, 1].set(np.nan)
  for rank in (0, 3, 6):
    _, _, du, dv, _ = run(x, u, v, g, bias, jnp.int32(rank))
    assert not np.any(du[:, rank:]) and not np.any(dv[rank:])


def test_the_interpreter_of_tpus_agrees_and_steps_as_the_rank(jit):
  """It has a TPU's memories, whose numbers are NaN until they are written."""
  shape, blocks = (3, 3, 4, 3), Blocks(2, 3, 1, 3)
  x, u, v, g, bias = arrays(shape)
  steps = []

  def record(token, *step):
    steps.append(step)
    return token

  mode = pltpu.InterpretParams(
    uninitialized_memory="nan",
    grid_point_recorder=record,
  )

  def dot(x, u, v, rank, *, bias):
    kind = {"bias": bias, "precision": None, "blocks": blocks}
    return pallas_tpu.dot(x, u, v, rank, interpret=mode, **kind)

  run = jit(functools.partial(both_ways, dot))
  counts = {}
  for rank in (1, 3):
    steps.clear()
    dirty = u.at[:, rank:].set(np.nan), v.at[rank:].set(np.nan)
    found = jax.block_until_ready(run(x, *dirty, g, bias, jnp.int32(rank)))
    check(found, reference(x, u, v, g, bias, rank), rank, 1e-5)
    counts[rank] = len(steps)
  # Two chains of 2 x 2 steps a block, two sums of 2; zeros are not summed.
  assert counts == {r: 8 * r + 2 * (2 + -(-(4 - r) // r)) * r for r in counts}


# ---------------------------------------------------------------------------
# Transformations
# ---------------------------------------------------------------------------


def alike(a, b, tolerance=2e-4):
  for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert one.shape == other.shape and one.dtype == other.dtype
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def batched(axes, shape, counts):
  """Arrays (x, u, v, g, bias, rank) with leading axes where `axes` say."""
  rng = np.random.default_rng(1)
  rows, n_in, full_rank, n_out = shape
  sizes = (rows, n_in), (n_in, full_rank), (full_rank, n_out), (rows, n_out)
  args = []
  for i, size in enumerate((*sizes, (n_out,), ())):
    lead = [n for n, a in zip(counts, axes, strict=True) if a[i] == 0]
    x = rng.standard_normal((*lead, *size))
    if i == 5:
      x = np.arange(x.size, dtype=np.int32).reshape(x.shape) * 5 % full_rank
      x = x if lead else 6
    args.append(jnp.asarray(x, jnp.int32 if i == 5 else jnp.float32))
  return args


@pytest.mark.parametrize(
  "axes",
  [
    (0, None, None, 0, None, None),  # more rows
    (0, None, 0, 0, None, 0),  # groups
  ],
)
def test_vmap_and_gradients_under_it(axes, jit):
  args = batched([axes], (9, 6, 10, 5), (3,))

  def run(dot):
    return jit(jax.vmap(functools.partial(both_ways, dot), axes))(*args)

  alike(run(kernels("rests")), run(masked))


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  "outer",
  [(0, None, None, 0, None, 0), (0,) * 6, (None,) * 5 + (0,)],
)
@pytest.mark.parametrize(
  "inner", [(None, 0, 0, None, 0, None), (0, None, 0, 0, None, 0)]
)
def test_vmap_twice(outer, inner, jit):
  args = batched([outer, inner], (6, 8, 5, 7), (3, 4))

  def run(dot):
    twice = jax.vmap(jax.vmap(functools.partial(both_ways, dot), inner), outer)
    return jit(twice)(*args)

  alike(run(by_masks), run(masked))


def test_rows_under_vmap_are_more_rows_and_the_rest_a_grid_of_groups():
  x, u, v, *_ = arrays((4, 6, 5, 7))
  rank = jnp.int32(3)

  def text(axes, *args):
    return str(jax.make_jaxpr(jax.vmap(dot, axes))(*args))

  folded = text((0, None, None, None), jnp.stack([x] * 3), u, v, rank)
  assert "f32[1,12,6]" in folded and folded.count("pallas_call[") == 1
  many = text((None, None, None, 0), x, u, v, jnp.arange(3, dtype=jnp.int32))
  assert "f32[3,4,7]" in many and many.count("pallas_call[") == 1
  assert "f32[3,6,5]" not in many  # the factors are not copied


def test_scan_and_remat(jit):
  rng = np.random.default_rng(0)
  x, u, v = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((6, 8), (4, 8, 5), (4, 5, 8))
  )
  ranks = jnp.asarray([0, 2, 5, 3], jnp.int32)

  def run(dot):
    def layer(x, w):
      return jnp.tanh(x + dot(x, *w)), None

    def total(u, v):
      body = jax.checkpoint(layer)
      return jnp.sum(jax.lax.scan(body, x, (u, v, ranks))[0] ** 2)

    return jit(jax.value_and_grad(total, (0, 1)))(u, v)

  alike(run(dot), run(masked), 2e-5)


def collectives(text):
  return {
    kind: sum(f" {kind}(" in line for line in text.splitlines())
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
  }


@pytest.mark.quick(0)
def test_rows_over_devices_stay_where_they_are(jit):
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  rows, whole = (jax.NamedSharding(mesh, jax.P(*a)) for a in (["data"], []))
  args = (*arrays((16, 8, 6, 4)), jnp.int32(3))
  shardings = (rows, whole, whole, rows, whole, whole)
  args = jax.device_put(args, shardings)

  # A function of its own: what is preferred is no part of JAX's cache.
  prefer = ops.prefer("xla", mesh=mesh, rows=("data",))
  run = prefer(functools.partial(both_ways, dot))
  traced = jit(lambda *args: run(*args)).trace(*args)
  assert "f32[1,4,8]" in str(traced.jaxpr)  # a quarter of x
  divided = traced.lower().compile()
  found = collectives(divided.as_text())
  assert found.pop("all-reduce") in (1, 2, 3)  # of du, dv and db
  assert not any(found.values())
  alike(divided(*args), both_ways(masked, *args), 2e-5)
  for a in divided(*args)[:2]:
    assert a.sharding.is_equivalent_to(rows, 2)

  odd = (args[0][:6], *args[1:3], args[3][:6], *args[4:])  # 6 rows, 4 devices
  alike(jit(run)(*odd), both_ways(masked, *odd), 2e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("form", "check_vma"), [(dot, True), (by_masks, True), (by_masks, False)]
)
def test_within_shard_map(form, check_vma, jit):
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  args = (*arrays((16, 8, 6, 4)), jnp.int32(3))
  row, whole = jax.P("data"), jax.P()

  def run(dot):
    def part(x, u, v, g, bias, rank):
      y = dot(x, u, v, rank, bias=bias)
      return jax.lax.psum(jnp.sum(y * g), "data")

    total = jax.shard_map(
      part,
      mesh=mesh,
      in_specs=(row, whole, whole, row, whole, whole),
      out_specs=whole,
      check_vma=check_vma,
    )
    return jit(jax.grad(total, (0, 1, 2, 4)))(*args)

  alike(run(form), both_ways(masked, *args)[1:], 2e-5)


def test_derivatives_that_there_are_not_are_left_to_xla():
  x, u, v, *_ = arrays((6, 8, 5, 7))
  rank = jnp.int32(3)
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(lambda x: by_masks(x, u, v, rank), (x,), (x,))


# ---------------------------------------------------------------------------
# Arguments, convolutions, the choice
# ---------------------------------------------------------------------------


def test_leading_axes_and_static_ranks_are_as_for_masks():
  x, u, v, _, bias = arrays((6, 8, 5, 7))
  x = x.reshape((2, 3, 8))
  for form in (by_masks, dot):
    for rank in (None, 0, 3, 5, jnp.int32(3)):
      alike(form(x, u, v, rank, bias=bias), masked(x, u, v, rank, bias=bias))
  found = str(jax.make_jaxpr(lambda *a: dot(*a, 3))(x, u, v))
  assert "pallas_call" not in found and found.count("dot_general") == 2


@pytest.mark.quick(2)
@pytest.mark.parametrize(
  "shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 3, 0), (2, 4, 0, 5)]
)
def test_nothing_to_multiply_gives_what_masks_give(shape):
  args = (*arrays(shape), jnp.int32(0))
  alike(both_ways(dot, *args), both_ways(masked, *args))


@pytest.mark.mixed_types
@pytest.mark.parametrize(
  "types",
  [
    ("bfloat16", "float32", "float32", "bfloat16"),
    ("float32", "bfloat16", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16", "float32"),
  ],
)
def test_types_are_mixed_as_by_masks(types, jit):
  x, u, v, _, bias = arrays((6, 8, 5, 7))
  args = [a.astype(t) for a, t in zip((x, u, v, bias), types, strict=True)]

  def run(form):
    def total(x, u, v, bias):
      y = form(x, u, v, jnp.int32(3), bias=bias)
      return jnp.sum(y.astype(jnp.float32)), y

    return jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(*args)

  (one, y), (other, z) = run(by_masks), run(masked)
  for a, b in zip((*one, y), (*other, z), strict=True):
    assert a.dtype == b.dtype
    a, b = (n.astype(jnp.float32) for n in (a, b))
    np.testing.assert_allclose(a, b, rtol=0.05, atol=0.1)


def test_types_and_precisions_that_kernels_have_not_are_refused():
  x, u, v, *_ = arrays((6, 8, 5, 7))
  rank = jnp.int32(3)
  with pytest.raises(ValueError, match=r"not float16; use impl.*='xla'"):
    by_masks(*(a.astype(jnp.float16) for a in (x, u, v)), rank)
  for precision in (("highest", "default"), "BF16_BF16_F32_X6"):
    with pytest.raises(ValueError, match=r"precision=.*use\s+'default' or"):
      by_masks(x, u, v, rank, precision=precision)

  def exact(*args, **options):
    text = str(jax.make_jaxpr(lambda *args: dot(*args, **options))(*args))
    return "Precision.HIGHEST" in text

  assert not exact(x, u, v, rank)
  assert exact(x, u, v, rank, precision="high")
  with jax.default_matmul_precision("highest"):
    assert exact(x, u, v, rank)
    assert not exact(*(a.astype(jnp.bfloat16) for a in (x, u, v)), rank)


def test_a_batch_of_unknown_size_can_be_exported():
  x, u, v, _, bias = arrays((6, 8, 5, 7))
  (rows,) = jax.export.symbolic_shape("b")
  exported = jax.export.export(jax.jit(by_masks))(
    jax.ShapeDtypeStruct((rows, 8), jnp.float32),
    u,
    v,
    jax.ShapeDtypeStruct((), jnp.int32),
    bias=bias,
  )
  rank = jnp.int32(3)
  found = exported.call(x, u, v, rank, bias=bias)
  alike(found, masked(x, u, v, rank, bias=bias))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
  ("window", "options"),
  [
    ((1, 1), {}),
    ((1, 1), {"strides": (2, 1), "padding": [(1, 0), (0, 1)]}),
    ((2, 3), {"input_dilation": (2, 1), "padding": [(0, 1), (1, 1)]}),
  ],
)
def test_convolutions_are_those_of_masks(window, options, groups, jit):
  rng = np.random.default_rng(0)
  lead = () if groups == 1 else (groups,)
  x, u, v = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in (
      (2, 5, 4, 4),
      (*lead, *window, 4 // groups, 5),
      (*lead, 5, 6 // groups),
    )
  )

  def run(implementation):
    def total(x, u, v, rank):
      kind = {"groups": groups, "implementation": implementation}
      y = ops.lowrank_conv(x, u, v, rank, **kind, **options)
      return jnp.sum(jnp.sin(y)), y

    return total, jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

  (total, one), (_, other) = run("interpret"), run("xla")
  for rank in (0, 3):
    rank = jnp.int32(rank)
    alike(one(x, u, v, rank), other(x, u, v, rank))
  text = str(jax.make_jaxpr(total)(x, u, v, jnp.int32(3)))
  assert ("pallas_call" in text) == (window == (1, 1) and groups == 1)


def test_what_is_preferred_is_used_where_it_pays():
  rank = jax.ShapeDtypeStruct((), jnp.int32)

  def uses(shape, dtype="float32", rank=rank, dot=ops.lowrank_dot, **options):
    rows, n_in, full_rank, n_out = shape
    sizes = (rows, n_in), (n_in, full_rank), (full_rank, n_out)
    given = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]

    def run(*args):
      with ops.prefer("pallas_tpu"):
        return dot(*args, **options)

    return "pallas_call" in str(jax.make_jaxpr(run)(*given, rank))

  assert uses((512, 1024, 256, 1024)) and uses((128, 1024, 512, 1024))
  assert uses((512, 1024, 256, 1024), "bfloat16")
  assert not uses((512, 1024, 255, 1024))  # one block of ranks
  assert not uses((64, 1024, 256, 1024))  # few rows
  assert not uses((4096, 1024, 1024, 1024))  # above break-even
  assert not uses((512, 1024, 256, 1024), "float16")
  assert not uses((512, 1024, 256, 1024), precision="F32_F32_F32")
  assert not uses((512, 1024, 256, 1024), dot=masked)
  assert uses((5, 4, 3, 2), dot=by_masks)  # as it was named

  def conv(x, u, v, rank):
    x = x.reshape((1, *x.shape))
    return ops.lowrank_conv(x, u[None], v, rank)

  assert uses((512, 1024, 256, 1024), dot=conv)
  assert not uses((64, 1024, 256, 1024), dot=conv)


@pytest.mark.parametrize(
  ("platform", "devices", "implementation"),
  [
    ("cpu", 1, "switch"),
    ("cpu", 8, "xla"),
    ("tpu", 1, "pallas_tpu"),
    ("tpu", 8, "pallas_tpu"),
    ("gpu", 1, "xla"),
  ],
)
def test_ranks_are_followed_where_there_is_a_way(
  platform, devices, implementation
):
  assert ops.follows_rank(platform, devices) == implementation
