"""Any size from one training: one nested network and its peers.

  python -m experiments.any_size                       # LeNet on MNIST, 3 seeds
  python -m experiments.any_size --rows=nested10,race,fixed --jobs=2
  python -m experiments.any_size --network=resnet20 --seeds=1
  python -m experiments.any_size --network=shakespeare --seeds=1
  python -m experiments.any_size --network=multi30k --seeds=1
  python -m experiments.any_size --smoke --rows=dense,nested10
  python -m experiments.any_size --show                # of the results kept

Rows, all by the network's recipe:

  nested10, nested20  ONE network along a chain of levels, in so many epochs
  race                a network for each budget: propose, race, settle
  lasso               a network for each budget: ordered dropout and a lasso
                      weighted by costs, whose strength follows the budget
  fixed               a network for each budget, of uniform ranks, from scratch
  dense

LeNet has 10 epochs of configs/lenet_od.py, where not said (the learning rate
falls to a tenth after 80 % of them); an epoch of dense warm-up begins race and
nested, and lasso discovers for three. ResNet-20 has 8 short epochs of 16,000
images, configs/resnet20_od.py, and nested 10, which cost what 8 dense ones do,
the first half of them dense. The GPT has the 4 epochs of
configs/shakespeare_od.py, the Transformer the 14 of configs/multi30k_od.py;
nested has a quarter and a fifth more. Of texts, the tables and figures show
perplexities.

Ranks are chosen on training images; the test set is read once, at the end of
each run. Runs go through `python -m maestro.main` into runs/experiments/ and
can be interrupted; the same command goes on. Results files are kept in
experiments/results/, from which the table and the figure in docs/images/ are
made: rows that were not run are not shown.
"""

import dataclasses
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
RUNS = pathlib.Path("runs/experiments")
RESULTS = pathlib.Path("experiments/results")
IMAGES = pathlib.Path("docs/images")
LABELS = {"fixed": "fixed: uniform ranks", "maestro": "maestro: by a lambda"}


@dataclasses.dataclass(frozen=True)
class Network:
  """What is compared on a network.

  Attributes:
    name: of results, runs and figure.
    config: file with its recipe.
    variant: of that file.
    levels: percent of the dense network's MACs.
    epochs: {row: of its run}.
    warm_up: {method: epochs of its discover phase}; 1 where not said.
    peers: methods of `experiments.lenet_comparison`, which has the same recipe,
      that are shown beside.
    score: the metric that is shown, "accuracy" in percent or "perplexity".
    drawn: points below the best, or above the lowest perplexity, that the
      figure shows.
  """

  name: str
  config: str
  variant: str
  levels: tuple[int, ...]
  epochs: Mapping[str, int]
  warm_up: Mapping[str, int] = dataclasses.field(default_factory=dict)
  peers: tuple[str, ...] = ()
  score: str = "accuracy"
  drawn: float = 3.0

  @property
  def nested(self) -> dict[str, Any]:
    """The method whose chain has these levels."""
    levels = (1.0, *(percent / 100 for percent in self.levels))
    return {"name": "nested", "nested": {"levels": levels}}

  @property
  def results(self) -> pathlib.Path:
    """Folder of the results files that are kept."""
    return RESULTS / self.name

  @property
  def figure(self) -> pathlib.Path:
    """Path of the figure."""
    return IMAGES / f"{self.name}.png"


NETWORKS = {
  "lenet": Network(
    "any_size",
    "lenet_od.py",
    "",
    levels=(80, 60, 50, 40, 25),
    epochs={"dense": 10, "nested10": 10, "race": 10, "fixed": 10}
    | {"lasso": 10, "nested20": 20},
    warm_up={"lasso": 3},
    peers=("maestro", "svd"),
  ),
  "resnet20": Network(
    "any_size_resnet20",
    "resnet20_od.py",
    "short",
    levels=(75, 50, 28),
    epochs={"dense": 8, "nested10": 10, "race": 8, "fixed": 8, "lasso": 8},
    warm_up={"nested": 5, "lasso": 3},
    drawn=12.0,
  ),
  "shakespeare": Network(
    "any_size_shakespeare",
    "shakespeare_od.py",
    "",
    levels=(75, 50, 35),
    epochs={"dense": 4, "nested5": 5, "race": 4, "fixed": 4},
    warm_up={"nested": 2},
    score="perplexity",
    drawn=1.0,
  ),
  "multi30k": Network(
    "any_size_multi30k",
    "multi30k_od.py",
    "",
    levels=(75, 50, 35),
    epochs={"dense": 14, "nested17": 17, "race": 14, "fixed": 14},
    warm_up={"nested": 6, "race": 2},
    score="perplexity",
    drawn=10.0,
  ),
}


