"""Trees of parameters and ranks: paths, layers, axes, kernels as matrices."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from maestro.errors import UserError

Tree = Mapping[str, Any]
Leaf = jax.Array | np.ndarray


class LowRankError(UserError):
  """A rule, a rank or a tree does not fit; names the layer and the remedy."""


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """What shapes alone cannot tell of a layer; made by `maestro.layers`.

  Attributes:
    kind: "dense", "conv", "embed", or "other" for what cannot be factored.
    stack: sizes of the scan axes before the kernel's own axes.
    groups: sizes of the axes over which independent maps are laid: (G,) for a
      grouped convolution, the batch axes of a DenseGeneral, else ().
    inputs: the input axes of one map, e.g. (in,), (kh, kw, in / G), (4, 8).
    outputs: the output axes of one map, e.g. (out,), (out / G,), (4, 8).
    positions: how often one example meets the kernel in a forward pass
      (output pixels, tokens), for one element of `stack`; of kind "other" the
      multiply-accumulates themselves.
    lookups: how many embeddings one example looks up.
    altered: whether the model changes the kernel before it multiplies by it
      (standardised or normalised weights), or multiplies by it outside of the
      layer (`x @ embed.embedding.T`), which factors cannot follow.
  """

  kind: str
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  stack: tuple[int, ...] = ()
  groups: tuple[int, ...] = ()
  positions: int = 1
  lookups: int = 0
  altered: bool = False

  @property
  def lead(self) -> tuple[int, ...]:
    """Shape of the layer's rank, and of the leading axes of its factors."""
    return self.stack + self.groups

  @property
  def n_in(self) -> int:
    return math.prod(self.inputs)

  @property
  def n_out(self) -> int:
    return math.prod(self.outputs)

  @property
  def full_rank(self) -> int:
    return min(self.n_in, self.n_out)

  def factor_shapes(self, rank: int) -> tuple[tuple, tuple]:
    """Shapes of u [*lead, *inputs, R] and v [*lead, R, *outputs]."""
    return (
      (*self.lead, *self.inputs, rank),
      (*self.lead, rank, *self.outputs),
    )

  @property
  def weight(self) -> str:
    """Name of the dense weight among the layer's parameters."""
    return "embedding" if self.kind == "embed" else "kernel"

  @property
  def kernel_shape(self) -> tuple[int, ...]:
    """Shape of the dense weight as the layer stores it."""
    if self.kind == "conv" and self.groups:
      out = self.groups[0] * self.n_out
      return (*self.stack, *self.inputs, out)
    return (*self.lead, *self.inputs, *self.outputs)


Layers = Mapping[str, LayerSpec]  # {path: LayerSpec} of a model


# ---------------------------------------------------------------------------
# Trees
# ---------------------------------------------------------------------------


def is_factored(node: Any) -> bool:
  """True if a node holds arrays u and v that fit as factors.

  A foreign layer may hold such arrays too; only `maestro.layers` tells.
  """
  if not isinstance(node, Mapping) or "u" not in node or "v" not in node:
    return False
  u, v = (getattr(node[name], "shape", None) for name in ("u", "v"))
  return bool(u and v and _fitting_leads(u, v))


def _fitting_leads(u: tuple, v: tuple) -> list[tuple[int, ...]]:
  """Leading axes with which shapes u [*lead, .., R], v [*lead, R, ..] fit."""
  return [
    u[:n]
    for n in range(min(len(u), len(v)) - 1)
    if u[:n] == v[:n] and v[n] == u[-1]
  ]


def walk(tree: Tree, path: str = "") -> Iterator[tuple[str, Tree]]:
  """Yields (path, node) of every layer that holds factors, in sorted order."""
  node = unboxed(tree)
  if is_factored(node):
    yield path, node
  for name in sorted(tree):
    if isinstance(tree[name], Mapping):
      yield from walk(tree[name], f"{path}/{name}" if path else name)


def factored(params: Tree, layers: Layers | None = None) -> dict[str, Tree]:
  """Returns {path: node} of the layers that hold factors, in sorted order.

  Args:
    params: a tree of parameters.
    layers: from `maestro.layers`; without it, what fits counts as factors, also
      the parameters u and v of a foreign module.
  """
  nodes = walk(params)
  return {p: node for p, node in nodes if layers is None or p in layers}


def get(tree: Tree, path: str) -> Any:
  """Returns the node of a nested mapping at a slash-joined path, or None."""
  node: Any = tree
  for name in path.split("/") if path else ():
    if not isinstance(node, Mapping) or name not in node:
      return None
    node = node[name]
  return node


def replace(tree: Tree, changes: Mapping[str, Tree], path: str = "") -> dict:
  """Copies a nested mapping with the nodes at some paths replaced.

  A leaf that was boxed is boxed again.
  """
  if path in changes:
    return {k: boxed(x, tree.get(k)) for k, x in changes[path].items()}
  return {
    name: replace(node, changes, f"{path}/{name}" if path else name)
    if isinstance(node, Mapping)
    else node
    for name, node in tree.items()
  }


