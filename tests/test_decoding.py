"""Tests of the searches against all sequences there are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import decoding
from maestro.errors import UserError

V, END, PAD, D = 4, 3, 0, 5


def next_token(language, cache, tokens, position):
  """The step of a language's numbers."""
  into, mix, out = language
  x = cache["state"] @ mix + into[tokens] + cache["own"][:, 0]
  state = jnp.tanh(x + 0.1 * position)
  return state @ out, cache | {"state": state}


class Language:
  """A next-token distribution that depends on all tokens before.

  The cache holds a vector that all tokens have gone into, and, to tell
  sequences of a batch apart, a vector of the sequence's own.
  """

  def __init__(self, seed, batch, scale=2.0):
    rng = np.random.default_rng(seed)
    self.into = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    self.mix = jnp.asarray(rng.normal(size=(D, D)) / 2, jnp.float32)
    self.out = jnp.asarray(scale * rng.normal(size=(D, V)), jnp.float32)
    own = rng.normal(size=(batch, 1, D))
    self.cache = {
      "state": jnp.zeros((batch, D)),
      "own": jnp.asarray(own, jnp.float32),
    }
    self.start = jnp.full(batch, 2, jnp.int32)

  def only(self, i):
    """Its i-th sequence alone."""
    one = object.__new__(Language)
    one.__dict__ = self.__dict__ | {
      "cache": jax.tree.map(lambda x: x[i : i + 1], self.cache),
      "start": self.start[i : i + 1],
    }
    return one

  def log_p(self, sequences):
    """Log-probabilities [b, n] of sequences [n, length], up to their ends."""
    own = np.asarray(self.cache["own"])
    into, mix, out = map(np.asarray, (self.into, self.mix, self.out))
    b, n = len(own), len(sequences)
    state, total = np.zeros((b, n, D), np.float32), np.zeros((b, n))
    token, going = np.full(n, 2), np.ones(n, bool)
    for i, following in enumerate(sequences.T):
      x = state @ mix + into[token] + own
      state = np.tanh(x + np.float32(0.1 * i))
      logits = state @ out
      log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      total += np.where(going, log_p[:, np.arange(n), following], 0)
      token, going = following, going & (following != END)
    return total


@functools.cache
def compiled(step, name, options):
  def function(numbers, cache, start):
    return getattr(decoding, name)(
      functools.partial(step, numbers), cache, start, end=END, **dict(options)
    )

  return jax.jit(function)


def search(language, name="beam", step=next_token, **options):
  numbers = language.into, language.mix, language.out
  function = compiled(step, name, tuple(options.items()))
  return function(numbers, language.cache, language.start)


def all_sequences(length):
  """All that end, padded, and all that are cut off at `length`."""
  out = []
  for n in range(1, length + 1):
    for s in itertools.product(range(V), repeat=n):
      if END not in s[:-1] and (s[-1] == END or n == length):
        out.append([*s, *[PAD] * (length - n)])
  return np.array(out, np.int32)


def lengths_of(sequences):
  ends = sequences == END
  full = sequences.shape[1]
  return np.where(ends.any(1), ends.argmax(1) + 1, full)


def penalty(lengths, alpha):
  return ((5 + lengths) / 6) ** alpha


@pytest.mark.parametrize(
  ("seed", "alpha"), [(0, 0.0), (1, 0.6), (2, 0.6), (3, 3.0)]
)
def test_a_beam_as_wide_as_all_prefixes_finds_the_best(seed, alpha):
  language, length = Language(seed, batch=6), 4
  tokens, scores = search(
    language, max_length=length, width=V**length, alpha=alpha
  )
  sequences = all_sequences(length)
  every = language.log_p(sequences) / penalty(lengths_of(sequences), alpha)
  np.testing.assert_array_equal(tokens, sequences[every.argmax(1)])
  np.testing.assert_allclose(scores, every.max(1), rtol=1e-5)


def test_the_penalty_of_length_matters():
  # So that the test above tells one alpha from another.
  found = [
    np.asarray(search(Language(1, 6), max_length=6, width=3, alpha=a)[0])
    for a in (0.0, 2.0)
  ]
  assert lengths_of(found[0]).sum() < lengths_of(found[1]).sum()


@pytest.mark.parametrize("seed", range(2))
def test_a_beam_of_one_is_greedy(seed):
  language = Language(seed, batch=6)
  tokens, scores = search(language, max_length=6, width=1)
  best = search(language, "greedy", max_length=6)
  np.testing.assert_array_equal(tokens, best)
  assert len({*lengths_of(np.asarray(best)).tolist()}) > 1
  own = np.diag(language.log_p(np.asarray(best)))
  np.testing.assert_allclose(
    scores, own / penalty(lengths_of(np.asarray(best)), 0.6), rtol=1e-5
  )


def test_greedy_takes_the_most_probable_token():
  language = Language(0, batch=4)
  tokens = np.asarray(search(language, "greedy", max_length=5))
  for i, sequence in enumerate(tokens):
    n = lengths_of(sequence[None])[0]
    for k in range(n):
      longer = np.repeat(sequence[None, : k + 1], V, axis=0)
      longer[:, k] = range(V)
      assert language.log_p(longer)[i].argmax() == sequence[k]
    assert not sequence[n:].any()


@pytest.mark.parametrize("width", [3, 6])
def test_a_score_is_that_of_the_sequence(width):
  # Which it is only if the caches follow their hypotheses.
  language = Language(5, batch=6, scale=1.0)
  tokens, scores = map(
    np.asarray, search(language, max_length=6, width=width, alpha=2.0)
  )
  own = np.diag(language.log_p(tokens))
  np.testing.assert_allclose(
    scores, own / penalty(lengths_of(tokens), 2.0), rtol=1e-5
  )
  one = search(language, max_length=6, width=1, alpha=2.0)[1]
  assert (scores >= one - 1e-6).all() and (scores > one + 1e-3).any()


