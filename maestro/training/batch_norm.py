"""Statistics of batch norm for a given network: those of all examples."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maestro import introspect as nn
from maestro import streams
from maestro.data import Split, choice
from maestro.parallel.mesh import Mesh, batch_devices, split_batch


def make_recalibrate(
  model: Any,
  *,
  preprocess: Callable,
  batch_size: int,
  examples: int | None,
  mesh: Mesh,
) -> Callable[[Any, Split], Any]:
  """Returns recalibrate(variables, split) -> batch_stats of that network.

    mean = E[mean of a batch]
    var  = E[variance within a batch] + Var[mean of a batch]

  over batches, by their numbers of examples: the law of total variance. Moving
  averages belong to the ranks that were sampled while training; a network cut
  to other ranks has other activations. The weights are fixed; whatever momentum
  the layers have is neither used nor changed, nor are `variables`. For a
  network's first normalisation this is exact at any batch size; those behind
  it see activations that were normalised batch by batch.

  The same variables always give the same statistics: a fixed random choice of
  examples, with the training's augmentation under fixed keys.

  Args:
    model: a Flax module whose normalisation layers are `linen.BatchNorm`.
    preprocess: as of a `maestro.data.Dataset`.
    batch_size: examples a batch; the last one may be smaller.
    examples: how many are used; None for the whole split. As many as are a
      multiple of the number of devices that split a batch.
    mesh: devices over which a batch is split.
  """

  @jax.jit
  def add_batch(stats, variables, x, k, n):
    key_image, key_dropout = jax.random.split(
      streams.stream(0, "statistics", k)
    )
    x = preprocess(split_batch(x, mesh), key_image)
    with nn.batch_statistics():
      _, new = model.apply(
        # Zeros: what the old statistics are, NaN too, must not matter.
        variables | {"batch_stats": jax.tree.map(jnp.zeros_like, stats)},
        x,
        **nn.mode(model, train=True),
        rngs={"dropout": key_dropout},
        mutable=["batch_stats"],
      )
    return _joined(stats, n, new["batch_stats"], len(x))

  def recalibrate(variables: Any, split: Split) -> Any:
    n = len(split) if examples is None else min(examples, len(split))
    order = choice(0, len(split))
    stats = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    parts = batch_devices(mesh)
    n = max(n // parts, 1) * parts
    for k, start in enumerate(range(0, n, batch_size)):
      batch = order[start : min(start + batch_size, n)]
      x = split.inputs[batch]
      stats = add_batch(stats, variables, x, k, jnp.float32(start))
    return stats

  return recalibrate


def _joined(a: Any, n: jax.Array, b: Any, m: int) -> Any:
  """Joins the statistics of n examples and of m others."""
  share = m / (n + m)
  joined = {}
  for name, x in a.items():
    if isinstance(x, Mapping):
      joined[name] = _joined(x, n, b[name], m)
      continue
    joined[name] = x + (b[name] - x) * share
    if name == "var" and "mean" in a:
      apart = b["mean"] - a["mean"]
      joined[name] += share * (1 - share) * apart**2
  return joined
