"""Writes a network with its weights as StableHLO, and reads it back."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.export

from maestro.errors import UserError
from maestro.introspect import mode
from maestro.ops import cpu

PLATFORMS = ("cpu", "cuda", "tpu")


class StableHloError(UserError):
  """A network cannot be lowered for all platforms and batch sizes."""


def write(
  path: pathlib.Path, model: Any, variables: Any, example: Any
) -> dict[str, Any]:
  """Writes outputs = call(inputs), for any batch size, on any of `PLATFORMS`.

  Args:
    path: of a new file.
    model: a Flax module.
    variables: of the model; they become constants.
    example: abstract value of inputs; the first axis is the batch.

  Returns:
    Which JAX made it, which it needs, and the platforms.

  Raises:
    StableHloError: the network cannot be lowered so.
  """
  (n,) = jax.export.symbolic_shape("n")
  x = jax.ShapeDtypeStruct((n, *example.shape[1:]), example.dtype)
  told = mode(model, train=False)
  forward = jax.jit(lambda x: model.apply(variables, x, **told))
  try:
    with cpu.portable():
      exported = jax.export.export(forward, platforms=PLATFORMS)(x)
    data = exported.serialize()
  except Exception as error:  # whatever a lowering may raise
    raise StableHloError(
      f"the network cannot be lowered for {', '.join(PLATFORMS)} and any batch"
      f" size: {reason(error)}; leave {path.name} out by --nostablehlo"
    ) from error
  with path.open("xb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  return {
    "jax": jax.__version__,
    "minimum_jax": jax.__version__,  # newer ones read what older ones wrote
    "calling_convention": exported.calling_convention_version,
    "platforms": list(exported.platforms),
  }


def read(path: str | os.PathLike) -> Callable[[Any], jax.Array]:
  """Returns call(inputs) -> outputs of a file that `write` made."""
  data = bytearray(pathlib.Path(path).read_bytes())
  return jax.export.deserialize(data).call


def reason(error: Exception) -> str:
  """What a lowering raised, in a line, and what that means of any batch."""
  why = str(error).strip().splitlines()[0]
  if "_DimExpr" in why and isinstance(error, TypeError):
    why += " (of a batch of any size, x.shape[0] is known, but not len(x))"
  return why
