"""The directory of an exported model: what is in it, and how it is loaded.

  model.safetensors  params and statistics; factors with the rank axis first
  config.json        what they are, and the sha256 of every other file
  slices.json        which rows of the weights are which size
  README.md          what they are, for people
  model.stablehlo    optional: the network with its weights, for `jax.export`

The weights may hold several sizes of one network, its profiles; loading one of
them reads what it needs (`maestro.deploy.packing`). Every byte that is read is
verified.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.export
from flax import traverse_util

from maestro import introspect as nn
from maestro.cost.budget import COSTS, Budget
from maestro.cost.count import count_cost
from maestro.deploy import files as safetensors_io
from maestro.deploy import packing, remote, slices
from maestro.deploy.directory import (
  CONFIG,
  FORMAT,
  FORMAT_VERSION,
  READABLE,
  STABLEHLO,
  WEIGHTS,
  ArtifactError,
  file_sha256,
  is_ours,
  is_url,
  local,
  sha256,
)
from maestro.deploy.directory import check_target as check_target
from maestro.deploy.directory import new_directory as new_directory
from maestro.deploy.directory import write_config as write_config
from maestro.errors import UserError
from maestro.models import MODELS
from maestro.runs import workdir as workdir_lib
from maestro.trees import LayerSpec

_REMEDY = "restore it, or export again"


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A network read from an exported directory.

  Attributes:
    model: a Flax module.
    variables: {"params": ...} and, where it has them, {"batch_stats": ...}.
    profile: its entry in config.json.
    config: the whole config.json.
    bytes_read: of model.safetensors.
    file_bytes: size of model.safetensors.
    bytes_received: from a server, config.json included; the rest was cached.
  """

  model: Any
  variables: dict[str, Any]
  profile: dict[str, Any]
  config: dict[str, Any]
  bytes_read: int
  file_bytes: int
  bytes_received: int = 0


def load(
  directory: str | os.PathLike,
  *,
  model: Any = None,
  budget: str | None = None,
  profile: float | str | None = None,
) -> tuple[Any, dict[str, Any]]:
  """Loads an exported network: model.apply(variables, x).

  Args:
    directory: made by `python -m maestro.export` or `maestro.export_model`; or
      the URL of one by the former, https://, http:// or
      hf://org/name[@revision][/folder]: only the bytes that the size needs are
      asked for, and kept (`maestro.deploy.remote`).
    model: the Flax module, for an architecture that maestro does not have;
      of `maestro.export_model`, None is what runs the exported function.
    budget: "macs:0.4", "params:0.4" or "bytes:0.4", a fraction of the dense
      network: the largest profile within it.
    profile: the name of a profile, e.g. 0.4. Without both, the largest.

  Returns:
    The model, and {"params": ..., "batch_stats": ...}; the latter only if it
    normalises by them.

  Raises:
    ArtifactError: a file is missing, altered or not ours; the file holds no
      such profile; or the model is unknown or another one. Or a server does not
      send what it is asked for.
  """
  if not is_url(directory):
    folder = pathlib.Path(directory)
    config = read_config(folder)
    if "function" in config:  # of `maestro.export_model`
      from maestro.deploy import functions  # which is made of this

      with _fields(folder):
        _choose(config, budget, profile, folder)
        return functions.load(folder, model)
  loaded = read(directory, model=model, budget=budget, profile=profile)
  return loaded.model, loaded.variables


def read(
  directory: str | os.PathLike,
  *,
  model: Any = None,
  budget: str | None = None,
  profile: float | str | None = None,
) -> Loaded:
  """Loads as `load` does, and says what was read.

  Raises:
    ArtifactError: as `load` does; or `maestro.export_model` made it.
  """
  server = remote.Remote(str(directory)) if is_url(directory) else None
  place = server or pathlib.Path(directory)
  config = read_config(place)
  if "function" in config:
    raise ArtifactError(
      f"{place} was made by maestro.export_model: it holds a function, not a"
      " network of Flax's. maestro.load reads it, from a local directory;"
      " download it first if it is on a server"
    )
  with _fields(place):
    chosen = _choose(config, budget, profile, place)
    ours = model is None
    if ours:
      model = _make_model(config["model"])
    example = jax.ShapeDtypeStruct(
      (1, *config["input"]["shape"]), config["input"]["dtype"]
    )
    path, file = place / WEIGHTS, server and server.weights(config)
    try:
      with safetensors_io.Reader(path, file) as reader:
        _check_header(reader, config, path)
        blocks = config["tensors"]
        # What a config asks for must not take longer than what there is.
        most = 100 + 10 * len(blocks) if ours else math.inf
        expected, layers = _shapes(
          model, example, config["model"]["name"], most
        )
        shapes = packing.shapes(reader, blocks, chosen, layers)
        _check_fit(shapes, expected, layers, blocks, path)
        if file:
          file.prefetch([*packing.wanted(reader, blocks, chosen, layers)])
        params, batch_stats = packing.unpack(reader, blocks, chosen, layers)
    except packing.PackingError as error:
      raise ArtifactError(
        f"{path}: {error}; restore the file, or pass as model= the module that"
        " was exported"
      ) from error
    variables = packing.assemble(params, batch_stats, chosen, layers)
    counted = count_cost(layers, variables["params"])
    forms = {layer.path: layer.form for layer in counted.layers}
    found = {kind: getattr(counted, kind) for kind in COSTS} | {"forms": forms}
    for key, value in found.items():
      if chosen[key] != value:
        raise ArtifactError(
          f"{place / CONFIG} is altered: {key} of profile"
          f" {chosen['name']!r} is {chosen[key]} there and {value} by the"
          f" weights; {_REMEDY}"
        )
    size = config["files"][WEIGHTS]["size"]
  received = server.received if server else 0
  return Loaded(
    model, variables, chosen, config, reader.bytes_read, size, received
  )


