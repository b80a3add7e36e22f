"""Tests budgets, cost tables and rules: no budget is ever exceeded."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro import data, lowrank, trees
from maestro.cost import allocation as rank_rules
from maestro.cost import budget as budget_lib
from maestro.cost import profiles
from maestro.cost.budget import COSTS, Budget, BudgetError, Tables
from maestro.cost.profiles import ProfileError
from maestro.deploy import choose as allocate
from maestro.errors import UserError
from maestro.models import MLP, ResNet18
from maestro.report import pareto
from maestro.training import build, losses, opened
from maestro.training.config import parse

CONFIG = {
  "model": {"name": "mlp", "features": (24, 16)},
  "data": {"name": "digits"},
  "discover": {"epochs": 1, "schedule": {"name": "constant"}},
  "settle": {"epochs": 1, "schedule": {"name": "constant"}},
  "optimizer": {"name": "sgd"},
  "batch_size": 32,
}


@pytest.fixture(scope="module")
def dataset():
  return data.make("digits")


@pytest.fixture(scope="module")
def run(dataset):
  """A decomposed MLP whose output layer was fitted to random features."""
  model = MLP(num_classes=10, features=(24, 16))
  facts = build.Facts.of(dataset)
  layers = maestro.layers(model, facts.example)
  x = dataset.train.inputs
  params = model.init(jax.random.key(0), x[:1])["params"]
  h = jax.nn.relu(x.reshape((len(x), -1)) @ params["fc1"]["kernel"])
  h = np.asarray(jax.nn.relu(h @ params["fc2"]["kernel"]))
  targets = 6.0 * np.eye(10)[dataset.train.targets]
  fit = np.linalg.lstsq(h, targets, rcond=None)[0]
  params["fc3"]["kernel"] = jnp.asarray(fit, jnp.float32)
  params = lowrank.decompose(params, [lowrank.Rule()], layers)
  return opened.Run(
    workdir=None,
    config=parse(CONFIG),
    facts=facts,
    model=model,
    layers=layers,
    step=0,
    params=jax.device_get(params),
    batch_stats={},
    ranks=jax.device_get(lowrank.full_ranks(params)),
  )


def cost_of(run, tree, kind):
  small = lowrank.extract(run.params, tree, run.layers)
  return getattr(maestro.count_cost(run.layers, small), kind)


def flat(tree):
  return {p: int(r) for p, r in trees.flatten_ranks(tree).items()}


def toy(costs, fixed=0, **options):
  """Tables of layers with these costs, all ranks worth choosing."""
  costs = {path: np.array(c, np.int64) for path, c in costs.items()}
  candidates = {path: np.arange(len(c)) for path, c in costs.items()}
  dense = fixed + sum(int(c[-1]) for c in costs.values())
  return Tables("macs", costs, candidates, fixed, dense, **options)


# ---------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------


def test_budget_is_read_and_written():
  assert Budget.parse("macs:0.5") == Budget("macs", 0.5)
  assert str(Budget.parse(" latency_ms:4 ")) == "latency_ms:4"


@pytest.mark.parametrize(
  "text, message",
  [
    ("flops:0.5", "unknown kind 'flops'"),
    ("macs", "kind:value"),
    ("macs:", "kind:value"),
    ("macs:half", "kind:value"),
    ("macs:0", "in \\(0, 1\\]"),
    ("params:1.2", "in \\(0, 1\\]"),
    ("bytes:nan", "in \\(0, 1\\]"),
    ("latency_ms:0", "above 0"),
    ("latency_ms:inf", "above 0"),
  ],
)
def test_bad_budget_is_refused(text, message):
  with pytest.raises(BudgetError, match=message):
    Budget.parse(text)


def test_impossible_budget_says_the_smallest_which_is_possible(run):
  with pytest.raises(BudgetError, match="the smallest is") as error:
    allocate.choose_ranks(run, "params:0.001", rule="uniform")
  smallest = str(error.value).split("the smallest is ")[1].split()[0]
  ranks = allocate.choose_ranks(run, smallest, rule="uniform")
  assert set(flat(ranks).values()) == {0}


def test_budget_above_the_checkpoint_says_the_maximum(run):
  ranks = trees.unflatten_ranks(
    {"fc1": np.int32(5), "fc2": np.int32(5), "fc3": np.int32(2)}
  )
  small = dataclasses.replace(run, ranks=ranks)
  with pytest.raises(BudgetError, match="--checkpoint=discover") as error:
    allocate.choose_ranks(small, "macs:0.9", rule="uniform")
  most = str(error.value).split("the maximum is ")[1].split()[0]
  chosen = flat(allocate.choose_ranks(small, most, rule="uniform"))
  assert all(chosen[path] <= int(r["rank"]) for path, r in ranks.items())
  assert flat(allocate.choose_ranks(run, "macs:1", rule="uniform")) == flat(
    run.ranks
  )


def test_limit_is_exact_in_spite_of_rounding():
  tables = toy({"a": range(101)})
  assert tables.limit(Budget("macs", 0.29)) == 29  # 0.29 * 100 < 29


# ---------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COSTS)
def test_tables_equal_the_cost_of_the_extracted_network(case, kind):
  now = budget_lib.current(case.layers, case.factored, case.full)
  tables = budget_lib.cost_tables(case.layers, case.factored, case.full, kind)
  rng = np.random.default_rng(0)
  for _ in range(4):
    ranks = {p: int(rng.integers(r + 1)) for p, r in tables.whole.items()}
    tree = budget_lib.rank_tree(now, ranks)
    small = jax.eval_shape(
      lambda p, tree=tree: lowrank.extract(p, tree, case.layers), case.factored
    )
    cost = maestro.count_cost(case.layers, small)
    assert tables.total(ranks) == getattr(cost, kind)
  dense = maestro.count_cost(case.layers, case.dense)
  assert tables.dense == getattr(dense, kind)


@pytest.mark.quick(2)
def test_tables_of_adapters_count_the_kernel_that_stays():
  spec = {"fc": trees.LayerSpec("dense", (6,), (4,))}
  node = {
    "kernel": jnp.ones((6, 4)),
    "u": jnp.ones((6, 4)),
    "v": jnp.ones((4, 4)),
  }
  params, full = {"fc": node}, {"fc": {"rank": np.int32(4)}}
  tables = budget_lib.cost_tables(spec, params, full, "params")
  for r in range(5):
    small = lowrank.extract(params, {"fc": {"rank": np.int32(r)}}, spec)
    cost = maestro.count_cost(spec, small).params
    assert tables.costs["fc"][r] == cost
  # Merged, it costs 24 at any rank: only rank 4 is worth choosing.
  assert tables.candidates["fc"].tolist() == [4]


def test_candidates_are_below_break_even_or_whole(run):
  tables = budget_lib.cost_tables(run.layers, run.params, run.ranks, "macs")
  # 64 x 24: 17 (64 + 24) < 64 * 24 <= 18 (64 + 24)
  assert tables.candidates["fc1"].tolist() == [*range(18), 24]
  assert tables.snap("fc1", 20) == 24
  assert tables.snap("fc1", 17) == 17
  tables = budget_lib.cost_tables(
    run.layers, run.params, run.ranks, "macs", multiple_of=5
  )
  assert tables.candidates["fc1"].tolist() == [0, 5, 10, 15, 24]
  assert tables.snap("fc1", 17) == 15
  assert tables.snap("fc1", 3) == 5  # not 0, which cuts the layer off
  assert tables.snap("fc1", 0) == 0


# ---------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------

FRACTIONS = (0.9, 0.7, 0.5, 0.3, 0.15)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
  "kind, multiple_of", [("params", 4), *((kind, 1) for kind in COSTS)]
)
@pytest.mark.parametrize("rule", allocate.RULES)
def test_no_rule_exceeds_a_budget(run, dataset, rule, kind, multiple_of):
  trees = allocate.choose_profiles(
    run,
    [Budget(kind, f) for f in FRACTIONS],
    rule=rule,
    dataset=dataset,
    batch=64,
    evaluations=40,
    multiple_of=multiple_of,
  )
  dense = cost_of(run, run.ranks, kind)  # at full rank, all is merged
  costs = [cost_of(run, tree, kind) for tree in trees]
  for fraction, cost in zip(FRACTIONS, costs, strict=True):
    assert cost <= fraction * dense
    if multiple_of == 1:
      assert cost >= 0.5 * fraction * dense  # nor is it wasted
  full = flat(run.ranks)
  profiles = [flat(tree) for tree in trees]
  for profile in profiles:
    for path, rank in profile.items():
      assert rank % multiple_of == 0 or rank == full[path]
  for larger, smaller in itertools.pairwise(profiles):
    assert all(smaller[path] <= larger[path] for path in full)


def test_uniform_keeps_one_fraction(run):
  tables = budget_lib.cost_tables(run.layers, run.params, run.ranks, "macs")
  levels = rank_rules.uniform_levels(tables)
  for part in (0.2, 0.5, 0.8):
    limit = int(part * tables.dense)
    ranks = rank_rules.by_level(tables, levels, limit)
    whole = tables.whole
    fits = []
    for f in np.linspace(0.1, 1, 2000):
      at = {p: tables.snap(p, int(f * top)) for p, top in whole.items()}
      fits += [at] if tables.total(at) <= limit else []
    assert ranks == fits[-1]


@pytest.mark.quick(1)
def test_threshold_is_one_for_all_layers():
  tables = toy({"a": [0, 1, 2, 3], "b": [0, 1, 2], "c": [0, 1]})
  params = {
    "a": {"u": np.diag([4.0, 3.0, 2.0]), "v": np.eye(3)},
    "b": {"u": np.diag([2.5, 1.0]), "v": np.eye(2)},
    "c": {"u": np.full((1, 1), 0.1), "v": np.ones((1, 1))},
  }
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  ranks = lowrank.full_ranks(params)
  levels = rank_rules.threshold_levels(tables, params, ranks)
  for path, score in lowrank.importance(params).items():
    np.testing.assert_allclose(-levels[path], score, rtol=1e-6)
  # Importances are 9.3, 5.1, 2.0; 3.8, 1.0; 0.1: first components come first.
  chosen = [rank_rules.by_level(tables, levels, n) for n in range(7)]
  assert [tuple(c.values()) for c in chosen] == [
    (0, 0, 0),
    (1, 0, 0),
    (1, 1, 0),
    (1, 1, 1),
    (2, 1, 1),
    (3, 1, 1),
    (3, 2, 1),
  ]


def test_energy_keeps_the_smallest_prefix_that_holds_a_fraction():
  tables = toy({"a": [0, 1, 2, 3], "b": [0, 1, 2]})
  u = np.diag([2.0, 1.0, 1.0]).astype(np.float32)
  b = np.diag([3.0, 0.1]).astype(np.float32)
  params = {
    "a": {"u": u, "v": np.eye(3, dtype=np.float32)},
    "b": {"u": b, "v": np.eye(2, dtype=np.float32)},
  }
  ranks = lowrank.full_ranks(params)
  levels = rank_rules.energy_levels(tables, params, ranks)
  np.testing.assert_allclose(levels["a"], [0, 4 / 6, 5 / 6], rtol=1e-6)
  chosen = rank_rules.by_level(tables, levels, 3)
  assert chosen == {"a": 2, "b": 1}  # 5 / 6 of a, more than that of b


def quadratic(weights):
  """A loss with interactions, decreasing in each rank."""

  def loss(ranks):
    lost = sum(w[ranks[p] :].sum() for p, w in weights.items())
    return float(lost + 0.1 * lost**2)

  return loss


@pytest.fixture
def small():
  rng = np.random.default_rng(3)
  tables = toy(
    {"a": 7 * np.arange(9), "b": 3 * np.arange(6), "c": 5 * np.arange(5)},
    fixed=4,
  )
  weights = {
    p: np.sort(rng.exponential(size=r))[::-1] for p, r in tables.whole.items()
  }
  return tables, quadratic(weights)


def test_greedy_begins_with_the_best_slice_of_all(small):
  tables, loss = small
  whole = tables.whole
  start, total = loss(whole), tables.total(whole)
  least = total - 6
  options = {}
  for path, rank in whole.items():
    for r in range(rank):
      ranks = whole | {path: r}
      saved = min(total - tables.total(ranks), total - least)
      options[path, r] = (loss(ranks) - start) / saved
  path, r = min(options, key=options.get)
  (first,) = rank_rules.greedy(
    tables, [total - 1], loss, grid=99, refresh=10**6
  )
  assert sum(first[p] != whole[p] for p in whole) == 1
  (chosen,) = rank_rules.greedy(tables, [least], loss, grid=99, refresh=10**6)
  assert chosen[path] <= r


def test_greedy_measures_again_only_as_often_as_allowed(small):
  tables, loss = small
  calls = []

  def counted(ranks):
    calls.append(ranks)
    return loss(ranks)

  (few,) = rank_rules.greedy(tables, [40], counted, grid=3, refresh=6)
  assert len(calls) <= 1 + 3 * 3 + 1 + 6
  assert tables.total(few) <= 40


def test_greedy_sees_through_a_stale_score():
  """Two layers back each other up: cutting both hurts, cutting one does not."""
  tables = toy({"a": [0, 10], "b": [0, 10], "c": [0, 10]})

  def loss(ranks):
    both = ranks["a"] == 0 and ranks["b"] == 0
    return (
      0.1 * (1 - ranks["a"])
      + 0.2 * (1 - ranks["b"])
      + 10.0 * both
      + (1.0 * (1 - ranks["c"]))
    )

  (fresh,) = rank_rules.greedy(tables, [10], loss, grid=9, refresh=10**6)
  assert fresh == {"a": 0, "b": 1, "c": 0}
  (stale,) = rank_rules.greedy(tables, [10], loss, grid=9, refresh=0)
  assert stale == {"a": 0, "b": 0, "c": 1}


def test_best_slice_looks_past_break_even():
  # 16 is whole and merged: 7 saves nothing to speak of, 2 saves much.
  costs = np.array([0, 10, 20, 30, 40, 50, 60, 70, *[72] * 9])
  tables = Tables("macs", {"a": costs}, {"a": np.array([*range(8), 16])}, 0, 72)
  increases = np.array([9, 5, 1.1, 1.08, 1.06, 1.04, 1.02, 1.0, *[0.0] * 9])
  rank, saved, _ = rank_rules.best_slice(tables, "a", 16, increases, 72)
  assert (rank, saved) == (2, 52)


@pytest.mark.parametrize("limit", [4, 20, 33, 41, 60, 84, 94])
def test_dp_equals_brute_force(small, limit):
  tables, loss = small
  whole = tables.whole
  increases = rank_rules.loss_table(tables, whole, loss, 99)

  def sum_of(ranks):
    return sum(increases[p][r] for p, r in ranks.items())

  every = [
    dict(zip(whole, ranks, strict=True))
    for ranks in itertools.product(*(range(r + 1) for r in whole.values()))
  ]
  best = min(sum_of(r) for r in every if tables.total(r) <= limit)
  (found,) = rank_rules.dp(tables, [limit], loss, grid=99)
  assert tables.total(found) <= limit
  assert sum_of(found) == pytest.approx(best)


@pytest.mark.parametrize("cells", [3, 10])
def test_knapsack_holds_the_limit_when_costs_are_rounded(small, cells):
  tables, loss = small
  increases = rank_rules.loss_table(tables, tables.whole, loss, 99)
  for limit in range(4, 90, 7):
    ranks = rank_rules.knapsack(
      tables, increases, tables.whole, limit, cells=cells
    )
    assert tables.total(ranks) <= limit
    # What is left would not pay for one more rank.
    for path, rank in ranks.items():
      if rank < tables.whole[path]:
        assert tables.total(ranks | {path: rank + 1}) > limit


def test_grid_is_geometric_with_the_least_and_not_the_whole():
  candidates = np.array([*range(101), 150])
  at = rank_rules.grid_ranks(candidates, 2 * np.arange(151), 6)
  assert at[0] == 0 and at[-1] < 150 and len(at) == 6
  steps = np.diff(np.log(at[1:]))
  np.testing.assert_allclose(steps, steps[0], rtol=0.2)
  assert rank_rules.grid_ranks(np.array([0, 1, 9]), np.arange(10), 6) == [0, 1]
  assert rank_rules.grid_ranks(np.array([4]), np.arange(5), 6) == []


@pytest.mark.quick(1)
def test_losses_are_those_of_the_masked_network(run, dataset):
  options = allocate.Options(batch=600, seed=1)
  loss, quarter = allocate.Oracle(run, dataset, options).losses()
  profile = {"fc1": 3, "fc2": 16, "fc3": 4}
  chosen = data.choice(1, len(dataset.train))
  tree = trees.unflatten_ranks(jax.tree.map(np.int32, profile))
  for n, value in ((600, loss(profile)), (150, quarter(profile))):
    x = dataset.train.inputs[np.asarray(chosen[:n])]
    y = dataset.train.targets[np.asarray(chosen[:n])]
    logits = run.model.apply({"params": run.params, "ranks": tree}, x)
    expected = losses.cross_entropy(logits, y).mean()
    assert value == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.quick(0)
def test_losses_use_the_statistics_of_the_batch(run):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(24, 8, 8, 3)).astype(np.float32)
  split = data.Split(x, np.arange(24, dtype=np.int32) % 10)
  images = data.Dataset("noise", split, split, split, 10, lambda x, key=None: x)
  model = ResNet18(num_classes=10, width=4, stage_sizes=(1,))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  layers = maestro.layers(model, x)
  params = lowrank.decompose(variables["params"], [lowrank.Rule()], layers)
  net = dataclasses.replace(
    run,
    model=model,
    layers=layers,
    params=params,
    batch_stats=variables["batch_stats"],
    ranks=lowrank.full_ranks(params),
  )
  loss, _ = allocate.Oracle(net, images, allocate.Options(batch=24)).losses()
  profile = {p: int(r) // 2 for p, r in flat(net.ranks).items()}
  cut = lowrank.mask(
    params, trees.unflatten_ranks(jax.tree.map(np.int32, profile))
  )
  with maestro.introspect.batch_statistics():
    _, own = model.apply(
      variables | {"params": cut}, x, train=True, mutable=["batch_stats"]
    )
  logits = model.apply({"params": cut} | dict(own), x, train=False)
  expected = losses.cross_entropy(logits, split.targets).mean()
  assert loss(profile) == pytest.approx(float(expected), rel=1e-4)


def test_measuring_rule_without_data_is_refused(run):
  with pytest.raises(UserError, match="needs the data"):
    allocate.choose_ranks(run, "macs:0.5", rule="greedy")


def test_bad_options_are_refused(run):
  with pytest.raises(UserError, match="--rule=best"):
    allocate.choose_ranks(run, "macs:0.5", rule="best")
  with pytest.raises(UserError, match="--multiple_of=0"):
    allocate.choose_ranks(run, "macs:0.5", rule="uniform", multiple_of=0)
  dense = dataclasses.replace(
    run, params=lowrank.merge(run.params, run.layers), ranks={}
  )
  with pytest.raises(BudgetError, match="no factored layers"):
    allocate.choose_ranks(dense, "macs:0.5", rule="uniform")


# ---------------------------------------------------------------------------
# Latency
# ---------------------------------------------------------------------------


def fake_latency(model, variables, example, *, batch_size, repeats):
  """A millisecond for each thousand parameters."""
  del model, example, batch_size, repeats
  return sum(x.size for x in jax.tree.leaves(variables)) / 1000


@pytest.mark.parametrize("budget", [0.3, 0.9, 1.7, 99.0])
def test_latency_budget_is_met(run, budget):
  tree = allocate.choose_ranks(
    run, f"latency_ms:{budget}", rule="energy", measure=fake_latency
  )
  small = lowrank.extract(run.params, tree, run.layers)
  found = sum(x.size for x in jax.tree.leaves(small)) / 1000
  assert found <= budget
  assert found >= 0.8 * budget or flat(tree) == flat(run.ranks)


def test_impossible_latency_says_the_smallest_measured(run):
  with pytest.raises(BudgetError, match=r"takes 0\.05 ms"):
    allocate.choose_ranks(
      run, "latency_ms:0.01", rule="uniform", measure=fake_latency
    )


def test_latency_is_measured(run):
  example = run.facts.example
  variables = {"params": run.params}
  one, many = (
    allocate.measure_latency(
      run.model, variables, example, batch_size=n, repeats=5
    )
    for n in (1, 4096)
  )
  assert 0 < one < many


def test_each_profile_is_measured_once(run, dataset):
  measured = []

  def counted(model, variables, example, **options):
    measured.append(sum(x.size for x in jax.tree.leaves(variables)))
    return fake_latency(model, variables, example, **options)

  budgets = ["latency_ms:0.9", "latency_ms:0.5", "latency_ms:0.9"]
  found = allocate.choose_profiles(run, budgets, rule="energy", measure=counted)
  assert len(set(measured)) == len(measured)
  assert len(found) == 3 and flat(found[0]) == flat(found[2])
  said = []
  oracle = allocate.Oracle(run, dataset, allocate.Options(batch=32))
  loss, _ = oracle.losses(said.append)
  assert loss({"fc1": 3, "fc2": 5, "fc3": 4}) == loss(
    {"fc3": 4, "fc2": 5, "fc1": 3}
  )
  assert said == [1.0]


# ---------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------


def test_profile_is_read_back(run, tmp_path):
  path = tmp_path / "profile.json"
  path.write_text(json.dumps({"ranks": {"fc1": 3, "fc3": 0}}))
  profile = profiles.read_profile(path)
  tree = profiles.parse_profile(profile, run.layers, run.params)
  assert flat(tree) == flat(run.ranks) | {"fc1": 3, "fc3": 0}


def test_profile_of_a_stacked_layer_may_have_lists(cases):
  case = cases["scan"]
  (path,) = case.layers
  for entry, expected in (([1, 2, 3], [1, 2, 3]), (2, [2, 2, 2])):
    tree = profiles.parse_profile(
      {"ranks": {path: entry}}, case.layers, case.factored
    )
    assert trees.flatten_ranks(tree)[path].tolist() == expected


@pytest.mark.parametrize(
  "profile, message",
  [
    ({"fc1": 3}, 'no such "ranks"'),
    ([], 'no such "ranks"'),
    ({"ranks": {"fc9": 3}}, "no layer 'fc9'"),
    ({"ranks": {"fc2": 3}}, "'fc2' is dense"),
    ({"ranks": {"fc1": 25}}, r"outside \[0, 24\]"),
    ({"ranks": {"fc1": -1}}, r"outside \[0, 24\]"),
    ({"ranks": {"fc1": 2.5}}, "is no rank"),
    ({"ranks": {"fc1": True}}, "is no rank"),
    ({"ranks": {"fc1": None}}, "is no rank"),
    ({"ranks": {"fc1": [1, [2]]}}, "is no rank"),
    ({"ranks": {"fc1": [1, 2]}}, "is no rank"),
  ],
)
def test_bad_profile_is_refused(run, profile, message):
  params = lowrank.merge(
    run.params, run.layers, where=lambda path: path == "fc2"
  )
  with pytest.raises(ProfileError, match=message):
    profiles.parse_profile(profile, run.layers, params)


@pytest.mark.parametrize(
  "text, message",
  [
    ('{"ranks": {"embed": 3, "embed": 4}}', "'embed' is there twice"),
    ("{", "not valid JSON"),
    (None, "cannot read"),
  ],
)
def test_bad_profile_file_is_refused(tmp_path, text, message):
  path = tmp_path / "profile.json"
  if text is not None:
    path.write_text(text)
  with pytest.raises(ProfileError, match=message):
    profiles.read_profile(path)


# ---------------------------------------------------------------------------
# Rows and files
# ---------------------------------------------------------------------------


@pytest.mark.quick(1)
def test_rows_hold_cost_and_validation_scores(run, dataset, tmp_path):
  rows = allocate.allocate(
    run,
    ["macs:0.6", "latency_ms:0.9"],
    dataset,
    rule="energy",
    measure=fake_latency,
  )
  assert [row["budget"] for row in rows] == [None, "macs:0.6", "latency_ms:0.9"]
  assert rows[0]["fraction"] == {"params": 1.0, "macs": 1.0, "bytes": 1.0}
  assert rows[1]["fraction"]["macs"] <= 0.6 and rows[2]["latency_ms"] <= 0.9
  tree = profiles.parse_profile(rows[1], run.layers, run.params)
  assert cost_of(run, tree, "macs") == rows[1]["cost"]["macs"]
  x, y = dataset.val.inputs, dataset.val.targets
  logits = run.model.apply({"params": run.params, "ranks": tree}, x)
  assert rows[1]["loss"] == pytest.approx(
    float(losses.cross_entropy(logits, y).mean()), rel=1e-5
  )
  record = {"run": "r", "checkpoint": "final", "rule": "energy", "rows": rows}
  pareto.draw(record, tmp_path / "pareto.png")
  assert (tmp_path / "pareto.png").stat().st_size > 1000
  assert "latency_ms:0.9" in pareto.table(rows)


@pytest.mark.quick(1)
def test_command_line_answers_bad_input_in_one_line(tmp_path):
  def call(*args):
    return subprocess.run(
      [sys.executable, "-m", "maestro.allocate", *args],
      capture_output=True,
      text=True,
    )

  done = call(f"--workdir={tmp_path}", "--budgets=macs:2")
  assert done.returncode == 2
  assert done.stderr.startswith("error: budget macs:2: must be in (0, 1]")
