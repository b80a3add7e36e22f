"""Tables of latency follow what was measured, and bound their compilations."""

import jax
import numpy as np
import pytest

from maestro import lowrank, trees
from maestro.cost import layer_latency
from maestro.cost.budget import Budget
from maestro.cost.count import count_cost
from maestro.introspect import layers as layers_of
from maestro.models.mlp import MLP
from maestro.models.resnet import ResNet18
from maestro.trees import LayerSpec

DENSE = 5.0


def specs(**sizes):
  return {
    path: LayerSpec("dense", (n,), (m,)) for path, (n, m) in sizes.items()
  }


def limits_of(layers):
  return {path: spec.full_rank for path, spec in layers.items()}


def meter(layers, of=lambda path, rank: rank / 100, slow=()):
  """A linear device: factors of rank r take r / 100 ms, kernels their own."""
  calls = []

  def whole(path):
    return layers[path].full_rank / 150

  def measure(profiles):
    calls.append(profiles)
    times = []
    for ranks in profiles:
      saved = sum(
        whole(path) - of(path, rank) - (path in slow)
        for path, rank in layer_latency.stored(layers, ranks).items()
      )
      times.append(DENSE - saved)
    return times

  return measure, calls


def test_a_table_holds_what_was_measured():
  layers = specs(a=(64, 48), b=(100, 80), c=(20, 90))
  measure, calls = meter(layers)
  tables = layer_latency.latency_tables(layers, limits_of(layers), measure)
  assert len(calls) == 1 and calls[0][0] == {}
  assert len(calls[0]) == 1 + 5 * 3
  assert tables.kind == "latency_ms"
  assert tables.dense == tables.total(tables.whole) == 5_000_000
  for ranks in ({"a": 3, "b": 7, "c": 1}, {"a": 27, "b": 44, "c": 20}):
    (expected,) = measure([ranks])
    assert abs(tables.total(ranks) / 1e6 - expected) < 1e-5
  for path, costs in tables.costs.items():
    assert costs.min() == 0 and len(costs) == layers[path].full_rank + 1
    found = costs[tables.candidates[path]]
    assert (np.diff(found) > 0).all() and tables.candidates[path][0] == 1


def test_what_is_no_faster_is_no_candidate():
  layers = specs(a=(64, 48), b=(100, 80))
  measure, _ = meter(layers, slow=("a",))
  tables = layer_latency.latency_tables(layers, limits_of(layers), measure)
  assert tables.candidates["a"].tolist() == [48]
  assert tables.smallest == {"a": 48, "b": 1}
  # A rank that a larger one beats: steps of 8, below which nothing is saved.
  measure, _ = meter(layers, of=lambda path, rank: -(-rank // 32) * 0.1)
  tables = layer_latency.latency_tables(layers, limits_of(layers), measure)
  assert 1 not in tables.candidates["a"]


def test_noise_is_averaged_until_times_rise():
  assert layer_latency.rising([1, 3, 2, 2, 5]) == pytest.approx(
    [1, 7 / 3, 7 / 3, 7 / 3, 5]
  )
  assert layer_latency.rising([4, 2, 0]) == [2, 2, 2]
  x = np.random.default_rng(0).normal(size=20) + np.linspace(0, 3, 20)
  found = np.array(layer_latency.rising(x.tolist()))
  assert (np.diff(found) >= 0).all() and np.isclose(found.sum(), x.sum())
  assert layer_latency.rising(found.tolist()) == found.tolist()
  assert layer_latency.rising([]) == []


def test_a_rank_that_rules_bound_is_never_dense():
  layers = specs(a=(64, 48))
  measure, calls = meter(layers)
  tables = layer_latency.latency_tables(layers, {"a": 9}, measure)
  assert tables.whole == {"a": 9} and max(p.get("a", 0) for p in calls[0]) == 9
  assert abs(tables.total({"a": 9}) - 1e6 * measure([{"a": 9}])[0]) < 2
  assert tables.dense == 5_000_000 > tables.total(tables.whole)


def test_layers_that_are_alike_are_measured_together():
  model = ResNet18(num_classes=10, width=8)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
  layers = layers_of(model, x)
  limits = {p: s.full_rank for p, s in layers.items() if s.full_rank > 1}
  measure, calls = meter(layers)
  tables = layer_latency.latency_tables(layers, limits, measure)
  kinds = len({layers[path] for path in limits})
  assert kinds < len(limits) and len(calls[0]) <= 1 + 32
  seen = {frozenset(ranks) for ranks in calls[0]}
  assert len(seen) == 1 + kinds and set().union(*seen) == set(limits)
  assert tables.total(tables.whole) == tables.dense


@pytest.mark.parametrize("kinds", [1, 6, 7, 16, 40])
def test_compilations_are_bounded(kinds):
  layers = specs(**{f"l{i}": (64 + i, 48) for i in range(kinds)})
  measure, calls = meter(layers)
  layer_latency.latency_tables(layers, limits_of(layers), measure)
  assert len(calls[0]) <= 1 + max(32, 2 * kinds)


@pytest.mark.parametrize("top", [1, 2, 5, 9, 40, 200])
def test_a_grid_is_of_factors_from_1_to_the_largest(top):
  spec = LayerSpec("dense", (300,), (200,))
  ranks = layer_latency.grid(spec, top, 5)
  assert ranks == sorted(set(ranks)) and 1 <= len(ranks) <= 5
  assert ranks[0] == 1 and ranks[-1] == min(top, 119)
  assert not lowrank.dense_is_cheaper(300, 200, ranks[-1])
  assert layer_latency.grid(LayerSpec("dense", (2,), (2,)), 2, 5) == [1]


def test_networks_have_the_form_that_extract_gives(cases):
  for name in ("network", "scan_remat_grouped", "embed", "general"):
    case = cases[name]
    full = trees.flatten_ranks(case.full)
    for level in (1, 2, 99):
      ranks = {p: min(level, int(np.max(r))) for p, r in full.items()}
      tree = trees.unflatten_ranks(
        {p: np.minimum(np.asarray(r), ranks[p]) for p, r in full.items()}
      )
      wanted = jax.eval_shape(
        lambda p, tree=tree, case=case: lowrank.extract(p, tree, case.layers),
        case.factored,
      )
      found = layer_latency.network_at(case.dense, case.layers, ranks)
      assert jax.tree.structure(found) == jax.tree.structure(wanted)
      for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.quick(1)
def test_what_stays_dense_is_shared():
  model = MLP(num_classes=10, features=(32, 32))
  x = jax.ShapeDtypeStruct((1, 16), "float32")
  layers = layers_of(model, x)
  params = model.init(jax.random.key(0), np.zeros((1, 16), "float32"))["params"]
  found = layer_latency.network_at(params, layers, {"fc2": 3, "fc1": 16})
  assert found["fc1"]["kernel"] is params["fc1"]["kernel"]
  assert found["fc2"]["u"].shape == (32, 3) and "kernel" not in found["fc2"]
  macs = [count_cost(layers, p).macs for p in (params, found)]
  assert macs[0] - macs[1] == 32 * 32 - 3 * 64
  assert np.isfinite(model.apply({"params": found}, np.ones((1, 16)))).all()


def test_a_latency_is_a_limit_in_nanoseconds():
  assert Budget.parse("latency_ms:0.29").limit(123) == 290_000
  assert Budget.parse("latency_ms:4").limit(1) == 4_000_000
