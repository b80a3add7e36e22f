"""The fisher order: components by what losing them does to the loss.

Where the plain decomposition asks how much of a kernel K is lost, and
`calibrate` how much of a layer's outputs X K, this asks how much the loss
changes, to second order: a change D of the kernel changes a layer's outputs by
X D, and the loss by about

  1/2 E ||(gradient at the output)^T (x D)||^2  ~  ||A^1/2 D G^1/2||_F^2

with A = E |g|^2 x x^T and G = E g g^T over rows x that the kernel meets and
gradients g at the layer's output (a Kronecker product for the layer's Fisher
information). A table that makes logits, too, q K^T, adds to both what its use
there has at stake: |q|^2 times the squares of the logits' gradients to A, and
the squared norms of these times q q^T to G. That the product of the sums is
about the sum of the products is one more approximation.

The best approximation of rank r is a prefix of

  A^1/2 K G^1/2 = U S V^T,   u = K G^1/2 V,   v = V^T G^-1/2,   u v = K
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro import lowrank, ops, trees
from maestro import taps as taps_lib
from maestro.lowrank import Rule
from maestro.methods import calibrate
from maestro.methods.calibrate import CalibrationError, transpose
from maestro.trees import LayerSpec, Tree

# Added to G, whose inverse root is taken, relative to its mean eigenvalue.
_RIDGE_OUT = 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Second moments on both sides of a layer's kernel, float32 means over rows.

  Attributes:
    inputs: E x x^T, [*lead, in, in]; the diagonal [*lead, in] of an embedding.
    weighted: E |g|^2 x x^T, likewise.
    outputs: E g g^T, [*lead, out, out].
  """

  inputs: Any
  weighted: Any
  outputs: Any


# ---------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------


def moments(
  model: Any,
  variables: Mapping[str, Any],
  batches: Iterable[Any],
  layers: Mapping[str, LayerSpec],
  *,
  key: jax.Array,
  centred: bool = True,
  **kwargs: Any,
) -> dict[str, Moments]:
  """Averages over the inputs that each kernel meets, and gradients behind it.

  Means are over rows, of tables over look-ups. The gradients are of <outputs of
  the model, z> with z normal, the same for equal keys: those of a loss whose
  Hessian with respect to the outputs is the identity, or, centred, of a softmax
  that has learned nothing. Rows are those of `calibrate.second_moments`; one
  backward pass a batch.

  Args:
    model: a Flax Linen module.
    variables: of the model, dense or factored.
    batches: the model's inputs: an array each, or a tuple of its arguments.
    layers: the layers to collect, from `maestro.layers(model, inputs)`.
    key: of z.
    centred: whether z is centred over the last axis of the outputs.
    **kwargs: passed on to the model, e.g. train=False.

  Raises:
    CalibrationError: no batches, a layer's inputs are not seen, or not finite.
  """

  def statistic(path: str, x: jax.Array, g: jax.Array) -> dict:
    g = g.astype(jnp.float32)
    square = jnp.sum(g * g, axis=-1)
    count = jnp.float32(g.shape[-2])
    if layers[path].kind == "embed":
      zero = jnp.zeros(layers[path].n_in, jnp.float32)
      if jnp.issubdtype(x.dtype, jnp.inexact):  # of `attend`: no look-ups
        x = x.astype(jnp.float32)
        weighted = jnp.einsum("n,nv->v", square, x * x)
        strength = jnp.sum(x * x, axis=-1)[..., None]
        sums = Moments(zero, weighted, _gram(strength * g, g))
        return {"sums": sums, "rows": jnp.float32(0), "seen": count}
      inputs, weighted = zero.at[x].add(1.0), zero.at[x].add(square)
    else:
      x = x.astype(jnp.float32)
      inputs, weighted = _gram(x, x), _gram(square[..., None] * x, x)
    outputs = _gram(g, g)
    sums = Moments(inputs, weighted, outputs)
    return {"sums": sums, "rows": count, "seen": count}

  def zeros(spec: LayerSpec) -> dict:
    side = (*spec.lead, spec.n_in)
    side = side if spec.kind == "embed" else (*side, spec.n_in)
    out = (*spec.lead, spec.n_out, spec.n_out)
    return {
      "sums": Moments(jnp.zeros(side), jnp.zeros(side), jnp.zeros(out)),
      "rows": jnp.zeros(spec.stack),
      "seen": jnp.zeros(spec.stack),
    }

  def objective(taps, variables, inputs, key):
    y = taps_lib.apply_tapped(
      model, variables, taps, statistic, *inputs, **kwargs
    )
    if not hasattr(y, "shape"):
      raise CalibrationError(
        f"{type(model).__name__} returns a {type(y).__name__}, not one array"
        " whose gradients can be taken; wrap it in a model that does"
      )
    z = jax.random.normal(key, y.shape, jnp.float32)
    if centred:
      z = z - jnp.mean(z, axis=-1, keepdims=True)
    return jnp.sum(y.astype(jnp.float32) * z)

  sums = ops.jit_precise(jax.grad(objective))
  nothing = {path: zeros(spec) for path, spec in layers.items()}
  total: Any = None
  for i, batch in enumerate(batches):
    inputs = batch if isinstance(batch, tuple) else (batch,)
    new = sums(nothing, variables, inputs, jax.random.fold_in(key, i))
    total = new if total is None else jax.tree.map(jnp.add, total, new)
  if total is None:
    if not layers:
      return {}
    raise CalibrationError("no batches to calibrate on; pass at least one")
  if missing := [p for p, t in total.items() if not np.all(t["seen"])]:
    raise CalibrationError(
      f"layers {missing}: no inputs were seen; under nn.scan, list"
      ' "captured" among its variable_axes: {"params": 0, "captured": 0};'
      " else leave them out of `layers` and decompose them without data"
    )
  found = {}
  for path, t in total.items():
    rows = max(np.max(np.asarray(t["rows"])), 1)  # logits alone look up none
    found[path] = jax.tree.map(lambda x, rows=rows: x / rows, t["sums"])
    for field in dataclasses.fields(Moments):
      if not np.all(np.isfinite(getattr(found[path], field.name))):
        raise CalibrationError(
          f"layer {path!r}: its moments are not all finite; check"
          " the calibration data and the parameters of this layer and its"
          " neighbours"
        )
  return found


