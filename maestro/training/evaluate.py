"""Exact evaluation of a network on a whole split."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro.data import DataError, Split
from maestro.data.dataset import Rows
from maestro.introspect import mode
from maestro.parallel.mesh import Mesh, split_batch
from maestro.training import losses


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluate:
  """Evaluates variables on a split: {metric: mean over examples or tokens}.

  Every example, and every token of a text, counts once: the last batch is
  padded, and the padding weighs nothing. Texts have a perplexity, too:
  exp(loss). Of `Rows`, those that cannot be read count for nothing, and
  "left_out" says how many they are. One program per shape of the variables,
  whatever the split.

  Attributes:
    names: of the metrics.
    batch_size: examples that run at a time.
    add_batch: compiled (sums, variables, inputs, targets, counts) -> sums, of
      inputs [batch_size, ...] and whether each counts, bool [batch_size].
  """

  names: tuple[str, ...]
  batch_size: int
  add_batch: Any

  def __call__(self, variables: Any, split: Split) -> dict[str, float]:
    sums = {name: jnp.zeros((), jnp.float32) for name in self.names}
    left_out = 0
    for start in range(0, len(split), self.batch_size):
      x = split.inputs[start : start + self.batch_size]
      y = split.targets[start : start + self.batch_size]
      missing = self.batch_size - len(x)
      counts = np.arange(self.batch_size) < len(x)
      if isinstance(split.inputs, Rows):
        lost = np.isin(start + np.arange(len(x)), [*split.inputs.unreadable])
        counts[: len(x)] &= ~lost
        left_out += int(np.sum(lost))
      sums = self.add_batch(
        sums, variables, _pad(x, missing), _pad(y, missing), counts
      )
    tokens = losses.of_tokens(split.targets)
    n = np.sum(split.targets >= 0) if tokens else len(split) - left_out
    if not n:
      raise DataError("none of the examples to evaluate on can be read")
    means = {name: float(x) / float(n) for name, x in sums.items()}
    if isinstance(split.inputs, Rows):
      means["left_out"] = float(left_out)
    if tokens and "accuracy" in means:
      means["perplexity"] = math.exp(min(means["loss"], 700.0))
    return means

  def lower(self, variables: Any, split: Split) -> Any:
    """Lowers its program; nothing of what is given needs to be there."""

    def batch(x: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((self.batch_size, *x.shape[1:]), x.dtype)

    sums = {n: jax.ShapeDtypeStruct((), jnp.float32) for n in self.names}
    counts = jax.ShapeDtypeStruct((self.batch_size,), jnp.bool_)
    return self.add_batch.lower(
      *(sums, variables, batch(split.inputs), batch(split.targets), counts)
    )


def make_evaluate(
  model: Any, *, loss: str, preprocess: Callable, batch_size: int, mesh: Mesh
) -> Evaluate:
  """Makes the evaluation of a model's variables, divided over a mesh."""
  told = mode(model, train=False)
  functions = {"loss": losses.LOSSES[loss], **losses.METRICS[loss]}

  @jax.jit
  def add_batch(sums, variables, x, y, counts):
    x, y, counts = split_batch((x, y, counts), mesh)
    out = model.apply(variables, preprocess(x), **told)
    return {
      # where, not a product: padding must not turn 0 * inf into NaN.
      name: sums[name] + jnp.sum(jnp.where(counts, f(out, y), 0.0))
      for name, f in functions.items()
    }

  return Evaluate(tuple(functions), batch_size, add_batch)


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
  """Repeats the last row, so that padding is an ordinary example."""
  return np.concatenate([x, np.repeat(x[-1:], rows, axis=0)]) if rows else x
