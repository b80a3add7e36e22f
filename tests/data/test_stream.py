"""Batches read ahead: which, from where, by whom; and what ends with whom."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from maestro.data import DataError, dataset, stream

SIZE, BATCH, PER_EPOCH, STEPS = 23, 4, 5, 12


class Numbers:
  """Examples that say what they were asked for."""

  def __call__(self, rows, draws, seed):
    if seed == 13:
      raise DataError("example 13 is unlucky")
    inputs = np.stack([rows, draws, np.full_like(rows, seed)], axis=1)
    targets = np.asarray(rows, np.int32)
    return {"inputs": inputs, "targets": targets, "replaced": np.array(0)}


def batches(workers=0, part=None, seed=3, steps=STEPS):
  part = np.arange(BATCH) if part is None else part
  return stream.Batches(
    dataset.Stream(Numbers(), workers),
    seed,
    SIZE,
    BATCH,
    PER_EPOCH,
    steps,
    part,
  )


def read(found, first=0):
  with stream.read_ahead(found, first) as ahead:
    return [{k: x.copy() for k, x in batch.items()} for batch in ahead]


def test_batches_are_those_of_the_order_of_each_epoch():
  found = read(batches())
  assert len(found) == STEPS
  rows = np.concatenate([batch["targets"] for batch in found])
  for epoch in range(2):
    order = np.asarray(dataset.epoch_order(3, epoch, SIZE))
    n = PER_EPOCH * BATCH
    np.testing.assert_array_equal(rows[epoch * n : (epoch + 1) * n], order[:n])
  draws = np.concatenate([batch["inputs"][:, 1] for batch in found])
  np.testing.assert_array_equal(draws, np.arange(STEPS * BATCH))


@pytest.mark.parametrize("first", [0, 1, 4, 5, 11, 12])
def test_a_run_that_goes_on_reads_what_comes_next(first):
  """In the midst of an epoch, too; there is no state but the step."""
  whole, rest = read(batches()), read(batches(), first)
  assert len(rest) == STEPS - first
  for a, b in zip(whole[first:], rest, strict=True):
    np.testing.assert_array_equal(a["inputs"], b["inputs"])


def test_parts_of_a_batch_are_disjoint_and_make_it_whole():
  parts = [np.array([0, 3]), np.array([1, 2])]
  halves = [read(batches(part=part)) for part in parts]
  for step, whole in enumerate(read(batches())):
    out = np.empty_like(whole["inputs"])
    for part, half in zip(parts, halves, strict=True):
      out[part] = half[step]["inputs"]
    np.testing.assert_array_equal(out, whole["inputs"])


def test_processes_read_the_same_in_the_same_order():
  for a, b in zip(read(batches(), 2), read(batches(2), 2), strict=True):
    np.testing.assert_array_equal(a["inputs"], b["inputs"])
  time.sleep(0.1)
  assert not children()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_the_data_is_said(workers):
  with pytest.raises(DataError, match="13 is unlucky"):
    read(batches(workers, seed=13))


class Odd:
  """Examples that are not what was asked for."""

  def __init__(self, change):
    self.change = change

  def __call__(self, rows, draws, seed):
    batch = Numbers()(rows, draws, seed)
    return {k: x for k, x in (batch | self.change).items() if x is not None}


@pytest.mark.parametrize(
  "change",
  [{"replaced": None}, {"inputs": None}, {"targets": np.zeros(3)}],
  ids=str,
)
def test_examples_that_are_not_what_was_asked_for_are_told(change):
  found = dataclasses.replace(batches(), stream=dataset.Stream(Odd(change), 0))
  with pytest.raises(DataError, match=r"config\.data: the examples of its"):
    read(found)


def test_rows_without_a_stream_are_told():
  class Lazy(dataset.Rows):
    digest, unreadable = "", set()
    shape, dtype = (4, 2), np.dtype(np.float32)

    def __getitem__(self, rows):
      return np.zeros(self.shape, np.float32)[rows]

  split = dataset.Split(Lazy(), np.zeros(4, np.int32))

  def make(targets, **more):
    train = dataclasses.replace(split, targets=targets)
    return dataset.Dataset(
      "own", train, split, split, 2, dataset.identity, **more
    )

  with pytest.raises(DataError, match=r"'own', train split.*stream="):
    make(split.targets)
  stream = dataset.Stream(Numbers(), 0)
  assert make(split.targets, stream=stream).input_shape == (2,)
  with pytest.raises(DataError, match=r"targets\[2\] is 7, no class"):
    make(np.array([0, 1, 7, 0], np.int32), stream=stream)


def children():
  """Processes of Python's that this one has started."""
  found = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")
  pids = " ".join(path.read_text() for path in found).split()
  lines = [pathlib.Path(f"/proc/{pid}/cmdline") for pid in pids]
  return [
    path.parent.name
    for path in lines
    if path.exists() and b"spawn_main" in path.read_bytes()
  ]


def test_a_process_that_is_killed_is_told():
  with (
    pytest.raises(RuntimeError, match="exit code -9"),
    stream.read_ahead(batches(1, steps=10_000), 0) as ahead,
  ):
    next(ahead)
    (pid,) = children()
    os.kill(int(pid), signal.SIGTERM)  # is not its own
    next(ahead)
    os.kill(int(pid), signal.SIGKILL)
    for _ in range(100):
      next(ahead)


READS = """
import sys
from test_stream import batches, children, stream
if __name__ == "__main__":
  with stream.read_ahead(batches(2, steps=10_000), 0) as ahead:
    next(ahead)
    print(*children(), flush=True)
    sys.stdin.read()
"""


def test_processes_end_with_the_one_that_trains(tmp_path):
  """Even if that one is killed."""
  (tmp_path / "reads.py").write_text(READS)
  path = os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
  run = subprocess.Popen(
    [sys.executable, str(tmp_path / "reads.py")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": path},
    text=True,
  )
  pids = run.stdout.readline().split()
  assert len(pids) == 2
  run.kill()
  run.communicate()
  until = time.monotonic() + 20
  while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
    assert time.monotonic() < until
    time.sleep(0.05)


def test_too_little_shared_memory_is_told_before_it_is_used(monkeypatch):
  usage = type("Usage", (), {"free": 100})
  monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(DataError, match=r"workers=2.*--shm-size.*workers=0"):
    read(batches(2))


def test_without_grain_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(stream.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(DataError, match="pip install 'maestro-lowrank"):
    stream.check()
