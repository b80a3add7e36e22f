"""The singular value decomposition, of what it can take alone."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro.trees import LowRankError, is_traced, wide_dtype


@jax.custom_jvp
def _svd(matrix: jax.Array):
  return jnp.linalg.svd(matrix, full_matrices=False)


@_svd.defjvp
def _svd_jvp(primals, tangents):
  raise LowRankError(
    "a decomposition cannot be differentiated: singular vectors have no"
    " derivative where singular values meet or vanish. Decompose outside of"
    " the gradient, or cut it off by jax.lax.stop_gradient(params)"
  )


def svd(matrix: jax.Array, path: str) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns U, s and V^H of matrices [*lead, in, out], in at least float32.

  What is not finite never reaches LAPACK, where it need not return: a concrete
  matrix raises, a traced one has NaN for singular values.

  Raises:
    LowRankError: a concrete matrix is not finite; names the layer.
  """
  finite = jnp.all(jnp.isfinite(matrix), axis=(-2, -1), keepdims=True)
  if not is_traced(finite) and not np.all(finite):
    raise LowRankError(
      f"layer {path!r}: its kernel holds NaN or infinity and has no"
      " decomposition; mend the parameters, or start from an earlier checkpoint"
    )
  # SVD has no half-precision form.
  wide = matrix.astype(wide_dtype(matrix.dtype))
  wide = jnp.where(finite, wide, jnp.zeros((), wide.dtype))
  left, s, right = _svd(wide)
  return left, jnp.where(finite[..., 0], s, jnp.nan), right


def fresh(path: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """Draws u [*lead, in, R] ~ N(0, 1 / in), the same for a path each time."""
  key = jax.random.key(zlib.crc32(path.encode()))
  return jax.random.normal(key, shape, dtype) / math.sqrt(shape[-2])
