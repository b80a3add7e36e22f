"""Where training starts from a safetensors file: an export's, or PyTorch's."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from maestro import lowrank, pytorch
from maestro.schema import ConfigError
from maestro.trees import LayerSpec, Tree

SUFFIX = ".safetensors"


def read(
  path: str, model: Any, example: Any, layers: Mapping[str, LayerSpec]
) -> tuple[Tree, Tree]:
  """Returns dense params, and batch_stats, that a file holds.

  Its names are an export's, "params/fc1/kernel" (factors with the rank axis
  first, see docs/export.md), or PyTorch's, see `maestro.from_torch`. Factors
  are multiplied out: it is their function from which training starts.

  Args:
    path: of a safetensors file.
    model: the Flax module.
    example: abstract value of an example of its input.
    layers: {path: LayerSpec} of the model.

  Raises:
    ConfigError: the file cannot be read, or its names or shapes are not the
      model's; all of them are named.
  """
  try:
    tensors = pytorch.read_file(path)
  except pytorch.WeightsError as error:  # which names the file
    raise ConfigError(f"config.init_from: {error}") from error
  try:
    if any(name.startswith("params/") for name in tensors):
      variables = _own(tensors, layers, pytorch.shapes_of(model, example))
    else:
      variables = pytorch.from_torch(tensors, model, example)
  except pytorch.WeightsError as error:
    raise ConfigError(f"config.init_from: {path}: {error}") from error
  params = lowrank.merge(variables["params"], layers)
  return params, variables.get("batch_stats", {})


def _own(
  tensors: Mapping[str, np.ndarray],
  layers: Mapping[str, LayerSpec],
  wanted: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
  """Variables of an export's tensors, or of what is laid out like them."""
  if rounded := [name for name in tensors if name.startswith("scales/")]:
    raise pytorch.WeightsError(
      f"its weights are int8, as {rounded[0]} says, which training does not"
      " start from; export without --int8"
    )
  found, sizes = {}, set()
  for name, x in tensors.items():
    parts = name.split("/", 2)
    if parts[0] == "batch_stats" and name not in wanted and len(parts) == 3:
      sizes.add(parts[1])  # statistics are of a size
      name = f"batch_stats/{parts[2]}"
    found[name] = x
  if len(sizes) > 1:
    raise pytorch.WeightsError(
      f"it holds the statistics of several sizes, {sorted(sizes)}; export the"
      " one to start from alone"
    )
  axes = {}  # where the rank axis belongs
  for path, spec in layers.items():
    base = f"params/{path}/".replace("//", "/")
    u = found.get(f"{base}u")
    if u is None or f"{base}{spec.weight}" in found:
      continue
    wanted.pop(f"{base}{spec.weight}", None)
    rank = u.shape[:1]
    wanted[f"{base}u"] = (*rank, *spec.lead, *spec.inputs)
    wanted[f"{base}v"] = (*rank, *spec.lead, *spec.outputs)
    axes |= {f"{base}u": u.ndim - 1, f"{base}v": len(spec.lead)}
  shapes = {name: x.shape for name, x in found.items()}
  if problems := pytorch.differences(shapes, wanted):
    raise pytorch.WeightsError(
      f"it does not fit this model: {'; '.join(problems)}. Give a file of the"
      " same config.model"
    )
  leaves = {
    name: jnp.asarray(np.moveaxis(x, 0, axes.get(name, 0)), jnp.float32)
    if x.ndim
    else jnp.asarray(x, jnp.float32)
    for name, x in found.items()
  }
  return traverse_util.unflatten_dict(leaves, sep="/")
