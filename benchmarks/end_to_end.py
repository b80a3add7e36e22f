"""Wall clock of whole runs, dense and Maestro in turn, everything included.

  python -m benchmarks.end_to_end --repeat=3
  python -m benchmarks.end_to_end --config=configs/resnet_od.py:short
  python -m benchmarks.end_to_end --config.discover.epochs=2 --out=runs.jsonl
  python -m benchmarks.end_to_end --smoke

Each run is `python -m maestro.main` in a process of its own and a new folder;
the dense ones add --config.method=dense. Every --config.KEY=VALUE reaches both.
The order changes with each repeat. "process" is the time from the start of
Python to its end; the other columns are from results.json: "wall" the run
itself, with reading data, compiling, evaluating and saving; "train" its steps
alone, with the compilation of the first. A ratio is the median over repeats of
Maestro's value over that of the dense run beside it.

--smoke adds the variant "smoke" and runs once. --out appends one JSON line a
run; without it nothing is written, and the folders of the runs are deleted.
"""

import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from benchmarks.train_step import append, machine
from experiments import runs
from maestro import cli
from maestro.errors import UserError
from maestro.report.tables import text_table

METHODS = ("dense", "maestro")
# Column: key of a row, divisor, format, and what the table calls it.
COLUMNS = (
  ("process_seconds", 1, ".1f", "process s"),
  ("wall_seconds", 1, ".1f", "wall s"),
  ("train_seconds", 1, ".1f", "train s"),
  ("examples_per_second", 1, ".0f", "examples/s"),
  ("compilations", 1, ".0f", "compilations"),
  ("macs_total", 1e12, ".3g", "TMACs"),
  ("params", 1, ".0f", "parameters"),
)


def smoke_variant(config: str) -> str:
  """Adds the variant "smoke" to a config's name, which may have variants."""
  return f"{config},smoke" if ":" in config else f"{config}:smoke"


def _run(
  config: str, method: str, workdir: pathlib.Path, overrides: Sequence[str]
) -> dict[str, Any]:
  """Does one run; returns what it took."""
  started = time.perf_counter()
  runs.run(config, workdir, [*overrides, f"--config.method={method}"])
  process_seconds = time.perf_counter() - started
  results = json.loads((workdir / "results.json").read_text())
  trained = results["train"]
  examples = results["steps"] * results["config"]["batch_size"]
  return {
    "method": method,
    "process_seconds": process_seconds,
    "wall_seconds": results["wall_seconds"],
    "train_seconds": examples / trained["examples_per_second"],
    "examples_per_second": trained["examples_per_second"],
    "compilations": trained["compilations"],
    "macs_total": trained["macs_total"],
    "params": results["final"]["params"],
    "macs": results["final"]["macs"],
    "metrics": results["final"]["metrics"],
    "steps": results["steps"],
  }


def measure(
  config: str, workdir: pathlib.Path, *, repeat: int, overrides: Sequence[str]
) -> list[dict[str, Any]]:
  """Runs both methods `repeat` times; returns a row a run, as in the JSON.

  Args:
    config: config file, with its variants after a colon.
    workdir: folder that gets a folder of each run.
    repeat: runs of each method.
    overrides: more arguments, e.g. "--config.discover.lam=1e-3".
  """
  rows = []
  for i in range(repeat):
    for method in METHODS if i % 2 == 0 else reversed(METHODS):
      row = _run(config, method, workdir / f"{method}{i}", overrides)
      about = {"benchmark": "end_to_end", "config": config, "repeat": i}
      rows.append(about | {"overrides": list(overrides)} | row | machine())
  return rows


def ratio(rows: Sequence[Mapping[str, Any]], key: str) -> float:
  """Median over repeats of Maestro's value over the dense run's."""
  values = {(row["method"], row["repeat"]): row[key] for row in rows}
  return statistics.median(
    value / values["dense", repeat]
    for (method, repeat), value in values.items()
    if method == "maestro"
  )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Lays out the medians of both methods, and their ratios, as text."""
  first, n = rows[0], 1 + max(row["repeat"] for row in rows)
  cells = [["", *(heading for *_, heading in COLUMNS)]]
  for method in METHODS:
    mine = [row for row in rows if row["method"] == method]
    cells.append([method])
    for key, scale, form, _ in COLUMNS:
      median = statistics.median(row[key] for row in mine)
      cells[-1].append(format(median / scale, form))
  cells.append(["ratio", *(f"{ratio(rows, key):.3f}" for key, *_ in COLUMNS)])
  head = (
    f"{first['config']}, {first['device']}, {first['cores']} cores,"
    f" JAX {first['jax']}, median of {n}"
  )
  return f"{head}\n{text_table(cells)}"


def main(argv: list[str]) -> None:
  """Runs what the flags say and prints the table."""
  values = flags.FLAGS
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  config = config_flags.get_config_filename(values["config"])
  changed = config_flags.get_override_values(values["config"])
  if "method" in changed:
    raise UserError("--config.method: both methods are run; leave it out")
  overrides = [f"--config.{key}={value}" for key, value in changed.items()]
  if values.smoke:
    config = smoke_variant(config)
  if values.out:
    append([], values.out)
  with tempfile.TemporaryDirectory() as folder:
    rows = measure(
      config,
      pathlib.Path(folder),
      repeat=1 if values.smoke else values.repeat,
      overrides=overrides,
    )
  if values.out:
    append(rows, values.out)
  print(table(rows))


def define_flags() -> None:
  """Defines the flags; called only as a program, as others use the names."""
  config_flags.DEFINE_config_file(
    "config",
    "configs/lenet_od.py:maestro",
    "Config file, with variants after a colon.",
  )
  flags.DEFINE_integer("repeat", 1, "Runs of each method.", lower_bound=1)
  flags.DEFINE_bool("smoke", False, "Two short runs, to try it.")
  flags.DEFINE_string("out", None, "File to append JSON lines to.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
