"""slices.json: which rows of the one weights file are which size, at what cost.

For runtimes that cut a size themselves: a list of sizes next to one nested
file. A tensor that `rows` of a size names is cut to so many rows of its first
axis, the rank; every other one is taken whole, but for the statistics of other
sizes. Where a tensor `scales/<name>` is there, `<name>` holds int8 to be
multiplied by it.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from maestro.cost.budget import COSTS
from maestro.deploy.directory import (
  CONFIG,
  SLICES,
  WEIGHTS,
  ArtifactError,
  file_sha256,
  local,
)
from maestro.runs import workdir as workdir_lib
from maestro.trees import LayerSpec

FORMAT = "maestro-slices"
FORMAT_VERSION = 1
_REMEDY = "restore it, or export again"


def describe(
  config: Mapping[str, Any], layers: Mapping[str, LayerSpec]
) -> dict[str, Any]:
  """Returns the content of slices.json.

  Args:
    config: the content of config.json, measured and evaluated.
    layers: {path: LayerSpec} of the model.

  Returns:
    {"weights": file name, "header_sha256": of its first bytes,
    "layers": {path: {"kind", "lead", "inputs", "outputs"}},
    "dense": cost of the network without factors,
    "sizes": [...], the largest first, each with its name, ranks {path: rank},
    rows {tensor: rows}, forms {path: "dense" or "factored", whichever holds
    fewer numbers}, cost (params and MACs of one example, bytes as float arrays,
    read_bytes of the file), latency_ms {device: {batch size: ms}}, metrics
    {split: {metric: value}} and `statistics`, the prefix of its batch-norm
    tensors. What was not measured or not evaluated is an empty object.
  """
  device = config["source"]["device"]

  def cost(record: Mapping[str, Any]) -> dict[str, Any]:
    ms = record["latency_ms"]
    return {
      **{kind: record[kind] for kind in COSTS},
      "latency_ms": {device: ms} if ms else {},
    }

  sizes = []
  for profile in config["profiles"]:
    statistics = f"batch_stats/{profile['name']}/"
    normed = any(name.startswith(statistics) for name in config["tensors"])
    sizes.append(
      {
        "name": profile["name"],
        "ranks": profile["ranks"],
        "rows": _rows(config["tensors"], profile["ranks"]),
        "forms": profile["forms"],
        **cost(profile),
        "read_bytes": profile["read_bytes"],
        "metrics": profile["metrics"],
        "statistics": statistics if normed else None,
      }
    )
  return {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "weights": WEIGHTS,
    "header_sha256": config["header_sha256"],
    "layers": {
      path: {
        "kind": spec.kind,
        "lead": spec.lead,
        "inputs": spec.inputs,
        "outputs": spec.outputs,
      }
      for path, spec in layers.items()
      if path in config["profiles"][0]["forms"]
    },
    "dense": cost(config["dense"]),
    "sizes": sizes,
  }


def _rows(
  tensors: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, Any]
) -> dict[str, int]:
  rows = {}
  for name, block in tensors.items():
    if "rows" in block:
      path = name.removeprefix("scales/").removeprefix("params/")
      layer = path.rpartition("/")[0]
      rows[name] = int(np.max(ranks[layer], initial=0))
  return rows


def write(
  directory: pathlib.Path,
  config: Mapping[str, Any],
  layers: Mapping[str, LayerSpec],
) -> None:
  """Writes slices.json into a directory, before its config.json."""
  content = workdir_lib.plain(describe(config, layers))
  workdir_lib.write_json(directory / SLICES, content)


def read(directory: str | os.PathLike) -> dict[str, Any]:
  """Reads slices.json and checks that its sizes can be cut.

  Raises:
    ArtifactError: it is missing, altered, of another format, its sizes are not
      nested, the directory is a URL, or `maestro.export_model` made it.
  """
  directory = local(directory, SLICES)
  path = directory / SLICES
  if not path.exists() and _holds_function(directory):
    raise ArtifactError(
      f"{directory} was made by maestro.export_model, of one size and without"
      f" {SLICES}; maestro.load reads it"
    )
  try:
    value = workdir_lib.read_json(path, remedy=_REMEDY)
  except workdir_lib.WorkdirError as error:
    raise ArtifactError(str(error)) from error
  known = (FORMAT, FORMAT_VERSION)
  if (value.get("format"), value.get("format_version")) != known:
    raise ArtifactError(
      f'{path} is no "{FORMAT}" of version {FORMAT_VERSION}; read it by the'
      " version of maestro that made it"
    )
  try:
    _check(value)
  except (
    AttributeError,
    LookupError,
    OverflowError,
    TypeError,
    ValueError,
  ) as error:
    raise ArtifactError(
      f"{path} is broken ({type(error).__name__}: {error}); {_REMEDY}"
    ) from error
  return value


def _holds_function(directory: pathlib.Path) -> bool:
  try:
    return "function" in workdir_lib.read_json(directory / CONFIG, remedy="")
  except workdir_lib.WorkdirError:
    return False


def _check(value: Mapping[str, Any]) -> None:
  sizes = value["sizes"]
  names = [size["name"] for size in sizes]
  if not names or len(set(names)) < len(names):
    raise ValueError(f"sizes {names}: none, or one is there twice")
  for size in sizes:
    where = f"size {size['name']!r}"
    if not set(size["ranks"]) <= set(value["layers"]):
      raise ValueError(f"{where} has ranks of layers that are not listed")
    for kind in (*COSTS, "read_bytes"):
      _check_count(size[kind], f"{where}: {kind}")
    for name, rows in size["rows"].items():
      _check_count(rows, f"{where}: rows of {name!r}")
    for device, times in size["latency_ms"].items():
      for ms in times.values():
        if not (isinstance(ms, float | int) and 0 < ms < math.inf):
          raise ValueError(f"{where}: {ms!r} ms on {device!r}")
  for large, small in itertools.pairwise(sizes):
    if large["rows"].keys() != small["rows"].keys():
      raise ValueError(
        f"{large['name']!r} and {small['name']!r} cut other tensors"
      )
    for name, rows in small["rows"].items():
      if rows > large["rows"][name]:
        raise ValueError(
          f"sizes are not nested: {name!r} has {rows} rows in"
          f" {small['name']!r}, {large['rows'][name]} in {large['name']!r}"
        )


def _check_count(x: Any, what: str) -> None:
  if type(x) is not int or x < 0:
    raise ValueError(f"{what} is {x!r}, not a count")


def check(directory: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises unless slices.json, if an export has one, is that of config.json.

  Raises:
    ArtifactError: it is altered, or says something else.
  """
  if SLICES not in config["files"]:  # of an earlier version
    return
  path = directory / SLICES
  if file_sha256(path) != config["files"][SLICES]["sha256"]:
    raise ArtifactError(f"{path} is altered; {_REMEDY}")
  value = read(directory)
  keys = ("name", "ranks", "forms", *COSTS)
  found, expected = (
    [{key: size[key] for key in keys} for size in sizes]
    for sizes in (value["sizes"], config["profiles"])
  )
  same = value["header_sha256"] == config["header_sha256"]
  if found != expected or not same:
    raise ArtifactError(
      f"{path} lists other sizes or weights than {CONFIG}; {_REMEDY}"
    )