def map_mirrored(
  tree: Any, params: Tree, edit: Callable[[Any, str | None], Any]
) -> Any:
  """Applies edit(leaf, path) to a tree that holds copies of parameters.

  A leaf mirrors a parameter if its path ends in the parameter's path and it has
  its shape; of several such parameters the one with the longest path. Fields
  and indices of the tree's own classes are no part of it: `mu` of Adam is
  another thing than a module of that name. `edit` gets the parameter's path,
  slash-joined, or None where a leaf mirrors nothing.
  """
  shapes = {
    names_of(path): jnp.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }

  def visit(path, leaf):
    own = [i for i, k in enumerate(path) if not hasattr(k, "key")]
    names = names_of(path[own[-1] + 1 if own else 0 :])
    for start in range(len(names)):
      if shapes.get(names[start:]) == jnp.shape(leaf):
        return edit(leaf, "/".join(names[start:]))
    return edit(leaf, None)

  return jax.tree_util.tree_map_with_path(visit, tree)


def names_of(path: Sequence[Any]) -> tuple[str, ...]:
  """Turns a key path into names; fields and dictionary keys alike."""
  return tuple(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    for k in path
  )


# ---------------------------------------------------------------------------
# Boxes: Flax's metadata around a parameter, such as names for its sharding
# ---------------------------------------------------------------------------


def is_boxed(x: Any) -> bool:
  return hasattr(x, "replace_boxed")


def unboxed(node: Tree) -> Tree:
  """Returns a layer's parameters without the boxes around them."""
  return {k: x.value if is_boxed(x) else x for k, x in node.items()}


def boxed(x: Any, like: Any, names: tuple | None = None) -> Any:
  """Puts an array into a box like another's, with names of its own axes."""
  if not is_boxed(like) or is_boxed(x):
    return x
  if names is not None and hasattr(like, "names"):
    return like.replace(value=x, names=names)
  return like.replace_boxed(x)


def factor_names(names: tuple, spec: LayerSpec) -> tuple[tuple, tuple]:
  """Names the axes of u and v as their kernel's; the rank axis has none."""
  n = len(spec.inputs)
  lead, rest = names[: len(spec.stack)], names[len(spec.stack) :]
  if spec.kind == "conv":
    lead = (*lead, *(None for _ in spec.groups))
  else:
    lead, rest = names[: len(spec.lead)], names[len(spec.lead) :]
  return (*lead, *rest[:n], None), (*lead, None, *rest[n:])


def kernel_names(u: tuple, v: tuple, spec: LayerSpec) -> tuple:
  """Inverts `factor_names`."""
  n = len(spec.lead)
  lead = u[: len(spec.stack)] if spec.kind == "conv" else u[:n]
  return (*lead, *u[n:-1], *v[n + 1 :])


def with_factors(node: Tree, u: Any, v: Any, spec: LayerSpec) -> dict:
  """Returns a layer's parameters with factors in place of its dense weight.

  Args:
    node: its parameters; of a boxed weight the factors get the names.
    u: [*lead, in, R].
    v: [*lead, R, out].
    spec: of the layer.
  """
  box, plain = node[spec.weight], unboxed(node)
  shape_u, shape_v = spec.factor_shapes(u.shape[-1])
  dtype = plain[spec.weight].dtype
  u = jnp.asarray(u.reshape(shape_u), dtype)
  v = jnp.asarray(v.reshape(shape_v), dtype)
  if names := getattr(box, "names", None):
    names_u, names_v = factor_names(names, spec)
    u, v = boxed(u, box, names_u), boxed(v, box, names_v)
  rest = {name: x for name, x in plain.items() if name != spec.weight}
  return rest | {"u": u, "v": v}


# ---------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------


def flatten_ranks(ranks: Tree, path: str = "") -> dict[str, Any]:
  """Turns a rank tree into {layer path: rank}, in sorted order."""
  flat = {}
  for name in sorted(ranks):
    if isinstance(ranks[name], Mapping):
      flat |= flatten_ranks(ranks[name], f"{path}/{name}" if path else name)
    elif name == "rank":
      flat[path] = ranks[name]
    else:
      raise LowRankError(
        f"rank tree: unexpected leaf {name!r} at {path!r}; the only leaves of"
        ' a rank tree are called "rank", as in {"fc": {"rank": 3}}'
      )
  return flat


def unflatten_ranks(flat: Mapping[str, Any]) -> dict:
  """Turns {layer path: rank} into a rank tree that mirrors the modules."""
  tree: dict = {}
  for path, rank in flat.items():
    node = tree
    for name in path.split("/") if path else ():
      node = node.setdefault(name, {})
    node["rank"] = rank
  return tree


def is_traced(x: Any) -> bool:
  return isinstance(x, Tracer)


