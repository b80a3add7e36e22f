"""Photographs a second through the input of ImageNet, beside a bare loop.

  python -m benchmarks.photographs             # on a synthetic set, made first
  python -m benchmarks.photographs --data_dir=DIR      # the real one
  python -m benchmarks.photographs --smoke

The bare loop, the peer, is what would be written with Pillow and nothing else:
a process a core, each of which decodes JPEGs that lie in its memory, crops them
at random, scales the crop, mirrors half of them and stacks them; no files, no
order, no batches handed over, no shared memory. The others are what feeds a
training step: `maestro.data.stream` over record files, by threads of this
process or by worker processes, one a core. Photographs a second and
the ratio to the bare loop of the same round: medians over rounds. Worker
processes are started and warm before a clock runs.
"""

import contextlib
import functools
import io
import json
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from benchmarks.train_step import append, machine
from experiments import photographs as synthetic
from maestro import cli, data
from maestro.data import photos, stream
from maestro.errors import UserError
from maestro.report.tables import text_table

_BATCH = 64


def bare_batch(encoded: Sequence[bytes], size: int, seed: int) -> np.ndarray:
  """Decodes, crops, scales, mirrors and stacks: Pillow and NumPy alone."""
  random, out = np.random.default_rng(seed), []
  for content in encoded:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    box = photos.random_box(random, *image.size)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    out.append(pixels[:, ::-1] if random.random() < 0.5 else pixels)
  return np.stack(out)


def _timed_batches(work: tuple[Sequence[bytes], int, int, int]) -> float:
  encoded, size, seed, count = work
  began = time.perf_counter()
  for i in range(count):
    bare_batch(encoded, size, seed + i)
  return time.perf_counter() - began


@contextlib.contextmanager
def bare(
  encoded: Sequence[bytes], size: int, processes: int, count: int
) -> Iterator[Callable[[], float]]:
  """Yields the peer: () -> photographs a second of all processes."""
  with multiprocessing.get_context("spawn").Pool(processes) as pool:
    pool.map(_timed_batches, [(encoded[:2], size, 0, 1)] * processes, 1)

    def run() -> float:
      each = -(-count // processes)
      works = [(encoded, size, 1000 * i, each) for i in range(processes)]
      seconds = pool.map(_timed_batches, works, 1)
      return each * processes * len(encoded) / max(seconds)

    yield run


@contextlib.contextmanager
def streamed(
  dataset: data.Dataset, workers: int, count: int, rounds: int
) -> Iterator[Callable[[], float]]:
  """Yields the input of a training: () -> photographs a second."""
  assert dataset.stream is not None
  per_epoch = len(dataset.train) // _BATCH
  # What is read ahead is not waited for: some batches before each clock, and
  # none after the last.
  lead = 8 * max(workers, 1)
  steps = (rounds + 1) * (count + lead)
  batches = stream.Batches(
    stream=data.dataset.Stream(dataset.stream.examples, workers),
    seed=0,
    size=len(dataset.train),
    batch_size=_BATCH,
    steps_per_epoch=per_epoch,
    steps=steps,
    part=np.arange(_BATCH),
  )
  with stream.read_ahead(batches, 0) as ahead:

    def take(n: int) -> None:
      for _ in range(n):
        next(ahead)

    take(lead)

    def run() -> float:
      # Drained: what was read while others were measured is not counted.
      take(lead)
      began = time.perf_counter()
      take(count)
      return count * _BATCH / (time.perf_counter() - began)

    yield run


def measure(
  root: pathlib.Path, size: int, count: int, rounds: int
) -> list[dict[str, Any]]:
  """Measures the peer and both ways to feed a step, in turns.

  Only one runs at a time: those that read ahead are full and wait meanwhile.

  Args:
    root: where the set is.
    size: of the squares.
    count: batches of 64 a round.
    rounds: of which the median is taken.
  """
  cores = photos.cores()
  dataset = data.make("imagenet2012", data_dir=root, size=size, val_examples=10)
  assert dataset.stream is not None
  few = dataset.stream.examples.photos.read(range(_BATCH))
  encoded = [example["image"] for example in few]
  ways = {
    "bare loop": functools.partial(bare, encoded, size, cores, count),
    "threads": functools.partial(streamed, dataset, 0, count, rounds),
    f"{cores} workers": functools.partial(
      streamed, dataset, cores, count, rounds
    ),
  }
  found: dict[str, list[float]] = {name: [] for name in ways}
  with contextlib.ExitStack() as stack:
    runs = {name: stack.enter_context(way()) for name, way in ways.items()}
    for i in range(rounds):
      for name, run in runs.items():
        found[name].append(run())
      print(f"round {i + 1} of {rounds}", flush=True)
  peer = found["bare loop"]
  return [
    {
      "benchmark": "photographs",
      "way": name,
      "size": size,
      "bytes": statistics.mean(map(len, encoded)),
      "photographs_per_second": statistics.median(rates),
      "ratio": statistics.median(
        a / b for a, b in zip(rates, peer, strict=True)
      ),
    }
    for name, rates in found.items()
  ]


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Lays the rows out as text."""
  cells = [["way", "size", "kB each", "photographs/s", "of the bare loop"]]
  for row in rows:
    cells.append(
      [
        *(row["way"], str(row["size"]), f"{row['bytes'] / 1e3:.0f}"),
        *(f"{row['photographs_per_second']:.0f}", f"{row['ratio']:.2f}"),
      ]
    )
  return text_table(cells)


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_string(
    "data_dir", None, "Where imagenet2012 is; None makes a synthetic one."
  )
  flags.DEFINE_integer("size", 224, "Of the squares.", 8)
  flags.DEFINE_integer("batches", 16, "Of 64, a round.", 1)
  flags.DEFINE_integer("rounds", 5, "Of which the median is taken.", 1)
  flags.DEFINE_bool("smoke", False, "Few and once, to see that it runs.")
  flags.DEFINE_string("out", None, "Appends a JSON line for each row.")


def main(argv: list[str]) -> None:
  """Measures and prints."""
  values = flags.FLAGS
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  if values.out:
    append([], values.out)
  count, rounds = (2, 1) if values.smoke else (values.batches, values.rounds)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(values.data_dir or folder)
    if not values.data_dir:
      print("making a synthetic set", flush=True)
      synthetic.write(root, 90 if values.smoke else 600, 10)
    rows = measure(root, values.size, count, rounds)
  rows = [row | machine() for row in rows]
  for row in rows:
    print(json.dumps(row), flush=True)
  print(f"\n{table(rows)}")
  if values.out:
    append(rows, values.out)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