def _gram(x: jax.Array, y: jax.Array) -> jax.Array:
  high = jax.lax.Precision.HIGHEST
  return jnp.einsum("...ni,...nj->...ij", x, y, precision=high)


# ---------------------------------------------------------------------------
# Orders
# ---------------------------------------------------------------------------


def _roots(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns G^1/2 and G^-1/2 of what has a ridge, [*lead, out, out]."""
  mean = np.mean(np.diagonal(g, axis1=-2, axis2=-1), axis=-1)[..., None, None]
  ridge = np.where(mean > 0, _RIDGE_OUT * mean, 1.0)
  values, q = np.linalg.eigh(g + ridge * np.eye(g.shape[-1]))
  root = np.sqrt(np.maximum(values, ridge[..., 0]))[..., None, :]
  return (q * root) @ transpose(q), (q / root) @ transpose(q)


def _checked(
  k: np.ndarray, found: Moments, spec: LayerSpec, path: str
) -> list[np.ndarray]:
  side = (*spec.lead, spec.n_in)
  side = side if spec.kind == "embed" else (*side, spec.n_in)
  out = (*spec.lead, spec.n_out, spec.n_out)
  arrays = [
    np.asarray(x, np.float64)
    for x in (found.inputs, found.weighted, found.outputs)
  ]
  if [x.shape for x in arrays] != [side, side, out]:
    raise CalibrationError(
      f"layer {path!r}: moments of shapes {[x.shape for x in arrays]} do not"
      f" fit its kernel; expected {side} twice and {out}"
    )
  if not all(np.all(np.isfinite(x)) for x in (k, *arrays)):
    raise CalibrationError(
      f"layer {path!r}: its weights or moments are not all finite"
    )
  # Rounding in float32 leaves them a little asymmetric.
  return [x if x.ndim < k.ndim else (x + transpose(x)) / 2 for x in arrays]


def _of(moments: Mapping[str, Moments], path: str) -> Moments:
  if path not in moments:
    raise CalibrationError(
      f"layer {path!r} has no moments; collect them with"
      " fisher.moments(model, variables, batches, layers, key=key)"
    )
  return moments[path]


def _factors(
  k: np.ndarray, found: Moments, spec: LayerSpec, path: str, rank: int
) -> tuple[np.ndarray, np.ndarray]:
  """The first components in fisher order; both factors of one norm."""
  _, a, g = _checked(k, found, spec, path)
  root, inverse = _roots(g)
  q = calibrate.basis(k @ root, a)[0][..., :rank]
  return calibrate.balanced(k @ root @ q, transpose(q) @ inverse, path)


def decompose(
  params: Tree,
  rules: Sequence[Rule],
  layers: Mapping[str, LayerSpec],
  moments: Mapping[str, Moments],
) -> dict:
  """Replaces kernels by factors in fisher order.

  The counterpart of `lowrank.decompose`, with the same rules and the same tree
  as result: full rank keeps the function, and by the Fisher information the
  first r components are the best r. Computed in float64 on the host; cannot be
  traced.

  Args:
    params: nested mapping of parameters with dense kernels.
    rules: which layers, see `Rule`; other layers are left untouched.
    layers: from `maestro.layers(model, inputs)`.
    moments: from `moments`, for at least the layers that rules select.

  Raises:
    LowRankError: a rule selects no layer, or a rank is impossible.
    CalibrationError: moments are missing, of a wrong shape or not finite, or a
      layer holds no dense kernel.
  """
  changes = {}
  for path, rank in lowrank.resolve(rules, layers).items():
    if rank is None:
      continue
    spec, node = layers[path], trees.get(params, path)
    k = calibrate.dense_matrix(params, spec, path)
    u, v = _factors(k, _of(moments, path), spec, path, rank)
    changes[path] = trees.with_factors(node, u, v, spec)
  return trees.replace(params, changes)


def reorder(
  params: Tree,
  ranks: Tree,
  layers: Mapping[str, LayerSpec],
  moments: Mapping[str, Moments],
) -> dict:
  """Brings the live components of factored layers into fisher order.

  The product of the factors at their ranks, and with it the network's function,
  stays as it is (to the rounding of its dtype); stored shapes stay too. Layers
  without moments are left as they are.

  Args:
    params: parameters with factored layers.
    ranks: their current ranks.
    layers: from `maestro.layers(model, inputs)`.
    moments: from `moments`.

  Raises:
    LowRankError: ranks do not fit the factors.
    CalibrationError: moments do not fit, or are not finite.
  """
  changes = {}
  for path, (node, rank) in trees.paired(
    lowrank.mask(params, ranks), ranks
  ).items():
    if path not in moments:
      continue
    spec, stored = layers[path], node["u"].shape[-1]
    shape_u = (*spec.lead, spec.n_in, stored)
    shape_v = (*spec.lead, stored, spec.n_out)
    u = np.asarray(node["u"], np.float64).reshape(shape_u)
    v = np.asarray(node["v"], np.float64).reshape(shape_v)
    size = min(stored, spec.full_rank)
    u, v = _factors(u @ v, moments[path], spec, path, size)
    live = np.arange(size) < np.asarray(rank)[..., None]
    u = np.where(live[..., None, :], u, 0.0)
    v = np.where(live[..., None], v, 0.0)
    if size < stored:
      more = [(0, 0)] * len(spec.lead)
      u = np.pad(u, [*more, (0, 0), (0, stored - size)])
      v = np.pad(v, [*more, (0, stored - size), (0, 0)])
    shape_u, shape_v = spec.factor_shapes(stored)
    changes[path] = dict(node) | {
      "u": jnp.asarray(u.reshape(shape_u), node["u"].dtype),
      "v": jnp.asarray(v.reshape(shape_v), node["v"].dtype),
    }
  return trees.replace(params, changes)


ORDERS = ("svd", "data", "fisher")


def lost_energy(
  params: Tree,
  layers: Mapping[str, LayerSpec],
  moments: Mapping[str, Moments],
) -> dict[str, dict[str, np.ndarray]]:
  """Returns the part of each layer's energy that a prefix loses, per order.

    {order: {path: tail [R + 1]}},  tail[r] = sum_{k >= r} S_k^2 / sum_k S_k^2

  with S the singular values of K ("svd"), of E[x x^T]^1/2 K ("data") and of
  A^1/2 K G^1/2 ("fisher"); summed over the elements of a stacked or grouped
  layer, whose rank is one number.

  Args:
    params: with dense kernels.
    layers: from `maestro.layers(model, inputs)`.
    moments: from `moments`; says which layers are told.
  """
  tails: dict[str, dict[str, np.ndarray]] = {order: {} for order in ORDERS}
  for path, found in moments.items():
    spec = layers[path]
    k = calibrate.dense_matrix(params, spec, path)
    inputs, weighted, outputs = _checked(k, found, spec, path)
    spectra = (
      np.linalg.svd(k, compute_uv=False),
      calibrate.basis(k, inputs)[1],
      calibrate.basis(k @ _roots(outputs)[0], weighted)[1],
    )
    for order, s in zip(ORDERS, spectra, strict=True):
      square = np.sum((s**2).reshape((-1, s.shape[-1])), axis=0)
      tail = np.append(np.cumsum(square[::-1])[::-1], 0.0)
      tails[order][path] = tail / (tail[0] if tail[0] > 0 else 1.0)
  return tails
