"""Any size from one training: LeNet on MNIST, one nested network and its peers.

  python -m experiments.any_size                       # 3 seeds of every row
  python -m experiments.any_size --rows=nested10,race,fixed --jobs=2
  python -m experiments.any_size --smoke --rows=dense,nested10

Rows, all by the recipe of configs/lenet_od.py in 10 epochs (the learning rate
falls to a tenth after 80 % of them):

  nested10, nested20  ONE network along a chain of levels, in 10 and 20 epochs
  race                a network for each budget: propose, race, settle
  fixed               a network for each budget, of uniform ranks, from scratch
  dense

An epoch of dense warm-up begins race and nested. Ranks are chosen on training
images; the test set is read once, at the end of each run. Runs go through
`python -m maestro.main` into runs/experiments/any_size/ and can be interrupted;
the same command goes on. Results files are kept in
experiments/results/any_size/, from which the table and docs/images/any_size.png
are made: rows that were not run are not shown.
"""

import functools
import json
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from absl import flags

from experiments import runs
from maestro import cli
from maestro.errors import UserError
from maestro.report import style
from maestro.report import tables as report
from maestro.report.tables import markdown_table

ROOT = pathlib.Path(__file__).parents[1]
LEVELS = (80, 60, 50, 40, 25)  # percent of the dense network's MACs
ROWS = ("dense", "nested10", "race", "fixed", "nested20")
RUNS = pathlib.Path("runs/experiments")
RESULTS = pathlib.Path("experiments/results/any_size")
FIGURE = pathlib.Path("docs/images/any_size.png")


def get_config(arg: str):
  """Returns the config of "ROW,PERCENT[,smoke]"; 100 is no budget.

  This file is a config, too: --config=experiments/any_size.py:race,25
  """
  row, percent, *more = arg.split(",")
  module = runpy.run_path(str(ROOT / "configs" / "lenet_od.py"))
  c = module["get_config"](",".join(more)).unlock()
  if not more:
    epochs = 20 if row == "nested20" else 10
    c.discover.epochs, c.settle.epochs = 1, epochs - 1
    # Over the whole run, whatever part of it settles.
    c.settle.schedule.boundaries = ((0.8 * epochs - 1) / (epochs - 1),)
  c.method = row.rstrip("0123456789")
  if c.method == "fixed":  # from scratch: nothing warms up
    c.discover.shrink = False
  if percent != "100":
    c.budget = f"macs:{int(percent) / 100}"
  return c.lock()


def jobs_of(rows: Sequence[str], percents: Sequence[int]) -> list[tuple]:
  """Returns (row, percent) of all runs; 100 where one run has every size."""
  jobs = []
  for row in rows:
    budgeted = row in ("race", "fixed")
    jobs += [(row, p) for p in percents] if budgeted else [(row, 100)]
  return jobs


