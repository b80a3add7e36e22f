"""Decomposes layers for the data they see: best rank-r layer *outputs*.

The plain decomposition (`lowrank.decompose`) is the best approximation of a
kernel K. What a network computes from it is X K, and inputs X that use few
directions, or some much more than others, make another product u @ v better:

  argmin over A of rank r of ||X (K - A)||_F  =  K Q_r Q_r^T

with Q_r the first r right singular vectors of X K, the eigenvectors of
K^T C K where C = X^T X / N. (X K Q_r Q_r^T is the truncated SVD of X K, the
best of any matrix of rank r by Eckart and Young.) The solutions are nested, so
the components are ordered, and no inverse of C is needed: C may be singular.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro import lowrank, ops, taps, trees
from maestro.errors import UserError
from maestro.lowrank import Rule
from maestro.svd import fresh
from maestro.trees import LayerSpec, Tree

# Weight, relative to the mean eigenvalue of C, of directions that no input has:
# those are ordered as the plain SVD would, instead of at random. Above the
# rounding of moments in float32.
_RIDGE = 1e-6


class CalibrationError(UserError):
  """Moments are missing or do not fit; names the layer and the remedy."""


# ---------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------


def _sum(x: jax.Array, spec: LayerSpec) -> jax.Array:
  """Sums x^T x over rows [*lead, N, in]; counts of indices for an embedding."""
  if spec.kind == "embed":
    rows = x.reshape((-1, x.shape[-1]))
    counts = jax.vmap(
      lambda i: jnp.zeros(spec.n_in, jnp.float32).at[i].add(1.0)
    )(rows)
    return counts.reshape((*spec.lead, spec.n_in))
  x = x.astype(jnp.float32)
  return jnp.einsum(
    "...ni,...nj->...ij", x, x, precision=jax.lax.Precision.HIGHEST
  )


def second_moments(
  model: Any,
  variables: Mapping[str, Any],
  batches: Iterable[Any],
  layers: Mapping[str, LayerSpec],
  **kwargs: Any,
) -> dict[str, jax.Array]:
  """Averages x x^T over all inputs x that each layer's kernel meets.

    {path: C [*lead, in, in]},  C = X^T X / N

  where a row of X is an input vector of a dense layer, a patch of a convolution
  (a row per output pixel) or, for an embedding, one-hot: its C is diagonal and
  returned as such, [*lead, in]; uses as logits (`attend`) do not count. A layer
  that is called several times averages over its calls. float32.

  A layer under `nn.scan` is seen if the scan has
  variable_axes={"params": 0, "captured": 0}.

  Args:
    model: a Flax Linen module.
    variables: of the model, e.g. {"params": ..., "batch_stats": ...}.
    batches: the model's inputs: an array each, or a tuple of its arguments.
      Equal shapes compile once. A batch's patches must fit in memory.
    layers: the layers to collect, from `maestro.layers(model, inputs)`; leave
      out what is not to be decomposed to save memory.
    **kwargs: passed on to the model, e.g. train=False.

  Raises:
    CalibrationError: no batches, a layer's inputs are not seen, or not finite.
  """

  def sums(variables, inputs):
    rows = taps.capture_inputs(model, variables, *inputs, **kwargs)
    if missing := sorted(set(layers) - set(rows)):
      raise CalibrationError(
        f"layers {missing}: no inputs were seen; under nn.scan, list"
        ' "captured" among its variable_axes: {"params": 0, "captured": 0};'
        " else leave them out of `layers` and decompose them without data"
      )
    totals, counts = {}, {}
    for path, spec in layers.items():
      totals[path] = sum(_sum(x, spec) for x in rows[path])
      axis = len(spec.lead)
      counts[path] = jnp.int32(sum(x.shape[axis] for x in rows[path]))
    return totals, counts

  sums = ops.jit_precise(sums)
  total: dict[str, jax.Array] = {}
  count: dict[str, int] = {}
  for batch in batches:
    inputs = batch if isinstance(batch, tuple) else (batch,)
    new, rows = sums(variables, inputs)
    for path in layers:
      total[path] = total[path] + new[path] if path in total else new[path]
      count[path] = count.get(path, 0) + int(rows[path])
  if not count and layers:
    raise CalibrationError("no batches to calibrate on; pass at least one")
  moments = {path: total[path] / max(count[path], 1) for path in layers}
  for path, c in moments.items():
    _check_finite(path, moments=c)
  return moments


def _check_finite(path: str, **values: Any) -> None:
  for name, x in values.items():
    if not np.all(np.isfinite(x)):
      raise CalibrationError(
        f"layer {path!r}: its {name} are not all finite; check the calibration"
        " data and the parameters of this layer and those before it"
      )


# ---------------------------------------------------------------------------
# Decomposition
# ---------------------------------------------------------------------------


def dense_matrix(params: Tree, spec: LayerSpec, path: str) -> np.ndarray:
  """Returns the kernel K [*lead, in, out] of a layer in float64.

  Raises:
    CalibrationError: there is none of the shape that `spec` says, or it is
      complex or not finite.
  """
  node = trees.get(params, path)
  node = trees.unboxed(node) if isinstance(node, Mapping) else {}
  shape = jnp.shape(node[spec.weight]) if spec.weight in node else None
  if "u" in node or shape != spec.kernel_shape:
    raise CalibrationError(
      f"layer {path!r}: expected a dense {spec.weight!r} of shape"
      f" {spec.kernel_shape} to decompose, found"
      f" {'factors' if 'u' in node else shape}"
    )
  if jnp.iscomplexobj(node[spec.weight]):
    raise CalibrationError(
      f"layer {path!r}: its {spec.weight!r} is complex, for which there is no"
      " decomposition by data; decompose it without (maestro.decompose)"
    )
  k = np.asarray(trees.to_matrix(node[spec.weight], spec), np.float64)
  _check_finite(path, weights=k)
  return k


def _matrices(
  params: Tree,
  layers: Mapping[str, LayerSpec],
  moments: Mapping[str, Any],
  path: str,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns K [*lead, in, out] and C of a layer as it is given, in float64."""
  if path not in moments:
    raise CalibrationError(
      f"layer {path!r} has no second moments; collect them with"
      " second_moments(model, variables, batches, layers), or decompose the"
      " layer without data (maestro.decompose)"
    )
  spec = layers[path]
  k = dense_matrix(params, spec, path)
  c = np.asarray(moments[path], np.float64)
  vector = (*spec.lead, spec.n_in)
  if c.shape not in (vector, (*vector, spec.n_in)):
    raise CalibrationError(
      f"layer {path!r}: second moments of shape {c.shape} do not fit its"
      f" inputs; expected {(*vector, spec.n_in)}, or {vector} for a diagonal"
    )
  _check_finite(path, moments=c)
  return k, c


