"""Which part of a parameter lies on which device: rules by path.

A rule names the mesh axes of a parameter's own axes. Where no rule of the
config matches, factors keep a chain of layers split over features: the inputs
of u, the outputs of v and biases on "model", never the rank axis, so that all
that devices exchange of a factored layer is [batch, rank]. Dense kernels have
their longer side on "model". What is large is split over "fsdp" too, along its
longest axis that divides.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maestro import trees
from maestro.errors import UserError
from maestro.parallel.mesh import BATCH, put, replicate
from maestro.trees import Layers, LayerSpec, Tree

AXES = (*BATCH, "model")


@dataclasses.dataclass(frozen=True)
class Rule:
  """Where the parameters that a pattern matches lie.

  Attributes:
    path: regular expression of whole paths, such as "block.*/u".
    axes: for each axis of the parameter a mesh axis, or None, from the first
      axis on; () is replicated.
  """

  path: str
  axes: Sequence[str | None] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
  """Where parameters lie on a mesh.

  Attributes:
    mesh: of the devices.
    layers: of the model.
    rules: of the config; the first that matches a path holds.
    smallest: parameters of fewer numbers are not split over "fsdp".
  """

  mesh: Mesh
  layers: Layers
  rules: Sequence[Rule] = ()
  smallest: int = 1 << 12
  _told: set[str] = dataclasses.field(default_factory=set)

  @property
  def trivial(self) -> bool:
    """Whether everything is on every device."""
    alone = self.mesh.shape["fsdp"] == self.mesh.shape["model"] == 1
    return self.mesh.size == 1 or (alone and not self.rules)

  def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns the mesh axes of the parameter at a path."""
    if self.trivial:
      return PartitionSpec()
    for rule in self.rules:
      if re.fullmatch(rule.path, path):
        return self._of_rule(rule, path, shape)
    layer, _, name = path.rpartition("/")
    spec = self.layers.get(layer)
    taken: list[tuple[str, ...]] = [() for _ in shape]
    if spec is not None and name in ("u", "v", spec.weight, "bias"):
      sides = _sides(name, spec, shape)
      # The last axis of a side is its features; those before are a window.
      for i in sorted(sides, reverse=True):
        if self._divides(shape[i], ("model",)):
          taken[i] = ("model",)
          break
    else:
      sides = range(len(shape))
    if math.prod(shape) >= self.smallest:
      fits = [i for i in sides if self._divides(shape[i], (*taken[i], "fsdp"))]
      if fits:
        longest = max(fits, key=lambda i: shape[i])
        taken[longest] += ("fsdp",)
      else:
        self._tell(path, shape, "fsdp")
    return PartitionSpec(*(self._live(axes) for axes in taken))

  def shardings(self, tree: Any, params: Tree) -> Any:
    """Returns shardings of a tree, in which copies lie as their parameters.

    Args:
      tree: a training state, an optimizer's, variables or parameters.
      params: those that it holds; what mirrors none of them is replicated.
    """

    def sharding(leaf, path):
      spec = self.spec(path, jnp.shape(leaf)) if path else PartitionSpec()
      return NamedSharding(self.mesh, spec)

    return trees.map_mirrored(tree, params, sharding)

  def put(self, tree: Any, params: Tree) -> Any:
    """Puts a tree where it belongs, see `shardings`."""
    return put(tree, self.shardings(tree, params))

  def whole(self, tree: Any) -> Any:
    """Gives every process all of a tree, for what is computed on hosts."""
    if self.trivial or jax.process_count() == 1:
      return tree
    return replicate(tree, self.mesh)

  def constrain(self, tree: Any, params: Tree) -> Any:
    """Keeps a tree where it belongs, within jit."""
    if self.trivial:
      return tree
    return jax.lax.with_sharding_constraint(tree, self.shardings(tree, params))

  def gathered(self, params: Tree) -> Any:
    """Gathers what is split as the batch is, within jit, for a forward pass.

    What a device then sends are parameters, once, and their gradients: the
    compiler would else be free to split the activations instead.
    """
    if self.trivial:
      return params

    def whole(sharding):
      axes = [
        tuple(n for n in _names(axis) if n not in BATCH) or None
        for axis in sharding.spec
      ]
      return NamedSharding(self.mesh, PartitionSpec(*axes))

    shardings = jax.tree.map(whole, self.shardings(params, params))
    return jax.lax.with_sharding_constraint(params, shardings)

  def check(self, params: Tree) -> None:
    """Checks the rules of the config against dense parameters.

    Raises:
      UserError: a rule matches nothing, neither as factors, or does not fit.
    """
    paths = {
      "/".join(trees.names_of(path)): len(jnp.shape(x))
      for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    for path, spec in self.layers.items():
      if spec.kind != "other":
        u, v = spec.factor_shapes(1)
        inside = f"{path}/" if path else ""
        paths |= {f"{inside}u": len(u), f"{inside}v": len(v)}
    for i, rule in enumerate(self.rules):
      where = f"config.placement[{i}]"
      try:
        found = [p for p in paths if re.fullmatch(rule.path, p)]
      except re.error as error:
        raise UserError(
          f"{where}.path: {rule.path!r} is no regular expression: {error}"
        ) from error
      if not found:
        raise UserError(
          f"{where}.path: {rule.path!r} matches no parameter, such as"
          f" {', '.join(map(repr, sorted(paths)[:4]))}"
        )
      known = [name for name in rule.axes if name is not None]
      if set(known) - set(AXES) or len(known) != len(set(known)):
        raise UserError(
          f"{where}.axes: {tuple(rule.axes)}; use each of {AXES} once at most,"
          " and None"
        )
      for path in found:
        if paths[path] < len(rule.axes):
          raise UserError(
            f"{where}.axes: {tuple(rule.axes)} are {len(rule.axes)}, but"
            f" {path!r} has {paths[path]} axes"
          )

  def _of_rule(
    self, rule: Rule, path: str, shape: tuple[int, ...]
  ) -> PartitionSpec:
    axes = []
    for name, size in zip(rule.axes, shape, strict=False):
      if name is not None and not self._divides(size, (name,)):
        self._tell(path, shape, name)
        return PartitionSpec()
      axes.append(name)
    return PartitionSpec(*axes)

  def _divides(self, size: int, names: Sequence[str]) -> bool:
    return size > 0 and size % math.prod(self.mesh.shape[n] for n in names) == 0

  def _live(self, names: tuple[str, ...]) -> tuple[str, ...] | None:
    return tuple(n for n in names if self.mesh.shape[n] > 1) or None

  def _tell(self, path: str, shape: tuple[int, ...], name: str) -> None:
    n = self.mesh.shape[name]
    if n > 1 and path not in self._told:
      self._told.add(path)
      print(
        f"config.mesh: {path} {shape} cannot be divided by {n} over {name!r};"
        " every device has all of it"
      )


def _names(axis: str | Sequence[str] | None) -> Sequence[str]:
  return () if axis is None else (axis,) if isinstance(axis, str) else axis


def _sides(name: str, spec: LayerSpec, shape: tuple[int, ...]) -> range:
  """The axes of a weight that may be split: not rank, stack, nor groups."""
  last, n_lead = len(shape), len(spec.lead)
  if name == "u":
    return range(n_lead, last - 1)
  if name == "v":
    return range(n_lead + 1, last)
  if name == "bias":
    return range(len(spec.stack), last)
  first = len(spec.stack) if spec.kind == "conv" else n_lead
  middle = last - len(spec.outputs)
  inputs, outputs = range(first, middle), range(middle, last)
  n_in = spec.inputs[-1] if spec.kind == "conv" else spec.n_in
  return outputs if spec.n_out >= n_in else inputs
