"""The moving average of the weights: what a run evaluates and leaves behind.

    average <- decay * average + (1 - decay) * weights      after every step

for the parameters and the statistics of normalisation layers, in float32. It
starts as a copy of the weights. When a network that has been trained becomes
factors, it starts anew with them, as the optimizer's state does: the average of
factors in one basis and in another is that of no network. What masks and cuts
the parameters does the same to it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from maestro import trees
from maestro.trees import Tree


def begin(params: Tree, batch_stats: Tree) -> dict[str, Any]:
  """Returns an average of one network: copies, which share no memory."""
  found = {"params": params, "batch_stats": batch_stats}
  return jax.tree.map(
    lambda x: jnp.array(x, trees.wide_dtype(x.dtype), copy=True), found
  )


def follow(
  average: dict[str, Any], params: Tree, batch_stats: Tree, decay: float
) -> dict[str, Any]:
  """Returns the average after another step."""
  return jax.tree.map(
    # As a difference: weights that stand still are their own average.
    lambda a, x: a + (1 - decay) * (x.astype(a.dtype) - a),
    average,
    {"params": params, "batch_stats": batch_stats},
  )
