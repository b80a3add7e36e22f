"""Tests of the samplers: their laws, their determinism, and rank 0."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import sampling

RANKS = {"a": jnp.int32(3), "b": {"c": jnp.array([1, 4], jnp.int32)}}
KEY = jax.random.key(0)
SAMPLERS = {
  "full": sampling.full,
  "pairs": sampling.one_layer,
  "layers": functools.partial(sampling.one_layer, over="layers"),
  "independent": sampling.independent,
  "fixed": functools.partial(sampling.fixed, fraction=0.5),
}


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS.keys())
def sampler(request):
  return request.param


def _flat(ranks):
  leaves = jax.tree.leaves(ranks)
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


def _draws(jit, sampler, ranks=RANKS, n=8000):
  """N draws, [n, elements of the ranks]."""

  def draw(key):
    flat = [jnp.ravel(leaf) for leaf in jax.tree.leaves(sampler(key, ranks))]
    return jnp.concatenate(flat)

  return np.asarray(jit(jax.vmap(draw))(jax.random.split(KEY, n)))


def _chi_square(counts, law):
  """Pearson's statistic over its expectation; near 1 if the law holds."""
  counts, law = np.asarray(counts, float), np.asarray(law, float)
  expected = counts.sum() * law / law.sum()
  return np.sum((counts - expected) ** 2 / expected) / (len(law) - 1)


# Under the law the statistics exceed 3.5 with a probability below 1e-3; the
# seed is fixed. A wrong law scores hundreds.
THRESHOLD = 3.5


# A draw of a layer's full rank leaves no trace of the layer: it is `None`.
# pairs: 8 of them, (0, 1..3), (1, 1), (2, 1..4).
PAIRS = {(0, 1): 1, (0, 2): 1, (2, 1): 1, (2, 2): 1, (2, 3): 1, None: 3}
# layers: a third each, in units of 1/36.
LAYERS = {(0, 1): 4, (0, 2): 4, (2, 1): 3, (2, 2): 3, (2, 3): 3, None: 19}


@pytest.mark.parametrize(
  ("over", "law"), [("pairs", PAIRS), ("layers", LAYERS)]
)
def test_one_layer_draws_by_its_law_and_leaves_the_others(jit, over, law):
  counts = dict.fromkeys(law, 0)
  full = _flat(RANKS)
  for draw in _draws(jit, SAMPLERS[over]):
    changed = np.flatnonzero(draw != full)
    assert len(changed) <= 1
    key = (int(changed[0]), int(draw[changed[0]])) if len(changed) else None
    counts[key] += 1  # an impossible draw is a KeyError
  assert _chi_square(list(counts.values()), list(law.values())) < THRESHOLD


def test_independent_draws_every_pair_of_ranks_alike(jit):
  draws = _draws(jit, sampling.independent)
  assert (draws[:, 1] == 1).all()
  counts = np.zeros((3, 4))
  np.add.at(counts, (draws[:, 0] - 1, draws[:, 2] - 1), 1)
  assert _chi_square(counts.ravel(), np.ones(12)) < THRESHOLD


def test_full_leaves_the_ranks():
  assert sampling.full(KEY, RANKS) is RANKS


