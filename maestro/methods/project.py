"""Spectra of dense kernels, and kernels put together from parts of them."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from maestro import lowrank, trees
from maestro.methods.rank_rules import Spectra
from maestro.trees import Layers, Tree


@jax.jit
def svds(kernels: Mapping[str, jax.Array]) -> dict:
  return {path: lowrank.svd(k, path) for path, k in kernels.items()}


@jax.jit
def put_together(
  parts: Mapping, ranks: Mapping[str, int], t: jax.Array
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
