"""Tests of products whose cost follows a rank known only at run time."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro import nn as layers
from maestro import ops, trees
from maestro.ops import switch

# (rows, in, R, out): blocks that divide and that do not, tiny and prime ones,
# and enough rows that u v is multiplied out at the largest ranks.
SHAPES = [
  (6, 32, 16, 24),
  (1, 7, 5, 11),
  (64, 16, 16, 16),
  (13, 17, 3, 5),
  (5, 4, 1, 3),
]
dot = functools.partial(ops.lowrank_dot, implementation="switch")
masked = functools.partial(ops.lowrank_dot, implementation="xla")


def ranks_of(full_rank):
  """0, 1, R, and both sides of the edges between branches."""
  near = [e + d for e in switch.edges(full_rank) for d in (-1, 0, 1)]
  return sorted({0, 1, *(r for r in near if 0 <= r <= full_rank)})


def arrays(shape, dtype=np.float32, seed=0):
  rows, n_in, full_rank, n_out = shape
  rng = np.random.default_rng(seed)
  sizes = (rows, n_in), (n_in, full_rank), (full_rank, n_out), (rows, n_out)
  return tuple(
    jnp.asarray(rng.standard_normal(size), dtype) for size in (*sizes, (n_out,))
  )


def reference(x, u, v, g, bias, rank):
  """y, dx, du, dv, db in float64."""
  x, u, v, g, bias = (np.asarray(a, np.float64) for a in (x, u, v, g, bias))
  u, v = u[:, :rank], v[:rank]
  du = x.T @ (g @ v.T)
  dv = (x @ u).T @ g
  return x @ u @ v + bias, (g @ v.T) @ u.T, du, dv, g.sum(0)


def both_ways(x, u, v, g, bias, rank, dot=dot):
  """The output y, and the gradients of <y, g>."""
  y, back = jax.vjp(
    lambda x, u, v, b: dot(x, u, v, rank, bias=b), x, u, v, bias
  )
  return y, *back(g)


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_at_every_rank(shape, dtype, counted):
  x, u, v, g, bias = arrays(shape, dtype)
  traced = counted(both_ways)
  run = jax.jit(traced)
  bar = 1e-5 if dtype == "float32" else 1e-2
  for rank in ranks_of(shape[2]):
    y, dx, du, dv, db = run(x, u, v, g, bias, jnp.int32(rank))
    wanted = reference(x, u, v, g, bias, rank)
    found = y, dx, du[:, :rank], dv[:rank], db
    for name, a, b in zip(
      ("y", "dx", "du", "dv", "db"), found, wanted, strict=True
    ):
      if b.size and np.any(b):
        assert relative(a, b) <= bar, (name, rank)
      else:
        assert not np.any(np.asarray(a, np.float32)), (name, rank)
    # To the bit.
    assert not np.any(np.asarray(du[:, rank:], np.float32)), rank
    assert not np.any(np.asarray(dv[rank:], np.float32)), rank
    assert du.dtype == dv.dtype == dx.dtype == jnp.dtype(dtype)
  assert traced.times == 1


@pytest.mark.quick(0)
@pytest.mark.parametrize("shape", [(6, 32, 16, 24), (64, 16, 16, 16)])
def test_what_is_beyond_the_rank_is_never_read(shape):
  x, u, v, g, bias = arrays(shape)
  run = jax.jit(both_ways)
  for rank in ranks_of(shape[2]):
    clean = run(x, u, v, g, bias, jnp.int32(rank))
    for poison in (np.nan, np.inf):
      dirty = run(
        x,
        u.at[:, rank:].set(poison),
        v.at[rank:].set(poison),
        g,
        bias,
        jnp.int32(rank),
      )
      for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("full_rank", [1, 2, 7, 8, 9, 64, 1000])
def test_a_rank_runs_in_the_first_branch_that_holds_it(full_rank):
  every = switch.edges(full_rank)
  assert every[-1] == full_rank and len(every) == min(8, full_rank)
  assert list(every) == sorted(set(every)) and every[0] >= 1
  for rank in range(full_rank + 1):
    i = int(switch._branch(jnp.int32(rank), full_rank))
    assert every[i] >= rank
    assert i == 0 or every[i - 1] < rank


def products_of(jaxpr):
  """Sizes of what is multiplied, branch by branch of the first switch."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "cond":
      return [
        sorted(
          max(atom.aval.shape)
          for inner in branch.jaxpr.eqns
          if inner.primitive.name == "dot_general"
          for atom in inner.outvars
        )
        for branch in eqn.params["branches"]
      ]
    for value in eqn.params.values():
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns") and (found := products_of(value)):
        return found
  return None


