"""A mesh changes where training happens, not what it computes or exchanges."""

import functools
import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maestro.nn
from maestro import introspect, lowrank, sampling
from maestro.lowrank import Rule
from maestro.models.mlp import MLP
from maestro.models.resnet import ResNet18
from maestro.parallel.mesh import MeshShape, make_mesh, replicate
from maestro.parallel.programs import collectives
from maestro.parallel.rules import Placement
from maestro.training import optim
from maestro.training.state import (
  at_ranks,
  new_state,
  truncate_state,
)
from maestro.training.step import make_step

ONE = MeshShape(data=1)
MESHES = (
  MeshShape(data=8),
  MeshShape(data=1, fsdp=8),
  MeshShape(data=2, model=4),
  MeshShape(data=1, fsdp=2, model=4),
)
BATCH, EXAMPLES = 16, 32
TX = optax.sgd(0.005, momentum=0.9)  # or rounding would grow


class Stack(flax.linen.Module):
  """Residual dense layers whose parameters are stacked by a scan."""

  @flax.linen.compact
  def __call__(self, x, train=False):
    def body(layer, x):
      return x + jnp.tanh(layer(x)), None

    layers = flax.linen.scan(
      body,
      variable_axes={"params": 0, "ranks": 0},
      split_rngs={"params": True},
      length=3,
    )
    x = maestro.nn.Dense(32, name="first")(x)
    x, _ = layers(maestro.nn.Dense(32, name="blocks"), x)
    return maestro.nn.Dense(8, name="last")(x)


MODELS = {
  "resnet": (ResNet18(8, width=8, stage_sizes=(1, 1)), (8, 8, 3)),
  "stack": (Stack(), (16,)),
}


