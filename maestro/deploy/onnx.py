"""Writes a network with its weights as ONNX, by jax2onnx; optional."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import numpy as np

from maestro.deploy import verify
from maestro.deploy.stablehlo import reason
from maestro.errors import UserError
from maestro.introspect import mode

_REMEDY = (
  "leave --onnx out, or: pip install onnx onnx-ir onnxruntime, then pip install"
  " --no-deps jax2onnx and what it imports (it asks for an older Orbax than"
  " maestro does)"
)


class OnnxError(UserError):
  """A network cannot be written as ONNX, or its packages are missing."""


def write_sizes(
  folder: pathlib.Path,
  model: Any,
  networks: Mapping[str, Any],
  example: Any,
  tolerance: float,
) -> dict[str, dict[str, Any]]:
  """Writes model.<size>.onnx of each size, and compares it with the network.

  Args:
    folder: to write to.
    model: a Flax module that returns one array.
    networks: {name of a size: variables}.
    example: abstract value of inputs; the first axis is the batch.
    tolerance: largest relative difference of outputs.

  Returns:
    {name of a size: {"file": its name, "difference": found}}.

  Raises:
    OnnxError: see `write`.
    DifferenceError: a file gives other outputs.
  """
  outputs, record = verify.make_outputs(model, example), {}
  x = verify.make_inputs(example, model=model)
  for size, variables in networks.items():
    name = f"model.{re.sub('[^A-Za-z0-9.]+', '-', size)}.onnx"
    if (folder / name).exists():
      raise OnnxError(f"two sizes would be written to {name}; rename one")
    write(folder / name, model, variables, example)
    expected = outputs(variables)
    found = [
      verify.difference(y, run(folder / name, inputs))
      for inputs, y in ((x, expected), (x[:1], expected[:1]))
    ]
    verify.check(max(found), tolerance, name, "the exported network")
    record[size] = {"file": name, "difference": max(found)}
  return record


def check_installed() -> None:
  """Raises unless ONNX can be written and run.

  Raises:
    OnnxError: a package is missing; says which.
  """
  try:
    import jax2onnx  # pyright: ignore[reportMissingImports] # noqa: F401
    import onnxruntime  # pyright: ignore[reportMissingImports] # noqa: F401
  except ImportError as error:
    raise OnnxError(f"--onnx: {error}; {_REMEDY}") from error


def write(path: pathlib.Path, model: Any, variables: Any, example: Any) -> None:
  """Writes outputs = run(inputs) for any batch size, named "batch".

  Args:
    path: of a new file.
    model: a Flax module that returns one array.
    variables: of the model; they become constants.
    example: abstract value of inputs; the first axis is the batch.

  Raises:
    OnnxError: a package is missing, or an operation is not known to it.
  """
  check_installed()
  import jax2onnx  # pyright: ignore[reportMissingImports]

  told = mode(model, train=False)
  (batch,) = jax.export.symbolic_shape("batch")
  try:
    jax2onnx.to_onnx(
      lambda x: model.apply(variables, x, **told),
      inputs=[jax.ShapeDtypeStruct((batch, *example.shape[1:]), example.dtype)],
      model_name=type(model).__name__,
      return_mode="file",
      output_path=str(path),
    )
  except Exception as error:  # whatever a conversion may raise
    raise OnnxError(
      f"{type(model).__name__} cannot be written as ONNX:"
      f" {reason(error)}; leave --onnx out"
    ) from error


def run(path: pathlib.Path, x: np.ndarray) -> np.ndarray:
  """Runs a file on the CPU, by onnxruntime."""
  check_installed()
  import onnxruntime  # pyright: ignore[reportMissingImports]

  session = onnxruntime.InferenceSession(
    str(path), providers=["CPUExecutionProvider"]
  )
  (entry,) = session.get_inputs()
  return session.run(None, {entry.name: x})[0]