@pytest.mark.parametrize("options", [{"name": "greedy"}, {"width": 3}])
def test_sequences_of_a_batch_do_not_meet(options):
  language = Language(2, batch=6)
  whole = jax.tree.leaves(search(language, max_length=6, **options))
  for i in range(6):
    alone = jax.tree.leaves(search(language.only(i), max_length=6, **options))
    for a, b in zip(alone, whole, strict=True):
      np.testing.assert_allclose(a[0], b[i], rtol=1e-5)


def ends_after(k, calls):
  """The step of one that ends at position k, almost surely; counts calls."""

  def step(language, cache, tokens, position):
    jax.debug.callback(lambda p: calls.append(int(p)), position)
    sure = jnp.where(position == k, END, 1)
    logits = 9.0 * jax.nn.one_hot(sure, V)
    return jnp.broadcast_to(logits, (len(tokens), V)), cache

  return step


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_the_search_stops_when_nothing_can_be_better(name):
  calls = []
  step = ends_after(2, calls)
  out = search(Language(0, batch=2), name, step, max_length=40)
  tokens = out if name == "greedy" else out[0]
  jax.effects_barrier()
  assert sorted(calls) == [0, 1, 2]
  np.testing.assert_array_equal(tokens[:, :4], [[1, 1, END, PAD]] * 2)


def plain_beam(language, i, length, width, alpha):
  """The search of one sequence, without caches and without stopping early."""
  one = language.only(i)

  def next_log_p(prefix):
    longer = np.array([[*prefix, t] for t in range(V)])
    before = one.log_p(longer[:1, :-1])[0] if prefix else 0.0
    return one.log_p(longer)[0] - before

  def score(hypothesis):
    return hypothesis[1] / penalty(len(hypothesis[0]), alpha)

  hypotheses = [((), 0.0)]
  for _ in range(length):
    longer = []
    for prefix, log_p in hypotheses:
      if END in prefix:
        longer.append((prefix, log_p))
      else:
        steps = enumerate(next_log_p(prefix))
        longer += [((*prefix, t), log_p + p) for t, p in steps]
    hypotheses = sorted(longer, key=score, reverse=True)[:width]
  best = hypotheses[0]
  return [*best[0], *[PAD] * (length - len(best[0]))], score(best)


@pytest.mark.parametrize(("width", "alpha"), [(3, 0.6), (3, 0.0), (3, 2.0)])
def test_the_search_is_the_plain_one(width, alpha):
  language = Language(3, batch=6, scale=1.0)
  tokens, scores = search(language, max_length=6, width=width, alpha=alpha)
  for i in range(6):
    best, score = plain_beam(language, i, 6, width, alpha)
    np.testing.assert_array_equal(tokens[i], best)
    np.testing.assert_allclose(scores[i], score, rtol=1e-5)


def test_the_search_goes_on_while_length_can_still_pay():
  # To end at once has probability 0.55, and 1 1 1 1 1 </s> 0.45: after one
  # token a worse score, -0.80 against -0.60, in the end -0.13.
  def step(language, cache, tokens, position):
    first = jnp.log(jnp.array([0, 0.45, 0, 0.55]))
    then = jnp.log(jax.nn.one_hot(jnp.where(position < 5, 1, END), V))
    logits = jnp.where(position == 0, first, then)
    return jnp.broadcast_to(logits, (len(tokens), V)), cache

  language = Language(0, batch=1)
  tokens, scores = search(language, step=step, max_length=6, width=2, alpha=3.0)
  np.testing.assert_array_equal(tokens, [[1, 1, 1, 1, 1, END]])
  np.testing.assert_allclose(scores, np.log(0.45) * (6 / 11) ** 3, rtol=1e-5)


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_positions_begin_where_they_are_told_to(name):
  calls = []
  step = ends_after(9, calls)
  language = Language(0, batch=2)
  out = search(language, name, step, max_length=5, position=7, pad=2)
  jax.effects_barrier()
  assert sorted(calls) == [7, 8, 9]
  tokens = out if name == "greedy" else out[0]
  np.testing.assert_array_equal(tokens, [[1, 1, END, 2, 2]] * 2)


def test_low_precision_logits_are_scored_in_float32():
  def rounded(language, cache, tokens, position):
    logits, cache = next_token(language, cache, tokens, position)
    return logits.astype(jnp.bfloat16), cache

  language = Language(0, batch=6)
  tokens, scores = search(language, step=rounded, max_length=6, width=3)
  assert tokens.dtype == jnp.int32 and scores.dtype == jnp.float32
  exact = search(language, max_length=6, width=3)[1]
  np.testing.assert_allclose(scores, exact, atol=0.05)
  # Sums in bfloat16 would be one of its few numbers.
  short = np.asarray(scores.astype(jnp.bfloat16), np.float32)
  assert np.abs(scores - short).max() > 1e-4


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"max_length": 0}, "max_length=0"),
    ({"max_length": 3, "width": 0}, "width=0"),
    ({"max_length": 3, "alpha": -0.1}, r"alpha=-0\.1"),
    ({"max_length": 3, "alpha": float("nan")}, "alpha=nan"),
  ],
)
def test_options_are_checked(options, words):
  with pytest.raises(UserError, match=words):
    search(Language(0, 2), **options)


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_a_cache_without_a_batch_axis_is_told(name):
  language = Language(0, 2)
  language.cache["index"] = jnp.zeros((), jnp.int32)
  with pytest.raises(UserError, match=r"cache\['index'\] \(\) .*axis, 2"):
    search(language, name, max_length=3)