def read_config(directory: pathlib.Path | remote.Remote) -> dict[str, Any]:
  """Reads config.json; checks that all files are there, with their sizes.

  Of a folder on a server only the config itself is checked.
  """
  path = directory / CONFIG
  if isinstance(directory, remote.Remote):
    read = functools.partial(_read_json, path, directory.read_config())
  else:
    read = functools.partial(_read_json, path)
    if not os.path.lexists(path):
      raise ArtifactError(
        f"cannot read {path}, which is not there; give a directory made by"
        " python -m maestro.export"
      )
    _check_regular(directory / CONFIG)
  config = read()
  if config.get("format") != FORMAT:
    raise ArtifactError(
      f"{directory} is no directory made by python -m maestro.export: its"
      f' {CONFIG} has no "format": "{FORMAT}"'
    )
  version = config.get("format_version")
  if version not in READABLE:
    raise ArtifactError(
      f"{path}: format version {version!r} is unknown, this maestro reads"
      f" {FORMAT_VERSION}; use the version of maestro that made it"
      f" ({config.get('source', {}).get('maestro', 'not recorded')})"
    )
  if version > 1:
    read(keys={"sha256": str})  # it may not be left out either
  with _fields(directory):
    if WEIGHTS not in config["files"]:
      raise ArtifactError(f"{path} lists no {WEIGHTS}; {_REMEDY}")
    for name, file in config["files"].items():
      if not is_ours(name):
        raise ArtifactError(
          f"{path} lists {name!r}, which is no file of an export; {_REMEDY}"
        )
      if isinstance(directory, pathlib.Path):
        _check_size(directory / name, file["size"])
    if isinstance(directory, pathlib.Path):
      slices.check(directory, config)
  return config


def _check_size(path: pathlib.Path, expected: int) -> None:
  _check_regular(path)
  size = path.stat().st_size
  if size != expected:
    raise ArtifactError(
      f"{path} is altered: {size} bytes, {expected} when it was written;"
      f" {_REMEDY}"
    )


def _read_json(path: Any, data: Any = None, **checks: Any) -> dict[str, Any]:
  try:
    if data is not None:
      return workdir_lib.parse_json(data, path, remedy=_REMEDY, **checks)
    return workdir_lib.read_json(path, remedy=_REMEDY, **checks)
  except workdir_lib.WorkdirError as error:
    raise ArtifactError(str(error)) from error


def _check_regular(path: pathlib.Path) -> None:
  """Raises unless a path is a file itself: no link, pipe or directory."""
  if not os.path.lexists(path):
    raise ArtifactError(f"{path} is missing; {_REMEDY}")
  if not stat.S_ISREG(path.lstat().st_mode):
    raise ArtifactError(f"{path} is no regular file; {_REMEDY}")


def load_stablehlo(directory: str | os.PathLike) -> Callable[[Any], jax.Array]:
  """Loads the StableHLO of an exported directory: outputs = call(inputs).

  Raises:
    ArtifactError: it is missing or altered, and nothing of it is run then; or
      the directory is a URL.
  """
  directory = local(directory, "the StableHLO")
  config = read_config(directory)
  if STABLEHLO not in config["files"]:
    raise ArtifactError(
      f"{directory} was exported without {STABLEHLO}; export it again without"
      " --nostablehlo"
    )
  data = (directory / STABLEHLO).read_bytes()
  if sha256(data) != config["files"][STABLEHLO]["sha256"]:
    raise ArtifactError(f"{directory / STABLEHLO} is altered; {_REMEDY}")
  return jax.export.deserialize(bytearray(data)).call


def verify(directory: str | os.PathLike) -> dict[str, Any]:
  """Checks the sha256 of every file, read or not by `load`.

  Returns:
    The content of config.json.

  Raises:
    ArtifactError: a file is missing or altered, or the directory is a URL.
  """
  directory = local(directory, "verifying the files")
  config = read_config(directory)
  for name, file in config["files"].items():
    if file_sha256(directory / name) != file["sha256"]:
      raise ArtifactError(
        f"{directory / name} is altered: its sha256 is not the one in {CONFIG};"
        " restore it, or export again"
      )
  return config


