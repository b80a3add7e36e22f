"""Exports any function of parameters, without a run: pytrees in and out.

  maestro.export_model(model_apply, params, ranks, layers, (x, y), out="small")
  model, variables = maestro.load("small")
  outputs = model.apply(variables, x, y)

The directory is that of `maestro.deploy.artifact`, with one size. Its StableHLO
takes the parameters, so that what is loaded runs without the code that made it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import numpy as np
from flax import traverse_util
from flax.core import meta
from flax.errors import ScopeParamNotFoundError

import maestro
from maestro import lowrank, ops, trees
from maestro.cost.budget import COSTS
from maestro.cost.count import Cost, count_cost
from maestro.deploy import artifact, verify
from maestro.deploy import files as safetensors_io
from maestro.deploy.directory import (
  FORMAT,
  FORMAT_VERSION,
  METADATA,
  STABLEHLO,
  WEIGHTS,
)
from maestro.deploy.stablehlo import PLATFORMS, reason
from maestro.errors import UserError
from maestro.ops import cpu
from maestro.runs.provenance import git_commit

_REMEDY = "any_batch=False exports the sizes of the example alone"


class FunctionError(UserError):
  """A function cannot be exported, or is not called as it was exported."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedFunction:
  """What `maestro.load` returns of such an export in the place of a module.

  Attributes:
    call: outputs = call(params, *args, **kwargs), of StableHLO.
    inputs: the types that it takes after the parameters, as text.
  """

  call: Callable[..., Any]
  inputs: str

  def apply(
    self, variables: Mapping[str, Any], *args: Any, **kwargs: Any
  ) -> Any:
    """Computes the outputs for {"params": ...}.

    Raises:
      FunctionError: the arguments are not of the types that were exported.
    """
    try:
      return self.call(variables["params"], *args, **kwargs)
    except (TypeError, ValueError) as error:
      raise FunctionError(
        f"an exported function of {self.inputs}: {str(error).strip()}"
      ) from error


def export_model(
  apply: Callable[..., Any],
  params: trees.Tree,
  ranks: trees.Tree,
  layers: trees.Layers,
  example: tuple[Any, ...],
  keywords: Mapping[str, Any] | None = None,
  *,
  out: str | os.PathLike,
  any_batch: bool = True,
  tolerance: float = 1e-4,
) -> dict[str, Any]:
  """Writes what `extract` makes of a model to a directory of its own.

  Args:
    apply: outputs = apply(params, *example, **keywords), pytrees of arrays;
      what else it needs, as batch statistics or train=False, it knows:
      `lambda p, x: model.apply({"params": p, "batch_stats": s}, x)`.
    params: factored parameters.
    ranks: rank tree, concrete.
    layers: from `maestro.layers`.
    example: the arguments after the parameters; arrays, or abstract ones in
      whose place random numbers are tried, of integers those that all tables
      among the layers have.
    keywords: those by keyword.
    out: directory to make; an earlier export there is replaced.
    any_batch: whether the first axis of the first array, and of all others of
      the same size, is a batch, of any size later; config.json says which, as
      float32[n, 4]. Where another array has that size by chance, as the raw key
      uint32[2] beside 2 examples, give an example of another size.
    tolerance: the largest relative difference to the masked network.

  Returns:
    The content of config.json.

  Raises:
    FunctionError: an argument is no array or a random key, `apply` does not
      run on factors, or it cannot be lowered.
    DifferenceError: what was exported differs by more than the tolerance.
    ArtifactError: the directory is something else, or cannot be written.
    LowRankError: ranks do not fit the parameters.
  """
  out = pathlib.Path(out).absolute()
  artifact.check_target(out)
  given = (tuple(example), dict(keywords or {}))
  args, kwargs = jax.tree.map_with_path(
    lambda path, x: _concrete(path, x, layers), given
  )
  params, ranks = meta.unbox(params), jax.device_get(ranks)
  extract = jax.jit(lambda p: lowrank.extract(p, ranks, layers))
  small = jax.device_get(extract(params))
  flat: dict[str, Any] = traverse_util.flatten_dict(small, sep="/")
  small = traverse_util.unflatten_dict(flat, sep="/")  # as it will be loaded

  @ops.jit_precise
  def run(params):
    return apply(params, *args, **kwargs)

  def outputs(params):
    try:
      with jax.default_matmul_precision("highest"):
        return jax.device_get(run(params))
    except ScopeParamNotFoundError as error:
      raise FunctionError(
        "`apply` does not run on factors; give that of a model of maestro.nn,"
        f" or of maestro.factored(model): {error}"
      ) from error

  found = outputs(small)
  difference = {
    "masked": verify.difference(outputs(lowrank.mask(params, ranks)), found)
  }
  what = "the extracted network"
  verify.check(difference["masked"], tolerance, what, "the masked one")
  function = _lower(apply, small, args, kwargs, any_batch)
  loose = tolerance  # products of accelerators are in less than float32
  if jax.default_backend() != "cpu":
    loose = max(tolerance, 3e-2)
  again = jax.device_get(function.call(small, *args, **kwargs))
  difference["stablehlo"] = verify.difference(found, again)
  verify.check(difference["stablehlo"], loose, STABLEHLO, what)
  if any_batch:
    _check_another_batch(apply, function, small, args, kwargs, loose)
  cost = count_cost(layers, small)
  dense = jax.eval_shape(lambda p: lowrank.merge(p, layers), params)
  record = {
    "name": "own",
    "ranks": {
      path: np.asarray(rank).tolist()
      for path, rank in trees.flatten_ranks(ranks).items()
    },
    "forms": {layer.path: layer.form for layer in cost.layers},
    "difference": difference,
    **_totals(cost),
  }
  with artifact.new_directory(out) as new:
    config = {
      "format": FORMAT,
      "format_version": FORMAT_VERSION,
      "function": {
        "inputs": _described(args, kwargs, any_batch),
        "any_batch": any_batch,
      },
      "source": {"git": git_commit(), "maestro": maestro.__version__},
      "dense": _totals(count_cost(layers, dense)),
      "profiles": [record],
      "stablehlo": {
        "jax": jax.__version__,
        "minimum_jax": jax.__version__,
        "platforms": list(function.platforms),
      },
    }
    tensors = {f"params/{path}": x for path, x in flat.items()}
    safetensors_io.write(new / WEIGHTS, tensors, METADATA)
    with (new / STABLEHLO).open("xb") as file:
      file.write(function.serialize())
      file.flush()
      os.fsync(file.fileno())
    artifact.write_config(new, config)
  return config


