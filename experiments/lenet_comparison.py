"""Every method in one loop: LeNet on MNIST, 10 epochs, 50 and 25 % of the MACs.

  python -m experiments.lenet_comparison                    # 60 runs, 3 seeds
  python -m experiments.lenet_comparison --jobs=2 --methods=dense,svd,prox
  python -m experiments.lenet_comparison --smoke --methods=dense,svd

All rows share configs/lenet_od.py: 5 epochs of discover, 5 of settle, one
schedule of the learning rate, one batch size. Every layer is factored in every
row, also where a paper would keep the first and the last dense: the first alone
has 31 % of the MACs. No row was tuned for this table: methods have the weights
of `maestro.methods`, maestro and prox that config's lambda, which was chosen
for maestro on LeNet's validation split at 20 epochs. All reach the MACs by one
rule, `Method.budget`: the ranks that the method chooses are scaled by one
factor to the largest that the budget allows. maestro and prox, which find ranks
in training, do so after discover, and keep smaller ranks than that if they
found them. dense and dylora, whose adapters merge into dense kernels, have no
budget.

Runs go through `python -m maestro.main` into runs/experiments/lenet_comparison/
and can be interrupted; the same command goes on. Results files are kept in
experiments/results/lenet_comparison/, from which the table and
docs/images/lenet_comparison.png are made. Wall clocks compare only runs of one
--jobs. Training MACs leave out decompositions.
"""

import functools
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from absl import flags

from experiments import runs
from maestro import cli
from maestro.errors import UserError
from maestro.methods.table import METHODS as EVERY
from maestro.report import style
from maestro.report import tables as report
from maestro.report.tables import markdown_table

# Those for budgets and any size, which have their own lengths of discover, are
# in any_size.py.
METHODS = [n for n in EVERY if n not in ("nested", "race", "lasso")]
ROOT = pathlib.Path(__file__).parents[1]
BUDGETS = (50, 25)  # percent of the dense network's MACs
UNBUDGETED = ("dense", "dylora")
RUNS = pathlib.Path("runs/experiments")
RESULTS = pathlib.Path("experiments/results/lenet_comparison")
FIGURE = pathlib.Path("docs/images/lenet_comparison.png")


def get_config(arg: str):
  """Returns configs/lenet_od.py for "METHOD,PERCENT[,smoke]"; 100 is no budget.

  This file is a config, too: --config=experiments/lenet_comparison.py:svd,50
  """
  name, percent, *more = arg.split(",")
  module = runpy.run_path(str(ROOT / "configs" / "lenet_od.py"))
  c = module["get_config"](",".join(["maestro", *more])).unlock()
  if not more:
    c.discover.epochs = c.settle.epochs = 5
  method = {"name": name}
  if percent != "100":
    method["budget"] = f"macs:{int(percent) / 100}"
  del c.method
  c.method = method
  return c.lock()


def rows(methods: Sequence[str]) -> list[tuple[str, int]]:
  """Returns (method, percent) of all rows; 100 where there is no budget."""
  free = [(name, 100) for name in methods if name in UNBUDGETED]
  return free + [
    (name, percent)
    for percent in BUDGETS
    for name in methods
    if name not in UNBUDGETED
  ]


Results = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def table(results: Results) -> str:
  """Tabulates means and standard deviations over seeds, in Markdown.

  Training MACs and seconds are relative to the dense row, if there is one.
  """

  def mean(row, *keys):
    values = []
    for one in row:
      for key in keys:
        one = one[key]
      values.append(one)
    return float(np.mean(values))

  dense = results.get(("dense", 100))
  head = ["method", "budget %", "accuracy, test %", "params", "MACs %"]
  head += ["training MACs", "seconds", "seeds"]
  if dense:
    head[5] += " / dense"
  lines = [head]
  for (name, percent), row in results.items():
    scores = [100 * one["final"]["metrics"]["accuracy"] for one in row]
    spread = f" ± {np.std(scores, ddof=1):.2f}" if len(row) > 1 else ""
    train = mean(row, "train", "macs_total")
    share = 100 * mean(row, "final", "macs") / mean(row, "dense", "macs")
    if dense:
      trained = f"{train / mean(dense, 'train', 'macs_total'):.2f}"
    else:
      trained = f"{train:.3g}"
    lines.append(
      [
        name,
        "" if percent == 100 else str(percent),
        f"{np.mean(scores):.2f}{spread}",
        f"{mean(row, 'final', 'params'):,.0f}",
        f"{share:.1f}",
        trained,
        f"{mean(row, 'wall_seconds'):,.0f}",
        str(len(row)),
      ]
    )
  return markdown_table(lines)


