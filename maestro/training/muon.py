"""Muon: momentum of matrices, made orthogonal (Jordan et al., 2024)."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from maestro import trees
from maestro.trees import LayerSpec, Tree

# Of the polynomial a x + b x^3 + c x^5 that singular values pass five times.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TIMES = 5
# A step's root mean square, in learning rates: about that of Adam's steps.
_RMS = 0.2


def split(params: Tree, layers: Mapping[str, LayerSpec]) -> Tree:
  """Labels as "matrices" what Muon steps, and as "rest" all other parameters.

  Matrices are the kernels and factors of layers, but those of tables, whose
  gradients are of a few rows.
  """

  def label(path, _) -> str:
    return "rest" if _matrix(path, layers) is None else "matrices"

  return jax.tree_util.tree_map_with_path(label, params)


def orthogonalize(
  layers: Mapping[str, LayerSpec],
) -> optax.GradientTransformation:
  """Turns each update M = P S Q^T of a matrix into about P Q^T, and scales it.

    M / |M|_F,  then five times  X <- a X + b (X X^T) X + c (X X^T)^2 X

  brings all singular values close to 1 (Jordan et al., 2024), but those that
  are 0. The step is then 0.2 sqrt(max(m, n)) of that matrix [m, n] (Liu et al.,
  2025, equation 4). A factor's side of the rank is never the longer one, and
  components that are zero stay so and change no other: masked and truncated
  factors take the same steps. Matrices of a stack, or of a group, are apart.
  """

  def step(updates, params):
    del params

    def one(path, x):
      axes = _matrix(path, layers)
      assert axes is not None  # of those that `split` labels
      if not x.size:  # a factor of rank 0
        return x
      lead, rows = x.shape[: axes[0]], x.shape[axes[0] : sum(axes)]
      flat = x.reshape((*lead, math.prod(rows), -1))
      return _each_orthogonal(flat).reshape(x.shape)

    return jax.tree_util.tree_map_with_path(one, updates)

  return optax.stateless(step)


@functools.partial(jnp.vectorize, signature="(m,n)->(m,n)")
def _each_orthogonal(x: jax.Array) -> jax.Array:
  """P Q^T of x = P S Q^T [m, n], nearly, times 0.2 sqrt(max(m, n))."""
  scale = _RMS * max(x.shape) ** 0.5
  tall = x.shape[0] > x.shape[1]
  x = x.T if tall else x
  x /= jnp.linalg.norm(x) + jnp.asarray(1e-7, x.dtype)
  a, b, c = _COEFFICIENTS
  for _ in range(_TIMES):
    square = x @ x.T
    x = a * x + (b * square + c * square @ square) @ x
  return scale * (x.T if tall else x)


def _matrix(
  path: tuple, layers: Mapping[str, LayerSpec]
) -> tuple[int, int] | None:
  """Tells how many axes lead, and how many then are rows, of a matrix."""
  *names, name = trees.names_of(path)
  spec = layers.get("/".join(names))
  if spec is None or spec.kind not in ("dense", "conv"):
    return None
  if name == spec.weight:
    own = len(spec.inputs) + len(spec.outputs)
    return len(spec.kernel_shape) - own, len(spec.inputs)
  if name in ("u", "v"):
    return len(spec.lead), len(spec.inputs) if name == "u" else 1
  return None
