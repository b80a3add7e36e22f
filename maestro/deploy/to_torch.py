"""Turns exported networks into modules of PyTorch's."""

import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from maestro import pytorch
from maestro.deploy import artifact
from maestro.errors import UserError
from maestro.models import LinearAutoencoder, LinearMap

if TYPE_CHECKING:
  import torch  # pyright: ignore[reportMissingImports]


def to_torch(
  directory: str | os.PathLike,
  *,
  budget: str | None = None,
  profile: float | str | None = None,
) -> "torch.nn.Module":
  """Loads an exported network as a `torch.nn.Module`, in evaluation mode.

    module = maestro.to_torch("resnet_small")
    logits = module(images)  # [b, c, h, w]
    program = torch.export.export(module, (images,))

  A tree of Linear, Conv2d and BatchNorm2d with torchvision's names; a factored
  layer is a `Sequential` of two, to the rank and from it. Its outputs are those
  of `maestro.load` within rounding, and `maestro.from_torch` of its state dict
  gives the same variables. Images are [b, c, h, w], where maestro's are
  [b, h, w, c]; other inputs are the same.

  Args:
    directory: made by `python -m maestro.export`.
    budget: as for `maestro.load`.
    profile: as for `maestro.load`.

  Raises:
    UserError: PyTorch is not installed.
    ArtifactError: as `maestro.load` does.
    WeightsError: the network has no form in PyTorch.
  """
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise UserError(
      "maestro.to_torch needs PyTorch, which is not installed: pip install"
      " torch"
    ) from error
  from maestro.deploy import torch_networks

  loaded = artifact.read(directory, budget=budget, profile=profile)
  linear = isinstance(loaded.model, LinearMap | LinearAutoencoder)
  shape = loaded.config["input"]["shape"]
  if linear and len(shape) != 1:
    axes = ", ".join(["b", *map(str, shape)])
    raise pytorch.WeightsError(
      f"{type(loaded.model).__name__} on inputs [{axes}]"
      " maps their last axis alone; PyTorch's form is of inputs [b, n]"
    )
  state = pytorch.to_state_dict(
    loaded.model, loaded.variables, _example(loaded.config["input"])
  )
  tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
  for name in state:
    if name.endswith(".running_var"):
      counter = name.replace("running_var", "num_batches_tracked")
      tensors[counter] = torch.tensor(0)
  shapes = {name: x.shape for name, x in state.items()}
  with torch.device("meta"):  # nothing is drawn at random only to be replaced
    module = torch_networks.network(loaded.model, shapes)
  module.load_state_dict(tensors, assign=True)
  return module.eval()


def _example(record: dict[str, Any]) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, *record["shape"]), record["dtype"])