def draw(results: Results) -> matplotlib.figure.Figure:
  """Draws test errors, a panel a budget: a dot a seed, a bar at their mean."""
  percents = sorted({p for _, p in results if p != 100}, reverse=True)
  if not percents:
    raise UserError("--methods: none of them has a budget to draw")

  def errors(row):
    # A quarter of an image stands for no errors on the logarithmic axis.
    return [
      max(100 * (1 - one["final"]["metrics"]["accuracy"]), 2.5e-3)
      for one in row
    ]

  dense = results.get(("dense", 100))
  names = list(dict.fromkeys(name for name, p in results if p != 100))
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(8, 1.3 + 0.28 * len(names)), layout="constrained"
    )
    grid = figure.subplots(
      1, len(percents), sharey=True, sharex=True, squeeze=False
    )
    for axes, percent in zip(grid.flat, percents, strict=True):
      for y, name in enumerate(names):
        found = errors(results[name, percent])
        colour = style.COLOURS[1 if name in ("maestro", "prox") else 0]
        axes.plot(found, [y] * len(found), "o", ms=4, alpha=0.5, color=colour)
        axes.plot([np.mean(found)], [y], "|", ms=13, mew=2.2, color=colour)
      if dense:
        axes.axvline(
          np.mean(errors(dense)),
          color=style.INK,
          linewidth=1,
          linestyle=(0, (4, 3)),
          label="dense, 100 %",
        )
      axes.set(
        title=f"at most {percent} % of the dense MACs",
        xlabel="test error (%), logarithmic",
        xscale="log",
      )
      axes.xaxis.set_major_locator(
        matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0))
      )
      axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
      axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
      axes.set_yticks(range(len(names)), names)
      axes.set_ylim(len(names) - 0.5, -0.5)
    if dense:
      handles, labels = grid[0, 0].get_legend_handles_labels()
      figure.legend(handles, labels, loc="outside upper right")
  return figure


def _run(name: str, percent: int, seed: int, smoke: bool) -> dict[str, Any]:
  label = name if percent == 100 else f"{name}_macs{percent}"
  folder = "lenet_comparison_smoke" if smoke else "lenet_comparison"
  workdir = RUNS / folder / f"{label}_seed{seed}"
  config = f"experiments/lenet_comparison.py:{name},{percent}"
  config += ",smoke" if smoke else ""
  runs.run(config, workdir, [f"--config.seed={seed}"])
  results = report.load(workdir)
  if not smoke:
    runs.write_results(RESULTS / f"{label}_seed{seed}.json", results)
  return results


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_integer("seeds", 3, "Seeds of each row.", 1)
  flags.DEFINE_integer("jobs", 1, "Runs at a time.", 1)
  flags.DEFINE_list("methods", METHODS, "Which methods to run.")
  flags.DEFINE_bool("smoke", False, "Two epochs, one seed; not kept.")


def main(argv: list[str]) -> None:
  """Runs what is missing, keeps results, prints the table, draws the figure."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  if unknown := sorted(set(values.methods) - set(METHODS)):
    raise UserError(f"--methods: {unknown} are none of {METHODS}")
  smoke = values.smoke
  seeds = range(1 if smoke else values.seeds)
  chosen = rows(values.methods)
  one = functools.partial(_run, smoke=smoke)
  results = runs.run_rows(one, chosen, seeds, values.jobs)
  print(f"\n{table(results)}")
  if any(percent != 100 for _, percent in chosen):
    figure = RUNS / "lenet_comparison_smoke" / FIGURE.name if smoke else FIGURE
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(figure)
    print(f"\nfigure: {figure}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