def sizes_of(results: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
  """{level: (share of the dense MACs, test accuracy), in percent} of a run."""
  dense = results["dense"]["macs"]
  found = results.get("levels") or [
    {"name": "", **results["final"]},
  ]
  return {
    level["name"]: (
      100 * level["macs"] / dense,
      100 * level["metrics"]["accuracy"],
    )
    for level in found
  }


Found = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def points(found: Found) -> dict[str, dict[int, np.ndarray]]:
  """{row: {percent: [seeds, 2], share of the MACs and accuracy}}."""
  curves: dict[str, dict[int, np.ndarray]] = {}
  for (row, percent), seeds in found.items():
    sizes = [sizes_of(results) for results in seeds]
    for name in sizes[0]:
      level = round(100 * float(name.split(":")[1])) if name else percent
      curve = curves.setdefault(row, {})
      curve[level] = np.array([one[name] for one in sizes])
  return curves


def table(found: Found) -> str:
  """Tabulates test accuracies at each budget, in Markdown.

  Training MACs are of all the runs behind a row, relative to the dense one's.
  """
  percents = sorted({p for c in points(found).values() for p in c})[::-1]
  lines = [["row", *(f"{p} %" for p in percents), "training MACs", "seeds"]]
  dense = found.get(("dense", 100))
  for row, curve in points(found).items():
    cells = []
    for percent in percents:
      if percent not in curve:
        cells.append("")
        continue
      scores = curve[percent][:, 1]
      spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
      cells.append(f"{np.mean(scores):.2f}{spread}")
    own = [runs for (name, _), runs in found.items() if name == row]
    macs = [np.mean([r["train"]["macs_total"] for r in runs]) for runs in own]
    cost = f"{np.sum(macs):.3g}"
    if dense:
      one = np.mean([r["train"]["macs_total"] for r in dense])
      cost = f"{np.sum(macs) / one:.2f}"
    lines.append([row, *cells, cost, str(min(len(runs) for runs in own))])
  return markdown_table(lines)


def draw(found: Found) -> matplotlib.figure.Figure:
  """Draws test accuracy against MACs: a dot a seed, a line through means."""
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (row, curve) in enumerate(points(found).items()):
      colour = style.COLOURS[i % len(style.COLOURS)]
      together = row.startswith("nested")
      label = f"{row}: one network" if together else row
      means = [curve[p].mean(axis=0) for p in sorted(curve)]
      line = "-" if together else "--"
      axes.plot(
        *np.transpose(means), line, marker="o", color=colour, label=label
      )
      dots = np.concatenate(list(curve.values()))
      axes.plot(*dots.T, "o", ms=3, alpha=0.4, color=colour)
    axes.set(
      xlabel="MACs of the network (% of dense)", ylabel="test accuracy (%)"
    )
    axes.legend(loc="lower right")
  return figure


def kept() -> Found:
  """The results files that are kept, by row and seed."""
  found: dict[tuple[str, int], list] = {}
  for row, percent in jobs_of(ROWS, LEVELS):
    paths = sorted(RESULTS.glob(f"{row}_{percent}_seed*.json"))
    if paths:
      texts = [path.read_text(encoding="utf-8") for path in paths]
      found[row, percent] = [json.loads(text) for text in texts]
  return found


def _run(row: str, percent: int, seed: int, smoke: bool) -> dict[str, Any]:
  label = f"{row}_{percent}_seed{seed}"
  workdir = RUNS / ("any_size_smoke" if smoke else "any_size") / label
  config = f"experiments/any_size.py:{row},{percent}"
  config += ",smoke" if smoke else ""
  runs.run(config, workdir, [f"--config.seed={seed}"])
  results = report.load(workdir)
  if not smoke:
    runs.write_results(RESULTS / f"{label}.json", results)
  return results


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_integer("seeds", 3, "Seeds of each row.", 1)
  flags.DEFINE_integer("jobs", 1, "Runs at a time.", 1)
  flags.DEFINE_list("rows", list(ROWS), "Which rows to run.")
  flags.DEFINE_list(
    "budgets", list(map(str, LEVELS)), "Percent, of race, fixed."
  )
  flags.DEFINE_bool("smoke", False, "Two epochs, one seed; not kept.")


def main(argv: list[str]) -> None:
  """Runs what is missing, keeps results, prints the table, draws the figure."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  if unknown := sorted(set(values.rows) - set(ROWS)):
    raise UserError(f"--rows: {unknown} are none of {list(ROWS)}")
  if not all(text.isdigit() and 0 < int(text) < 100 for text in values.budgets):
    raise UserError(f"--budgets: {values.budgets} are no percents below 100")
  smoke = values.smoke
  jobs = jobs_of(values.rows, [int(text) for text in values.budgets])
  found: Found = runs.run_rows(
    functools.partial(_run, smoke=smoke),
    jobs,
    range(1 if smoke else values.seeds),
    values.jobs,
  )
  found = found if smoke else kept()
  print(f"\n{table(found)}")
  figure = RUNS / "any_size_smoke" / FIGURE.name if smoke else FIGURE
  figure.parent.mkdir(parents=True, exist_ok=True)
  draw(found).savefig(figure)
  print(f"\nfigure: {figure}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
