"""How dense kernels become factors: the decomposers that a method can name."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from maestro import lowrank, trees
from maestro.methods import calibrate, fisher
from maestro.schema import Count
from maestro.trees import Layers, Tree

# ---------------------------------------------------------------------------
# Decomposers: (params, rules, layers, moments=, key=, options) -> params
# ---------------------------------------------------------------------------


def svd(params: Tree, rules, layers: Layers, *, moments, key) -> dict:
  """Takes the best approximation of each kernel: `lowrank.decompose`.

  At the start of training this is spectral initialisation.
  """
  del moments, key
  return lowrank.decompose(params, rules, layers)


def data(
  params: Tree, rules, layers: Layers, *, moments, key, examples: Count = 512
) -> dict:
  """Takes the best approximation of each layer's outputs on training data.

  See `maestro.methods.calibrate`; `examples` training examples are its data.
  """
  del key
  return calibrate.decompose(params, rules, layers, moments.inputs(examples))


def by_fisher(
  params: Tree, rules, layers: Layers, *, moments, key, examples: Count = 512
) -> dict:
  """Takes the best approximation for the loss: see `maestro.methods.fisher`."""
  del key
  return fisher.decompose(params, rules, layers, moments.both(examples))


def random(params: Tree, rules, layers: Layers, *, moments, key) -> dict:
  """Forgets the kernel: normal u and v, whose product has its mean square.

  E (u @ v)_ij^2 = mean(K^2),   E u_ik^2 = E v_kj^2
  """
  del moments
  changes = {}
  for path, rank, key_u, key_v in _selected(rules, layers, key):
    spec, node = layers[path], trees.get(params, path)
    kernel = trees.unboxed(node)[spec.weight]
    _check_finite(path, kernel)
    square = jnp.mean(kernel.astype(jnp.float32) ** 2)
    # Of a kernel of zeros: u as in an adapter and v zero, which can learn.
    root = (square / max(rank, 1)) ** 0.25
    scale_u = jnp.where(square == 0, spec.n_in**-0.5, root)
    scale_u, root = scale_u.astype(kernel.dtype), root.astype(kernel.dtype)
    shape_u, shape_v = spec.factor_shapes(rank)
    u = scale_u * jax.random.normal(key_u, shape_u, kernel.dtype)
    v = root * jax.random.normal(key_v, shape_v, kernel.dtype)
    changes[path] = trees.with_factors(node, u, v, spec)
  return trees.replace(params, changes)


def adapter(params: Tree, rules, layers: Layers, *, moments, key) -> dict:
  """Keeps the kernel and adds factors: u random, v zero (Hu et al., 2022).

    weight = kernel + u @ v,   u ~ N(0, 1 / in)

  so that the function is as it was.
  """
  del moments
  changes = {}
  for path, rank, key_u, _ in _selected(rules, layers, key):
    spec, node = layers[path], trees.get(params, path)
    _check_finite(path, node[spec.weight])
    dtype = node[spec.weight].dtype
    shape_u, shape_v = spec.factor_shapes(rank)
    u = jax.random.normal(key_u, shape_u, dtype)
    changes[path] = dict(node) | {
      "u": u / math.sqrt(spec.n_in),
      "v": jnp.zeros(shape_v, dtype),
    }
  return trees.replace(params, changes)


def _check_finite(path: str, kernel: jax.Array) -> None:
  if not trees.is_traced(kernel) and not np.all(np.isfinite(kernel)):
    raise trees.LowRankError(
      f"layer {path!r}: its kernel holds NaN or infinity; mend the parameters"
    )


def _selected(rules, layers: Layers, key: jax.Array) -> Iterator[tuple]:
  """Yields (path, rank, a key for u, one for v) of the layers to decompose."""
  for i, (path, rank) in enumerate(lowrank.resolve(rules, layers).items()):
    if rank is not None:
      yield path, rank, *jax.random.split(jax.random.fold_in(key, i))


DECOMPOSERS = {
  "svd": svd,
  "data": data,
  "fisher": by_fisher,
  "random": random,
  "adapter": adapter,
}
SUPPLIED = ("params", "rules", "layers", "moments", "key")
