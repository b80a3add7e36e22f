"""LeNet on MNIST: models of five sizes from one run, by every rule for ranks.

  python -m experiments.deploy                 # two runs, then all budgets
  python -m experiments.deploy --smoke         # one epoch each, to try it

Trains LeNet with ordered dropout alone (lambda = 0, nothing shrinks, nothing
settles) for 10 epochs, and dense for 10 epochs of the same recipe, whose
kernels are then decomposed by plain SVD. Both are cut to 80, 60, 50, 40 and
25 % of the dense MACs by each rule of `maestro.allocate`, without any training
afterwards. Rules measure on training examples; validation loss compares; the
test split is only reported. Writes experiments/results/deploy/deploy.json and
docs/images/deploy.png; exit code 1 if a check at the end fails.
"""

import dataclasses
import pathlib
import sys
import time

import matplotlib
import matplotlib.figure
from absl import flags

from experiments import runs
from maestro import cli, lowrank
from maestro import data as data_lib
from maestro.cost import profiles as budget
from maestro.deploy import choose as allocate
from maestro.errors import UserError
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.report import style
from maestro.report import tables as report
from maestro.runs import provenance
from maestro.runs import workdir as workdir_lib
from maestro.training import build, opened

CONFIG = "configs/lenet_od.py:maestro"
RECIPE = [
  "--config.discover.lam=0",
  "--config.discover.shrink=False",
  "--config.settle.epochs=0",
]
FRACTIONS = (0.8, 0.6, 0.5, 0.4, 0.25)
BATCH = 2048  # training examples on which greedy and dp measure
SOURCES = {
  "ordered": "ordered dropout, λ = 0",
  "svd": "SVD of the dense network",
}
RESULTS = pathlib.Path("experiments/results/deploy")
IMAGE = pathlib.Path("docs/images/deploy.png")


def _decomposed(run: opened.Run) -> opened.Run:
  """Decomposes a dense run by plain SVD."""
  params = lowrank.decompose(run.params, [lowrank.Rule()], run.layers)
  return dataclasses.replace(
    run, params=params, ranks=lowrank.full_ranks(params)
  )


def _rows(source: str, run: opened.Run, dataset, smoke: bool) -> list[dict]:
  """Cuts one network by every rule; validation and test scores of each."""
  budgets = [f"macs:{f}" for f in FRACTIONS]
  mesh = make_mesh(MeshShape(data=1))
  evaluate = build.make_evaluator(run.config, run.model, dataset, mesh)
  rows = []
  for rule in allocate.RULES:
    start = time.monotonic()
    cut = allocate.allocate(
      run,
      budgets,
      dataset,
      rule=rule,
      batch=256 if smoke else BATCH,
      evaluations=40 if smoke else None,
    )
    seconds = time.monotonic() - start
    for row in cut if rule == allocate.RULES[0] else cut[1:]:
      tree = budget.parse_profile(row, run.layers, run.params, run.ranks)
      small = lowrank.extract(run.params, tree, run.layers)
      test = evaluate({"params": small}, dataset.test)
      rows.append(
        {"source": source, "rule": rule if row["budget"] else None}
        | row
        | {f"test_{name}": value for name, value in test.items()}
      )
    print(f"{source}, {rule}: {seconds:.0f} s", flush=True)
  return rows


def _find(rows: list[dict], source: str, rule: str | None, fraction) -> dict:
  name = None if fraction is None else f"macs:{fraction}"
  return next(
    r
    for r in rows
    if (r["source"], r["rule"], r["budget"]) == (source, rule, name)
  )


def _table(rows: list[dict], key: str, scale: float, form: str) -> str:
  cells = [["source, rule", "whole", *(f"{f:.0%}" for f in FRACTIONS)]]
  for source in SOURCES:
    for rule in allocate.RULES:
      chosen = [_find(rows, source, None, None)]
      chosen += [_find(rows, source, rule, f) for f in FRACTIONS]
      values = [format(scale * r[key], form) for r in chosen]
      cells.append([f"{source}, {rule}", *values])
  return report.text_table(cells)


