"""Judges networks by their loss on a fixed choice of training examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro import data as data_lib
from maestro.introspect import mode
from maestro.training import losses

_CHUNK = 512  # examples of one forward pass
_TEXTS = 64  # the same, of rows of tokens


def make_judge(
  model: Any,
  *,
  loss: str,
  preprocess: Callable,
  split: data_lib.Split,
  examples: int,
  seed: int,
) -> Callable[..., float]:
  """Returns judge(variables, n=None) -> mean loss on the first n examples.

  Of texts, it is the mean over their tokens.

  Batch norm uses the statistics of the examples at hand (at most 512 at a
  time), which are those of the network that is judged; no augmentation, and
  the same dropout for all networks. One program for equal shapes.

  Args:
    model: a Flax module.
    loss: name of the loss.
    preprocess: as of a `maestro.data.Dataset`.
    split: of which examples are chosen.
    examples: how many; all, if there are fewer.
    seed: of the choice.
  """
  chosen = data_lib.choice(seed, len(split))[:examples]
  inputs, targets = split.inputs[chosen], split.targets[chosen]
  function = losses.LOSSES[loss]
  tokens = losses.of_tokens(targets)

  @jax.jit
  def total(variables, x, y):
    x = preprocess(x)
    if "batch_stats" not in variables:
      out = model.apply(variables, x, **mode(model, train=False))
      return jnp.sum(function(out, y))
    out, _ = model.apply(
      variables,
      x,
      **mode(model, train=True),
      rngs={"dropout": jax.random.key(0)},
      mutable=["batch_stats"],
    )
    return jnp.sum(function(out, y))

  def judge(variables: Any, n: int | None = None) -> float:
    n = len(inputs) if n is None else min(n, len(inputs))
    # Of equal size, or the statistics of a last, small one would be poor.
    size = _TEXTS if tokens else _CHUNK
    chunks = np.array_split(np.arange(n), -(-n // size))
    count = int(np.sum(targets[:n] >= 0)) if tokens else n
    return (
      float(sum(total(variables, inputs[i], targets[i]) for i in chunks))
      / count
    )

  return judge
