"""Spectra of dense kernels, and their projection to lower ranks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro import trees
from maestro.methods.rank_rules import Spectra
from maestro.svd import svd
from maestro.trees import Layers, Tree


@jax.jit
def svds(kernels: Mapping[str, jax.Array]) -> dict:
  return {path: svd(k, path) for path, k in kernels.items()}


@jax.jit
def put_together(
  parts: Mapping, ranks: Mapping[str, Any], t: jax.Array
) -> dict:
  """Puts kernels together from `rank` components, singular values less t."""
  matrices = {}
  for path, (u, s, vt) in parts.items():
    live = jnp.arange(s.shape[-1]) < ranks[path]
    s = jnp.where(live, jnp.maximum(s - t, 0.0), 0.0)
    matrices[path] = jnp.matmul(
      u * s[..., None, :], vt, precision=jax.lax.Precision.HIGHEST
    )
  return matrices


def matrices(params: Tree, layers: Layers, paths: Iterable[str]) -> dict:
  """Returns dense kernels as matrices [*lead, in, out]."""
  return {
    path: trees.to_matrix(
      trees.get(params, path)[layers[path].weight], layers[path]
    )
    for path in paths
  }


def spectra(params: Tree, layers: Layers, paths: Iterable[str]) -> Spectra:
  parts = svds(matrices(params, layers, paths))
  found = {path: np.asarray(s) for path, (_, s, _) in parts.items()}
  if bad := [path for path, s in found.items() if np.any(np.isnan(s))]:
    raise trees.LowRankError(
      f"layers {bad}: their kernels hold NaN or infinity and have no spectrum;"
      " go back to an earlier checkpoint"
    )
  return found


def project(
  params: Tree,
  layers: Layers,
  paths: Iterable[str],
  choose: Callable[[Callable[[], Spectra]], Mapping[str, int]],
  t: float,
) -> dict:
  """Cuts dense kernels to lower ranks, singular values less t.

    K = U diag(s) V^T  ->  sum_{k < r} max(s_k - t, 0) u_k v_k^T

  TRP (Xu et al., 2020) truncates every few steps and adds a sub-gradient of
  the nuclear norm, U V^T, to the gradient in between. A step t along it
  lowers every singular value by t; taking it at the projection, all at once,
  and stopping at zero, is ours: it needs no more decompositions.

  Args:
    params: with dense kernels.
    layers: from `maestro.layers`.
    paths: which kernels.
    choose: (function that returns spectra) -> {path: r}.
    t: by how much singular values fall.
  """
  parts = svds(matrices(params, layers, paths))
  ranks = choose(lambda: {p: np.asarray(s) for p, (_, s, _) in parts.items()})
  changes = {}
  for path, matrix in put_together(parts, ranks, jnp.float32(t)).items():
    spec, node = layers[path], trees.get(params, path)
    kernel = trees.to_kernel(matrix, spec).astype(node[spec.weight].dtype)
    changes[path] = dict(node) | {spec.weight: kernel}
  return trees.replace(params, changes)
