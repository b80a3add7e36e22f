"""Decoding: sequences of tokens from a network that tells the next one.

  step(cache, tokens [b], position) -> (logits [b, V], cache)

`tokens` stand at `position`, an int32 scalar; the logits are of the token after
them. The cache is a tree of arrays whose first axis is the batch. Everything
here is pure, and is to be called under `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maestro.errors import UserError

Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class DecodingError(UserError):
  """An option of a search, or a cache, does not fit."""


def greedy(
  step: Step,
  cache: Any,
  start: jax.Array,
  *,
  end: int,
  max_length: int,
  pad: int = 0,
  position: int = 0,
) -> jax.Array:
  """Takes the most probable token each time, until all sequences have ended.

  Args:
    step: see above.
    cache: tree of [b, ...]; what `step` needs before the first token.
    start: [b] int32, the tokens to begin with, such as <s>.
    end: the token that ends a sequence.
    max_length: most tokens of a sequence, `end` included.
    pad: what follows `end`.
    position: where `start` stands.

  Returns:
    [b, max_length] int32, without `start`: tokens, `end`, then `pad`. One that
    is cut off at `max_length` has no `end`.

  Raises:
    DecodingError: If `max_length` is below 1 or a cache has no batch axis.
  """
  _check(cache, start, max_length=max_length)
  (b,) = start.shape

  def going(state):
    i, _, done, _, _ = state
    return (i < max_length) & ~done.all()

  def extend(state):
    i, token, done, out, cache = state
    logits, cache = step(cache, token, position + i)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jnp.where(done, pad, token)
    return i + 1, token, done | (token == end), out.at[:, i].set(token), cache

  state = (
    jnp.int32(0),
    start.astype(jnp.int32),
    jnp.zeros(b, bool),
    jnp.full((b, max_length), pad, jnp.int32),
    cache,
  )
  return lax.while_loop(going, extend, state)[3]


class _Beam(NamedTuple):
  """The hypotheses of each sequence; w is the width.

  Attributes:
    i: int32 scalar; tokens of each hypothesis that goes on.
    token: [b, w] int32; the last token.
    done: [b, w] bool; whether it has ended.
    log_p: [b, w] float32; its log-probability, -inf if there is none.
    score: [b, w] float32; log_p over the length's penalty.
    out: [b, w, max_length] int32.
    cache: tree of [b * w, ...].
  """

  i: jax.Array
  token: jax.Array
  done: jax.Array
  log_p: jax.Array
  score: jax.Array
  out: jax.Array
  cache: Any


def beam(
  step: Step,
  cache: Any,
  start: jax.Array,
  *,
  end: int,
  max_length: int,
  width: int = 4,
  alpha: float = 0.6,
  pad: int = 0,
  position: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Searches the best sequence among the `width` best prefixes of each length.

  The score of a sequence Y of |Y| tokens, `end` included, is

    log P(Y) / lp(Y),   lp(Y) = ((5 + |Y|) / 6)^alpha

  (Wu et al., 2016, equation 14, without the coverage penalty). Hypotheses that
  have ended stay as they are and keep their place in the beam for as long as
  their score does. The search ends when none of those that go on can come to
  have a better score than the best that has ended, or at `max_length`, where
  hypotheses that have not ended are taken as they are. With `width` 1 this is
  `greedy`; with `alpha` 0 the score is the log-probability.

  Args:
    step: see above; it is run on b * width sequences.
    cache: tree of [b, ...]; what `step` needs before the first token.
    start: [b] int32, the tokens to begin with, such as <s>.
    end: the token that ends a sequence.
    max_length: most tokens of a sequence, `end` included.
    width: hypotheses of each sequence.
    alpha: how much long sequences are favoured, at least 0.
    pad: what follows `end`.
    position: where `start` stands.

  Returns:
    tokens: [b, max_length] int32, as of `greedy`: the best hypothesis.
    score: [b] float32, its score.

  Raises:
    DecodingError: If an option is out of range or a cache has no batch axis.
  """
  _check(cache, start, max_length=max_length, width=width)
  if not alpha >= 0:
    raise DecodingError(f"alpha={alpha} must be at least 0")
  (b,) = start.shape
  rows = jnp.arange(b)[:, None]

  def penalty(length):
    return ((5 + jnp.asarray(length, jnp.float32)) / 6) ** alpha

  def going(s):
    # Log-probabilities only fall and penalties only rise: what goes on comes to
    # this at the most.
    best = jnp.where(s.done, -jnp.inf, s.log_p).max(-1) / penalty(max_length)
    ended = jnp.where(s.done, s.score, -jnp.inf).max(-1)
    return (s.i < max_length) & (best > ended).any()

  def extend(s):
    logits, cache = step(s.cache, s.token.reshape(-1), position + s.i)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_p = log_p.reshape(b, width, -1)
    n = log_p.shape[-1]
    # What has ended goes on as itself alone, in the place of token 0.
    itself = jnp.where(jnp.arange(n) == 0, 0.0, -jnp.inf)[None, None]
    log_p = jnp.where(s.done[..., None], itself, log_p) + s.log_p[..., None]
    score = jnp.where(
      s.done[..., None],
      s.score[..., None] + itself,
      log_p / penalty(s.i + 1),
    )
    score, at = lax.top_k(score.reshape(b, -1), width)
    parent = at // n
    done = s.done[rows, parent]
    token = jnp.where(done, pad, at % n).astype(jnp.int32)
    own = (rows * width + parent).reshape(-1)
    return _Beam(
      i=s.i + 1,
      token=token,
      done=done | (token == end),
      log_p=log_p.reshape(b, -1)[rows, at],
      score=score,
      out=s.out[rows, parent].at[:, :, s.i].set(token),
      cache=jax.tree.map(lambda x: x[own], cache),
    )

  # At first all hypotheses are one.
  first = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
  first = jnp.broadcast_to(first, (b, width)).astype(jnp.float32)
  final = lax.while_loop(
    going,
    extend,
    _Beam(
      i=jnp.int32(0),
      token=jnp.repeat(start[:, None].astype(jnp.int32), width, axis=1),
      done=jnp.zeros((b, width), bool),
      log_p=first,
      score=first,
      out=jnp.full((b, width, max_length), pad, jnp.int32),
      cache=jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), cache),
    ),
  )
  # Before max_length, only what has ended counts.
  full = final.done | (final.i == max_length)
  score = jnp.where(full, final.score, -jnp.inf)
  best = jnp.argmax(score, axis=-1)[:, None]
  return final.out[rows, best][:, 0], score[rows, best][:, 0]


def _check(cache: Any, start: jax.Array, **at_least_one: int) -> None:
  """Raises unless sizes are positive and all of the cache has a batch axis."""
  for name, size in at_least_one.items():
    if size < 1:
      raise DecodingError(f"{name}={size} must be at least 1")
  if start.ndim != 1:
    raise DecodingError(f"start {start.shape} must have one axis, the batch")
  for path, x in jax.tree_util.tree_leaves_with_path(cache):
    if x.shape[:1] != start.shape:
      raise DecodingError(
        f"cache{jax.tree_util.keystr(path)} {x.shape} must begin with the"
        f" batch's axis, {start.shape[0]}: repeat what all sequences share"
      )
