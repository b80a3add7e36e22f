"""Compares networks by their outputs on random inputs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from maestro import lowrank, ops
from maestro.errors import UserError
from maestro.introspect import layers, mode
from maestro.trees import Layers


class DifferenceError(UserError):
  """Two networks that should be equal are not."""


def make_inputs(
  example: Any,
  n: int = 8,
  model: Any = None,
  *,
  specs: Layers | None = None,
) -> np.ndarray:
  """Random inputs, so that no data is needed.

  Tokens are any that all tables have, of the model or of the layers that are
  given instead, or 0 and 1 without a table.
  """
  shape, dtype = (n, *example.shape[1:]), np.dtype(example.dtype)
  rng = np.random.default_rng(0)
  if np.issubdtype(dtype, np.integer):
    if specs is None and model is not None:
      specs = layers(model, example, **mode(model, train=False))
    tables = [s.n_in for s in (specs or {}).values() if s.kind == "embed"]
    return rng.integers(0, min(tables, default=2), shape).astype(dtype)
  return rng.standard_normal(shape).astype(dtype)


def make_outputs(model: Any, example: Any, n: int = 8) -> Callable[..., Any]:
  """Returns outputs(variables, ranks=None) on n random inputs, in float32.

  With ranks, the parameters are masked at them: the definition of a network at
  these ranks. A network that computes in bfloat16 would hide any difference
  below 1 %.
  """
  if getattr(model, "dtype", None) is not None:
    model = model.clone(dtype="float32")
  x, told = make_inputs(example, n, model), mode(model, train=False)

  @ops.jit_precise  # ranks are traced: one compilation for all masks
  def forward(variables, ranks):
    params = lowrank.mask(variables["params"], ranks)
    return model.apply({**variables, "params": params}, x, **told)

  def outputs(variables: Any, ranks: Any = None) -> Any:
    with jax.default_matmul_precision("highest"):
      return jax.device_get(forward(variables, ranks or {}))

  return outputs


def difference(expected: Any, found: Any) -> float:
  """Largest difference, relative to the largest output; inf if not finite.

  Outputs are any pytree of arrays: the worst of them counts.
  """

  def of(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    gap, scale = (np.max(np.abs(x), initial=0.0) for x in (a - b, a))
    if not np.isfinite(gap):
      return math.inf
    return float(gap / scale) if scale else (math.inf if gap else 0.0)

  return max(jax.tree.leaves(jax.tree.map(of, expected, found)), default=0.0)


def check(found: float, tolerance: float, what: str, other: str) -> None:
  if not found <= tolerance:
    raise DifferenceError(
      f"{what} differs from {other} by {found:.1e} (relative), above"
      f" --tolerance={tolerance:g}; nothing was written. If the network is not"
      " finite, neither is this; if it computes in low precision, raise it"
    )