def wide_dtype(dtype: Any) -> np.dtype:
  """What numbers of a type are added up in: at least single precision."""
  if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32:
    return jnp.dtype(dtype)
  return jnp.dtype(jnp.float32)


def as_written(x: float) -> Fraction:
  """The number that a float is written as: 0.29 is 29/100, not 0.28999..."""
  return Fraction(repr(float(x)))


def ratio(fraction: float) -> Fraction:
  """The ratio of integers up to 46340 that a fraction of a rank stands for.

  Exact for decimals of up to four places and for j / r of such integers; the
  product of two of them fits into an int32.
  """
  return as_written(fraction).limit_denominator(46340)


def check_rank(rank: Any, full_rank: int, path: str) -> None:
  """Raises if a concrete rank is no integer in [0, full_rank]."""
  if is_traced(rank) or isinstance(rank, jax.ShapeDtypeStruct):
    return
  values = np.asarray(rank)
  if not np.issubdtype(values.dtype, np.integer):
    raise LowRankError(
      f"layer {path!r}: rank {rank!r} is not an integer; ranks are counts"
    )
  if values.size and (values.min() < 0 or values.max() > full_rank):
    raise LowRankError(
      f"layer {path!r}: rank {values.tolist()} is outside [0, {full_rank}];"
      f" its factors hold {full_rank} components"
    )


def paired(params: Tree, ranks: Tree) -> dict[str, tuple[Tree, Any]]:
  """Pairs the factored layers that `ranks` names with their ranks."""
  layers = factored(params)
  pairs = {}
  for path, rank in flatten_ranks(ranks).items():
    if path not in layers:
      raise LowRankError(
        f"rank tree: layer {path!r} has no factors in these parameters;"
        f" factored layers are {sorted(layers) or 'none'}"
      )
    node = layers[path]
    lead = jnp.shape(rank)
    check_factors(node, lead, path)
    check_rank(rank, node["u"].shape[-1], path)
    pairs[path] = (node, rank)
  return pairs


def check_factors(node: Tree, lead: tuple[int, ...], path: str) -> None:
  u, v, n = node["u"].shape, node["v"].shape, len(lead)
  fits = u[:n] == lead and v[:n] == lead and len(v) > n + 1 and v[n] == u[-1]
  if not fits:
    raise LowRankError(
      f"layer {path!r}: factors u {u} and v {v} do not fit a rank of shape"
      f" {lead}; expected u [*{lead}, inputs, R] and v [*{lead}, R, outputs]"
    )


def find_lead(node: Tree, spec: LayerSpec | None, path: str) -> tuple[int, ...]:
  """Finds the leading axes of a layer's factors, from shapes if they tell."""
  if spec is not None:
    return spec.lead
  u, v = node["u"].shape, node["v"].shape
  candidates = _fitting_leads(u, v)
  if len(candidates) != 1:
    raise LowRankError(
      f"layer {path!r}: the shapes u {u}, v {v} do not tell which axes are"
      " stacked or grouped; pass `layers=maestro.layers(model, inputs)`"
    )
  return candidates[0]


def component_axes(x: Leaf, name: str, n_lead: int) -> tuple[int, ...]:
  """Axes of u or v that are neither leading nor the rank axis."""
  if name == "u":
    return tuple(range(n_lead, x.ndim - 1))
  return tuple(range(n_lead + 1, x.ndim))


def _live(x: Leaf, name: str, rank: Any) -> jax.Array:
  """Boolean [*lead, 1.., R] for u, [*lead, R, 1..] for v: component < rank."""
  lead = jnp.shape(rank)
  n_lead = len(lead)
  size = x.shape[-1] if name == "u" else x.shape[n_lead]
  component = jax.lax.broadcasted_iota(jnp.int32, (*lead, size), n_lead)
  live = component < jnp.asarray(rank)[..., None]
  return jnp.expand_dims(live, component_axes(x, name, n_lead))


def mask_factor(x: Leaf, name: str, rank: Any) -> jax.Array:
  """Zeroes the components of factor u or v (`name`) at or beyond `rank`."""
  return jnp.where(_live(x, name, rank), x, jnp.zeros((), x.dtype))


# ---------------------------------------------------------------------------
# Dense <-> factored
# ---------------------------------------------------------------------------


def to_matrix(kernel: jax.Array, spec: LayerSpec) -> jax.Array:
  """Reshapes a stored kernel to matrices [*lead, in, out]."""
  if spec.kind == "conv" and spec.groups:  # output channels are group-major
    shape = (*spec.stack, spec.n_in, *spec.groups, spec.n_out)
    return jnp.moveaxis(kernel.reshape(shape), -2, -3)
  return kernel.reshape((*spec.lead, spec.n_in, spec.n_out))


def to_kernel(matrix: jax.Array, spec: LayerSpec) -> jax.Array:
  """Inverts `to_matrix`."""
  if spec.kind == "conv" and spec.groups:
    matrix = jnp.moveaxis(matrix, -3, -2)
  return matrix.reshape(spec.kernel_shape)
