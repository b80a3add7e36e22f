"""What the processes of a run must have in common, compared between them."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np

from maestro.data import Dataset
from maestro.data.dataset import Rows
from maestro.errors import UserError
from maestro.parallel import processes
from maestro.parallel.mesh import is_split
from maestro.runs import digests
from maestro.runs import workdir as workdir_lib
from maestro.runs.checkpoint import Checkpoints, DamagedError
from maestro.training.state import TrainState, plain_ranks

_HERE = "data.data_dir"  # may differ between hosts


def configs(config: Mapping[str, Any]) -> None:
  """Compares configs and versions, before anything is read.

  Raises:
    UserError: names the processes that differ, and the keys.
  """
  if processes.alone():
    return
  flat = workdir_lib.flatten(workdir_lib.plain(config))
  lines = [f"{k}: {json.dumps(v)}" for k, v in sorted(flat.items())]
  lines = [line for line in lines if not line.startswith(_HERE)]
  lines += [f"JAX {jax.__version__}", f"Flax {flax.__version__}"]
  processes.agree(
    "the config, or the version,",
    "\n".join(lines),
    "start all with the same command on the same installation",
  )


def data(dataset: Dataset) -> None:
  """Compares data sets, of which every host reads its own copy."""
  if processes.alone():
    return
  lines = []
  for name in ("train", "val", "test"):
    split = getattr(dataset, name)
    rows = isinstance(split.inputs, Rows)
    digest = split.inputs.digest if rows else _digest(split.arrays)
    lines += [f"{name}: {len(split)} examples, {digest}"]
  processes.agree(
    f"the data set {dataset.name!r}",
    "\n".join(lines),
    "copy it from one host to the others (config.data.data_dir, TFDS_DATA_DIR)",
  )


def finished(path: pathlib.Path, results: Mapping[str, Any] | None) -> None:
  """Checks that all find the same end of a run in a workdir, or none."""
  end = {} if results is None else results["final"]
  processes.agree(
    f"what {path} holds",
    json.dumps(end, sort_keys=True),
    "--workdir must be on a file system that all hosts share",
  )


def workdir(path: pathlib.Path) -> None:
  """Checks that all see the directory that the first one has claimed."""
  processes.exchange("")  # it has by now
  if not workdir_lib.appears(path / "config.json"):
    raise UserError(
      f"{path} has no config.json here, which process 0 has written: --workdir"
      " must be on a file system that all hosts share"
    )


def newest(checkpoints: Checkpoints) -> int | None:
  """The newest step that the first process sees."""
  step = processes.exchange(json.dumps(checkpoints.latest))[0]
  return json.loads(step)


@contextlib.contextmanager
def damage() -> Iterator[list[str]]:
  """Yields a list that has, afterwards, what any process found damaged."""
  found, said = [], ""
  try:
    yield found
  except DamagedError as error:
    said = str(error)
  found += filter(None, processes.exchange(said))


def networks(state: TrainState) -> None:
  """Compares ranks, and parameters as far as every process has them whole.

  Each computes them for itself, from the same numbers; another kind of CPU may
  round a decomposition differently.
  """
  if processes.alone():
    return
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  whole = {
    jax.tree_util.keystr(path): x
    for path, x in leaves
    if not is_split(x.sharding)
  }
  ranks = [f"{k}: {v}" for k, v in plain_ranks(state.ranks).items()]
  processes.agree(
    f"the network after step {int(state.step)}",
    "\n".join([*ranks, f"parameters {_digest(whole)}"]),
    "use hosts of one kind; what was saved before is whole",
  )


def _digest(arrays: Mapping[str, Any]) -> str:
  """Digests arrays that this process has whole, by name."""
  each = {k: digests.of_host(k, np.asarray(x)) for k, x in arrays.items()}
  return digests.of_record({"leaves": each})[:16]
