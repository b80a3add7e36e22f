"""What each step trains on: the split that lies on the devices, or a batch."""

import abc
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maestro.data import Dataset, stream
from maestro.errors import UserError
from maestro.parallel.mesh import BATCH, replicate
from maestro.training.durations import Clock
from maestro.training.step import Data


class Feed(abc.ABC):
  """Gives each step its data, on the devices; in any order of steps.

  Attributes:
    waited: seconds that steps have waited for their data, in sum.
    replaced: examples that stood for others that could not be read, in sum.
  """

  streams = False

  def __init__(self):
    self.waited = 0.0
    self.replaced = 0
    self._open = contextlib.ExitStack()

  @abc.abstractmethod
  def __call__(self, step: int) -> Data:
    """Returns what a step takes, see `training.step.make_step`."""

  def close(self) -> None:
    """Ends what reads ahead."""
    self._open.close()


class Resident(Feed):
  """The whole split on every device, and the order of the step's epoch."""

  def __init__(self, dataset: Dataset, seed: int, clock: Clock, mesh: Mesh):
    super().__init__()
    self._arrays = replicate(dataset.train.arrays, mesh)
    self._dataset, self._seed = dataset, seed
    self._clock, self._mesh = clock, mesh
    self._epoch: int | None = None

  def __call__(self, step: int) -> Data:
    epoch = step // self._clock.steps_per_epoch
    if epoch != self._epoch:
      order = self._dataset.order(self._seed, epoch, self._clock.batch_size)
      self._data = {**self._arrays, "order": replicate(order, self._mesh)}
      self._epoch = epoch
    return self._data


class Streamed(Feed):
  """A batch a step, read ahead; of it each process reads what it needs."""

  streams = True

  def __init__(self, dataset: Dataset, seed: int, clock: Clock, mesh: Mesh):
    super().__init__()
    assert dataset.stream is not None
    stream.check()
    self._sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    self._batches = stream.Batches(
      stream=dataset.stream,
      seed=seed,
      size=len(dataset.train),
      batch_size=clock.batch_size,
      steps_per_epoch=clock.steps_per_epoch,
      steps=clock.total,
      part=part_of(self._sharding, clock.batch_size),
    )
    self._next: int | None = None
    self._ahead: Iterator = iter(())

  def __call__(self, step: int) -> Data:
    began = time.monotonic()
    if step != self._next:  # at first, and for each candidate of a race
      self.close()
      self._ahead = self._open.enter_context(
        stream.read_ahead(self._batches, step)
      )
    try:
      batch = next(self._ahead)
    except RuntimeError as error:  # what Grain says of a process that ended
      if not self._batches.stream.workers:
        raise
      raise UserError(
        f"a process that reads the data has ended ({error}); run the command"
        " again to go on from the newest checkpoint. If memory ran out, lower"
        " config.data.workers"
      ) from error
    self._next = step + 1
    self.replaced += int(batch["replaced"])
    self.waited += time.monotonic() - began
    return {k: self._put(batch[k]) for k in ("inputs", "targets")}

  def close(self) -> None:
    self._ahead = iter(())
    super().close()

  def _put(self, x: np.ndarray) -> jax.Array:
    """Makes the global array of the rows that this process has read."""
    if self._sharding.is_fully_addressable:
      return jax.device_put(x, self._sharding)
    shape, part = (self._batches.batch_size, *x.shape[1:]), self._batches.part

    def rows(index: Any) -> np.ndarray:
      first, last, _ = index[0].indices(shape[0])
      return x[np.searchsorted(part, np.arange(first, last))]

    return jax.make_array_from_callback(shape, self._sharding, rows)


def part_of(sharding: NamedSharding, size: int) -> np.ndarray:
  """The places of a batch that lie on devices of this process, in order."""
  parts = sharding.addressable_devices_indices_map((size,)).values()
  places = [np.arange(size)[index] for index in parts if index is not None]
  return np.unique(np.concatenate(places))


def make_feed(dataset: Dataset, seed: int, clock: Clock, mesh: Mesh) -> Feed:
  """Returns what feeds the steps of a run; to be closed."""
  kind = Resident if dataset.stream is None else Streamed
  return kind(dataset, seed, clock, mesh)
