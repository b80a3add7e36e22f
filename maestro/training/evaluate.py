"""Exact evaluation of a network on a whole split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro.data import Split
from maestro.introspect import mode
from maestro.parallel.mesh import Mesh, split_batch
from maestro.training import losses


def make_evaluate(
  model: Any, *, loss: str, preprocess: Callable, batch_size: int, mesh: Mesh
) -> Callable[[Any, Split], dict[str, float]]:
  """Returns evaluate(variables, split) -> {metric: mean over examples}.

  Every example counts once: the last batch is padded, and the padding weighs
  nothing. One program per shape of the variables, whatever the split.
  """
  told = mode(model, train=False)
  functions = {"loss": losses.LOSSES[loss], **losses.METRICS[loss]}

  @jax.jit
  def add_batch(sums, variables, x, y, n):
    x, y = split_batch((x, y), mesh)
    out = model.apply(variables, preprocess(x), **told)
    counts = jnp.arange(batch_size) < n
    return {
      # where, not a product: padding must not turn 0 * inf into NaN.
      name: sums[name] + jnp.sum(jnp.where(counts, f(out, y), 0.0))
      for name, f in functions.items()
    }

  def evaluate(variables: Any, split: Split) -> dict[str, float]:
    sums = {name: jnp.zeros((), jnp.float32) for name in functions}
    for start in range(0, len(split), batch_size):
      x = split.inputs[start : start + batch_size]
      y = split.targets[start : start + batch_size]
      missing = batch_size - len(x)
      sums = add_batch(
        sums, variables, _pad(x, missing), _pad(y, missing), len(x)
      )
    return {name: float(x) / len(split) for name, x in sums.items()}

  return evaluate


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
  """Repeats the last row, so that padding is an ordinary example."""
  return np.concatenate([x, np.repeat(x[-1:], rows, axis=0)]) if rows else x
