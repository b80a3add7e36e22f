"""Statistics of batch norm for a given network: a cumulative average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maestro import introspect as nn
from maestro import streams
from maestro.data import Split, choice
from maestro.parallel.mesh import Mesh, split_batch


def make_recalibrate(
  model: Any,
  *,
  preprocess: Callable,
  batch_size: int,
  examples: int | None,
  mesh: Mesh,
) -> Callable[[Any, Split], Any]:
  """Returns recalibrate(variables, split) -> batch_stats of that network.

    s_k = s_{k-1} + (statistics of batch k - s_{k-1}) / k,   k = 1, 2, ...

  Moving averages belong to the ranks that were sampled while training; a
  network cut to other ranks has other activations. This is the plain mean of
  the batches' means and variances, with the weights fixed; whatever momentum
  the layers have is neither used nor changed, nor are `variables`.

  The same variables always give the same statistics: a fixed random choice of
  examples, with the training's augmentation under fixed keys.

  Args:
    model: a Flax module whose normalisation layers are `linen.BatchNorm`.
    preprocess: as of a `maestro.data.Dataset`.
    batch_size: examples a batch; a last, smaller batch is left out.
    examples: how many are used, at least one batch; None for the whole split.
    mesh: devices over which a batch is split.
  """

  @jax.jit
  def add_batch(stats, variables, x, k):
    key_image, key_dropout = jax.random.split(
      streams.stream(0, "statistics", k)
    )
    x = preprocess(split_batch(x, mesh), key_image)
    with nn.batch_statistics():
      _, new = model.apply(
        # Zeros: what the old statistics are, NaN too, must not matter.
        variables | {"batch_stats": jax.tree.map(jnp.zeros_like, stats)},
        x,
        train=True,
        rngs={"dropout": key_dropout},
        mutable=["batch_stats"],
      )
    return jax.tree.map(
      lambda s, b: s + (b - s) / (k + 1), stats, new["batch_stats"]
    )

  def recalibrate(variables: Any, split: Split) -> Any:
    n = len(split) if examples is None else min(examples, len(split))
    order = choice(0, len(split))
    stats = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    for k in range(max(n // batch_size, 1)):
      batch = order[k * batch_size : (k + 1) * batch_size]
      stats = add_batch(stats, variables, split.inputs[batch], k)
    return stats

  return recalibrate