def _totals(cost: Cost) -> dict[str, int]:
  return {kind: getattr(cost, kind) for kind in COSTS}


def _concrete(path: Any, x: Any, layers: trees.Layers) -> Any:
  """An argument itself, or random numbers of its type."""
  where = f"example{jax.tree_util.keystr(path)}"
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise FunctionError(
      f"{where}: {x!r} is no array; what does not change from call to call"
      " belongs into `apply`"
    )
  if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
    raise FunctionError(
      f"{where}: a random key ({x.dtype}) is no array that can be stored; let"
      " `apply` hold it, or take jax.random.key_data of it and wrap that by"
      " jax.random.wrap_key_data"
    )
  if not isinstance(x, jax.ShapeDtypeStruct):
    return x
  if not x.shape:
    return np.ones((), x.dtype)
  return verify.make_inputs(x, x.shape[0], specs=layers)


def _described(args: tuple, kwargs: dict, any_batch: bool) -> str:
  """The types of arguments as text, as float32[n, 4] of n examples."""

  def describe(x, batched):
    sizes = ["n", *x.shape[1:]] if any_batch and batched else x.shape
    return f"{np.dtype(x.dtype)}[{', '.join(map(str, sizes))}]"

  given = (args, kwargs)
  types = jax.tree.map(describe, given, _batched(given))
  words = [*map(str, types[0]), *(f"{k}={v}" for k, v in types[1].items())]
  return ", ".join(words).replace("'", "")


def _lower(
  apply: Callable, params: Any, args: tuple, kwargs: dict, any_batch: bool
) -> jax.export.Exported:
  """Lowers outputs = apply(params, *args, **kwargs) for all platforms."""
  (n,) = jax.export.symbolic_shape("n")

  def abstract(x, batched):
    shape = (n, *x.shape[1:]) if any_batch and batched else x.shape
    return jax.ShapeDtypeStruct(shape, x.dtype)

  given = (args, kwargs)
  types = jax.tree.map(abstract, given, _batched(given))
  try:
    with cpu.portable():
      exported = jax.export.export(jax.jit(apply), platforms=PLATFORMS)(
        params, *types[0], **types[1]
      )
    exported.serialize()  # raises for trees that only Python knows
  except Exception as error:  # whatever a lowering may raise
    batch = " and any batch size" if any_batch else ""
    remedy = f"{_REMEDY}; " if any_batch else ""
    raise FunctionError(
      f"`apply` cannot be lowered for {', '.join(PLATFORMS)}{batch}:"
      f" {reason(error)}; {remedy}inputs and outputs are"
      " arrays in dicts, lists and tuples"
    ) from error
  return exported


def _batched(tree: Any) -> Any:
  """For each array, whether axis 0 is a batch: of the size of the first's."""
  sizes = [x.shape[0] for x in jax.tree.leaves(tree) if x.shape]
  return jax.tree.map(lambda x: bool(x.shape) and x.shape[0] == sizes[0], tree)


def _check_another_batch(
  apply: Callable,
  function: jax.export.Exported,
  params: Any,
  args: tuple,
  kwargs: dict,
  tolerance: float,
) -> None:
  """Raises unless one more example gives what `apply` gives."""

  def grow(x, batched):
    return jax.numpy.concatenate([x, x[:1]]) if batched else x

  given = (args, kwargs)
  args, kwargs = jax.tree.map(grow, given, _batched(given))
  try:
    with jax.default_matmul_precision("highest"):
      wanted = jax.device_get(ops.jit_precise(apply)(params, *args, **kwargs))
    found = jax.device_get(function.call(params, *args, **kwargs))
  except Exception as error:  # a function of the user's may raise anything
    raise FunctionError(
      f"`apply` does not take another batch size than that of the example:"
      f" {str(error).strip().splitlines()[0]}; {_REMEDY}"
    ) from error
  difference = verify.difference(wanted, found)
  verify.check(difference, tolerance, STABLEHLO, "another batch size's outputs")


def load(directory: pathlib.Path, model: Any = None) -> tuple[Any, dict]:
  """Loads a directory that `export_model` made, every file verified.

  Args:
    directory: whose config has a "function".
    model: returned as it is; None returns an `ExportedFunction`.

  Raises:
    ArtifactError: a file is missing or altered.
  """
  config = artifact.verify(directory)
  with safetensors_io.Reader(directory / WEIGHTS) as reader:
    flat = {name: reader.read(name) for name in reader.shapes}
  variables = traverse_util.unflatten_dict(flat, sep="/")
  variables = jax.tree.map(jax.numpy.asarray, variables)
  if model is None:
    call = artifact.load_stablehlo(directory)
    model = ExportedFunction(call, config["function"]["inputs"])
  return model, variables