def _check_known(moments: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
  if unknown := sorted(set(moments) - set(layers)):
    raise CalibrationError(
      f"moments: {unknown} are none of the model's layers, which are"
      f" {sorted(layers)}"
    )


def transpose(x: np.ndarray) -> np.ndarray:
  """Transposes matrices [*lead, m, n]."""
  return np.swapaxes(x, -1, -2)


def _apply(c: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Multiplies C @ b, where C may be given as its diagonal."""
  return c[..., None] * b if c.ndim < b.ndim else c @ b


def _svd_basis(k: np.ndarray) -> np.ndarray:
  """Right singular vectors of K, [*lead, out, R]."""
  return transpose(np.linalg.svd(k, full_matrices=False)[2])


def basis(k: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the right singular vectors of C^1/2 K, and its singular values.

  Of matrices K [*lead, in, out] and C [*lead, in, in], or its diagonal
  [*lead, in]: vectors [*lead, out, R] that span K's rows, values [*lead, R]. By
  the eigenvectors of K^T C K: no root of C, the largest of them, is needed.
  """
  n_in, n_out = k.shape[-2:]
  # In coordinates of K's rows, R = min(in, out) vectors always span them all:
  # full rank keeps the kernel, even what the data have no input for.
  w = np.linalg.qr(transpose(k))[0] if n_in < n_out else np.eye(n_out)
  b = k @ w
  c_mean = np.mean(
    c if c.ndim < k.ndim else np.diagonal(c, axis1=-2, axis2=-1), axis=-1
  )
  ridge = np.where(c_mean > 0, _RIDGE * c_mean, 1.0)[..., None, None]
  m = transpose(b) @ (_apply(c, b) + ridge * b)
  values, q = np.linalg.eigh(m)
  return w @ q[..., ::-1], np.sqrt(np.maximum(values[..., ::-1], 0.0))


def balanced(
  u: np.ndarray, v: np.ndarray, path: str
) -> tuple[np.ndarray, np.ndarray]:
  """Gives both factors of each component one norm; the product stays.

  What the kernel maps to zero (to the rounding of float32) has u at random and
  v zero, so that it can still learn, see `lowrank.decompose`.

  Args:
    u: [*lead, in, R].
    v: [*lead, R, out].
    path: of the layer.
  """
  left, right = np.linalg.norm(u, axis=-2), np.linalg.norm(v, axis=-1)
  size = np.max(left * right, axis=-1, keepdims=True, initial=0.0)
  dead = left * right <= 1e-7 * size
  scale = np.sqrt(right / np.where(dead, 1.0, left))
  scale = np.where(dead, 1.0, scale)
  u = np.where(
    dead[..., None, :],
    fresh(path, u.shape, jnp.float32),
    u * scale[..., None, :],
  )
  return u, np.where(dead[..., None], 0.0, v / scale[..., None])


def decompose(
  params: Tree,
  rules: Sequence[Rule],
  layers: Mapping[str, LayerSpec],
  moments: Mapping[str, Any],
) -> dict:
  """Replaces kernels by the factors that keep most of the layers' outputs.

    kernel -> u = K Q / sqrt(d), v = sqrt(d) Q^T,  d_k = ||K q_k||

  with Q as in the file's heading. The counterpart of `lowrank.decompose`, with
  the same rules and the same tree as result: full rank keeps the function, the
  first r components are the best r, and both factors of a component have one
  norm. The norms need not fall from one component to the next, as components
  are ordered by what they add to the output. Computed in float64 on the host;
  cannot be traced.

  Args:
    params: nested mapping of parameters with dense kernels.
    rules: which layers, see `Rule`; other layers are left untouched.
    layers: {path: LayerSpec}, from `maestro.layers(model, inputs)`.
    moments: from `second_moments`, for at least the layers that rules select.

  Raises:
    LowRankError: a rule selects no layer, or a rank is impossible.
    CalibrationError: a layer's moments are missing, of a wrong shape or not
      finite, or it holds no dense kernel.
  """
  _check_known(moments, layers)
  changes = {}
  for path, rank in lowrank.resolve(rules, layers).items():
    if rank is None:
      continue
    k, c = _matrices(params, layers, moments, path)
    q = basis(k, c)[0][..., :rank]
    u, v = balanced(k @ q, transpose(q), path)
    node = trees.get(params, path)
    changes[path] = trees.with_factors(node, u, v, layers[path])
  return trees.replace(params, changes)


def compare(
  params: Tree,
  layers: Mapping[str, LayerSpec],
  moments: Mapping[str, Any],
) -> dict[str, dict[str, np.ndarray]]:
  """Returns the output error of both decompositions, per layer and rank.

    {path: {"svd": e, "data": e}},  e_r = ||X (K - A_r)||^2 / ||X K||^2

  for r = 0 .. R, float64 [*lead, R + 1], from C alone: with A_r = K Q_r Q_r^T
  the numerator is N sum_{k >= r} q_k^T K^T C K q_k. Zero where X K is zero.
  Biases are no part of it.

  Args:
    params: nested mapping of parameters with dense kernels.
    layers: {path: LayerSpec}, from `maestro.layers(model, inputs)`.
    moments: from `second_moments`; says which layers are compared.

  Raises:
    CalibrationError: as `decompose`.
  """
  _check_known(moments, layers)
  table = {}
  for path in moments:
    k, c = _matrices(params, layers, moments, path)
    table[path] = {
      "svd": _errors(k, c, _svd_basis(k)),
      "data": _errors(k, c, basis(k, c)[0]),
    }
  return table


def _errors(k: np.ndarray, c: np.ndarray, q: np.ndarray) -> np.ndarray:
  """Relative squared output errors [*lead, R + 1] of K Q_r Q_r^T."""
  b = k @ q
  # Rounding of C, in float32, can make a zero slightly negative.
  energy = np.maximum(np.sum(b * _apply(c, b), axis=-2), 0.0)
  tail = np.cumsum(energy[..., ::-1], axis=-1)[..., ::-1]
  tail = np.concatenate([tail, np.zeros_like(tail[..., :1])], axis=-1)
  total = tail[..., :1]
  return tail / np.where(total > 0, total, 1.0)