def test_the_cost_of_a_branch_is_that_of_its_edge():
  # No size but the rank is as large, so the largest one tells the rank; of one
  # row, so that u v is not multiplied out.
  x, u, v, *_ = arrays((1, 3, 64, 5))
  jaxpr = jax.make_jaxpr(dot)(x, u, v, jnp.int32(3)).jaxpr
  found = products_of(jaxpr)
  assert [sizes[-1] for sizes in found] == list(switch.edges(64))


def test_ranks_out_of_range():
  x, u, v, _, bias = arrays((6, 32, 16, 24))
  run = jax.jit(dot)
  np.testing.assert_array_equal(
    run(x, u, v, jnp.int32(99)), run(x, u, v, jnp.int32(16))
  )
  np.testing.assert_array_equal(
    run(x, u, v, jnp.int32(-2), bias=bias),
    jnp.broadcast_to(bias, (6, 24)),
  )
  with pytest.raises(trees.LowRankError, match="rank"):
    dot(x, u, v, 17)


@pytest.mark.quick(1)
def test_leading_axes_and_static_ranks_are_as_for_masks():
  x, u, v, _, bias = arrays((6, 32, 16, 24))
  x = x.reshape((2, 3, 32))
  for rank in (None, 0, 5, 16, jnp.int32(5)):
    a, b = (f(x, u, v, rank, bias=bias) for f in (dot, masked))
    assert a.shape == (2, 3, 24)
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
  empty = dot(x, u[:, :0], v[:0], jnp.int32(0), bias=bias)
  np.testing.assert_array_equal(empty, jnp.broadcast_to(bias, (2, 3, 24)))


@pytest.mark.quick(1)
@pytest.mark.parametrize("shape", [(6, 32, 16, 24), (64, 16, 16, 16)])
@pytest.mark.parametrize(
  "dtypes",
  [
    ("bfloat16", "float32", "float32"),
    ("float32", "bfloat16", "bfloat16"),
    ("float32", "float32", "bfloat16"),
  ],
)
@pytest.mark.mixed_types
def test_types_are_mixed_as_by_masks(shape, dtypes):
  args = [a.astype(d) for a, d in zip(arrays(shape)[:3], dtypes, strict=True)]
  rank = jnp.int32(5)
  a, b = (f(*args, rank) for f in (dot, masked))
  assert a.dtype == b.dtype
  np.testing.assert_allclose(
    a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.05, atol=0.1
  )
  for i in (1, 2):
    grads = [
      jax.grad(lambda *x, f=f: jnp.sum(f(*x, rank)), i)(*args)
      for f in (dot, masked)
    ]
    assert grads[0].dtype == grads[1].dtype == args[i].dtype


@pytest.mark.quick(2)
@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 3, 0)])
def test_nothing_to_multiply_gives_what_masks_give(shape):
  x, u, v, g, bias = arrays(shape)
  for a, b in zip(
    both_ways(x, u, v, g, bias, jnp.int32(2)),
    both_ways(x, u, v, g, bias, jnp.int32(2), dot=masked),
    strict=True,
  ):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a, b)


