"""Measures how long forward passes take on this device."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from maestro.introspect import mode

_WARM_UP = 3  # passes that are not counted
_SECONDS = 20.0  # of measuring, roughly at most
_LEAST = 5  # passes that are measured, however long they take


def make_measure(
  model: Any, example: Any, *, batch_size: int = 1, repeats: int = 30
) -> Callable[[Sequence[Any]], list[float]]:
  """Returns measure(forms) -> milliseconds of each network's forward pass.

  The median of passes in which the networks take turns, so that what else the
  machine does meets all of them alike. Compilation and the first passes are
  left out; every pass is waited for. The input is on the device already, its
  values do not matter. What one call has compiled serves the next ones.

  Args:
    model: a Flax module, told not to train.
    example: preprocessed inputs or their abstract value; the first axis is the
      batch.
    batch_size: examples of a pass.
    repeats: passes of each; fewer (but five) if they take over 20 seconds.
  """
  told = mode(model, train=False)
  forward = jax.jit(lambda v, x: model.apply(v, x, **told))
  x = jax.device_put(np.zeros((batch_size, *example.shape[1:]), example.dtype))

  def measure(forms: Sequence[Any]) -> list[float]:
    forms = [jax.device_put(form) for form in forms]
    times: list[list[float]] = [[] for _ in forms]
    began = time.perf_counter()
    for i in range(_WARM_UP + repeats):
      if i == _WARM_UP:
        began = time.perf_counter()
      for form, measured in zip(forms, times, strict=True):
        start = time.perf_counter()
        jax.block_until_ready(forward(form, x))
        if i >= _WARM_UP:
          measured.append(time.perf_counter() - start)
      enough = i + 1 >= _WARM_UP + _LEAST
      if enough and time.perf_counter() - began > _SECONDS:
        break
    return [1e3 * statistics.median(measured) for measured in times]

  return measure


def measure_latencies(
  model: Any, forms: Sequence[Any], example: Any, **options: int
) -> list[float]:
  """Returns the median time of each network, as `make_measure`."""
  return make_measure(model, example, **options)(forms)


def measure_latency(
  model: Any,
  variables: Any,
  example: Any,
  *,
  batch_size: int = 1,
  repeats: int = 30,
) -> float:
  """Returns the median time of one network, as `measure_latencies`."""
  options = {"batch_size": batch_size, "repeats": repeats}
  return measure_latencies(model, [variables], example, **options)[0]
