"""The files of an exported model, and how their folder is written."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from maestro.errors import UserError
from maestro.runs import stop
from maestro.runs import workdir as workdir_lib

FORMAT = "maestro-export"
FORMAT_VERSION = 3
# 1 had no digest of config.json itself; 2 had card.md instead of README.md, no
# slices.json, and other metadata in the weights.
READABLE = (1, 2, 3)
WEIGHTS, CONFIG, SLICES = "model.safetensors", "config.json", "slices.json"
STABLEHLO = "model.stablehlo"
CARD, OLD_CARD = "README.md", "card.md"
FILES = (WEIGHTS, SLICES, STABLEHLO, CARD, OLD_CARD)  # beside config.json

# Of the weights. Other libraries want a framework that they know as "format".
METADATA = {
  "format": "flax",
  "maestro": FORMAT,
  "format_version": str(FORMAT_VERSION),
}


class ArtifactError(UserError):
  """An exported directory cannot be written, read or trusted."""


def is_url(source: Any) -> bool:
  """Whether a source names a scheme, such as https://."""
  return (
    isinstance(source, str) and re.match(r"\w[\w+.-]*://", source) is not None
  )


def local(directory: str | os.PathLike, what: str) -> pathlib.Path:
  """Returns the path of a directory on this machine.

  Args:
    directory: of an export.
    what: is to be done with it, for the error.

  Raises:
    ArtifactError: it is a URL.
  """
  if is_url(directory):
    raise ArtifactError(
      f"{what} of a URL, {directory}, is not supported: only `maestro.load` and"
      " `maestro.deploy.artifact.read` take one; download the folder first"
    )
  return pathlib.Path(directory)


def is_ours(name: str) -> bool:
  """Whether an export may hold a file of that name, beside config.json."""
  return name in FILES or bool(re.fullmatch(r"model\.[\w.-]+\.onnx", name))


def sha256(data: bytes) -> str:
  """Returns the digest of bytes."""
  return hashlib.sha256(data).hexdigest()


def file_sha256(path: pathlib.Path) -> str:
  """Returns the digest of a file's content."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_target(out: pathlib.Path) -> None:
  """Raises unless a directory is free, or holds an earlier export and no more.

  Raises:
    ArtifactError: there is something else.
  """
  if not out.exists():
    return
  if not out.is_dir():
    raise ArtifactError(f"--out={out} is a file; choose another --out")
  names = {path.name for path in out.iterdir()}
  if not names:
    return
  try:
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    listed = {name for name in config["files"] if is_ours(name)}
    ours = {CONFIG, *listed} if config["format"] == FORMAT else set()
  except (OSError, ValueError, KeyError, TypeError):
    ours = set()
  if foreign := sorted(names - ours):
    raise ArtifactError(
      f"--out={out} holds what no export wrote ({', '.join(foreign[:3])}"
      f"{', ...' if foreign[3:] else ''}); it is not overwritten: choose"
      " another --out, or empty it"
    )


@contextlib.contextmanager
def new_directory(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a directory that takes the place of `out` once it is complete."""
  new, old = (
    out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("new", "old")
  )
  try:
    new.mkdir(parents=True)
    yield new
    check_target(out)
    with stop.saving():
      if out.exists():
        out.rename(old)
      new.rename(out)
  except OSError as error:
    raise ArtifactError(
      f"cannot write --out={out}: {error.strerror or error}; free space or"
      " choose another --out"
    ) from error
  finally:
    if old.exists() and not out.exists():
      old.rename(out)  # the new one could not take its place
    for path in (new, old):
      shutil.rmtree(path, ignore_errors=True)


def write_config(new: pathlib.Path, config: dict) -> None:
  """Writes config.json with the sizes and digests of the other files."""
  config["files"] = {
    path.name: {
      "size": path.stat().st_size,
      "sha256": file_sha256(path),
    }
    for path in sorted(new.iterdir())
    if path.name != CONFIG
  }
  workdir_lib.write_json(new / CONFIG, workdir_lib.plain(config))