@functools.cache
def problem(name):
  model, shape = MODELS[name]
  rng = np.random.default_rng(0)
  x = rng.standard_normal((EXAMPLES, *shape)).astype(np.float32)
  y = rng.integers(0, 8, EXAMPLES).astype(np.int32)
  layers = introspect.layers(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  dense = jax.tree.map(
    lambda a: jnp.asarray(
      rng.standard_normal(a.shape) * 0.7 / max(a.size, 1) ** 0.25, a.dtype
    ),
    variables["params"],
  )
  stats = {}
  if "batch_stats" in variables:
    stats = jax.tree.map(
      lambda a: jnp.ones(a.shape, a.dtype), variables["batch_stats"]
    )
  return x, y, layers, dense, stats


def programs(name, mesh, placement, jit):
  """Returns a step of a form and the data on the devices."""
  model, (x, y, *_) = MODELS[name][0], problem(name)

  def step(lam):
    return jit(
      make_step(
        model,
        TX,
        loss="cross_entropy",
        preprocess=lambda x, key=None: x,
        sampler=sampling.one_layer,
        batch_size=BATCH,
        steps_per_epoch=EXAMPLES // BATCH,
        lam=lam,
        penalty=lowrank.group_lasso,
        full_pass=None,
        placement=placement,
      ),
      donate_argnums=0,
    )

  order = np.arange(EXAMPLES, dtype=np.int32)
  data = replicate({"inputs": x, "targets": y, "order": order}, mesh)
  return step, data


def train(name, shape, jit):
  """Losses of 20 steps: dense, decomposed, shrunk, cut; and what lies where."""
  mesh = make_mesh(shape)
  *_, layers, dense, stats = problem(name)
  placement = Placement(mesh, layers, smallest=64)
  step, data = programs(name, mesh, placement, jit)
  losses, split = [], []

  def put(state):
    state = placement.put(state, state.params)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    split.append(sum(not x.is_fully_replicated for x in leaves))
    return state

  def go(state, program, n):
    for _ in range(n):
      state, loss = program(state, data)
      losses.append(float(loss))
    for x, sharding in zip(
      jax.tree.leaves(state),
      jax.tree.leaves(placement.shardings(state, state.params)),
      strict=True,
    ):
      assert x.sharding.is_equivalent_to(sharding, x.ndim)
    return state

  dense, stats = jax.tree.map(jnp.copy, (dense, stats))  # steps donate theirs
  state = new_state(0, "cross_entropy", TX, dense, stats, {})
  state = go(put(state), step(0.0), 5)
  params = lowrank.decompose(state.params, [Rule()], layers)
  ranks = lowrank.full_ranks(params, layers)
  state = state.replace(
    params=params, ranks=ranks, opt_state=optim.restart(TX, params, state.step)
  )
  program = step(1e-3)
  state = go(put(state), program, 5)
  half = jax.tree.map(lambda r: jnp.maximum(r - r // 4, 1), state.ranks)
  state = go(put(at_ranks(state, half)), program, 5)
  state = put(truncate_state(TX, state, 1))
  state = go(state, program, 5)
  return np.array(losses), split


@functools.cache
def reference(name, jit):
  return train(name, ONE, jit)[0]


@pytest.mark.quick(1)
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_trains_as_one_device(name, shape, jit):
  losses, split = train(name, shape, jit)
  np.testing.assert_allclose(losses, reference(name, jit), rtol=1e-5)
  assert len(losses) == 20 and losses[4] < losses[0]
  splits = shape.fsdp * shape.model > 1
  assert [n > 0 for n in split] == [splits] * 4


# ---------------------------------------------------------------------------
# What devices exchange, read from the compiled step
# ---------------------------------------------------------------------------

CHAIN = MLP(num_classes=8, features=(64, 48, 64))


def exchanged(shape):
  """Returns ([(collective, array shape)], params) of a step of a chain."""
  mesh = make_mesh(shape)
  x = np.zeros((EXAMPLES, 32), np.float32)
  layers = introspect.layers(CHAIN, x)
  params = jax.eval_shape(CHAIN.init, jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), params)
  ranks = {f"fc{i}": {"rank": r} for i, r in enumerate((20, 12, 28, 5), 1)}
  params = lowrank.decompose(params, [Rule()], layers)
  params = lowrank.truncate(params, ranks)
  placement = Placement(mesh, layers, smallest=1)
  state = new_state(
    0, "cross_entropy", TX, params, {}, lowrank.full_ranks(params)
  )
  state = placement.put(state, params)
  step = make_step(
    CHAIN,
    TX,
    loss="cross_entropy",
    preprocess=lambda x, key=None: x,
    sampler=sampling.full,
    batch_size=BATCH,
    steps_per_epoch=EXAMPLES // BATCH,
    lam=0.0,
    penalty=None,
    full_pass=None,
    placement=placement,
  )
  y, order = np.zeros(EXAMPLES, np.int32), np.arange(EXAMPLES, dtype=np.int32)
  data = replicate({"inputs": x, "targets": y, "order": order}, mesh)
  text = jax.jit(step, donate_argnums=0).lower(state, data).compile().as_text()
  return [(one.kind, one.shape) for one in collectives(text)], params


def numbers(found):
  return sum(math.prod(shape) for _, shape in found)


@pytest.mark.quick(0)
def test_data_parallel_devices_exchange_gradients_of_factors():
  found, params = exchanged(MeshShape(data=4))
  assert {kind for kind, _ in found} == {"all-reduce"}
  gradients = [(kind, shape) for kind, shape in found if shape]
  assert numbers(gradients) == sum(x.size for x in jax.tree.leaves(params))
  assert len(found) - len(gradients) < 20  # scalars: loss and metrics


@pytest.mark.quick(0)
def test_fsdp_devices_gather_nothing_but_parameters():
  found, params = exchanged(MeshShape(data=1, fsdp=4))
  sizes = {x.shape for x in jax.tree.leaves(params)}
  sizes |= {shape[::-1] for shape in sizes}
  gathered = [shape for kind, shape in found if kind == "all-gather"]
  assert gathered and set(gathered) <= sizes
  # Once forward, and at most once more backward.
  total = sum(x.size for x in jax.tree.leaves(params))
  assert sum(map(math.prod, gathered)) <= 2 * total
  rest = [shape for kind, shape in found if kind != "all-gather"]
  assert {kind for kind, _ in found} <= {
    "all-gather",
    "all-reduce",
    "reduce-scatter",
  }
  assert {shape for shape in rest if shape} <= sizes


def test_model_parallel_devices_exchange_batch_times_rank():
  found, params = exchanged(MeshShape(data=1, model=4))
  wanted = {(BATCH, params[f"fc{i}"]["u"].shape[-1]) for i in (1, 2, 3, 4)}
  large = [s for kind, s in found if kind == "all-reduce" and len(s) == 2]
  assert wanted <= set(large)
  # Forward and backward of each, and the loss of classes that are split: the
  # largest logit of each of four devices.
  logits = {(BATCH, 8), (BATCH, 4), (BATCH, 1)}
  assert {s for _, s in found if len(s) == 2} <= wanted | logits
  assert all(large.count(shape) <= 2 for shape in wanted)
  assert {s for _, s in found if len(s) == 1} <= {(BATCH,)}
