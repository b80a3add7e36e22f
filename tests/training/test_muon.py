"""Tests Muon: its rule in NumPy, what is a matrix, whose sides it knows."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maestro import introspect as nn
from maestro import lowrank
from maestro.lowrank import Rule
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.training import muon, optim

rng = np.random.default_rng(0)


def numbers(*shape):
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def orthogonal(m):
  """One matrix in double precision: five times the polynomial, then 0.2 ..."""
  x = np.float64(m) / np.linalg.norm(m)
  for _ in range(5):
    p, s, q = np.linalg.svd(x, full_matrices=False)
    x = (p * (3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5)) @ q
  return 0.2 * max(m.shape) ** 0.5 * x


class Net(linen.Module):
  """A layer of each kind, some of several axes or groups."""

  @linen.compact
  def __call__(self, x):  # int [b, t]
    x = linen.Embed(9, 8, name="table")(x)
    x = linen.Conv(12, (3,), feature_group_count=2, name="grouped")(x)
    x = linen.Conv(12, (3,), name="conv")(x)
    x = linen.DenseGeneral((2, 4), name="heads")(x)
    x = linen.DenseGeneral(6, axis=(-2, -1), name="out")(x)
    block = linen.scan(
      lambda layer, x, _: (jnp.tanh(layer(x)), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )
    x = block(linen.Dense(6, name="stacked"), x, None)[0]
    return linen.LayerNorm(name="norm")(x)


TOKENS = jnp.zeros((2, 5), jnp.int32)


def network():
  layers = nn.layers(Net(), TOKENS)
  shapes = jax.eval_shape(Net().init, jax.random.key(0), TOKENS)["params"]
  return layers, jax.tree.map(lambda s: numbers(*s.shape), shapes)


def test_steps_are_those_of_the_published_rule(close):
  layers, params = network()
  section = {"name": "muon", "beta": 0.9, "weight_decay": 0.5}
  section |= {"adam_rate": 0.25}
  tx = optim.make(section, optax.constant_schedule(0.1), layers)
  state, m = tx.init(params), 0.0
  for _ in range(3):
    grads = jax.tree.map(lambda a: numbers(*a.shape), params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    g = np.float64(grads["heads"]["kernel"]).reshape(12, 8)
    m = 0.9 * m + g
    step = orthogonal(0.9 * m + g).reshape(12, 2, 4)
    want = -0.1 * (step + 0.5 * np.float64(params["heads"]["kernel"]))
    close(updates["heads"]["kernel"], want, 1e-4)
  adam = optax.adamw(0.025, b2=0.95, weight_decay=0.5 / 0.25)
  for name in ("table", "norm"):
    state, other = tx.init(params), adam.init(params[name])
    found = tx.update(grads, state, params)[0][name]
    close(found, adam.update(grads[name], other, params[name])[0])


@pytest.mark.quick(1)
@pytest.mark.parametrize("factored", [False, True])
def test_matrices_are_kernels_and_factors_each_by_itself(factored, close):
  layers, params = network()
  if factored:
    params = lowrank.decompose(params, [Rule()], layers)
  split = muon.split(params, layers)
  for path, label in jax.tree_util.tree_leaves_with_path(split):
    layer, name = (k.key for k in path)
    matrix = name in ("kernel", "u", "v") and layer != "table"
    assert label == ("matrices" if matrix else "rest"), path

  grads = jax.tree.map(lambda a: numbers(*a.shape), params)
  only = {k: v for k, v in grads.items() if k not in ("table", "norm")}
  only = {
    layer: {k: v for k, v in node.items() if k != "bias"}
    for layer, node in only.items()
  }
  found, _ = muon.orthogonalize(layers).update(only, optax.EmptyState())
  for layer, node in only.items():
    spec = layers[layer]
    for name, g in node.items():
      lead = len(spec.stack if name == "kernel" else spec.lead)
      rows = 1 if name == "v" else len(spec.inputs)
      shape = g.shape
      each = [
        orthogonal(one.reshape(int(np.prod(one.shape[:rows])), -1))
        for one in np.float64(g).reshape(-1, *shape[lead:])
      ]
      close(found[layer][name], np.reshape(each, shape), 1e-4)


def test_steps_are_the_same_wherever_a_matrix_lies(close):
  mesh = make_mesh(MeshShape(data=1, fsdp=8))
  layers = {"fc": nn.layers(linen.Dense(16), jnp.zeros((1, 24)))[""]}
  tx = optim.make({"name": "muon"}, optax.constant_schedule(0.1), layers)
  params = {"fc": {"kernel": numbers(24, 16), "bias": numbers(16)}}
  grads = jax.tree.map(lambda a: numbers(*a.shape), params)
  want, _ = tx.update(grads, tx.init(params), params)
  for spec in (("fsdp",), (None, "fsdp")):
    lie = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    there = [
      {"fc": t["fc"] | {"kernel": jax.device_put(t["fc"]["kernel"], lie)}}
      for t in (grads, params)
    ]
    found, _ = jax.jit(tx.update)(there[0], tx.init(there[1]), there[1])
    close(found, want)


def test_singular_values_are_nearly_alike_and_zero_stays_zero():
  layers = {"fc": nn.layers(linen.Dense(40), jnp.zeros((1, 30)))[""]}
  g = np.float32(rng.standard_normal((30, 20)))
  g[:, 7:] = 0  # components beyond a rank
  found, _ = muon.orthogonalize(layers).update(
    {"fc": {"u": jnp.asarray(g)}}, optax.EmptyState()
  )
  u = np.asarray(found["fc"]["u"])
  assert not u[:, 7:].any()
  s = np.linalg.svd(u[:, :7], compute_uv=False) / (0.2 * 30**0.5)
  assert s.min() > 0.6 and s.max() < 1.3
  zero, _ = muon.orthogonalize(layers).update(
    {"fc": {"u": jnp.zeros((30, 20))}}, optax.EmptyState()
  )
  assert not np.asarray(zero["fc"]["u"]).any()
