"""Measures how long a forward pass takes on this device."""

import statistics
import time
from typing import Any

import jax
import numpy as np


def measure_latency(
  model: Any,
  variables: Any,
  example: Any,
  *,
  batch_size: int = 1,
  repeats: int = 30,
) -> float:
  """Returns the median time of a compiled forward pass, in milliseconds.

  Compilation and the first passes are left out; every pass is waited for. The
  input is on the device already, its values do not matter.

  Args:
    model: a Flax module, applied with train=False.
    variables: of the model, in the form to be measured.
    example: preprocessed inputs or their abstract value; the first axis is the
      batch.
    batch_size: examples of a pass.
    repeats: passes that are measured.
  """
  forward = jax.jit(lambda v, x: model.apply(v, x, train=False))
  shape = (batch_size, *example.shape[1:])
  x, variables = jax.device_put((np.zeros(shape, example.dtype), variables))
  times = []
  for i in range(3 + repeats):
    start = time.perf_counter()
    jax.block_until_ready(forward(variables, x))
    if i >= 3:
      times.append(time.perf_counter() - start)
  return 1e3 * statistics.median(times)
