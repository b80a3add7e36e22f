"""Profiles for a budget: within it, and the best where that is known."""

import itertools

import numpy as np
import pytest

from maestro.cost.allocation import knapsack
from maestro.cost.budget import Tables
from maestro.methods import proposals


def network(seed, layers=None, least=1):
  """Tables and parts lost of a random small network."""
  rng = np.random.default_rng(seed)
  costs, candidates, tails = {}, {}, {}
  for i in range(layers or rng.integers(1, 6)):
    n_in, n_out = rng.integers(2, 12, size=2)
    full, uses = int(min(n_in, n_out)), int(rng.integers(1, 50))
    dense = uses * n_in * n_out
    table = np.array(
      [min(uses * r * (n_in + n_out), dense) for r in range(full)]
    )
    table = np.append(table, dense)
    after = np.minimum.accumulate(table[::-1])[::-1]
    low = min(least, full)
    useful = [r for r in range(low, full) if table[r] < after[r + 1]]
    path = f"layer{i}"
    costs[path], candidates[path] = table, np.array([*useful, full])
    s = np.sort(rng.exponential(size=full))[::-1]
    tails[path] = np.append(np.cumsum(s[::-1])[::-1], 0) / s.sum()
  fixed = int(rng.integers(0, 100))
  dense = fixed + sum(int(c[-1]) for c in costs.values())
  return Tables("macs", costs, candidates, fixed, dense), tails, rng


def limit_of(tables, rng):
  low, high = tables.total(tables.smallest), tables.total(tables.whole)
  return int(rng.integers(low, high + 1))


@pytest.mark.parametrize("seed", range(500))
def test_no_proposal_exceeds_its_budget_or_cuts_a_layer_off(seed):
  tables, tails, rng = network(seed)
  limit = limit_of(tables, rng)
  orders = {"fisher": tails, "svd": {p: t**0.5 for p, t in tails.items()}}
  found = proposals.propose(tables, limit, orders, tails)
  near = proposals.neighbours(
    tables,
    limit,
    proposals.series(tails),
    found[0].ranks,
    top=tables.whole,
    most=4,
  )
  assert found[0].name == "uniform" and len(near) <= 4
  seen = [tuple(p.ranks.items()) for p in found]
  assert len(set(seen)) == len(seen)
  for p in (*found, *near):
    assert tables.total(p.ranks) <= limit
    assert all(r in tables.candidates[path] for path, r in p.ranks.items())
    assert all(r >= 1 for r in p.ranks.values())


@pytest.mark.parametrize("seed", range(60))
def test_a_knapsack_with_floors_is_the_best_above_them(seed):
  """Against all combinations."""
  tables, tails, rng = network(seed, layers=3)
  floor = {p: int(rng.choice(c)) for p, c in tables.candidates.items()}
  low = tables.total(floor)
  limit = int(rng.integers(low, tables.total(tables.whole) + 1))
  found = knapsack(tables, tails, tables.whole, limit, cells=10**9, floor=floor)
  every = (
    dict(zip(tails, ranks, strict=True))
    for ranks in itertools.product(
      *(c.tolist() for c in tables.candidates.values())
    )
  )
  best = min(
    sum(tails[p][r] for p, r in ranks.items())
    for ranks in every
    if tables.total(ranks) <= limit and all(ranks[p] >= floor[p] for p in ranks)
  )
  assert tables.total(found) <= limit
  assert all(found[p] >= floor[p] for p in floor)
  assert sum(tails[p][r] for p, r in found.items()) == pytest.approx(best)


def test_layers_in_series_lose_a_product():
  tails = {"a": np.array([1.0, 0.5, 0.0]), "b": np.array([1.0, 0.2, 0.0])}
  score = proposals.series(tails)
  kept = np.exp(-(score["a"][1] + score["b"][1]))
  assert kept == pytest.approx(0.5 * 0.8)
  assert np.isfinite(score["a"][0])


def test_neighbours_move_what_weighs_much():
  """A convolution's one component outweighs a classifier's."""
  costs = {
    "conv": np.array([0, 1000, 2000, 3000]),
    "fc": np.arange(21, dtype=np.int64),
  }
  candidates = {"conv": np.arange(1, 4), "fc": np.arange(1, 21)}
  tables = Tables("macs", costs, candidates, 0, 3020)
  score = {p: np.linspace(1, 0, len(c)) for p, c in costs.items()}
  ranks = {"conv": 2, "fc": 5}
  near = proposals.neighbours(
    tables, 2010, score, ranks, top=tables.whole, most=9
  )
  assert {p.name for p in near} == {"conv -"}
  assert near[0].ranks == {"conv": 1, "fc": 20}


@pytest.mark.parametrize("seed", range(20))
def test_room_for_one_more_is_the_next_candidate(seed):
  tables, _, rng = network(seed)
  ranks = {p: int(rng.choice(c)) for p, c in tables.candidates.items()}
  more = proposals.one_more(tables, ranks)
  for path, c in tables.candidates.items():
    above = [r for r in c if r > ranks[path]]
    assert more[path] == (above[0] if above else ranks[path])
