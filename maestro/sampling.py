"""Ordered-dropout samplers: pure functions (key, ranks) -> ranks.

Each takes a JAX key and the tree of current ranks and returns a tree of the
same shape with the ranks to train at in this step. Ranks of stacked and grouped
layers are vectors; each of their elements counts as a layer of its own. A layer
of rank 0 stays at 0. All of them can be traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from maestro.trees import ratio

Ranks = Any


def full(key: jax.Array, ranks: Ranks) -> Ranks:
  """Leaves every layer at its current rank: no ordered dropout."""
  del key
  return ranks


def one_layer(key: jax.Array, ranks: Ranks, *, over: str = "pairs") -> Ranks:
  """Draws one layer i and a rank b in 1 .. r_i; the others keep their rank.

  Args:
    key: JAX key.
    ranks: tree of int32.
    over: "pairs" draws (i, b) uniformly over all pairs, as the paper does, so
      that P(layer i) is proportional to r_i; "layers" draws i uniformly over
      the layers with r_i > 0, then b uniformly.
  """
  if over not in ("pairs", "layers"):
    raise ValueError(f'over={over!r} is unknown; use "pairs" or "layers"')
  if not jax.tree.leaves(ranks):
    return ranks
  r, unravel = ravel_pytree(ranks)
  key_layer, key_rank = jax.random.split(key)
  weights = r if over == "pairs" else (r > 0).astype(r.dtype)
  ends = jnp.cumsum(weights)
  draw = jax.random.randint(key_layer, (), 0, jnp.maximum(ends[-1], 1))
  i = jnp.minimum(jnp.searchsorted(ends, draw, side="right"), r.size - 1)
  b = jax.random.randint(key_rank, (), 1, jnp.maximum(r[i], 1) + 1)
  return unravel(r.at[i].set(jnp.minimum(b, r[i])))


def independent(key: jax.Array, ranks: Ranks) -> Ranks:
  """Draws every layer's rank on its own, uniformly over 1 .. r_i."""
  if not jax.tree.leaves(ranks):
    return ranks
  r, unravel = ravel_pytree(ranks)
  b = jax.random.randint(key, r.shape, 1, jnp.maximum(r, 1) + 1)
  return unravel(jnp.minimum(b, r))


def fixed(key: jax.Array, ranks: Ranks, *, fraction: float) -> Ranks:
  """Keeps ceil(fraction * r_i) components of every layer, in integers.

  Args:
    key: unused.
    ranks: tree of int32.
    fraction: in [0, 1], see `trees.ratio`.
  """
  del key
  if not 0 <= fraction <= 1:
    raise ValueError(f"fraction={fraction} is outside [0, 1]")
  p, q = ratio(fraction).as_integer_ratio()
  # Whole multiples of q apart, so that no product exceeds an int32.
  return jax.tree.map(lambda r: r // q * p + (r % q * p + q - 1) // q, ranks)


def level(key: jax.Array, shares: jax.Array) -> jax.Array:
  """Draws a level of a chain of profiles, i with probability shares[i].

  Args:
    key: JAX key.
    shares: [L], with sum 1.
  """
  ends = jnp.cumsum(shares)
  draw = jax.random.uniform(key) * ends[-1]
  i = jnp.searchsorted(ends, draw, side="right")
  return jnp.minimum(i, len(ends) - 1).astype(jnp.int32)


SAMPLERS = {
  "full": full,
  "one_layer": one_layer,
  "independent": independent,
  "fixed": fixed,
}
