"""Weights of the lasso by cost, and what moves its strength to a budget."""

import copy
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maestro import introspect, lowrank, nn, trees
from maestro.cost import count
from maestro.methods import controllers, prox
from maestro.methods.table import METHODS
from maestro.report import figures
from maestro.runs import metrics
from maestro.schema import ConfigError
from maestro.training import loop as train
from maestro.training.config import clock_of, parse, periods_of

BASE = {
  "model": {"name": "mlp", "features": [24, 16]},
  "data": {"name": "digits"},
  "batch_size": 64,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "method": "lasso",
  "budget": "macs:0.4",
  "discover": {
    "epochs": 6,
    "schedule": {"name": "constant", "learning_rate": 0.05},
    "sampler": {"name": "one_layer"},
    "shrink": True,
  },
  "settle": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "checkpoint": {"keep": 9},
  "mesh": {"data": 1},
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)


def one(spec, kind):
  """The root of what a component of a layer costs, counted another way."""
  elements = np.prod(spec.lead, dtype=int)
  if kind == "params":
    cost = sum(np.prod(x) for x in spec.factor_shapes(1))
  else:
    cost = count.layer_macs(spec, 1)
  return (cost / elements) ** 0.5


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_weights_are_in_proportion_to_roots_of_costs(case, kind):
  limits = {path: spec.full_rank for path, spec in case.layers.items()}
  weights = controllers.component_weights(case.layers, limits, kind)
  units = [weights[path] / one(s, kind) for path, s in case.layers.items()]
  assert units == pytest.approx([units[0]] * len(units))
  counts = {
    path: spec.full_rank * np.prod(spec.lead, dtype=int)
    for path, spec in case.layers.items()
  }
  total = sum(weights[path] * n for path, n in counts.items())
  assert total == pytest.approx(sum(counts.values()))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", prox.KINDS)
def test_weights_count_groups_layer_by_layer(case, kind, close):
  paths = list(trees.factored(case.factored))
  weights = {path: 0.5 + i for i, path in enumerate(paths)}
  whole = lowrank.group_lasso(case.factored, case.full, kind, weights)
  moved = prox.prox(case.factored, case.full, 0.05, kind, weights)
  total = 0.0
  for path, weight in weights.items():
    ranks = {path: trees.flatten_ranks(case.full)[path]}
    tree = trees.unflatten_ranks(ranks)
    total += weight * lowrank.group_lasso(case.factored, tree, kind)
    alone = prox.prox(case.factored, tree, 0.05 * weight, kind)
    close(trees.get(moved, path), trees.get(alone, path))
  assert float(whole) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.quick(2)
def test_layers_without_a_weight_count_once(case, close):
  some = dict.fromkeys(list(trees.factored(case.factored))[:1], 1.0)
  plain = prox.prox(case.factored, case.full, 0.05)
  close(prox.prox(case.factored, case.full, 0.05, weights=some), plain)
  assert float(
    lowrank.group_lasso(case.factored, case.full, weights=some)
  ) == float(lowrank.group_lasso(case.factored, case.full))


def test_an_update_may_be_given_its_weight(cases, close):
  case, mu = cases["dense"], 0.5
  grads = jax.tree.map(jnp.ones_like, case.factored)

  def move(own, **given):
    tx = optax.chain(
      optax.sgd(0.1, momentum=mu),
      prox.proximal(lambda _: 0.1, own, layers=case.layers, momentum=mu),
    )
    state = tx.init(case.factored)
    return tx.update(grads, state, case.factored, **given)[0]

  close(move(7.0, lam=0.2), move(0.2 / (1 - mu)))
  close(move(optax.constant_schedule(0.3)), move(0.3))


# --- the controller ---


def bound(**options):
  model, x = nn.Dense(20), jnp.ones((1, 30))
  layers = introspect.layers(model, x)
  (path,) = layers
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  section = {"name": "follow"} | options
  m = dataclasses.replace(
    METHODS["lasso"], controller=section, budget="params:0.5"
  )
  dense = count.count_cost(layers, shapes)
  return controllers.bind(m, layers, {path: 20}, dense)


def test_costs_are_those_of_factors():
  c = bound()
  assert (c.fixed, c.whole, c.limit) == (20, 20 + 20 * 50, 310)
  assert c.cost({path: 3 for path in c.costs}) == 20 + 3 * 50


@pytest.mark.parametrize("done", [0.0, 0.3, 0.8, 1.0])
def test_the_lasso_acts_above_the_aim_alone(done):
  c = bound(rise=2.0)
  aim = c.whole * (c.limit / c.whole) ** min(done / 0.8, 1.0)
  for rank in range(1, 21):
    ranks = {path: rank for path in c.costs}
    lam, force = c.update(3.0, ranks, done)
    if c.cost(ranks) <= c.limit:
      assert (lam, force) == (0.0, 3.0)
    elif c.cost(ranks) > aim:
      assert lam == force == 6.0
    else:
      assert lam == 0.0 and force == pytest.approx(3.0 / 2**0.5)


