"""Compares networks by their outputs on random inputs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from maestro import lowrank
from maestro.errors import UserError


class DifferenceError(UserError):
  """Two networks that should be equal are not."""


def make_inputs(example: Any, n: int = 8) -> np.ndarray:
  """Random inputs, so that no data is needed; token numbers stay small."""
  shape, dtype = (n, *example.shape[1:]), np.dtype(example.dtype)
  rng = np.random.default_rng(0)
  if np.issubdtype(dtype, np.integer):
    return rng.integers(0, 2, shape).astype(dtype)
  return rng.standard_normal(shape).astype(dtype)


def make_outputs(model: Any, example: Any) -> Callable[..., np.ndarray]:
  """Returns outputs(variables, ranks=None) on random inputs, in float32.

  With ranks, the parameters are masked at them: the definition of a network at
  these ranks. A network that computes in bfloat16 would hide any difference
  below 1 %.
  """
  if getattr(model, "dtype", None) is not None:
    model = model.clone(dtype="float32")
  x = make_inputs(example)

  @jax.jit  # ranks are traced: one compilation for all masks
  def forward(variables, ranks):
    params = lowrank.mask(variables["params"], ranks)
    return model.apply({**variables, "params": params}, x, train=False)

  def outputs(variables: Any, ranks: Any = None) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
      return jax.device_get(forward(variables, ranks or {}))

  return outputs


def difference(expected: Any, found: Any) -> float:
  """Largest difference, relative to the largest output; inf if not finite."""
  a, b = (np.asarray(x, np.float64) for x in (expected, found))
  gap, scale = np.max(np.abs(a - b)), np.max(np.abs(a))
  if not np.isfinite(gap):
    return math.inf
  return float(gap / scale) if scale else (math.inf if gap else 0.0)


def check(found: float, tolerance: float, what: str, other: str) -> None:
  if not found <= tolerance:
    raise DifferenceError(
      f"{what} differs from {other} by {found:.1e} (relative), above"
      f" --tolerance={tolerance:g}; nothing was written. If the network is not"
      " finite, neither is this; if it computes in low precision, raise it"
    )
