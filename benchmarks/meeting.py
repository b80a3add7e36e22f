"""Time for many processes to meet and to agree, over one machine's loopback.

  python -m benchmarks.meeting                    # 2, 32 and 256 processes
  python -m benchmarks.meeting --processes=1024
  python -m benchmarks.meeting --smoke

Threads of this process stand for processes: no JAX starts, no network is in
between, and all of their work shares one interpreter. "meet" is
the roll call of `maestro.parallel.roll_call`; "agree" an exchange of --kib that
all say alike, as of a config; "differ", its peer, one in which every text is
another and so goes to everyone. Seconds, the median of three.
"""

import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from benchmarks.train_step import append, machine
from maestro import cli
from maestro.errors import UserError
from maestro.parallel.roll_call import Line, Place
from maestro.report.tables import text_table

_PATIENCE = 300.0  # seconds


def together(calls: Sequence[Callable[[], Any]]) -> tuple[float, list[Any]]:
  """Calls all at once, each in a thread; returns the seconds, and results."""
  results: list[Any] = [None] * len(calls)

  def run(i: int) -> None:
    results[i] = calls[i]()

  threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
  began = time.perf_counter()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return time.perf_counter() - began, results


def measure(count: int, kib: int) -> dict[str, Any]:
  """Lets `count` processes meet, agree and differ, over texts of `kib` KiB."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  meet, lines = together(
    [
      lambda i=i: Line(Place("127.0.0.1", port, count, i), _PATIENCE, _PATIENCE)
      for i in range(count)
    ]
  )

  def exchange(text: Callable[[int], str]) -> float:
    calls = [
      lambda line=line, i=i: line.exchange(text(i).ljust(kib << 10))
      for i, line in enumerate(lines)
    ]
    return statistics.median(together(calls)[0] for _ in range(3))

  row = {
    "processes": count,
    "kib": kib,
    "meet": meet,
    "agree": exchange(lambda i: ""),
    "differ": exchange(str),
  }
  for line in reversed(lines):  # process 0 last, as others would miss it
    line.leave()
  return row


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Lays the rows out as text."""
  cells = [["processes", "KiB", "meet", "agree", "differ", "agree / differ"]]
  for row in rows:
    cells.append(
      [
        *(str(row["processes"]), str(row["kib"])),
        *(f"{row[k]:.3f}" for k in ("meet", "agree", "differ")),
        f"{row['agree'] / row['differ']:.2f}",
      ]
    )
  return text_table(cells)


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_multi_integer(
    "processes", [2, 32, 256], "How many meet.", lower_bound=2
  )
  flags.DEFINE_integer("kib", 5, "Of what each says.", lower_bound=1)
  flags.DEFINE_bool("smoke", False, "Two, to see that it runs.")
  flags.DEFINE_string("out", None, "Appends a JSON line for each row.")


def main(argv: list[str]) -> None:
  """Measures and prints."""
  values = flags.FLAGS
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  if values.out:
    append([], values.out)
  rows = []
  for count in [2] if values.smoke else values.processes:
    rows.append(measure(count, values.kib) | machine())
    print(json.dumps(rows[-1]), flush=True)
  print(f"\n{table(rows)}")
  if values.out:
    append(rows, values.out)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
