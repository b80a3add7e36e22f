"""The directory of a run: whose it is, and its JSON files, whole or absent."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from typing import Any

from maestro.errors import UserError
from maestro.parallel import processes


class WorkdirError(UserError):
  """A workdir is another run's, is broken or cannot be written."""


# Keys in which two configs of one run may differ: where things are. The number
# of devices is in runs from before there were meshes.
PLACES = re.compile(r"data\.data_dir|mesh(\..*)?|placement|num_devices")

# What results.json must hold to be the end of a run.
RESULTS = {"config": dict, "dense": dict, "final": dict, "layers": list}
_MOST_BYTES = 1 << 28  # of a JSON file that is read


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
    if _has_checkpoint(workdir):
      raise WorkdirError(
        f"{workdir} has checkpoints but no config.json, so it is no directory"
        " of a run; choose another --workdir"
      )
    return None
  results = workdir / "results.json"
  if not _has_checkpoint(workdir) and not results.exists():
    return None  # a start that failed: nothing is lost by another config
  old, new = flatten(read_json(path)), flatten(plain(config))
  changed = [  # a key that is absent, as in an older config, is None
    f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} here"
    for key in sorted(old.keys() | new.keys())
    if not PLACES.fullmatch(key) and old.get(key) != new.get(key)
  ]
  if changed:
    raise WorkdirError(
      f"{workdir} belongs to a run of another config"
      f" ({'; '.join(changed[:5])}{'; ...' if changed[5:] else ''});"
      " choose another --workdir, or delete this one"
    )
  if not results.exists():
    return None
  return read_json(
    results,
    keys=RESULTS,
    remedy="delete it and run the same command again, which writes it anew",
  )


def _has_checkpoint(workdir: pathlib.Path) -> bool:
  return any((workdir / "checkpoints").glob("[0-9]*"))


def claim(workdir: pathlib.Path, config, facts: Mapping[str, Any]) -> None:
  """Makes the workdir and writes config.json, once all options are checked.

  The first of many processes does so alone, here and in all other files.

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


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Makes a workdir and keeps all other writers out of it.

  By a lock of the kernel on the file `lock`, which ends with the process,
  however that dies. Readers need none. On a network file system it holds
  between machines only if that passes flock on (NFS since version 4 does).

  Raises:
    WorkdirError: another process has it, or it cannot be written.
  """
  if not processes.first():
    yield
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    raise WorkdirError(
      f"cannot write to workdir {workdir}: {error}; choose another --workdir"
    ) from error
  with os.fdopen(descriptor, "r+", errors="replace") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise WorkdirError(
        f"{workdir} is in use by {file.read(200).strip() or 'another process'};"
        " wait for it, stop it, or choose another --workdir"
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def appears(path: pathlib.Path, seconds: float = 10.0) -> bool:
  """Whether a file that another host has written comes to sight.

  A network file system may take seconds to tell of it.
  """
  until = time.monotonic() + seconds
  while True:
    with contextlib.suppress(OSError):
      os.listdir(path.parent)  # asks the server anew
      if path.exists():
        return True
    if time.monotonic() > until:
      return False
    time.sleep(0.1)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with the sha256 of its content as its last key."""
  content = {key: v for key, v in value.items() if key != "sha256"}
  # Through JSON, so that the digest is of what a reader will see.
  content = json.loads(json.dumps(content))
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
  """Checks and drops what `sealed` adds; files of earlier versions lack it.

  Raises:
    ValueError: the content is not what its digest is of.
  """
  last = str(next(reversed(value.values()), ""))
  # A digest whose key was altered is no earlier version's.
  if "sha256" not in value and not re.fullmatch("[0-9a-f]{64}", last):
    return value
  content = sealed(value)
  if value.get("sha256") != content.pop("sha256"):
    raise ValueError("its content is not what its sha256 is of")
  return content


def read_json(
  path: pathlib.Path,
  *,
  keys: Mapping[str, type] | None = None,
  remedy: str = "restore it, or start in another --workdir",
) -> dict:
  """Reads a JSON object from a regular file, without its digest.

  Args:
    path: of the file.
    keys: what it must hold, and of which type.
    remedy: what to do if it is damaged.

  Raises:
    WorkdirError: it is missing, altered, no such object, or names a key twice.
  """
  try:
    # Not to be blocked by a pipe of that name.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
      facts = os.fstat(file.fileno())
      if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MOST_BYTES:
        raise _damaged(path, "no regular file of a sensible size", remedy)
      data = file.read()
  except OSError as error:
    raise WorkdirError(
      f"cannot read {path} ({error}); name the directory of a run"
    ) from error
  return parse_json(data, path, keys=keys, remedy=remedy)


def parse_json(
  data: bytes,
  name: Any,
  *,
  keys: Mapping[str, type] | None = None,
  remedy: str = "restore it, or start in another --workdir",
) -> dict:
  """Reads a JSON object from the bytes of a file, as `read_json` does.

  Raises:
    WorkdirError: it is altered, no such object, or names a key twice.
  """

  def once(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
      raise ValueError("a key is there twice")
    return value

  try:
    value = json.loads(data, object_pairs_hook=once)
    if not isinstance(value, dict):
      raise ValueError("no object")
    for key, kind in (keys or {}).items():
      if not isinstance(value.get(key), kind):
        raise ValueError(f"no {key!r} of the kind that it should hold")
    return unsealed(value)
  except (ValueError, RecursionError) as error:
    raise _damaged(name, str(error), remedy) from error


def _damaged(name: Any, why: str, remedy: str) -> WorkdirError:
  return WorkdirError(
    f"{name} is damaged, not the JSON that was written ({why}); {remedy}"
  )


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a file whole or not at all, with its digest."""
  if not processes.first():
    return
  new = path.with_name(path.name + ".tmp")
  with new.open("w", encoding="utf-8") as file:
    json.dump(sealed(value), file, indent=1)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)