def test_fixed_is_the_exact_ceiling_for_every_fraction_and_rank():
  ranks = np.arange(257, dtype=np.int32)
  for r in range(1, 257):
    for j in range(r + 1):
      if math.gcd(j, r) > 1:
        continue  # the same float as the reduced fraction
      found = sampling.fixed(KEY, ranks, fraction=j / r)
      # -(-a // b) is the ceiling of the fraction a / b, in integers.
      assert np.array_equal(found, -(-ranks.astype(np.int64) * j // r)), (j, r)
      assert found[r] == j


@pytest.mark.quick(32)
@pytest.mark.parametrize("size", [1, 3, 50, 4096, 65537, 2**31 - 1])
@pytest.mark.parametrize(
  "text", ["0", "0.0001", "0.0004", "0.001", "0.29", "0.3333", "0.9999", "1"]
)
def test_fixed_is_exact_for_small_fractions_and_large_ranks(jit, text, size):
  """As an exact ceiling in Python's integers, traced or not."""
  wanted = math.ceil(Fraction(text) * size)
  ranks = {"a": jnp.int32(size), "b": jnp.int32(0)}
  draw = functools.partial(sampling.fixed, fraction=float(text))
  for found in (draw(KEY, ranks), jit(draw)(KEY, ranks)):
    assert int(found["a"]) == wanted and int(found["b"]) == 0


def test_fixed_gives_integers_on_the_device():
  found = sampling.fixed(KEY, RANKS, fraction=1 / 3)
  assert _flat(found).tolist() == [1, 1, 2]
  assert found["a"].dtype == jnp.int32


@pytest.mark.quick(11)
@pytest.mark.parametrize(
  "ranks",
  [
    {"a": jnp.int32(0)},
    {"a": jnp.int32(0), "b": jnp.zeros(3, jnp.int32)},
    {"a": jnp.array([0, 2, 0], jnp.int32), "b": jnp.int32(0)},
    {"a": jnp.int32(0), "b": jnp.int32(5), "c": jnp.array([0], jnp.int32)},
  ],
)
def test_rank_zero_stays_zero_and_live_ranks_stay_live(jit, sampler, ranks):
  old, drawn = _flat(ranks), _draws(jit, sampler, ranks, 64)
  assert drawn.shape == (64, old.size)
  assert np.array_equal(drawn == 0, np.broadcast_to(old == 0, drawn.shape))
  assert (drawn >= 0).all()
  assert (drawn <= old).all()


@pytest.mark.parametrize("over", ["pairs", "layers"])
def test_one_layer_never_draws_a_layer_of_rank_zero(jit, over):
  # The only live layer is drawn every time: all of its ranks are as frequent.
  ranks = {"a": jnp.array([0, 4, 0], jnp.int32)}
  drawn = _draws(jit, SAMPLERS[over], ranks, 4000)
  counts = np.bincount(drawn[:, 1], minlength=5)[1:]
  assert _chi_square(counts, np.ones(4)) < 6


def test_samplers_are_functions_of_the_key(jit, sampler):
  draws, again = (_draws(jit, sampler, n=20) for _ in range(2))
  assert np.array_equal(draws, again)
  random = sampler not in (SAMPLERS["full"], SAMPLERS["fixed"])
  assert (len({d.tobytes() for d in draws}) > 1) == random


def test_a_sampler_draws_the_same_outside_of_jit(jit):
  key = jax.random.split(KEY, 20)[7]
  eager = sampling.one_layer(key, RANKS)
  assert np.array_equal(_flat(eager), _draws(jit, sampling.one_layer, n=20)[7])


def test_samplers_keep_structure_shapes_and_dtypes(sampler):
  drawn = jax.eval_shape(sampler, KEY, RANKS)
  assert drawn == jax.eval_shape(lambda r: r, RANKS)


def test_samplers_take_an_empty_tree(sampler):
  assert sampler(KEY, {}) == {}


def test_samplers_trace_once_for_all_ranks(jit, sampler):
  traces = []

  @jit
  def draw(key, ranks):
    traces.append(None)
    return sampler(key, ranks)

  for n in range(5):
    draw(jax.random.key(n), jax.tree.map(lambda r, n=n: r + n, RANKS))
  assert len(traces) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fixed_refuses_a_fraction_out_of_range(fraction):
  with pytest.raises(ValueError, match="outside"):
    sampling.fixed(KEY, RANKS, fraction=fraction)


def test_one_layer_refuses_an_unknown_law():
  with pytest.raises(ValueError, match="'nothing' is unknown"):
    sampling.one_layer(KEY, RANKS, over="nothing")


def test_samplers_by_name_are_the_functions():
  assert set(sampling.SAMPLERS) == {"full", "one_layer", "independent", "fixed"}
  for name, function in sampling.SAMPLERS.items():
    assert function is getattr(sampling, name)