def test_within_the_budget_nothing_is_pushed_further():
  c = bound()
  ranks = {path: 5 for path in c.costs}
  assert c.update(2.0, ranks, 0.5) == (0.0, 2.0)


def test_a_force_that_never_suffices_stays_finite():
  c, force = bound(rise=1e9), 1.0
  ranks = {path: 20 for path in c.costs}
  for _ in range(100):
    lam, force = c.update(force, ranks, 1.0)
  assert np.isfinite(np.float32(lam)) and lam == force


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  ("method", "rules"), [("dense", ({},)), ("svd", ({},)), ("maestro", ())]
)
def test_costs_of_a_lasso_that_is_not_there_change_nothing(
  method, rules, tmp_path
):
  config = copy.deepcopy(BASE) | {"method": method, "rules": rules}
  config["discover"]["epochs"] = 1
  del config["budget"]
  results = [
    train.train(config | {"lasso_cost": cost}, tmp_path / str(cost))["final"]
    for cost in (None, "macs")
  ]
  assert results[0] == results[1]


@pytest.mark.quick(0)
def test_the_weights_of_a_config_are_used(tmp_path):
  config = copy.deepcopy(BASE) | {"method": "maestro", "budget": None}
  config["discover"] |= {"epochs": 1, "lam": 1e-2}
  losses = [
    train.train(config | {"lasso_cost": cost}, tmp_path / str(cost))["final"]
    for cost in (None, "macs", "params")
  ]
  assert losses[0]["metrics"] != losses[1]["metrics"]
  # A dense layer's component has as many MACs as parameters.
  assert losses[1]["metrics"] == losses[2]["metrics"]


# --- in a run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "figures", lambda workdir: None)
    workdir = tmp_path_factory.mktemp("lasso") / "run"
    return train.train(copy.deepcopy(BASE), workdir), workdir


def records(workdir):
  lines = (workdir / metrics.FILE).read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.quick(0)
def test_a_run_comes_to_its_budget_without_a_lambda(run):
  results, workdir = run
  share = results["final"]["macs"] / results["dense"]["macs"]
  assert 0.25 < share <= 0.4
  lams = [r["lam"] for r in records(workdir) if "lam" in r]
  assert len(lams) >= 40 and lams[0] == 0.0 and max(lams) > 1e-4
  # It falls from the first to the last, not all at once.
  costs = [r["cost/macs"] for r in records(workdir) if r["phase"] == 0]
  assert sum(a > b for a, b in itertools.pairwise(costs)) >= 5


@pytest.mark.quick(0)
def test_a_run_stopped_within_discover_goes_on_with_its_weight(run, tmp_path):
  results, workdir = run

  class StoppedError(Exception):
    pass

  saved = train._save
  calls = []

  def save(checkpoints, state, *rest):
    saved(checkpoints, state, *rest)
    calls.append(float(state.controls.get("force", 0.0)))
    if len(calls) == 3:
      raise StoppedError

  again = tmp_path / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "_save", save)
    with pytest.raises(StoppedError):
      train.train(copy.deepcopy(BASE), again)
  assert calls[-1] > 0 and calls[-1] != calls[0]
  resumed = train.train(copy.deepcopy(BASE), again)
  assert resumed["final"] == results["final"]
  lams = [[r.get("lam") for r in records(w)] for w in (workdir, again)]
  assert lams[0] == lams[1]


def test_ranks_fall_as_often_as_the_controller_looks():
  c = parse(copy.deepcopy(BASE))
  clock = clock_of(c, 50)
  assert periods_of(c, clock).shrink == {"discover": 3}
  own = copy.deepcopy(BASE)
  own["discover"]["shrink_every"] = "steps:7"
  assert periods_of(parse(own), clock).shrink == {"discover": 7}


@pytest.mark.parametrize(
  ("method", "more", "match"),
  [
    ({"budget": None}, {"budget": None}, "budget: missing"),
    ({"controller": {"name": "pid"}}, {}, "config.method.controller"),
    (
      {"controller": {"name": "follow", "reach": 0.0}},
      {},
      "config.method.controller.reach",
    ),
    ({"proximal": False}, {}, "controller: moves"),
    ({}, {"budget": "bytes:0.5"}, "another kind"),
    ({}, {"lasso_cost": "joules"}, "config.lasso_cost"),
  ],
)
def test_bad_controllers_are_named(method, more, match, tmp_path):
  config = copy.deepcopy(BASE) | {"method": {"name": "lasso"} | method} | more
  with pytest.raises(ConfigError, match=match):
    train.train(config, tmp_path / "run")


def test_a_controller_without_shrinking_is_named(tmp_path):
  config = copy.deepcopy(BASE)
  config["discover"]["shrink"] = False
  with pytest.raises(ConfigError, match=r"config\.discover\.shrink"):
    train.train(config, tmp_path / "run")
