"""The exact proximal step against the thresholded lasso: LeNet on MNIST.

  python -m experiments.prox_lasso                  # 24 runs of 10 epochs
  python -m experiments.prox_lasso --jobs=2         # two at a time
  python -m experiments.prox_lasso --smoke          # two epochs, to try it

Trains LeNet by the methods maestro (lasso in the loss, importances below a
threshold are dropped) and prox (an exact step, zeros are counted) at the same
four lambdas, three seeds each, on the recipe of `experiments.lenet_comparison`
without a budget, with that config's threshold, 1e-5. For every point of the
lasso, the parameters that the proximal step needs for the same test accuracy
are read off its curve: means over seeds, straight lines in the logarithm of the
parameters.

Runs go through `python -m maestro.main` into runs/experiments/prox_lasso/ and
can be interrupted; the same command goes on. Results files are kept in
experiments/results/prox_lasso/, from which the tables and
docs/images/prox_lasso.png are made.
"""

import functools
import itertools
import math
import pathlib
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
from maestro.report import style
from maestro.report import tables as report
from maestro.report.tables import markdown_table

CONFIG = "experiments/lenet_comparison.py"
METHODS = {"maestro": "lasso, threshold", "prox": "proximal step, exact zeros"}
LAMBDAS = ("1e-3", "1.5e-3", "3e-3", "6e-3")
RUNS = pathlib.Path("runs/experiments")
RESULTS = pathlib.Path("experiments/results/prox_lasso")
FIGURE = pathlib.Path("docs/images/prox_lasso.png")

Results = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def _values(row: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
  """Returns (parameters, test accuracies in %) of the seeds of a row."""
  params = [one["final"]["params"] for one in row]
  scores = [100 * one["final"]["metrics"]["accuracy"] for one in row]
  return np.array(params, float), np.array(scores)


def params_at(
  accuracy: float, params: Sequence[float], accuracies: Sequence[float]
) -> float | None:
  """Fewest parameters that reach an accuracy on a curve through given points.

  Straight lines in log(params) between neighbours in size. None above the best
  point; the smallest point where that is already as accurate.
  """
  points = sorted(zip(params, accuracies, strict=True))
  if points[0][1] >= accuracy:
    return float(points[0][0])
  for (p0, a0), (p1, a1) in itertools.pairwise(points):
    if a0 < accuracy <= a1:
      share = (accuracy - a0) / (a1 - a0)
      return float(math.exp(math.log(p0) + share * math.log(p1 / p0)))
  return None


def compare(results: Results) -> list[dict[str, Any]]:
  """At each lasso point, the proximal step's parameters at equal accuracy."""
  names = list(METHODS)
  curves: dict[str, list[tuple[str, float, float]]] = {n: [] for n in names}
  for (name, lam), row in results.items():
    params, scores = _values(row)
    mean = math.exp(np.mean(np.log(params)))
    curves[name].append((lam, mean, float(np.mean(scores))))
  _, prox_params, prox_scores = zip(*curves["prox"], strict=True)
  found = []
  for lam, params, accuracy in curves["maestro"]:
    other = params_at(accuracy, prox_params, prox_scores)
    found.append(
      {
        "lam": lam,
        "accuracy": accuracy,
        "lasso": params,
        "prox": other,
        "ratio": None if other is None else other / params,
      }
    )
  return found


def table(results: Results) -> str:
  """Tabulates all rows, then the comparison at equal accuracy, in Markdown."""
  lines = [["method", "lambda", "accuracy, test %", "params", "MACs %"]]
  for (name, lam), row in results.items():
    params, scores = _values(row)
    macs = [100 * one["final"]["macs"] / one["dense"]["macs"] for one in row]
    spread = [
      f" ± {np.std(x, ddof=1):,.{digits}f}" if len(row) > 1 else ""
      for x, digits in ((scores, 2), (params, 0))
    ]
    lines.append(
      [
        name,
        lam,
        f"{np.mean(scores):.2f}{spread[0]}",
        f"{np.mean(params):,.0f}{spread[1]}",
        f"{np.mean(macs):.1f}",
      ]
    )
  equal = [["accuracy, test %", "params: lasso", "prox", "ratio"]]
  for one in compare(results):
    reached = one["prox"] is not None
    equal.append(
      [
        f"{one['accuracy']:.2f}",
        f"{one['lasso']:,.0f}",
        f"{one['prox']:,.0f}" if reached else "not reached",
        f"{one['ratio']:.2f}" if reached else "",
      ]
    )
  return "\n\n".join(map(markdown_table, (lines, equal)))


def draw(results: Results) -> matplotlib.figure.Figure:
  """Draws test error over parameters: a dot a seed, lines through the means."""
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, label), colour in zip(
      METHODS.items(), style.COLOURS, strict=False
    ):
      means = []
      for (method, _), row in results.items():
        if method != name:
          continue
        params, scores = _values(row)
        axes.plot(
          params, 100 - scores, "o", ms=4, alpha=0.45, mew=0, color=colour
        )
        means.append((math.exp(np.mean(np.log(params))), 100 - np.mean(scores)))
      axes.plot(
        *zip(*sorted(means), strict=True), "-", color=colour, label=label
      )
    axes.set(xscale="log", xlabel="parameters", ylabel="test error (%)")
    axes.xaxis.set_major_locator(
      matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0))
    )
    axes.xaxis.set_major_formatter(
      matplotlib.ticker.StrMethodFormatter("{x:,.0f}")
    )
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.legend()
  return figure


def _run(name: str, lam: str, seed: int, smoke: bool) -> dict[str, Any]:
  folder = "prox_lasso_smoke" if smoke else "prox_lasso"
  workdir = RUNS / folder / f"{name}_lam{lam}_seed{seed}"
  config = f"{CONFIG}:{name},100" + (",smoke" if smoke else "")
  overrides = [f"--config.discover.lam={lam}", f"--config.seed={seed}"]
  runs.run(config, workdir, overrides)
  results = report.load(workdir)
  if not smoke:
    runs.write_results(RESULTS / f"{workdir.name}.json", results)
  return results


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_integer("seeds", 3, "Seeds of each row.", 1)
  flags.DEFINE_integer("jobs", 1, "Runs at a time.", 1)
  flags.DEFINE_bool("smoke", False, "Two epochs, one seed; not kept.")


def main(argv: list[str]) -> None:
  """Runs what is missing, keeps results, prints tables, draws the figure."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  smoke = flags.FLAGS.smoke
  seeds = range(1 if smoke else flags.FLAGS.seeds)
  rows = [(name, lam) for lam in LAMBDAS for name in METHODS]
  one = functools.partial(_run, smoke=smoke)
  results = runs.run_rows(one, rows, seeds, flags.FLAGS.jobs)
  figure = RUNS / "prox_lasso_smoke" / FIGURE.name if smoke else FIGURE
  figure.parent.mkdir(parents=True, exist_ok=True)
  draw(results).savefig(figure)
  print(f"\n{table(results)}\n\nfigure: {figure}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
