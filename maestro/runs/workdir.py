"""The directory of a run: whose it is, and its JSON files, whole or absent."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from maestro.errors import UserError


class WorkdirError(UserError):
  """A workdir is another run's, is broken or cannot be written."""


# Keys in which two configs of one run may differ: where things are.
PLACES: Sequence[str] = ("data.data_dir",)


def plain(value: Any) -> Any:
  """Turns nested mappings and sequences into dicts and lists, as JSON has."""
  if isinstance(value, Mapping):
    return {key: plain(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  return value


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
  """Turns nested mappings into {"a.b.c": value}."""
  if not isinstance(value, Mapping):
    return {prefix: value}
  flat = {}
  for key, v in value.items():
    flat |= flatten(v, f"{prefix}.{key}" if prefix else key)
  return flat


def finished_results(workdir: pathlib.Path, config) -> dict | None:
  """Returns the results of a finished run; changes nothing.

  Raises:
    WorkdirError: the workdir belongs to another config, or is no run's.
  """
  path = workdir / "config.json"
  if not path.exists():
    if (workdir / "checkpoints").exists():
      raise WorkdirError(
        f"{workdir} has checkpoints but no config.json, so it is no directory"
        " of a run; choose another --workdir"
      )
    return None
  results = workdir / "results.json"
  if not _has_checkpoint(workdir) and not results.exists():
    return None  # a start that failed: nothing is lost by another config
  old, new = flatten(read_json(path)), flatten(plain(config))
  changed = [
    f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} here"
    for key in sorted(old.keys() | new.keys())
    if key not in PLACES and old.get(key, "absent") != new.get(key, "absent")
  ]
  if changed:
    raise WorkdirError(
      f"{workdir} belongs to a run of another config"
      f" ({'; '.join(changed[:5])}{'; ...' if changed[5:] else ''});"
      " choose another --workdir, or delete this one"
    )
  return read_json(results) if results.exists() else None


def _has_checkpoint(workdir: pathlib.Path) -> bool:
  return any((workdir / "checkpoints").glob("[0-9]*"))


def claim(workdir: pathlib.Path, config, facts: Mapping[str, Any]) -> None:
  """Makes the workdir and writes config.json, once all options are checked.

  Beside it, facts.json says what the run must know of its data set, so that
  its model can be opened where the data is not.

  Raises:
    WorkdirError: it cannot be written.
  """
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not (path.exists() and _has_checkpoint(workdir)):
      write_json(workdir / "facts.json", facts)
      write_json(path, plain(config))
  except OSError as error:
    raise WorkdirError(
      f"cannot write to workdir {workdir}: {error}; choose another --workdir"
    ) from error


def read_json(path: pathlib.Path) -> dict:
  """Reads a JSON file.

  Raises:
    WorkdirError: it is missing or no JSON.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise WorkdirError(
      f"cannot read {path} ({error}); name the directory of a run"
    ) from error
  except ValueError as error:
    raise WorkdirError(
      f"{path} is not valid JSON ({error}); restore it, or start in another"
      " --workdir"
    ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file whole or not at all."""
  new = path.with_name(path.name + ".tmp")
  with new.open("w", encoding="utf-8") as file:
    json.dump(value, file, indent=1)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)
