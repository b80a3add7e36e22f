"""Host memory and time of saving a state that is split over processes.

  python -m benchmarks.sharded_save               # 2 processes, 512 MiB
  python -m benchmarks.sharded_save --processes=4 --mib=1024
  python -m benchmarks.sharded_save --smoke

A state of float32 matrices is split over processes, one CPU device each, which
save it in two ways: "parts", `maestro.runs.checkpoint`, where each writes what
it has, and "gathered", where each first gets the whole of every array, as it
takes to write one file from one host. "extra" is the largest resident memory
during the save, less that before it, as a multiple of the process's own part.
The last column is the bar that parts must meet.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from benchmarks.train_step import append, machine
from maestro import cli
from maestro.errors import UserError
from maestro.parallel.loopback import Command
from maestro.report.tables import text_table

WAYS = ("parts", "gathered")
BAR = 1.3  # of a process's own part, by parts

# Each process of the measurement is this program.
_PROGRAM = """
import sys
from benchmarks import sharded_save
sharded_save.one(*sys.argv[1:])
"""


def _resident() -> tuple[float, float]:
  """Resident memory now, and its peak since `_reset`, in MiB."""
  text = pathlib.Path("/proc/self/status").read_text()
  sizes = dict(line.split(":", 1) for line in text.splitlines())
  return tuple(int(sizes[k].split()[0]) / 1024 for k in ("VmRSS", "VmHWM"))


def _reset() -> None:
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def one(way: str, mib: str, *place: str) -> None:
  """Saves from one process, and prints what it took as JSON."""
  options = dict(word.removeprefix("--").split("=", 1) for word in place)
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  from maestro.parallel import processes
  from maestro.parallel.mesh import MeshShape, make_mesh, put
  from maestro.runs.checkpoint import Checkpoints

  count = int(options["num_processes"])
  processes.join(
    processes.Join(
      coordinator=options["coordinator"],
      num_processes=count,
      process_id=int(options["process_id"]),
    )
  )
  with processes.ending():
    mesh = make_mesh(MeshShape(data=1, fsdp=count))
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    rows = 128 * count
    columns = max(int(mib) * 2**20 // (4 * 8 * rows), 1)
    zeros = np.broadcast_to(np.float32(0), (rows, columns))
    make = jax.jit(lambda x, i: x + i, out_shardings=sharding)
    state = {str(i): make(put(zeros, sharding), i) for i in range(8)}
    jax.block_until_ready(state)
    own = sum(x.addressable_shards[0].data.nbytes for x in state.values())
    with Checkpoints(options["workdir"]) as checkpoints:
      checkpoints.save(1, {"warm": make(put(zeros, sharding)[:, :1], 1)}, {})
      _reset()
      before, _ = _resident()
      began = time.perf_counter()
      if way == "gathered":
        gathered = multihost_utils.process_allgather(state, tiled=True)
        state = {name: np.asarray(x) for name, x in gathered.items()}
      checkpoints.save(2, state, {})
      seconds = time.perf_counter() - began
      _, peak = _resident()
    row = {"way": way, "own_mib": own / 2**20, "seconds": seconds}
    row |= {"before_mib": before, "peak_mib": peak, "processes": count}
    row["extra"] = (peak - before) / row["own_mib"]
    # Of others than the first, stdout is closed.
    print(json.dumps(row), file=sys.stderr, flush=True)


def measure(way: str, mib: int, count: int) -> dict[str, Any]:
  """Saves in one way; returns the row of the process that took most."""
  command = Command([sys.executable, "-c", _PROGRAM, way, str(mib)], count)
  with tempfile.TemporaryDirectory() as folder:
    started = [
      subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
      )
      for line in command.lines(pathlib.Path(folder) / "checkpoints")
    ]
    said = [process.communicate()[1] for process in started]
  rows = []
  for process, text in zip(started, said, strict=True):
    lines = [x for x in text.splitlines() if x.startswith('{"way"')]
    if process.returncode or not lines:
      raise UserError(f"a process ended with {process.returncode}:\n{text}")
    rows.append(json.loads(lines[0]))
  return max(rows, key=lambda row: row["extra"])


def table(rows: list[dict[str, Any]]) -> str:
  """Lays the rows out as text."""
  cells = [
    [
      row["way"],
      str(row["processes"]),
      f"{row['own_mib']:.0f}",
      f"{row['before_mib']:.0f}",
      f"{row['peak_mib']:.0f}",
      f"{row['extra']:.2f}",
      f"{row['seconds']:.2f}",
      f"<= {BAR}" if row["way"] == "parts" else "",
    ]
    for row in rows
  ]
  head = ["way", "processes", "own MiB", "before MiB", "peak MiB", "extra"]
  return text_table([[*head, "s", "bar"], *cells])


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_integer("mib", 512, "Size of the state.", lower_bound=1)
  flags.DEFINE_integer("processes", 2, "How many.", lower_bound=2)
  flags.DEFINE_string("out", None, "Appends a JSON line for each row.")
  flags.DEFINE_bool("smoke", False, "Saves 16 MiB.")


def main(argv: list[str]) -> None:
  """Measures both ways, as the flags say."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  if values.out:
    append([], values.out)
  mib = 16 if values.smoke else values.mib
  rows = []
  for way in WAYS:
    print(f"{way}: {values.processes} processes save {mib} MiB ...", flush=True)
    rows.append(measure(way, mib, values.processes))
    if values.out:
      append([rows[-1] | machine()], values.out)
  print(f"\n{table(rows)}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