def _checks(rows: list[dict]) -> list[dict]:
  """Compares validation losses with the bars."""
  checks = []

  def loss(source, rule, f):
    return _find(rows, source, rule, f)["loss"]

  for rule in ("greedy", "dp"):
    gaps = {
      f: loss("ordered", rule, f) - loss("ordered", "uniform", f)
      for f in FRACTIONS
    }
    behind = {
      f: loss("ordered", rule, f) - loss("svd", rule, f)
      for f in FRACTIONS
      if f <= 0.6
    }
    checks += [
      {
        "check": f"{rule} is at most 0.005 nats above uniform everywhere",
        "ok": max(gaps.values()) <= 0.005,
        "largest": max(gaps.values()),
      },
      {
        "check": f"{rule} is below uniform at 40 % and 25 %",
        "ok": max(gaps[0.4], gaps[0.25]) < 0,
        "largest": max(gaps[0.4], gaps[0.25]),
      },
      {
        "check": f"{rule}: ordered is below the SVD at 60 % and less",
        "ok": max(behind.values()) < 0,
        "largest": max(behind.values()),
      },
    ]
  return checks


def _draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draws test accuracy against MACs, a panel for each source."""
  colours = dict(zip(allocate.RULES, style.COLOURS, strict=False))
  marks = dict(zip(allocate.RULES, "os^Dv", strict=True))
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (source, title) in zip(panels, SOURCES.items(), strict=True):
      whole = _find(rows, source, None, None)
      for rule in allocate.RULES:
        cut = [whole, *(_find(rows, source, rule, f) for f in FRACTIONS)]
        axes.plot(
          [100 * r["fraction"]["macs"] for r in cut],
          [100 * r["test_accuracy"] for r in cut],
          marker=marks[rule],
          markersize=4,
          color=colours[rule],
          label=rule,
        )
      axes.set(
        title=title, xlabel="MACs (% of dense)", xlim=(20, 103), ylim=(0, 103)
      )
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: list[str]) -> None:
  """Trains what is missing, cuts, prints the tables and the checks."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  smoke = flags.FLAGS.smoke
  folder = pathlib.Path("runs/experiments") / (
    "deploy_smoke" if smoke else "deploy"
  )
  recipe = [*RECIPE, *(["--config.discover.epochs=1"] if smoke else [])]
  runs.run(CONFIG, folder / "ordered", recipe)
  runs.run(CONFIG, folder / "dense", [*recipe, "--config.method=dense"])
  ordered = opened.open_run(folder / "ordered", "discover")
  dataset = data_lib.make(**ordered.config.data)
  rows = _rows("ordered", ordered, dataset, smoke)
  dense = opened.open_run(folder / "dense")
  rows += _rows("svd", _decomposed(dense), dataset, smoke)
  checks = _checks(rows)
  results = {
    "git": provenance.git_commit(),
    "config": workdir_lib.read_json(folder / "ordered" / "config.json"),
    "batch": BATCH,
    "checks": checks,
    "rows": rows,
  }
  out = folder if smoke else RESULTS
  out.mkdir(parents=True, exist_ok=True)
  workdir_lib.write_json(out / "deploy.json", results)
  _draw(rows, folder / "deploy.png" if smoke else IMAGE)
  for title, key, scale, form in (
    ("validation loss (nats)", "loss", 1, ".4f"),
    ("test loss (nats)", "test_loss", 1, ".4f"),
    ("test accuracy (%)", "test_accuracy", 100, ".2f"),
  ):
    print(f"\n{title}\n{_table(rows, key, scale, form)}")
  print()
  for check in checks:
    verdict = "ok" if check["ok"] else "FAILS"
    print(f"{verdict}: {check['check']} (largest {check['largest']:+.4f})")
  if not smoke and not all(check["ok"] for check in checks):
    sys.exit(1)


def define_flags() -> None:
  """Defines the command's flags."""
  flags.DEFINE_bool("smoke", False, "One epoch a run; not kept.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
