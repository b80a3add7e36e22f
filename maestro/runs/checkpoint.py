"""Save and load training states whose shapes are not known in advance.

A thin layer over orbax. One step is one directory:

  <directory>/<step>/state/...             the leaves, as a nested dict of paths
  <directory>/<step>/_CHECKPOINT_METADATA  our record: leaves, digests, extra

The record has each leaf's dtype, shape and digest, because orbax loads flipped
bytes silently. Leaves are written and read as host arrays: the digest is of
what is written, orbax then needs no sharding file (which ties a checkpoint to
the devices that wrote it), and small states save in half the time. Only where
an array's parts lie on several processes, each writes its own, and none has all
of them: see `maestro.runs.digests`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from maestro.errors import UserError
from maestro.parallel import mesh, processes
from maestro.runs import digests, orbax_logs

# 2 if an array was written by several processes, else 1.
_FORMATS = (1, 2)
_RECORD = "maestro"  # our key in orbax's custom metadata


class CheckpointError(UserError):
  """A checkpoint cannot be written, or cannot be trusted."""


class DamagedError(CheckpointError):
  """A checkpoint does not hold what was saved."""


@dataclasses.dataclass
class _KeptSteps:
  """An orbax preservation policy: what `owner.keep_steps` is at a save."""

  owner: "Checkpoints"

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    return [c.step in self.owner.keep_steps for c in checkpoints]


class Checkpoints:
  """Keep the newest checkpoints of one run; a context manager.

  When `save` returns, the step survives kill -9. Only one run may have a
  directory open for saving, with all of its processes; readers use
  `load_params`.

  Args:
    directory: made if missing; left-overs of killed saves in it are deleted.
    keep: how many of the newest steps to keep.
    keep_steps: steps to keep always.

  Attributes:
    keep_steps: may be set anew; holds from the next save on.

  Raises:
    CheckpointError: the directory cannot be made or read.
  """

  def __init__(
    self, directory, *, keep: int = 2, keep_steps: Sequence[int] = ()
  ):
    if keep < 1:
      raise CheckpointError(f"keep must be at least 1, got {keep}")
    self.directory = pathlib.Path(directory).absolute()
    self.keep_steps = frozenset(keep_steps)
    policies = ocp.training.preservation_policies
    self._preservation = policies.AnyPreservationPolicy(
      [policies.LatestN(keep), _KeptSteps(self)]
    )
    self._context = ocp.Context()
    # Else a save that fails early leaves a thread that waits for 20 minutes.
    self._context.asynchronous.create_directories_asynchronously = False
    self._open()

  def _open(self) -> None:
    try:
      self._checkpointer = ocp.training.Checkpointer(
        str(self.directory),
        context=self._context,
        # orbax types its own policies for another class
        preservation_policy=self._preservation,  # pyright: ignore
        cleanup_tmp_directories=True,
      )
    except Exception as error:
      raise CheckpointError(
        f"cannot open {self.directory} for checkpoints: {_line(error)}; give"
        " a directory that can be made and written"
      ) from error

  def steps(self) -> list[int]:
    """List the saved steps, ascending."""
    return list_steps(self.directory)

  @property
  def latest(self) -> int | None:
    """The newest step, or None."""
    return max(self.steps(), default=None)

  def save(self, step: int, state: Any, extra: dict) -> None:
    """Write the state, durable on return, and drop the steps not kept.

    Args:
      step: larger than every saved step.
      state: any pytree of arrays.
      extra: JSON values to keep beside it; floats return exactly.

    Raises:
      CheckpointError: `step` is not new, `extra` is not JSON, or the disk is
        full or not writable. Saved steps are left as they were.
    """
    step, latest = int(step), self.latest
    if latest is not None and step <= latest:
      raise CheckpointError(
        f"cannot save step {step}: {self.directory} has step {latest}; delete"
        f" {self.directory / str(latest)} or use another workdir"
      )
    paths, leaves, _ = _flatten(state)
    leaves = dict(zip(paths, map(_host, leaves), strict=True))
    if len(leaves) < len(paths):
      raise CheckpointError("two leaves have one path; is '/' in a key?")
    try:
      record = _record(leaves, extra, step)
    except TypeError as error:
      raise CheckpointError(
        f"cannot save step {step}: `extra` is not JSON: {error}"
      ) from error
    try:
      with orbax_logs.failures(lambda error: self._end(step, error)):
        # Orbax's own policy skips saves; force does not.
        done = self._checkpointer.save(
          step,
          _nested_nonempty(leaves),
          force=True,
          custom_metadata={_RECORD: record},
        )
    except Exception as error:
      self._end(step, error)
      # Orbax counts the failed step as saved; start it afresh. Closing raises
      # the same error once more.
      with contextlib.suppress(Exception):
        self.close()
      with contextlib.suppress(CheckpointError):
        self._open()
      raise self._unsaved(step, error) from error
    if not done:
      raise CheckpointError(f"orbax skipped {self.directory / str(step)}")

  def _unsaved(self, step: int, error: BaseException) -> CheckpointError:
    return CheckpointError(
      f"cannot save {self.directory / str(step)}: {_line(error)}; if the disk"
      " is full or not writable, mend that and run again to resume from"
      f" {_resume(self.directory, step)}"
    )

  def _end(self, step: int, error: BaseException) -> None:
    """Ends all of many processes, whose orbax would wait for this one's."""
    if not processes.alone():
      processes.fail(self._unsaved(step, error))

  def set_aside(self, step: int) -> pathlib.Path:
    """Renames a step, so that it is none any more; returns its new path."""
    self.close()
    old = self.directory / str(step)
    new = old.with_name(f"{step}.damaged-{time.time_ns()}")
    if processes.first():
      old.rename(new)
    new = pathlib.Path(processes.exchange(str(new))[0])
    self._open()
    return new

  def shapes(self, step: int) -> tuple[dict, dict]:
    """Return the saved leaves as ShapeDtypeStructs, and extra.

    Returns:
      A nested dict by path, `{"params": {...}, "opt_state": {"0": ...}, ...}`
      (always with params, batch_stats and ranks, maybe empty), and `extra`.

    Raises:
      CheckpointError: the step is missing, broken or not ours.
    """
    record = _read_record(self.directory, step)
    tree = {"params": {}, "batch_stats": {}, "ranks": {}}
    flat = {path: _abstract(leaf) for path, leaf in record["leaves"].items()}
    return tree | traverse_util.unflatten_dict(flat, sep="/"), record["extra"]

  def load(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
    """Read a state into the structure, shapes and shardings given.

    Args:
      step: a saved step.
      abstract_state: ShapeDtypeStructs; a leaf without sharding goes to the
        default device.

    Returns:
      The state and `extra`, every bit as saved.

    Raises:
      CheckpointError: the step is missing, broken or not ours, or its leaves
        are not those of `abstract_state`.
    """
    record = _read_record(self.directory, step)
    paths, wanted, treedef = _flatten(abstract_state)
    saved = {path: _abstract(leaf) for path, leaf in record["leaves"].items()}
    for path in sorted(saved.keys() - set(paths)):
      raise _misfit(self.directory, step, path, "is saved but not in the model")
    for path, want in zip(paths, wanted, strict=True):
      if path not in saved:
        raise _misfit(self.directory, step, path, "is not saved")
      have = saved[path]
      if (have.shape, have.dtype) != (want.shape, want.dtype):
        what = (
          f"is saved as {have.dtype}{list(have.shape)} but the model has"
          f" {want.dtype}{list(want.shape)}"
        )
        raise _misfit(self.directory, step, path, what)
    # What several processes have written, each reads its own part of.
    parts = {
      path: want
      for path, want in zip(paths, wanted, strict=True)
      if "sum" in record["leaves"][path] and mesh.is_split(want.sharding)
    }
    leaves = _read_leaves(self.directory, step, record, paths, parts)
    state = [
      _put(leaves[path], want.sharding)
      for path, want in zip(paths, wanted, strict=True)
    ]
    return treedef.unflatten(state), record["extra"]

  def close(self) -> None:
    """Release orbax's threads."""
    self._checkpointer.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def load_params(directory, step: int | None = None) -> tuple:
  """Read params, batch_stats, ranks and extra, whatever the optimizer was.

  Where moving averages of params and batch_stats are saved, these are read.
  Changes nothing on disk, so a run that is still saving can be read.

  Args:
    directory: of a `Checkpoints`.
    step: None for the newest.

  Returns:
    Nested dicts of host arrays `(params, batch_stats, ranks)`, and `extra`.

  Raises:
    CheckpointError: no checkpoint, or it is broken or not ours.
  """
  directory = pathlib.Path(directory).absolute()
  if step is None:
    step = max(list_steps(directory), default=None)
  if step is None:
    raise CheckpointError(
      f"no checkpoint in {directory}; is it the right path?"
    )
  names = ("params", "batch_stats", "ranks")
  tree, extra = _load_parts(directory, step, ("ema", "ranks"))
  tree |= tree.get("ema") or _load_parts(directory, step, names[:2])[0]
  return *(tree.get(name, {}) for name in names), extra


def load_levels(directory, step: int) -> dict:
  """Read the levels of a nested network; {} if there are none.

  Raises:
    CheckpointError: the step is missing, broken or not ours.
  """
  directory = pathlib.Path(directory).absolute()
  return _load_parts(directory, step, ("levels",))[0].get("levels", {})


def _load_parts(
  directory: pathlib.Path, step: int, names: Sequence[str]
) -> tuple[dict, Any]:
  record = _read_record(directory, step)
  paths = [p for p in record["leaves"] if p.partition("/")[0] in names]
  leaves = _read_leaves(directory, step, record, paths) if paths else {}
  return traverse_util.unflatten_dict(leaves, sep="/"), record["extra"]


def load_leaves(directory, step: int) -> tuple[dict[str, np.ndarray], dict]:
  """Read all leaves of a step, {path: host array}, and extra.

  Raises:
    CheckpointError: the step is missing, broken or not ours.
  """
  directory = pathlib.Path(directory).absolute()
  record = _read_record(directory, step)
  paths = list(record["leaves"])
  return _read_leaves(directory, step, record, paths), record["extra"]


def list_steps(directory: pathlib.Path) -> list[int]:
  """List the saved steps, oldest first."""
  # By name: orbax renames a directory to its step when it is whole.
  try:
    names = [path.name for path in directory.iterdir() if path.is_dir()]
  except OSError as error:
    raise CheckpointError(f"cannot read {directory}: {error}") from error
  return sorted(int(n) for n in names if n.isdecimal() and str(int(n)) == n)


def _flatten(tree: Any) -> tuple[list[str], list, Any]:
  """Return slash-joined paths, leaves and the structure."""
  pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
  keystr = jax.tree_util.keystr
  paths = [keystr(path, simple=True, separator="/") for path, _ in pairs]
  return paths, [leaf for _, leaf in pairs], treedef


def _host(leaf: Any) -> np.ndarray | jax.Array:
  if isinstance(leaf, jax.Array) and mesh.is_split(leaf.sharding):
    return leaf
  return np.asarray(leaf)


def _put(leaf: Any, sharding: Any) -> jax.Array:
  if isinstance(leaf, jax.Array):
    return leaf
  if sharding is not None and not sharding.is_fully_addressable:
    return mesh.put(leaf, sharding)
  # Not aliased: XLA may be asked to donate what we return.
  return jax.device_put(leaf, sharding, may_alias=False)


def _abstract(leaf: dict) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))


