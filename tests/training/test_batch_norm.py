"""Tests the statistics of batch norm that belong to a given network."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import introspect, lowrank, nn
from maestro.data import Split, choice
from maestro.lowrank import Rule
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.training.batch_norm import make_recalibrate


class Net(linen.Module):
  """Two normalised layers of different momentum, and dropout."""

  momenta: tuple[float, float] = (0.9, 0.3)
  dropout: float = 0.0

  @linen.compact
  def __call__(self, x, train=False):
    for i, momentum in enumerate(self.momenta):
      x = nn.Dense(5, name=f"fc{i}")(x)
      x = linen.BatchNorm(
        use_running_average=not train, momentum=momentum, name=f"norm{i}"
      )(x)
      x = linen.relu(x)
      x = linen.Dropout(self.dropout, deterministic=not train)(x)
    return x


def identity(x, key=None):
  del key
  return x


def recalibrator(model, *, examples=None, batch_size=8, preprocess=identity):
  return make_recalibrate(
    model,
    preprocess=preprocess,
    batch_size=batch_size,
    examples=examples,
    mesh=make_mesh(MeshShape(data=1)),
  )


@pytest.fixture(scope="module")
def split():
  rng = np.random.default_rng(0)
  x = (3 + 2 * rng.normal(size=(45, 4))).astype(np.float32)
  return Split(x, np.zeros(45, np.int32))


@pytest.fixture(scope="module")
def variables(split):
  return Net().init(jax.random.key(0), jnp.asarray(split.inputs[:2]))


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 45, 100])
def test_they_are_those_of_all_examples(split, variables, batch_size):
  """Whatever the batches are, the last one included (8 leaves 5 of 45)."""
  found = recalibrator(Net(), batch_size=batch_size)(variables, split)
  kernel = np.asarray(variables["params"]["fc0"]["kernel"])  # its bias is 0
  hidden = split.inputs @ kernel
  assert np.allclose(found["norm0"]["mean"], hidden.mean(0), atol=1e-5)
  assert np.allclose(found["norm0"]["var"], hidden.var(0), rtol=1e-4)


def test_the_momentum_does_not_matter_and_stays(split, variables):
  found = recalibrator(Net())(variables, split)
  same = recalibrator(Net(momenta=(0.0, 0.999)))(variables, split)
  assert np.array_equal(flat(found), flat(same))
  # Afterwards, and within one trace, training averages as it did before.
  model, x = Net(), jnp.asarray(split.inputs[:8])

  def update():
    return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]

  before = update()
  with introspect.batch_statistics():
    batch = update()
  assert np.array_equal(flat(before), flat(update()))
  old = variables["batch_stats"]["norm1"]["var"]
  new = 0.3 * old + 0.7 * batch["batch_stats"]["norm1"]["var"]
  assert np.allclose(before["batch_stats"]["norm1"]["var"], new, rtol=1e-6)


def test_old_statistics_do_not_matter_and_stay(split, variables):
  broken = jax.tree.map(lambda x: x * jnp.nan, variables["batch_stats"])
  recalibrate = recalibrator(Net())
  found = recalibrate(variables | {"batch_stats": broken}, split)
  assert np.array_equal(flat(found), flat(recalibrate(variables, split)))
  assert np.isnan(flat(broken)).all()


def test_they_are_the_same_every_time(split, variables):
  def noisy(x, key=None):
    return x + jax.random.normal(key, x.shape)

  model = Net(dropout=0.5)
  recalibrate = recalibrator(model, preprocess=noisy)
  first, again = (recalibrate(variables, split) for _ in range(2))
  assert np.array_equal(flat(first), flat(again))
  assert not np.allclose(
    flat(first), flat(recalibrator(Net())(variables, split))
  )


@pytest.mark.parametrize("examples", [None, 40, 23, 1, 1000])
def test_how_many_examples_count(split, variables, examples):
  found = recalibrator(Net(), examples=examples)(variables, split)
  order = choice(0, 45)[:examples]
  few = Split(split.inputs[order], split.targets[order])
  hidden = few.inputs @ np.asarray(variables["params"]["fc0"]["kernel"])
  assert np.allclose(found["norm0"]["mean"], hidden.mean(0), atol=1e-5)


def test_masked_and_cut_networks_have_the_same_statistics(split, variables):
  layers = introspect.layers(Net(), split.inputs[:1])
  params = lowrank.decompose(variables["params"], [Rule()], layers)
  ranks = {"fc0": {"rank": 2}, "fc1": {"rank": 1}}
  recalibrate = recalibrator(Net())
  rest = {"batch_stats": variables["batch_stats"]}
  full = recalibrate({"params": params} | rest, split)
  masked = lowrank.mask(params, ranks)
  masked = recalibrate({"params": masked} | rest, split)
  cut = recalibrate({"params": lowrank.truncate(params, ranks)} | rest, split)
  assert np.allclose(flat(masked), flat(cut), rtol=1e-5, atol=1e-6)
  assert not np.allclose(flat(full), flat(cut), rtol=1e-2)


def test_on_one_batch_fixed_statistics_give_what_the_batchs_own_give(
  split, variables
):
  stats = recalibrator(Net(), batch_size=45)(variables, split)
  fixed = Net().apply(variables | {"batch_stats": stats}, split.inputs)
  batch, _ = Net().apply(
    variables, split.inputs, train=True, mutable=["batch_stats"]
  )
  assert np.allclose(fixed, batch, rtol=1e-4, atol=1e-5)
  assert not np.allclose(fixed, Net().apply(variables, split.inputs), rtol=0.1)