def get_config(arg: str):
  """Returns the config of "NETWORK,ROW,PERCENT[,smoke]"; 100 is no budget.

  This file is a config, too: --config=experiments/any_size.py:lenet,race,25
  """
  name, row, percent, *more = arg.split(",")
  network = NETWORKS[name]
  module = runpy.run_path(str(ROOT / "configs" / network.config))
  variants = ",".join(filter(None, [network.variant, *more]))
  c = module["get_config"](variants).unlock()
  method = row.rstrip("0123456789")
  if not more:
    epochs = network.epochs[row]
    c.discover.epochs = network.warm_up.get(method, 1)
    c.settle.epochs = epochs - c.discover.epochs
    if "one_line" in module:
      module["one_line"](c)
    else:  # over the whole run, whatever part of it settles
      settled = 0.8 * epochs - c.discover.epochs
      c.settle.schedule.boundaries = (settled / c.settle.epochs,)
  with c.ignore_type():
    c.method = method if method != "nested" else network.nested
  if method == "fixed":  # from scratch: nothing warms up
    c.discover.shrink = False
  c.budget = f"macs:{int(percent) / 100}" if percent != "100" else None
  return c.lock()


def jobs_of(rows: Sequence[str], percents: Sequence[int]) -> list[tuple]:
  """Returns (row, percent) of all runs; 100 where one run has every size."""
  jobs = []
  for row in rows:
    budgeted = row in ("race", "fixed", "lasso")
    jobs += [(row, p) for p in percents] if budgeted else [(row, 100)]
  return jobs


def sizes_of(
  results: Mapping[str, Any], score: str = "accuracy"
) -> dict[str, tuple[float, float]]:
  """{level: (share of the dense MACs in percent, test score)} of a run."""
  unit = 100 if score == "accuracy" else 1
  dense = results["dense"]["macs"]
  found = results.get("levels") or [
    {"name": "", **results["final"]},
  ]
  return {
    level["name"]: (
      100 * level["macs"] / dense,
      unit * level["metrics"][score],
    )
    for level in found
  }


Found = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def points(
  found: Found, score: str = "accuracy"
) -> dict[str, dict[int, np.ndarray]]:
  """{row: {percent: [seeds, 2], share of the MACs and score}}."""
  curves: dict[str, dict[int, np.ndarray]] = {}
  for (row, percent), seeds in found.items():
    sizes = [sizes_of(results, score) for results in seeds]
    for name in sizes[0]:
      level = round(100 * float(name.split(":")[1])) if name else percent
      curve = curves.setdefault(row, {})
      curve[level] = np.array([one[name] for one in sizes])
  return curves


def table(found: Found, score: str = "accuracy") -> str:
  """Tabulates test scores at each budget, in Markdown.

  Training MACs are of all the runs behind a row, relative to the dense one's.
  """
  curves = points(found, score)
  percents = sorted({p for c in curves.values() for p in c})[::-1]
  lines = [["row", *(f"{p} %" for p in percents), "training MACs", "seeds"]]
  dense = found.get(("dense", 100))
  for row, curve in curves.items():
    cells = []
    for percent in percents:
      if percent not in curve:
        cells.append("")
        continue
      values = curve[percent][:, 1]
      spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
      cells.append(f"{np.mean(values):.2f}{spread}")
    own = [runs for (name, _), runs in found.items() if name == row]
    macs = [np.mean([r["train"]["macs_total"] for r in runs]) for runs in own]
    cost = f"{np.sum(macs):.3g}"
    if dense:
      one = np.mean([r["train"]["macs_total"] for r in dense])
      cost = f"{np.sum(macs) / one:.2f}"
    lines.append([row, *cells, cost, str(min(len(runs) for runs in own))])
  return markdown_table(lines)


