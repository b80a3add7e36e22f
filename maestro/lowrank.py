"""The method on parameter trees: decompose, mask, truncate, merge, shrink.

A layer's kernel K is stored dense, or as two factors u and v with K = u @ v and
an *ordered* rank axis: the first r components are meant to be the best r.

  {"fc": {"kernel": [in, out], "bias": [out]}}               dense
  {"fc": {"u": [in, R], "v": [R, out], "bias": [out]}}       factored

In general u is [*lead, *inputs, R] and v is [*lead, R, *outputs]. `lead` is the
shape of the layer's rank: () for most layers, [L] if scan-stacked, [G] if
grouped, [L, G] if both. A convolution unrolls (kh, kw, in): u is
[kh, kw, in, R] and v is [R, out]. A layer that holds `kernel` as well as `u`
and `v` has their sum as its weight.

Ranks are a tree that mirrors the modules, {"fc": {"rank": int32}}. Everything
here is a pure function of such trees; nothing is registered and nothing is
changed in place. `mask` defines what a rank means; every other form of a
truncated network is tested to equal it.

Paths are slash-joined module names ("encoder/fc"); the empty path is a model
that is itself one layer.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro.svd import svd
from maestro.trees import (
  LayerSpec,
  Leaf,
  LowRankError,
  Tree,
  boxed,
  check_factors,
  check_rank,
  component_axes,
  factored,
  find_lead,
  flatten_ranks,
  get,
  is_factored,
  is_traced,
  kernel_names,
  mask_factor,
  paired,
  replace,
  to_kernel,
  to_matrix,
  unboxed,
  unflatten_ranks,
  wide_dtype,
  with_factors,
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """Says whether, and from which rank, the layers it matches are decomposed.

  Attributes:
    path: regular expression, matched in full against a layer's path.
    rank: the rank to start from; None is the full rank, min(in, out).
    decompose: False leaves the matched layers dense.
  """

  path: str = ".*"
  rank: int | None = None
  decompose: bool = True


def resolve(
  rules: Sequence[Rule], layers: Mapping[str, LayerSpec]
) -> dict[str, int | None]:
  """Applies rules to layers: {path: starting rank, or None to stay dense}.

  The first rule that matches a layer decides; a layer that no rule matches
  stays dense. So does a layer of full rank 1, of which a depthwise convolution
  is made: it has nothing to decompose.

  Raises:
    LowRankError: a rule decides for no layer, or for none of which there are
      factors; is no regular expression; asks for an impossible rank; or selects
      a layer whose kernel the model uses in another way than the layer does.
  """
  patterns = []
  for rule in rules:
    try:
      patterns.append(re.compile(rule.path))
    except re.error as error:
      raise LowRankError(
        f"rule {rule.path!r} is not a regular expression: {error}"
      ) from error
  chosen: dict[str, int | None] = dict.fromkeys(layers)
  used = [False] * len(patterns)
  for path, spec in layers.items():
    match = next((i for i, p in enumerate(patterns) if p.fullmatch(path)), None)
    if match is None:
      continue
    used[match] = True
    rule = rules[match]
    if not rule.decompose or spec.full_rank <= 1:
      continue
    if spec.altered:
      raise LowRankError(
        f"layer {path!r}: the model changes its kernel before it multiplies by"
        " it (as weight standardisation, WeightNorm and SpectralNorm do), or"
        " multiplies by it outside of the layer (instead of `Embed.attend`),"
        " which would be lost on factors; keep it dense by an earlier rule:"
        f" Rule({re.escape(path)!r}, decompose=False)"
      )
    if rule.rank is not None:
      check_rank(rule.rank, spec.full_rank, path)
    chosen[path] = spec.full_rank if rule.rank is None else rule.rank
  for rule in rules:
    paths = [path for path in layers if re.fullmatch(rule.path, path)]
    others = all(layers[path].kind == "other" for path in paths)
    if paths and others and rule.decompose:
      raise LowRankError(
        f"rule {rule.path!r} matches only {sorted(paths)}, which multiply but"
        " cannot be factored; leave the rule out"
      )
  if not all(used):
    rule = rules[used.index(False)]
    shadowed = any(re.fullmatch(rule.path, path) for path in layers)
    why = "is shadowed by an earlier rule" if shadowed else "matches no layer"
    raise LowRankError(
      f"rule {rule.path!r} {why}; the layers are {sorted(layers)}"
    )
  return chosen


def decompose(
  params: Tree, rules: Sequence[Rule], layers: Mapping[str, LayerSpec]
) -> dict:
  """Replaces kernels by factors from their singular value decomposition.

    kernel = U diag(s) V^T  ->  u = U sqrt(s), v = sqrt(s) V^T

  so that u @ v is the kernel (its best approximation, if the rule's rank is
  below the full one) and the components are ordered by singular value. Those
  of singular value zero (to the rounding of the SVD) are zero on the longer
  side and have their singular vector on the shorter one, so that they can still
  learn: of a kernel of zeros, u @ v then takes the kernel's own steps. Can be
  traced: abstract and sharded trees take the same path. Not to be
  differentiated, which raises: singular vectors have no derivative where
  singular values meet.

  Args:
    params: nested mapping of parameters with dense kernels.
    rules: which layers, see `Rule`; other layers are left untouched.
    layers: {path: LayerSpec}, from `maestro.layers(model, inputs)`.

  Raises:
    LowRankError: a rule selects no layer, a rank is impossible, or a layer's
      parameters do not hold the kernel that its LayerSpec describes.
  """
  changes = {}
  for path, rank in resolve(rules, layers).items():
    if rank is None:
      continue
    spec, node = layers[path], get(params, path)
    box = node.get(spec.weight) if isinstance(node, Mapping) else None
    node = unboxed(node) if isinstance(node, Mapping) else node
    shape = None if box is None else jnp.shape(node[spec.weight])
    if is_factored(node) or shape != spec.kernel_shape:
      found = "factors" if is_factored(node) else shape
      raise LowRankError(
        f"layer {path!r}: expected a dense {spec.weight!r} of shape"
        f" {spec.kernel_shape} to decompose, found {found}"
      )
    kernel = node[spec.weight]
    matrix = to_matrix(kernel, spec)
    left, s, right = svd(matrix, path)
    # Where a singular value is zero, both factors would be, and with them both
    # gradients, for ever: one is the singular vector, which changes nothing.
    size = max(spec.n_in, spec.n_out) * jnp.finfo(s.dtype).eps
    dead = (s <= size * s[..., :1])[..., :rank]
    root = jnp.sqrt(s[..., :rank]).astype(left.dtype)
    ones, zeros = jnp.where(dead, 1.0, root), jnp.where(dead, 0.0, root)
    in_u, in_v = (ones, zeros) if spec.n_in < spec.n_out else (zeros, ones)
    u = left[..., :rank] * in_u[..., None, :]
    v = in_v[..., :, None] * right[..., :rank, :]
    changes[path] = with_factors(get(params, path), u, v, spec)
  return replace(params, changes)


def full_ranks(
  params: Tree, layers: Mapping[str, LayerSpec] | None = None
) -> dict:
  """Returns the rank tree at which every stored component is live.

    {"fc": {"u": [in, R], "v": [R, out]}} -> {"fc": {"rank": R}}

  Args:
    params: parameters with factored layers.
    layers: from `maestro.layers`; needed where shapes do not tell leading axes
      apart, or where foreign modules hold parameters u and v.
  """
  flat = {}
  for path, node in factored(params, layers).items():
    lead = find_lead(node, (layers or {}).get(path), path)
    check_factors(node, lead, path)
    flat[path] = jnp.full(lead, node["u"].shape[-1], jnp.int32)
  return unflatten_ranks(flat)


def merge(
  params: Tree,
  layers: Mapping[str, LayerSpec] | None = None,
  *,
  where: Callable[[str], bool] | None = None,
) -> dict:
  """Multiplies factors back into dense kernels.

    {"u": [in, R], "v": [R, out]} -> {"kernel": u @ v  (+ kernel, if held)}

  Args:
    params: parameters with factored layers, masked or truncated to their ranks.
    layers: from `maestro.layers`; may be left out when no layer is stacked,
      grouped or an embedding.
    where: which paths to merge; None merges every factored layer.
  """
  changes = {}
  for path, node in factored(params, layers).items():
    if where is not None and not where(path):
      continue
    u, v = node["u"], node["v"]
    spec = None if layers is None else layers[path]
    lead = find_lead(node, spec, path)
    if spec is None:
      if lead:
        raise LowRankError(
          f"layer {path!r} is stacked or grouped; merging it needs"
          " `layers=maestro.layers(model, inputs)`"
        )
      spec = LayerSpec("dense", u.shape[:-1], v.shape[1:])
    rank = u.shape[-1]
    matrix = jnp.matmul(
      u.reshape((*lead, spec.n_in, rank)),
      v.reshape((*lead, rank, spec.n_out)),
      precision=jax.lax.Precision.HIGHEST,
    )
    kernel = to_kernel(matrix, spec)
    if spec.weight in node:
      kernel = node[spec.weight] + kernel
    box_u, box_v = (get(params, path)[name] for name in ("u", "v"))
    if getattr(box_u, "names", None) and spec.weight not in node:
      names = kernel_names(box_u.names, box_v.names, spec)
      kernel = boxed(kernel, box_u, names)
    rest = {k: x for k, x in node.items() if k not in ("u", "v", spec.weight)}
    changes[path] = rest | {spec.weight: kernel}
  return replace(params, changes)


# ---------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------


def mask(params: Tree, ranks: Tree) -> dict:
  """Zeroes every component at or beyond its layer's rank; shapes stay.

    u[..., b] = 0 and v[b] = 0 for b >= rank

  This is the definition of a network at given ranks. Layers that `ranks` does
  not name are left as they are. Concrete ranks out of range raise; traced ones
  act as if clipped.
  """
  return replace(
    params,
    {
      path: dict(node)
      | {name: mask_factor(node[name], name, rank) for name in ("u", "v")}
      for path, (node, rank) in paired(params, ranks).items()
    },
  )


def stored_rank(rank: Any, full_rank: int, multiple_of: int = 1) -> int:
  """Size of the rank axis after truncation: rounded up, at most what it was."""
  if multiple_of < 1:
    raise LowRankError(f"multiple_of={multiple_of} is below 1")
  top = int(np.max(np.asarray(rank), initial=0))
  return min(full_rank, -(-top // multiple_of) * multiple_of)


def cut_factor(
  x: Leaf, name: str, rank: Any, multiple_of: int = 1
) -> jax.Array:
  """Masks one factor (or a leaf shaped like it) and slices its rank axis."""
  axis = x.ndim - 1 if name == "u" else jnp.ndim(rank)
  size = stored_rank(rank, x.shape[axis], multiple_of)
  return jax.lax.slice_in_dim(mask_factor(x, name, rank), 0, size, axis=axis)


def truncate(params: Tree, ranks: Tree, multiple_of: int = 1) -> dict:
  """Cuts factors down to their ranks: smaller arrays, the same function.

    {"u": [in, R], "v": [R, out]} -> {"u": [in, r], "v": [r, out]}

  where r is the rank rounded up to a multiple of `multiple_of` (the largest of
  them for a stacked or grouped layer); what is kept beyond the rank is zero.
  Optimizer states are cut by `maestro.training.optim.truncate`.

  Raises:
    LowRankError: a rank is traced (shapes must be known), out of range, or
      names a layer without factors.
  """
  changes = {}
  for path, (node, rank) in paired(params, ranks).items():
    if is_traced(rank):
      raise LowRankError(
        f"layer {path!r}: truncate needs concrete ranks, as they become"
        " shapes; call it outside of jit"
      )
    changes[path] = dict(node) | {
      name: cut_factor(node[name], name, rank, multiple_of)
      for name in ("u", "v")
    }
  return replace(params, changes)


def dense_is_cheaper(n_in: int, n_out: int, rank: int) -> bool:
  """True if factors of this rank hold no fewer numbers than the kernel.

  r (in + out) >= in * out; the official code merges at ">", where a tie keeps
  two products that cost as much as one.
  """
  return rank * (n_in + n_out) >= n_in * n_out


def extract(
  params: Tree,
  ranks: Tree,
  layers: Mapping[str, LayerSpec],
  *,
  multiple_of: int = 1,
) -> dict:
  """Returns the deployable tree: truncated, and merged where dense is cheaper.

  The same function as `mask(params, ranks)`, in the fewest parameters that
  these ranks allow. A layer that holds its kernel too is always merged.
  """
  small = truncate(params, ranks, multiple_of)
  sizes = {
    path: node["u"].shape[-1] for path, node in factored(small, layers).items()
  }
  if missing := flatten_ranks(ranks).keys() - layers.keys():
    raise LowRankError(
      f"layers {sorted(missing)} hold factors but are not in `layers`; pass"
      " maestro.layers(model, inputs) of the model that these parameters are of"
    )

  def where(path: str) -> bool:
    spec, node = layers[path], get(small, path)
    if spec.weight in node:
      return True
    return dense_is_cheaper(spec.n_in, spec.n_out, sizes[path])

  return merge(small, layers, where=where)


def squared_norms(x: jax.Array | np.ndarray, name: str, rank: Any) -> jax.Array:
  """Squared Frobenius norm of each component, [*lead, R], zero if dead."""
  # Masked before it is squared, or a NaN would reach the gradient: 0 * NaN.
  wide = mask_factor(x, name, rank)
  wide = wide.astype(wide_dtype(x.dtype))
  square = jnp.real(wide * jnp.conj(wide))
  return jnp.sum(square, axis=component_axes(x, name, jnp.ndim(rank)))


def _suffix_sums(x: jax.Array) -> jax.Array:
  """Sums of x[..., b:] for every b."""
  return jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)


def _sqrt(x: jax.Array) -> jax.Array:
  """Square root whose gradient at zero is zero (the sub-gradient, not NaN)."""
  zero = x == 0  # not x > 0, by which NaN would turn into zero
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def _norms(params: Tree, ranks: Tree | None):
  """Yields (path, squared norms of u's components, of v's), each [*lead, R]."""
  ranks = full_ranks(params) if ranks is None else ranks
  for path, (node, rank) in paired(params, ranks).items():
    yield (
      path,
      squared_norms(node["u"], "u", rank),
      squared_norms(node["v"], "v", rank),
    )


def importance(params: Tree, ranks: Tree | None = None) -> dict[str, jax.Array]:
  """Scores components: ||u[:, b:r]||_F * ||v[b:r, :]||_F, for each b.

  Non-increasing in b, so that the components above any threshold are a prefix;
  zero for dead components (b >= r).

  Args:
    params: parameters with factored layers.
    ranks: current ranks; None takes every stored component as live.

  Returns:
    {layer path: float32 [*lead, R]}.
  """
  scores = {}
  for path, u, v in _norms(params, ranks):
    score = _sqrt(_suffix_sums(u)) * _sqrt(_suffix_sums(v))
    # Parallel prefix sums may break the order in the last bit.
    scores[path] = jax.lax.cummax(score, axis=score.ndim - 1, reverse=True)
  return scores


def group_lasso(
  params: Tree,
  ranks: Tree | None = None,
  kind: str = "hierarchical",
  weights: Mapping[str, float] | None = None,
) -> jax.Array:
  """Sums the norms of groups of live components over all factored layers.

  hierarchical: sum_b ( ||u[:, b:r]||_F + ||v[b:r, :]||_F ),  b = 0 .. r - 1
  flat:         sum_b ( ||u[:, b]||_2   + ||v[b, :]||_2 )

  The hierarchical groups are suffixes, so a component is pulled towards zero
  once for each component before it and the last ones vanish first. Costs
  O(size of the factors); the gradient at an exact zero is zero.

  Args:
    params: parameters with factored layers.
    ranks: current ranks; None takes every stored component as live.
    kind: "hierarchical" or "flat".
    weights: {layer path: what its groups count}, 1 where not given; None is 1
      for all.

  Returns:
    A float32 scalar; 0 without factored layers.
  """
  if kind not in ("hierarchical", "flat"):
    raise LowRankError(
      f'lasso kind {kind!r} is unknown; use "hierarchical" or "flat"'
    )
  total = jnp.zeros((), jnp.float32)
  for path, u, v in _norms(params, ranks):
    if kind == "hierarchical":
      u, v = _suffix_sums(u), _suffix_sums(v)
    norms = jnp.sum(_sqrt(u)) + jnp.sum(_sqrt(v))
    total += norms if weights is None else weights.get(path, 1.0) * norms
  return total


def shrink(params: Tree, ranks: Tree, threshold: jax.typing.ArrayLike) -> dict:
  """Lowers each rank to the number of components with importance >= threshold.

  Ranks never rise. The threshold is absolute, in units of the kernel's norm:
  components below it change K by less than about `threshold`. Sub-gradient
  steps leave vanished components hovering at a floor of order
  (learning rate * lambda)^2; a threshold below that floor never shrinks.

  Raises:
    LowRankError: concrete factors hold NaN; traced ones keep their rank.
  """
  scores = importance(params, ranks)
  for path, score in scores.items():
    if not is_traced(score) and np.any(np.isnan(score)):
      raise LowRankError(
        f"layer {path!r}: its factors hold NaN, so no rank can be read off"
        " them; go back to an earlier checkpoint"
      )
  flat = {
    path: jnp.minimum(
      # A NaN is below no threshold: its rank stays, and the loss shows it.
      jnp.sum(~(scores[path] < threshold), axis=-1, dtype=jnp.int32),
      jnp.asarray(rank, jnp.int32),
    )
    for path, rank in flatten_ranks(ranks).items()
  }
  return unflatten_ranks(flat)
