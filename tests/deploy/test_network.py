"""A network in memory is cut, judged and exported as a run is."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro import data as data_lib
from maestro import lowrank, nn, trees
from maestro.deploy import artifact, choose, export, network
from maestro.deploy.network import Settings, as_run
from maestro.errors import UserError
from maestro.models import MLP
from maestro.training import build

OPTIONS = export.Options(repeats=2, keep_statistics=True)


class Plain(flax.linen.Module):
  """Is told nothing."""

  @flax.linen.compact
  def __call__(self, x):
    x = x.reshape((x.shape[0], -1))
    x = jax.nn.relu(nn.Dense(24, name="first")(x))
    return nn.Dense(10, name="second")(x)


class Deterministic(flax.linen.Module):
  """Must be told whether to drop; returns a pytree of several types."""

  @flax.linen.compact
  def __call__(self, tokens, *, deterministic):
    x = nn.Embed(16, 12, name="embed")(tokens)
    x = flax.linen.Dropout(0.5)(x, deterministic=deterministic)
    logits = nn.Dense(10, name="head")(x)
    return {"logits": logits, "rest": (x, jnp.argmax(logits, -1))}


class Training(flax.linen.Module):
  """Is told by `training`, normalises, returns a tuple."""

  @flax.linen.compact
  def __call__(self, x, training=False):
    x = nn.Conv(8, (3, 3), name="conv")(x)
    x = flax.linen.BatchNorm(use_running_average=not training)(x)
    return x, nn.Dense(10, name="head")(x.mean((1, 2)))


MODELS = {
  "plain": (Plain(), jnp.zeros((2, 8, 8)), {}),
  "deterministic": (
    Deterministic(),
    jnp.zeros((2, 5), jnp.int32),
    {"deterministic": True},
  ),
  "training": (Training(), jnp.zeros((2, 6, 6, 3)), {}),
}


@pytest.fixture(params=MODELS)
def case(request):
  """(run, inputs, how it is told not to train)."""
  model, x, told = MODELS[request.param]
  variables = model.init(jax.random.key(0), x, **told)
  layers = maestro.layers(model, x, **told)
  params = lowrank.decompose(variables["params"], [lowrank.Rule()], layers)
  return as_run(model, {**variables, "params": params}, x), x, told


def _equal(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    found,
    expected,
  )


@pytest.mark.quick(0)
def test_it_is_exported_and_loaded(case, tmp_path):
  run, x, told = case
  sizes = [
    export.Size(b, choose.choose_ranks(run, b, rule="energy"), b)
    for b in ("params:0.8", "params:0.6")
  ]
  export.export(run, tmp_path / "out", sizes, options=OPTIONS, log=_quiet)
  norms = {"batch_stats": run.batch_stats} if run.batch_stats else {}
  call = artifact.load_stablehlo(tmp_path / "out")
  for size in sizes:
    model, variables = maestro.load(
      tmp_path / "out", model=run.model, profile=size.name
    )
    masked = {"params": lowrank.mask(run.params, size.ranks), **norms}
    expected = model.apply(masked, x, **told)
    _equal(model.apply(variables, x, **told), expected)
    if size is sizes[0]:
      _equal(call(x), expected)


def _quiet(line):
  del line


def test_settings_say_what_a_forward_pass_reads():
  assert isinstance(Settings(), build.Forward)


def test_it_is_judged_by_data_of_its_own():
  data = data_lib.make("digits")
  model, x = Plain(), jnp.asarray(data.preprocess(data.train.inputs[:2]))
  params = model.init(jax.random.key(0), x)["params"]
  layers = maestro.layers(model, x)
  params = lowrank.decompose(params, [lowrank.Rule()], layers)
  run = as_run(model, {"params": params}, x, settings=Settings(batch_size=64))
  rows = choose.allocate(
    run, ["macs:0.5"], data, rule="dp", batch=32, evaluations=8
  )
  tree = trees.unflatten_ranks(
    {path: np.int32(rank) for path, rank in rows[1]["ranks"].items()}
  )
  x = data.preprocess(data.val.inputs)
  logits = model.apply({"params": lowrank.mask(params, tree)}, x)
  accuracy = float(np.mean(np.argmax(logits, -1) == data.val.targets))
  assert rows[1]["accuracy"] == pytest.approx(accuracy, abs=1e-3)
  assert rows[1]["fraction"]["macs"] <= 0.5


@pytest.mark.quick(0)
def test_its_own_ranks_are_kept(tmp_path):
  model, x = MLP(num_classes=10, features=(24, 16)), jnp.zeros((1, 8, 8))
  params = model.init(jax.random.key(0), x)["params"]
  layers = maestro.layers(model, x)
  params = lowrank.decompose(params, [lowrank.Rule()], layers)
  ranks = jax.tree.map(lambda r: r // 2, lowrank.full_ranks(params, layers))
  run = as_run(model, {"params": params}, x, ranks=ranks)
  config = export.export(run, tmp_path / "out", options=OPTIONS, log=_quiet)
  assert config["profiles"][0]["ranks"] == {"fc1": 12, "fc2": 8, "fc3": 5}


def test_what_would_be_lost_is_refused():
  x = jnp.zeros((1, 8, 8))
  variables = Plain().init(jax.random.key(0), x)
  with pytest.raises(UserError, match="'cache' is neither"):
    network.as_run(Plain(), variables | {"cache": {}}, x)
  with pytest.raises(UserError, match="one array is needed"):
    network.as_run(Plain(), variables, (x, x))