def draw(
  found: Found, drawn: float = 3.0, score: str = "accuracy"
) -> matplotlib.figure.Figure:
  """Draws test scores against MACs: a dot a seed, a line through means.

  What is more than `drawn` worse than the best is told in the legend.
  """
  curves = points(found, score)
  high = score == "accuracy"
  sign = 1 if high else -1
  best = max(
    (sign * dots[:, 1]).max() for c in curves.values() for dots in c.values()
  )

  def near(dots: np.ndarray) -> np.ndarray:
    return sign * dots[:, 1] > best - drawn

  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (row, curve) in enumerate(curves.items()):
      colour = style.COLOURS[i % len(style.COLOURS)]
      together = row.startswith("nested")
      label = f"{row}: one network" if together else LABELS.get(row, row)
      means = np.array([curve[p].mean(axis=0) for p in sorted(curve)])
      dots = np.concatenate(list(curve.values()))
      shown, dots = means[near(means)], dots[near(dots)]
      if len(shown) < len(means):
        rest = means[~near(means)]
        label += f" ({', '.join(f'{y:.0f} at {x:.0f} %' for x, y in rest)})"
      line = "-" if together else "--"
      axes.plot(*shown.T, line, marker="o", color=colour, label=label)
      axes.plot(*dots.T, "o", ms=3, alpha=0.4, color=colour)
    axes.set(
      xlabel="MACs of the network (% of dense)",
      ylabel="test accuracy (%)" if high else f"test {score}",
    )
    axes.legend(loc="lower right" if high else "upper right")
  return figure


def kept(network: Network) -> Found:
  """The results files that are kept, by row and seed."""
  found: dict[tuple[str, int], list] = {}
  for row, percent in jobs_of(list(network.epochs), network.levels):
    if seeds := _read(network.results, f"{row}_{percent}_seed*.json"):
      found[row, percent] = seeds
  return found


def _read(folder: pathlib.Path, pattern: str) -> list[dict[str, Any]]:
  paths = sorted(folder.glob(pattern))
  return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def shown(network: Network) -> Found:
  """Results of this experiment and of its peers."""
  found = dict(kept(network))
  for peer in network.peers:
    for percent in network.levels:
      name = f"{peer}_macs{percent}_seed*.json"
      if seeds := _read(RESULTS / "lenet_comparison", name):
        found[peer, percent] = seeds
  return found


def _run(
  row: str, percent: int, seed: int, network: str, smoke: bool
) -> dict[str, Any]:
  label, where = f"{row}_{percent}_seed{seed}", NETWORKS[network]
  workdir = RUNS / (where.name + ("_smoke" if smoke else "")) / label
  config = f"experiments/any_size.py:{network},{row},{percent}"
  config += ",smoke" if smoke else ""
  runs.run(config, workdir, [f"--config.seed={seed}"])
  results = report.load(workdir)
  if not smoke:
    runs.write_results(where.results / f"{label}.json", results)
  return results


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_enum("network", "lenet", list(NETWORKS), "Which network.")
  flags.DEFINE_integer("seeds", 3, "Seeds of each row.", 1)
  flags.DEFINE_integer("jobs", 1, "Runs at a time.", 1)
  flags.DEFINE_list("rows", None, "Which rows to run; all if not given.")
  flags.DEFINE_list(
    "budgets",
    None,
    "Percent, of race, fixed, lasso; all levels if not given.",
  )
  flags.DEFINE_bool("smoke", False, "Two epochs, one seed; not kept.")
  flags.DEFINE_bool(
    "show", False, "Only the table and figure of the results that are kept."
  )


def main(argv: list[str]) -> None:
  """Runs what is missing, keeps results, prints the table, draws the figure."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  network = NETWORKS[values.network]
  rows = values.rows or list(network.epochs)
  if unknown := sorted(set(rows) - set(network.epochs)):
    raise UserError(f"--rows: {unknown} are none of {list(network.epochs)}")
  budgets = values.budgets or list(map(str, network.levels))
  if not all(text.isdigit() and 0 < int(text) < 100 for text in budgets):
    raise UserError(f"--budgets: {budgets} are no percents below 100")
  smoke = values.smoke
  jobs = jobs_of(rows, [int(text) for text in budgets])
  found: Found = runs.run_rows(
    functools.partial(_run, network=values.network, smoke=smoke),
    [] if values.show else jobs,
    range(1 if smoke else values.seeds),
    values.jobs,
  )
  found = found if smoke else shown(network)
  print(f"\n{table(found, network.score)}")
  figure = network.figure
  figure = RUNS / f"{network.name}_smoke" / figure.name if smoke else figure
  figure.parent.mkdir(parents=True, exist_ok=True)
  draw(found, network.drawn, network.score).savefig(figure)
  print(f"\nfigure: {figure}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