def _nested_nonempty(leaves: dict[str, Any]) -> dict:
  """Nest by path; a leaf of rank 0 stays out, orbax refuses size zero."""
  flat = {path: x for path, x in leaves.items() if x.size}
  return traverse_util.unflatten_dict(flat, sep="/")


def _record(leaves: dict[str, Any], extra: dict, step: int) -> dict:
  described = {}
  for path, x in leaves.items():
    kind = "sum" if isinstance(x, jax.Array) else "digest"
    described[path] = {
      "dtype": str(x.dtype),
      "shape": list(x.shape),
      kind: digests.of(path, x, kind),
    }
  # Through JSON, so that the digest is of what a reader will see.
  extra = json.loads(json.dumps(extra))
  version = 2 if any("sum" in x for x in described.values()) else 1
  record = {"format": version, "leaves": described, "extra": extra}
  record |= {"step": step}
  return record | {"digest": digests.of_record(record)}


def _read_record(directory: pathlib.Path, step: int) -> dict:
  steps = list_steps(directory)
  if step not in steps:
    raise CheckpointError(f"no step {step} in {directory}, which has {steps}")
  try:
    # Not ocp.metadata(): it opens every array, and damage there makes it noisy.
    text = (directory / str(step) / "_CHECKPOINT_METADATA").read_text()
    record = json.loads(text)["custom_metadata"][_RECORD]
    good = record["digest"] == digests.of_record(record)
    version = record["format"]
  except Exception as error:
    what = (
      "has no readable maestro record (damaged, or not a checkpoint of"
      f" maestro): {_line(error)}"
    )
    raise _broken(directory, step, what, DamagedError) from error
  if not good:
    what = "has a damaged record (digest differs)"
    raise _broken(directory, step, what, DamagedError)
  if record.get("step", step) != step:  # of an earlier version: not recorded
    what = f"holds step {record['step']}: give it its name back"
    raise _broken(directory, step, what)
  if version not in _FORMATS:
    what = f"has format {version}, this version reads {_FORMATS}"
    raise _broken(directory, step, what)
  return record