@contextlib.contextmanager
def _fields(directory: pathlib.Path | remote.Remote) -> Iterator[None]:
  """Turns what a mangled config.json causes into one line."""
  try:
    yield
  except UserError:
    raise
  except (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
  ) as error:
    raise ArtifactError(
      f"{directory / CONFIG} is broken ({type(error).__name__}: {error});"
      " restore it, or export again"
    ) from error


def _choose(config, budget, profile, directory) -> dict[str, Any]:
  """Finds the profile that is asked for; the largest comes first."""
  profiles = config["profiles"]
  names = [p["name"] for p in profiles]
  if budget is not None and profile is not None:
    raise ArtifactError("load: give `budget` or `profile`, not both")
  if profile is not None:
    for p in profiles:
      if _same_name(p["name"], profile):
        return p
    raise ArtifactError(
      f"{directory} holds no profile {str(profile)!r}; it holds {names}"
    )
  if budget is None:
    return profiles[0]
  wanted = Budget.parse(budget)
  kind = wanted.kind
  if kind not in COSTS:
    raise ArtifactError(
      f"budget {budget!r}: load knows what profiles cost in {', '.join(COSTS)},"
      " not how fast they are here; measure them and give `profile`"
    )
  dense = config["dense"][kind]
  fitting = [p for p in profiles if p[kind] <= wanted.limit(dense)]
  if not fitting:
    least = min(p[kind] for p in profiles) / dense
    raise ArtifactError(
      f"budget {budget!r}: {directory} holds no profile that small; the"
      f" smallest of {names} is {kind}:{math.ceil(1e4 * least) / 1e4:g}"
    )
  return max(fitting, key=lambda p: p[kind])


def _same_name(name: str, wanted: float | str) -> bool:
  try:
    return name == str(wanted) or float(name) == float(wanted)
  except ValueError:
    return False


def _make_model(record: Mapping[str, Any]) -> Any:
  name, options = record["name"], record["options"]
  if name not in MODELS or options is None:
    raise ArtifactError(
      f"the architecture {name!r} is not one of this maestro's"
      f" ({', '.join(MODELS)}); pass model=, the Flax module that was exported"
    )
  options = {k: _as_tuple(v) for k, v in options.items()}
  try:
    return MODELS[name](**options)
  except TypeError as error:
    raise ArtifactError(
      f"this maestro's {name!r} does not take the options {options} ({error});"
      " use the version of maestro that made the export, or pass model="
    ) from error


def _as_tuple(value: Any) -> Any:
  """Lists, as JSON has them, to tuples, which can be hashed."""
  return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _shapes(model, example, name, most) -> tuple[dict, dict[str, LayerSpec]]:
  """{"params/..." or "batch_stats/...": shape} of the dense model; layers."""
  try:
    init = functools.partial(model.init, **nn.mode(model, train=False))
    with nn.at_most(most):
      expected = jax.eval_shape(init, jax.random.key(0), example)
    layers = nn.layers(model, example, **nn.mode(model, train=False))
  except Exception as error:  # a module of the user's may raise anything
    raise ArtifactError(
      f"model= is not the exported {name!r}: it does not run on inputs of shape"
      f" {example.shape}: {str(error).strip().splitlines()[0]}"
    ) from error
  flat: dict[str, Any] = traverse_util.flatten_dict(expected, sep="/")
  return {path: x.shape for path, x in flat.items()}, layers


def _check_header(reader: safetensors_io.Reader, config, path) -> None:
  """The header says how bytes become arrays, so it must be the one written."""
  told = reader.metadata  # before version 3, "format" was this format
  if FORMAT not in (told.get("maestro"), told.get("format")):
    raise ArtifactError(
      f"{path} is a foreign safetensors file, not written by maestro.export;"
      " restore the file, or export again"
    )
  if sha256(reader.header) != config["header_sha256"]:
    raise ArtifactError(
      f"{path} is altered: its header is not the one that {CONFIG} describes;"
      " restore the file, or export again"
    )
  if reader.shapes.keys() != config["tensors"].keys():
    raise ArtifactError(
      f"{path} does not hold the tensors that {CONFIG} lists; {_REMEDY}"
    )


def _check_fit(shapes, expected, layers, blocks, path) -> None:
  """Raises unless the arrays to be read are the model's, in any form."""
  wanted = dict(expected)
  for name in shapes:
    base, _, leaf = name.rpartition("/")
    if leaf != "u" or "rows" not in blocks.get(name, ()):
      continue
    spec = layers[base.removeprefix("params").removeprefix("/")]
    rank, base = shapes[name][-1], f"{base}/"
    if base + spec.weight not in shapes:
      wanted.pop(base + spec.weight, None)
    wanted[base + "u"] = (*spec.lead, *spec.inputs, rank)
    wanted[base + "v"] = (*spec.lead, rank, *spec.outputs)
  for name in sorted(shapes.keys() | wanted.keys()):
    if shapes.get(name) != wanted.get(name):
      raise ArtifactError(
        f"{path} does not fit the model: {name!r} has shape"
        f" {shapes.get(name, 'none')} there and {wanted.get(name, 'none')} in"
        " the model; pass as model= the module that was exported"
      )
