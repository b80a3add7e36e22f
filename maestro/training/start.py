"""Where training starts: random parameters, or those of another run."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maestro import lowrank, streams, trees
from maestro.runs import checkpoint
from maestro.schema import ConfigError
from maestro.trees import LayerSpec, Tree


def random(seed: int, model: Any, example) -> tuple[Tree, Tree]:
  """Returns random dense params, and batch_stats, of the run's seed."""
  key = streams.stream(seed, "initial")
  inputs = jnp.zeros(example.shape, example.dtype)
  variables = jax.jit(model.init)(key, inputs)
  return variables["params"], variables.get("batch_stats", {})


def trained(
  workdir: str, layers: Mapping[str, LayerSpec], wanted: Tree
) -> tuple[Tree, Tree]:
  """Returns dense params, and batch_stats, of another run: its function."""
  source = pathlib.Path(workdir)
  if not (source / "checkpoints").is_dir():
    raise ConfigError(
      f"config.init_from: {source} is no workdir of a run (it has no"
      " checkpoints/)"
    )
  params, stats, ranks, _ = checkpoint.load_params(source / "checkpoints")
  params = jax.tree.map(jnp.asarray, params)
  for path, (node, _) in trees.paired(params, ranks).items():
    found, spec = (node["u"].shape, node["v"].shape), layers.get(path)
    fits = "absent" if spec is None else spec.factor_shapes(found[0][-1])
    if found != fits:
      raise ConfigError(
        f"config.init_from: {source} does not fit this model: layer {path!r}"
        f" has factors {found} there and {fits} here"
      )
  params = lowrank.merge(lowrank.truncate(params, ranks), layers)
  found, fits = _shapes(params), _shapes(wanted)
  for path in sorted(found.keys() | fits.keys()):
    if found.get(path) != fits.get(path):
      raise ConfigError(
        f"config.init_from: {source} does not fit this model: parameter"
        f" {path!r} is {found.get(path, 'absent')} there and"
        f" {fits.get(path, 'absent')} here"
      )
  return params, stats


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
  keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {keystr(path): jnp.shape(leaf) for path, leaf in leaves}
