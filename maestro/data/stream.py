"""Batches read ahead of the training that needs them, by Grain.

What a step trains on is a function of (seed, step): there is no state to save,
and a run that goes on, or goes back, reads from its step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from maestro.data.dataset import DataError, Stream, epoch_order

_AHEAD = 2  # batches in memory, of each process that reads
_SHARED = "/dev/shm"  # where processes hand batches over


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """The batches of a run, by step: a source of Grain's.

  Attributes:
    stream: reads examples.
    seed: of the run.
    size: of the training split.
    batch_size: examples a step, of all processes.
    steps_per_epoch: steps that an epoch has.
    steps: of the run.
    part: which places of a batch are read here, int [k].
  """

  stream: Stream
  seed: int
  size: int
  batch_size: int
  steps_per_epoch: int
  steps: int
  part: np.ndarray

  def __len__(self) -> int:
    return self.steps

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    """Reads {"inputs": [k, ...], "targets": [k, ...], "replaced": []}.

    The examples are those that `epoch_order` has at the step's places.
    """
    epoch, i = divmod(int(step), self.steps_per_epoch)
    rows = _order(self.seed, epoch, self.size)[i * self.batch_size + self.part]
    draws = int(step) * self.batch_size + self.part
    batch = self.stream.examples(rows, draws, self.seed)
    sizes = {k: np.shape(batch.get(k, ()))[:1] for k in ("inputs", "targets")}
    if {*sizes.values()} != {(len(rows),)} or "replaced" not in batch:
      raise DataError(
        f"config.data: the examples of its stream are {sorted(batch)}, with"
        f" {sizes} rows for {len(rows)} asked for; return inputs and targets of"
        " as many rows, and how many are replaced"
      )
    return batch


def check() -> None:
  """Raises DataError unless Grain is there."""
  if importlib.util.find_spec("grain") is None:
    raise DataError(
      "config.data: this set is read by Grain while it is trained on, which is"
      " not installed: pip install 'maestro-lowrank[imagenet]', or pip install"
      " grain"
    )


@contextlib.contextmanager
def read_ahead(
  batches: Batches, first: int
) -> Iterator[Iterator[dict[str, np.ndarray]]]:
  """Yields an iterator over the batches from a step on, in order.

  With workers, step k is read by process k mod workers. They end with the
  block, or with this process.

  Raises:
    DataError: a batch does not fit into shared memory.
  """
  import grain

  workers = batches.stream.workers
  source = grain.MapDataset.source(cast(Any, batches))[first:]
  ahead = grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
  read: Any = source.to_iter_dataset(ahead)
  if workers:
    _check_shared_memory(batches, workers)
    if not flags.FLAGS.is_parsed():  # in a notebook; Grain reads some
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
    read = read.mp_prefetch(options, worker_init_fn=_worker)
  iterator = iter(read)
  try:
    # Copied: shared memory is freed as soon as a batch is here.
    yield map(_own, iterator) if workers else iterator
  finally:
    with contextlib.suppress(AttributeError):  # of an older Grain
      iterator.close()
    del iterator
    if workers:
      gc.collect()  # Grain's iterators are cycles, which hold shared memory


def _own(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {name: np.array(x) for name, x in batch.items()}


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.asarray(epoch_order(seed, epoch, size))


def _worker(index: int, count: int) -> None:
  """Begins a process that reads: it ends with the one that trains.

  Signals are that one's, which saves and then ends them all; what is drawn
  here, the order of an epoch, needs no accelerator.
  """
  del index, count
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  jax.config.update("jax_platforms", "cpu")
  if (parent := multiprocessing.parent_process()) is not None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
  """Ends this process when its parent is gone, be it killed."""
  multiprocessing.connection.wait([parent.sentinel])
  os._exit(1)


def _check_shared_memory(batches: Batches, workers: int) -> None:
  """Raises DataError if batches cannot be handed over; else a bus error would.

  Containers have 64 MB of it, where nothing else is said.
  """
  if not os.path.isdir(_SHARED):
    return
  first = np.zeros(1, np.int64)
  one = batches.stream.examples(first, first, batches.seed)["inputs"].nbytes
  one *= len(batches.part)
  needed, free = workers * (_AHEAD + 1) * one, shutil.disk_usage(_SHARED).free
  if needed > free:
    raise DataError(
      f"config.data.workers={workers}: they hand over batches of"
      f" {one / 1e6:.0f} MB through {_SHARED}, which has {free / 1e6:.0f} MB"
      f" left where {needed / 1e6:.0f} MB may be needed: give the container"
      " more (docker run --shm-size=...), or set config.data.workers=0"
    )
