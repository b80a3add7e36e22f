"""The paper's figure 3 on LeNet: ranks over training, nested across lambda.

  python -m experiments.rank_evolution              # four runs of 20 epochs
  python -m experiments.rank_evolution --epochs=10  # shorter ones
  python -m experiments.rank_evolution --jobs=2     # two at a time
  python -m experiments.rank_evolution --smoke      # one epoch, to try it

Trains LeNet on MNIST on the paper's schedule (configs/lenet_od.py:paper), one
seed, at four lambdas, through `python -m maestro.main` into
runs/experiments/rank_evolution/; can be interrupted, the same command goes on.
Each lambda's ranks after every epoch are kept in
experiments/results/rank_evolution/, from which docs/images/rank_evolution.png
and the count of nested pairs are made: of two neighbouring lambdas, the larger
should leave each layer no more components than the smaller.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
from absl import flags

from experiments import runs
from maestro import cli
from maestro.errors import UserError
from maestro.report import style
from maestro.report import tables as report
from maestro.runs import metrics

CONFIG = "configs/lenet_od.py"
LAMBDAS = ("1e-4", "3e-4", "1e-3", "3e-3")
RUNS = pathlib.Path("runs/experiments")
RESULTS = pathlib.Path("experiments/results/rank_evolution")
FIGURE = pathlib.Path("docs/images/rank_evolution.png")

_COLOURS = ("#9ecae1", "#4292c6", "#08519c", "#021d40")  # light: small lambda


def ranks_by_epoch(
  records: Sequence[Mapping[str, Any]], layers: Sequence[str]
) -> dict[str, list[int]]:
  """Reads a run's ranks from its metrics: {layer or "total": [epochs + 1]}.

  Epoch 0 is the start of training, at full rank.

  Raises:
    UserError: an epoch has no record, as when a run did not finish.
  """
  found = {r["epoch"]: r for r in records if "rank/total" in r}
  if list(found) != list(range(len(found))) or not found:
    raise UserError(
      f"metrics: ranks stand for epochs {list(found)}, not for 0, 1, 2, ...;"
      " delete the run's workdir and start again"
    )
  return {
    name: [record[f"rank/{name}"] for record in found.values()]
    for name in (*layers, "total")
  }


def nested(
  finals: Sequence[Mapping[str, int]],
) -> tuple[int, int, list[tuple[int, str]]]:
  """Counts how often ranks are nested across neighbouring lambdas.

  Args:
    finals: {layer: rank} of runs in the order of rising lambda.

  Returns:
    (pairs of a layer and two neighbours in which the larger lambda has no
    more components, all pairs, [(index of the larger lambda, layer) that
    fails]).
  """
  pairs = [
    (i, layer, finals[i][layer] <= finals[i - 1][layer])
    for i in range(1, len(finals))
    for layer in finals[i]
  ]
  failed = [(i, layer) for i, layer, holds in pairs if not holds]
  return len(pairs) - len(failed), len(pairs), failed


def collect(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads what is kept of one finished run."""
  results = report.load(workdir)
  records = metrics.read(workdir)
  layers = results["layers"]
  keys = ("config", "git", "device", "jax", "seed", "wall_seconds", "dense")
  return {key: results[key] for key in keys} | {
    "full_ranks": {x["path"]: x["full_rank"] for x in layers},
    "ranks": ranks_by_epoch(records, [x["path"] for x in layers]),
    "val_accuracy": [r["val/accuracy"] for r in records if "val/accuracy" in r],
    "final": results["final"],
  }


def draw(results: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
  """Draws a panel for each layer and one for the total, a line a lambda."""
  names = list(results[0]["ranks"])
  columns = 3
  rows = -(-len(names) // columns)
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(8, 2.35 * rows + 0.4), layout="constrained"
    )
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
      for one, colour in zip(results, _COLOURS, strict=False):
        ranks = one["ranks"][name]
        axes.plot(
          range(len(ranks)),
          ranks,
          marker=".",
          markersize=4.5,
          color=colour,
          label=f"λ = {one['config']['discover']['lam']:g}",
        )
      axes.set_title(f"{name}, full rank {results[0]['ranks'][name][0]}")
      axes.set_ylim(0, 1.06 * results[0]["ranks"][name][0])
      axes.set_xlim(0, None)
      for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    for axes in grid.flat[len(names) :]:
      axes.set_visible(False)
    for axes in grid[-1]:
      axes.set_xlabel("epoch")
    for axes in grid[:, 0]:
      axes.set_ylabel("rank")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
      handles, labels, loc="outside upper center", ncols=len(results)
    )
  return figure


def table(results: Sequence[Mapping[str, Any]]) -> str:
  """Tabulates final ranks, accuracy and cost, and says how many are nested."""
  names = list(results[0]["ranks"])
  rows = [["lambda", *names, "test %", "params", "MACs"]]
  for one in results:
    final = one["final"]
    ranks = [str(one["ranks"][n][-1]) for n in names]
    rows.append(
      [
        f"{one['config']['discover']['lam']:g}",
        *ranks,
        f"{100 * final['metrics']['accuracy']:.2f}",
        f"{final['params']:,}",
        f"{final['macs']:,}",
      ]
    )
  finals = [
    {n: one["ranks"][n][-1] for n in names if n != "total"} for one in results
  ]
  held, total, failed = nested(finals)
  lines = [
    *report.align(rows),
    "",
    f"nested: {held} of {total} (layer, neighbouring lambdas)",
  ]
  for i, layer in failed:
    small, large = finals[i - 1][layer], finals[i][layer]
    lams = [results[j]["config"]["discover"]["lam"] for j in (i - 1, i)]
    lines.append(
      f"  not {layer}: {small} at {lams[0]:g}, {large} at {lams[1]:g}"
    )
  return "\n".join(lines)


def _run(lam: str) -> dict[str, Any]:
  folder = "rank_evolution_smoke" if flags.FLAGS.smoke else "rank_evolution"
  epochs = 1 if flags.FLAGS.smoke else flags.FLAGS.epochs
  workdir = RUNS / folder / f"lam{lam}_epochs{epochs}"
  overrides = [
    f"--config.discover.lam={lam}",
    f"--config.discover.epochs={epochs}",
  ]
  runs.run(f"{CONFIG}:paper", workdir, overrides)
  return collect(workdir)


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_integer("epochs", 20, "Epochs of each run.", 1)
  flags.DEFINE_integer("jobs", 1, "Runs at a time.", 1)
  flags.DEFINE_bool("smoke", False, "One epoch at two lambdas; not kept.")


def main(argv: list[str]) -> None:
  """Runs what is missing, keeps the ranks, draws the figure."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  lambdas = LAMBDAS[-2:] if flags.FLAGS.smoke else LAMBDAS
  results = runs.run_all(_run, [(lam,) for lam in lambdas], flags.FLAGS.jobs)
  smoke = RUNS / "rank_evolution_smoke"
  figure = smoke / FIGURE.name if flags.FLAGS.smoke else FIGURE
  if not flags.FLAGS.smoke:
    for lam, one in zip(lambdas, results, strict=True):
      runs.write_results(RESULTS / f"lam{lam}.json", one)
  figure.parent.mkdir(parents=True, exist_ok=True)
  draw(results).savefig(figure)
  print(f"\n{table(results)}\n\nfigure: {figure}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