def _read_leaves(
  directory: pathlib.Path,
  step: int,
  record: dict,
  paths: Iterable[str],
  parts: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> dict[str, Any]:
  """Read some leaves, to the host but for `parts`; check their digests."""
  saved = {path: _abstract(record["leaves"][path]) for path in paths}
  # A numpy leaf asks orbax for numpy; its memory is never touched.
  leaves: dict[str, Any] = {
    path: np.empty(x.shape, x.dtype) for path, x in saved.items()
  } | dict(parts or {})
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    with context:
      tree = ocp.load(str(directory / str(step)), _nested_nonempty(leaves))
    leaves |= traverse_util.flatten_dict(tree, sep="/")
    for path in saved:
      if isinstance(leaves[path], jax.ShapeDtypeStruct):
        raise KeyError(path)  # left unread
      leaves[path] = _host(leaves[path])
  except Exception as error:
    what = f"cannot be read: {_line(error)}"
    raise _broken(directory, step, what, DamagedError) from error
  # All of them first: of parts, all processes compute the digest together.
  found = {
    path: digests.of(path, x, digests.kind(record["leaves"][path]))
    for path, x in leaves.items()
  }
  for path, digest in found.items():
    described = record["leaves"][path]
    if digest != described[digests.kind(described)]:
      what = f"is damaged: leaf {path} is not what was saved (digest differs)"
      raise _broken(directory, step, what, DamagedError)
  return leaves


def _resume(directory: pathlib.Path, step: int) -> str:
  older = [s for s in list_steps(directory) if s < step]
  return f"the previous step {older[-1]}" if older else "the start"


def _broken(
  directory: pathlib.Path,
  step: int,
  what: str,
  kind: type[CheckpointError] = CheckpointError,
) -> CheckpointError:
  where, back = directory / str(step), _resume(directory, step)
  return kind(
    f"checkpoint {where} {what}; delete {where} to resume from {back}"
  )


def _misfit(directory, step, path, what: str) -> CheckpointError:
  return CheckpointError(
    f"checkpoint {directory / str(step)}: leaf {path} {what}; run with the"
    " config that wrote it, or use another workdir"
  )


def _line(error: BaseException) -> str:
  """Shorten orbax's pages to a line that has the system's reason."""
  text = " ".join(str(error).split())
  reason = re.search(r"os_error_code='(\d+)'", text)
  tail = f" ... {os.strerror(int(reason[1]))}" if reason else ""
  return f"{type(error).__name__}: {text[:200]}{tail}"
