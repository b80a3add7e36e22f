"""Levels of a nested network: their steps, their networks, their records."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro import lowrank, trees
from maestro.report import figures
from maestro.runs import checkpoint, metrics
from maestro.schema import ConfigError
from maestro.training import build, levels, loop
from maestro.training.config import parse

BASE = {
  "model": {"name": "mlp", "features": [24, 16]},
  "data": {"name": "digits"},
  "batch_size": 64,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "method": {"name": "nested", "nested": {"levels": [1.0, 0.6, 0.4]}},
  "discover": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "settle": {
    "epochs": 4,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "checkpoint": {"keep": 9},
  "mesh": {"data": 1},
}


def config(**changes):
  return copy.deepcopy(BASE) | changes


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("nested")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "figures", lambda workdir: None)
    return loop.train(config(), workdir), workdir


def test_every_level_is_reported_within_its_budget(finished):
  results, _ = finished
  names = [level["name"] for level in results["levels"]]
  assert names == ["macs:1", "macs:0.6", "macs:0.4"]
  for level in results["levels"]:
    share = level["macs"] / results["dense"]["macs"]
    assert share <= float(level["name"].split(":")[1])
  assert results["levels"][0]["metrics"] == results["final"]["metrics"]


def test_evaluating_the_run_gives_every_level(finished):
  results, workdir = finished
  again = loop.evaluate_workdir(workdir)
  assert again["levels"] == results["levels"]
  assert again["test"] == results["final"]["metrics"]


def test_every_evaluation_has_a_value_for_every_level(finished):
  results, workdir = finished
  records = [r for r in metrics.read(workdir) if r["phase"] == 1]
  assert len(records) == 4
  for record in records:
    for name in ("macs:0.6", "macs:0.4"):
      assert f"val/accuracy@{name}" in record and f"val/loss@{name}" in record
  for level in results["levels"][1:]:
    last = records[-1][f"val/loss@{level['name']}"]
    assert last == pytest.approx(level["val_metrics"]["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
  """A run whose largest level is trained in every step, and teaches."""
  workdir = tmp_path_factory.mktemp("taught")
  changed = config(full_pass={"distill": 0.5, "temperature": 2.0})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "figures", lambda workdir: None)
    return loop.train(changed, workdir), workdir


@pytest.mark.quick(0)
@pytest.mark.parametrize("name", ["finished", "taught"])
def test_the_loop_trains_as_it_is_written_here(name, request):
  """An independent loop over the levels that the seed draws."""
  results, workdir = request.getfixturevalue(name)
  t = build.make_training(parse(config()))
  n, total = t.clock.discover, t.clock.total
  first, last = (saved(workdir, step) for step in (n, total))
  # The chain is built from what the dense warm-up left.
  factors, profiles = t.method.nested.start(first["params"], {})
  assert [level["ranks"] for level in results["levels"]] == profiles
  params = jax.tree.map(jnp.asarray, factors)
  velocity = jax.tree.map(jnp.zeros_like, params)
  train = t.dataset.train

  def outputs(params, level, x):
    ranks = {p: jnp.int32(r) for p, r in profiles[level].items()}
    masked = lowrank.mask(params, trees.unflatten_ranks(ranks))
    return t.model.apply({"params": masked}, x)

  for step in range(n, total):
    order = np.asarray(t.feed()(step)["order"])  # discover is an epoch
    batch = order[step % n * 64 : step % n * 64 + 64]
    x = t.dataset.preprocess(train.inputs[batch])
    targets = jax.nn.one_hot(train.targets[batch], 10)
    level = t.level(step)

    def loss(params, x=x, y=targets, level=level):
      def cross_entropy(out, y):
        return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(out), axis=1))

      out = outputs(params, level, x)
      if name == "finished":
        return cross_entropy(out, y)
      teacher = outputs(params, 0, x)
      soft = jax.lax.stop_gradient(jax.nn.softmax(teacher / 2.0))
      own = jnp.sum(soft * jnp.log(soft), axis=1)
      distilled = 4.0 * (cross_entropy(out / 2.0, soft) + jnp.mean(own))
      task = 0.5 * cross_entropy(out, y) + 0.5 * distilled
      return task + cross_entropy(teacher, y)

    grads = jax.grad(loss)(params)
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
    params = jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity)
  for a, b in zip(
    jax.tree.leaves(params), jax.tree.leaves(last["params"]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.quick(0)
def test_a_taught_step_costs_its_level_and_the_largest(finished, taught):
  plain, both = (run[0]["train"]["macs_total"] for run in (finished, taught))
  t = build.make_training(parse(config()))
  steps = t.clock.total - t.clock.discover
  largest = finished[0]["levels"][0]["ranks"]
  macs = sum(
    r * (t.layers[p].n_in + t.layers[p].n_out) for p, r in largest.items()
  )
  assert both == plain + 3 * 64 * steps * macs


@pytest.mark.quick(0)
def test_a_taught_step_keeps_statistics_of_both_levels():
  changed = config(
    model={"name": "resnet18", "width": 4, "stage_sizes": [1]},
    full_pass={"distill": 0.5},
  )
  t = build.make_training(parse(changed))
  params, stats = t.initial()
  factors, profiles = t.method.nested.start(params, stats)
  ranks = trees.unflatten_ranks(
    {path: jnp.int32(rank) for path, rank in profiles[0].items()}
  )
  _, tx = t.optimizer(t.clock.discover)
  state = t.new_state(
    tx, factors, stats, ranks, levels.stacked(profiles, stats, t.layers)
  )
  small = levels.Level(2, jax.device_get(levels.split(state.levels)[2][0]))
  data = t.feed()(0)
  before = jax.device_get(state)
  after, _ = t.program("settle", t.clock.discover, 1, small)(state, data)
  moved = [
    not np.allclose(jax.tree.leaves(a)[0], jax.tree.leaves(b)[0])
    for (_, a), (_, b) in zip(
      levels.split(before.levels), levels.split(after.levels), strict=True
    )
  ]
  assert moved == [True, False, True]
  jax.tree.map(
    np.testing.assert_array_equal,
    after.batch_stats,
    levels.split(after.levels)[0][1],
  )


def saved(workdir, step):
  params, stats, ranks, _ = checkpoint.load_params(
    workdir / "checkpoints", step
  )
  return {"params": params, "batch_stats": stats, "ranks": ranks}


def test_all_levels_are_trained(finished):
  t = build.make_training(parse(config()))
  n = t.clock.discover
  drawn = [t.level(step) for step in range(n, t.clock.total)]
  assert set(drawn) == {0, 1, 2}
  results, _ = finished
  programs = [p for p in results["train"]["programs"] if "level " in p]
  assert len(programs) == 3
  # Steps cost what their level costs.
  profiles = [level["ranks"] for level in results["levels"]]
  costs = []
  for profile in profiles:
    costs.append(
      sum(
        r * (t.layers[p].n_in + t.layers[p].n_out) for p, r in profile.items()
      )
    )
  macs = n * t.dense.macs + sum(costs[i] for i in drawn)
  scored = 3 * 512 * t.dense.macs
  assert results["train"]["macs_total"] == 3 * 64 * macs + scored


def test_statistics_belong_to_their_level():
  state = levels.TrainState(
    step=jnp.int32(0),
    params={},
    batch_stats={"norm": {"mean": jnp.zeros(2)}},
    opt_state=(),
    ranks={},
    key=jnp.zeros(2),
    metrics={},
    levels=levels.stacked(
      [{"fc": 3}, {"fc": 2}],
      {"norm": {"mean": jnp.zeros(2)}},
      {"fc": maestro.LayerSpec("dense", (4,), (3,))},
    ),
  )
  new = {"norm": {"mean": jnp.ones(2)}}
  small = levels.Level(1, {}).with_statistics(state, new)
  (_, whole), (_, cut) = levels.split(small.levels)
  assert np.all(cut["norm"]["mean"] == 1) and np.all(whole["norm"]["mean"] == 0)
  assert np.all(small.batch_stats["norm"]["mean"] == 0)
  large = levels.Level(0, {}).with_statistics(state, new)
  assert np.all(large.batch_stats["norm"]["mean"] == 1)


BAD = {
  "too small": ({}, {"nested": {"levels": [1.0, 0.01]}}, "cannot be reached"),
  "budget": ({"budget": "macs:0.5"}, {}, "config.method.budget"),
  "race": ({}, {"race": {}}, "config.method.race"),
  "time": ({}, {"decompose": "end"}, "config.method.decompose"),
  "no layer": ({"rules": ()}, {}, "config.rules: no layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_chain_that_cannot_be_trained_is_named_before(name, tmp_path):
  changes, pieces, match = BAD[name]
  method = BASE["method"] | pieces
  with pytest.raises(ConfigError, match=match):
    loop.train(config(method=method, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()
