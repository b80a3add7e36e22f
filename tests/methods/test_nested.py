"""Chains of profiles: nested, within their budgets, from the bottom up."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_proposals import network

from maestro import sampling
from maestro.methods import nested
from maestro.schema import ConfigError


@pytest.mark.parametrize("seed", range(200))
def test_levels_are_nested_and_within_their_budgets(seed):
  tables, tails, rng = network(seed)
  low, high = tables.total(tables.smallest), tables.total(tables.whole)
  limits = [*sorted(rng.integers(low, high + 1, size=4).tolist())[::-1], low]
  profiles = nested.chain(tables, [high, *limits], tails)
  assert profiles[0] == tables.whole and profiles[-1] == tables.smallest
  for profile, limit in zip(profiles, [high, *limits], strict=True):
    assert tables.total(profile) <= limit
  for above, below in itertools.pairwise(profiles):
    assert all(above[path] >= below[path] for path in above)


def test_the_smallest_level_is_the_best_for_its_budget():
  """It is not cornered by what larger levels kept."""
  tables, tails, _ = network(3, layers=4)
  limit = (tables.total(tables.smallest) + tables.total(tables.whole)) // 2
  alone = nested.chain(tables, [limit], tails)
  both = nested.chain(tables, [tables.total(tables.whole), limit], tails)
  assert both[-1] == alone[0]


def test_levels_are_drawn_by_their_shares():
  shares = np.array(nested.Options().shares)
  assert shares[-1] == pytest.approx(3 / 8.5) and sum(shares) == 1
  keys = jax.random.split(jax.random.key(0), 20_000)
  draw = jax.jit(jax.vmap(lambda key: sampling.level(key, jnp.asarray(shares))))
  found = np.bincount(np.asarray(draw(keys)), minlength=len(shares))
  error = np.sqrt(shares * (1 - shares) * len(keys))
  assert np.all(np.abs(found - shares * len(keys)) < 4.5 * error)


BAD = {
  "one": ({"levels": [1.0]}, "two or more"),
  "rising": ({"levels": [0.5, 0.8]}, "do not descend"),
  "twice": ({"levels": [0.5, 0.5]}, "do not descend"),
  "above": ({"levels": [1.5, 0.5]}, r"levels\[0\]: 1.5 is out of range"),
  "weights": ({"weights": [1.0, 2.0]}, "2 of them for 6 levels"),
  "no weight": ({"levels": [1.0, 0.5], "weights": [1.0, 0.0]}, "weights"),
  "kind": ({"kind": "mac"}, "did you mean 'macs'"),
  "key": ({"level": [1.0, 0.5]}, "did you mean 'levels'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_chain_is_named(name):
  section, match = BAD[name]
  with pytest.raises(ConfigError, match=match):
    nested.options_of(section)