@pytest.mark.quick(1)
def test_a_batch_of_unknown_size_can_be_exported():
  x, u, v, _, bias = arrays((64, 16, 16, 16))
  (rows,) = jax.export.symbolic_shape("b")
  exported = jax.export.export(jax.jit(dot))(
    jax.ShapeDtypeStruct((rows, 16), jnp.float32),
    u,
    v,
    jax.ShapeDtypeStruct((), jnp.int32),
    bias=bias,
  )
  for rank in (0, 5, 16):
    np.testing.assert_allclose(
      exported.call(x, u, v, jnp.int32(rank), bias=bias),
      masked(x, u, v, rank, bias=bias),
      rtol=2e-5,
      atol=2e-5,
    )


# ---------------------------------------------------------------------------
# Transformations
# ---------------------------------------------------------------------------


def loss(dot, x, u, v, rank):
  return jnp.sum(jnp.tanh(dot(x, u, v, rank)) ** 2)


@pytest.mark.quick(1)
@pytest.mark.parametrize("axes", [(0, None, None, None), (0, 0, 0, 0)])
@pytest.mark.parametrize("inner", [(None, 0, 0, None), (0, 0, 0, 0)])
def test_vmap_twice_and_gradients_under_it(axes, inner):
  keys = jax.random.split(jax.random.key(0), 3)
  shape = [(3, 4), (3, 4), (3, 4), (3, 4)]
  sizes = ((6, 8), (8, 5), (5, 7), ())
  args = []
  for key, lead, size, outer, within in zip(
    (*keys, None), shape, sizes, axes, inner, strict=True
  ):
    lead = [n for n, a in zip(lead, (outer, within), strict=True) if a == 0]
    if key is None:
      count = int(np.prod(lead))
      args.append(jnp.arange(count, dtype=jnp.int32).reshape(lead) % 6)
    else:
      args.append(jax.random.normal(key, (*lead, *size)))

  def run(dot):
    grad = jax.value_and_grad(functools.partial(loss, dot), (0, 1, 2))
    return jax.jit(jax.vmap(jax.vmap(grad, inner), axes))(*args)

  for a, b in zip(
    jax.tree.leaves(run(dot)), jax.tree.leaves(run(masked)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_ranks_of_a_batch_cost_a_mask_not_every_branch():
  x, u, v, *_ = arrays((6, 32, 16, 24))
  many = jnp.arange(3, dtype=jnp.int32)

  def text(axes, *args):
    return str(jax.make_jaxpr(jax.vmap(dot, axes))(*args))

  batched = text((None, None, None, 0), x, u, v, many)
  assert "cond[" not in batched and batched.count("dot_general[") == 2
  shared = text((0, None, None, None), x[None], u, v, many[0])
  assert shared.count("cond[") == 1


@pytest.mark.quick(1)
def test_scan_and_remat():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((6, 8)), jnp.float32)
  u = jnp.asarray(rng.standard_normal((4, 8, 5)), jnp.float32)
  v = jnp.asarray(rng.standard_normal((4, 5, 8)), jnp.float32)
  ranks = jnp.asarray([0, 2, 5, 3], jnp.int32)

  def run(dot):
    def layer(x, w):
      return jnp.tanh(x + dot(x, *w)), None

    def total(u, v):
      body = jax.checkpoint(layer)
      return jnp.sum(jax.lax.scan(body, x, (u, v, ranks))[0] ** 2)

    return jax.jit(jax.value_and_grad(total, (0, 1)))(u, v)

  for a, b in zip(
    jax.tree.leaves(run(dot)), jax.tree.leaves(run(masked)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.quick(1)
def test_a_batch_over_devices_stays_where_it_is():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = jax.NamedSharding(mesh, jax.P("data"))
  x, u, v, g, bias = arrays((64, 8, 6, 4))
  wanted = both_ways(x, u, v, g, bias, jnp.int32(3), dot=masked)
  x, g = (jax.device_put(a, split) for a in (x, g))
  found = jax.jit(both_ways)(x, u, v, g, bias, jnp.int32(3))
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_forward_mode_is_left_to_xla():
  x, u, v, *_ = arrays((6, 8, 5, 7))
  rank = jnp.int32(3)
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(lambda x: dot(x, u, v, rank), (x,), (x,))
  jax.jvp(lambda x: masked(x, u, v, rank), (x,), (x,))


# ---------------------------------------------------------------------------
# Convolutions, layers, the choice
# ---------------------------------------------------------------------------


@pytest.mark.quick(0)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"strides": (2, 1), "padding": "VALID"},
    {"kernel_dilation": (1, 2), "padding": [(1, 0), (2, 1)]},
    {"input_dilation": (2, 1), "padding": [(1, 1), (0, 2)]},
  ],
)
def test_convolutions_are_those_of_masks(groups, options):
  rng = np.random.default_rng(0)
  lead = () if groups == 1 else (groups,)
  x = jnp.asarray(rng.standard_normal((2, 6, 5, 4)), jnp.float32)
  u = jnp.asarray(
    rng.standard_normal((*lead, 3, 2, 4 // groups, 5)), jnp.float32
  )
  v = jnp.asarray(rng.standard_normal((*lead, 5, 6 // groups)), jnp.float32)
  for rank in (None, 0, 3, jnp.int32(0), jnp.int32(3), jnp.int32(5)):

    def run(x, u, v, implementation, rank=rank):
      y = ops.lowrank_conv(
        x, u, v, rank, groups=groups, implementation=implementation, **options
      )
      return jnp.sum(jnp.sin(y)), y

    (_, a), grads_a = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(
      x, u, v, "switch"
    )
    (_, b), grads_b = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(
      x, u, v, "xla"
    )
    for one, other in zip((a, *grads_a), (b, *grads_b), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def conditionals(function, *args):
  return str(jax.make_jaxpr(function)(*args)).count("cond[")


def test_what_is_preferred_is_used_where_it_pays():
  large = arrays((16, 256, 128, 128))[:3]
  small = arrays((16, 64, 32, 64))[:3]
  tall = arrays((1024, 256, 128, 128))[:3]
  rank = jnp.int32(3)

  def run(*args):
    with ops.prefer("switch"):
      return ops.lowrank_dot(*args)

  assert conditionals(run, *large, rank) == 1
  assert conditionals(run, *small, rank) == 0
  assert conditionals(run, *tall, rank) == 0
  assert conditionals(ops.lowrank_dot, *large, rank) == 0
  assert conditionals(lambda *a: run(*a, None), *large) == 0
  assert conditionals(dot, *small, rank) == 1  # as it was named

  def named(*args):
    with ops.prefer("switch"):
      return masked(*args)

  assert conditionals(named, *large, rank) == 0
  with (
    pytest.raises(ValueError, match=r"unknown; use None.*'switch', 'xla'"),
    ops.prefer("swich"),
  ):
    pass
  with pytest.raises(ValueError, match="'pallas' is unknown"):
    ops.lowrank_dot(*large, rank, implementation="pallas")


@pytest.mark.quick(0)
@pytest.mark.mixed_types
def test_layers_of_a_model_take_their_ranks_by_a_switch():
  class Net(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x):
      kind = {"implementation": self.implementation}
      x = layers.Conv(6, (3, 3), name="conv", **kind)(x)
      x = layers.DenseGeneral((2, 4), name="heads", **kind)(x)
      x = layers.DenseGeneral(3, axis=-1, batch_dims=(0,), name="each", **kind)(
        x
      )
      return layers.Dense(5, name="out", **kind)(x)

  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  nets = {name: Net(name) for name in ("xla", "switch")}
  variables = nets["xla"].init(jax.random.key(1), x)
  found = maestro.layers(nets["xla"], x)
  params = maestro.decompose(variables["params"], [maestro.Rule()], found)
  full = maestro.full_ranks(params)
  for share in (0.0, 0.5, 1.0):
    ranks = jax.tree.map(lambda r, s=share: (r * s).astype(jnp.int32), full)

    def run(params, net, ranks=ranks):
      y = net.apply({"params": params, "ranks": ranks}, x)
      return jnp.sum(jnp.sin(y))

    one, other = (jax.value_and_grad(run)(params, net) for net in nets.values())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
