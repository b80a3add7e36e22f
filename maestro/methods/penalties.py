"""What is added to the loss, and how ranks fall under it."""

import math

import jax
import jax.numpy as jnp

from maestro import lowrank, trees
from maestro.methods import prox
from maestro.trees import Tree

# ---------------------------------------------------------------------------
# Penalties: (params, ranks, kind) -> scalar; kind is config.lasso
# ---------------------------------------------------------------------------


def frobenius(params: Tree, ranks: Tree, kind: str = "") -> jax.Array:
  """Sums 1/2 ||u @ v||_F^2 over all factored layers: decay of the products.

    ||u v||_F^2 = sum((u^T u) * (v v^T))

  by Gram matrices, in O((in + out) R^2) instead of in * out * R. A layer's
  own kernel, if held, does not count.
  """
  del kind
  total = jnp.zeros((), jnp.float32)
  for node, rank in trees.paired(params, ranks).values():
    lead, R = jnp.shape(rank), node["u"].shape[-1]
    n = len(lead)
    u, v = (
      node[name].astype(trees.wide_dtype(node[name].dtype))
      for name in ("u", "v")
    )
    u = u.reshape((*lead, math.prod(u.shape[n:-1]), R))
    v = v.reshape((*lead, R, math.prod(v.shape[n + 1 :])))
    high = jax.lax.Precision.HIGHEST
    left = jnp.einsum("...ia,...ib->...ab", u, u, precision=high)
    right = jnp.einsum("...ai,...bi->...ab", v, v, precision=high)
    total += 0.5 * jnp.sum(left * right)
  return total


PENALTIES = {"group_lasso": lowrank.group_lasso, "frobenius": frobenius}


# ---------------------------------------------------------------------------
# Shrinking: (params, ranks, threshold) -> ranks; threshold is config.threshold
# ---------------------------------------------------------------------------


def zeros(params: Tree, ranks: Tree, threshold: jax.typing.ArrayLike) -> dict:
  """Counts components up to the last that is not exactly zero."""
  del threshold
  return prox.exact_ranks(params, ranks)


SHRINKERS = {"threshold": lowrank.shrink, "zeros": zeros}
