"""Chooses lambda: halves it until accuracy and cost suit, on validation data.

Trains the dense network of a config, then lambda = start, start/2, start/4, ...
with seed 0 each. The first (largest, so cheapest) lambda whose validation
accuracy is at most --max_accuracy_loss below the dense network's is chosen. If
its cost exceeds --max_params or --max_macs, no lambda meets both. The test
split plays no part in the choice.

  python -m maestro.search --config=configs/digits_od.py:maestro --start=4e-3
  python -m maestro.search --config=configs/lenet_od.py:maestro --start=0.016 \
      --seeds=3
  python -m maestro.search --config=configs/lenet_od.py:maestro --start=0.016 \
      --max_accuracy_loss=0.0035 --max_params=0.2 --max_macs=0.5
  python -m maestro.search --config=configs/linear_od.py --start=4e-3 \
      --max_loss_increase=1e-4

--seeds=3 then trains the dense network and the chosen one with seeds 1 and 2
too; config.seed and config.discover.lam are set by the search. The same command
resumes; --max_runs and --seeds may be raised. The workdir (the default is
runs/<config>_search) gets dense/seed0, lam=.../seed0, ..., search.json and
search.png. Exit codes: 0 chosen, 2 bad input, 3 no lambda suits, 75 interrupted
by SIGTERM (run the same command again).
"""

import copy
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import matplotlib
import matplotlib.figure
from absl import flags
from ml_collections import config_flags

from maestro import cli
from maestro.errors import UserError
from maestro.main import default_workdir
from maestro.report import style
from maestro.report import tables as report
from maestro.runs import workdir as workdir_lib
from maestro.training import loop as train
from maestro.training.config import length_of, parse

EXIT_NONE_SUITS = 3
_ROUNDING = 1e-9  # 0.95 - 0.9465 is a little more than 0.0035


def _fraction(x):
  return x is None or 0 < x <= 1


# The criterion: {flag: (default, whether a value is good, which are, help)}.
_FRACTION = "in (0, 1], a fraction of the dense network's"
_FLAGS: dict[str, tuple] = {
  "start": (None, lambda x: x and 0 < x < math.inf, "above 0", "First lambda"),
  "max_runs": (8, lambda x: x >= 1, "at least 1", "Most lambdas to try"),
  "seeds": (1, lambda x: x >= 1, "at least 1", "Runs of dense and chosen"),
  "max_accuracy_loss": (
    None,
    lambda x: x is None or 0 <= x < 1,
    "in [0, 1), 0.01 for one point; the default is 0.005",
    "How far validation accuracy may be below the dense network's",
  ),
  "max_loss_increase": (
    None,
    lambda x: x is None or 0 <= x < math.inf,
    "at least 0",
    "For regression: how far validation loss may be above the dense network's",
  ),
  "max_params": (None, _fraction, _FRACTION, "Most parameters"),
  "max_macs": (None, _fraction, _FRACTION, "Most MACs"),
}

flags.declare_key_flag("config")
flags.declare_key_flag("workdir")
for _name, (_default, _, _range, _help) in _FLAGS.items():
  _define = flags.DEFINE_integer if _default else flags.DEFINE_float
  _define(_name, _default, f"{_help}: {_range}.")


class SearchError(UserError):
  """A flag or the workdir does not fit; says which and the remedy."""


def search(
  config: Mapping[str, Any], workdir: Any, criterion: Mapping[str, Any]
) -> dict:
  """Runs, or resumes, a search; prints the tables and draws search.png.

  Args:
    config: nested mapping of the runs; its seed and discover.lam are replaced.
    workdir: directory of the search.
    criterion: values by flag; those left out have their defaults.

  Returns:
    The content of search.json; "chosen" is None if no lambda suits.

  Raises:
    UserError: bad config, criterion or workdir.
    Interrupted: SIGTERM came.
  """
  workdir = pathlib.Path(workdir)
  criterion = _check(config, criterion)
  record = _open(workdir, config, criterion)
  runs, results = record["runs"], {}
  most = criterion["max_runs"]

  def run(lam: float | None, seed: int) -> None:
    recipe: dict[str, Any] = copy.deepcopy(dict(config)) | {"seed": seed}
    if lam is None:
      recipe["method"] = "dense"
    else:
      recipe["discover"]["lam"] = lam
    name = f"{'dense' if lam is None else f'lam={lam:g}'}/seed{seed}"
    print(f"\n--- {workdir / name}")
    result = results[lam, seed] = train.train(recipe, workdir / name)
    jax.clear_caches()
    final, dense = result["final"], result["dense"]
    row = {
      "lam": lam,
      "seed": seed,
      "workdir": name,
      "val_accuracy": final["val_metrics"].get("accuracy"),
      "val_loss": final["val_metrics"]["loss"],
      "params_fraction": final["params"] / dense["params"],
      "macs_fraction": final["macs"] / dense["macs"],
      "wall_seconds": result["wall_seconds"],
      "macs_total": result["train"]["macs_total"],
      "accepted": False,
      "why": "repeats the choice" if seed else "baseline",
    }
    runs.append(row)
    if lam is not None and not seed:
      row["accepted"], row["why"], record["verdict"] = _judge(runs, criterion)
      record["chosen"] = lam if row["accepted"] else None
    record["total"] = _total(runs)
    workdir_lib.write_json(workdir / "search.json", record)

  run(None, 0)
  for i in range(most):
    run(criterion["start"] / 2**i, 0)
    if record["verdict"]:
      break
  else:
    record["verdict"] = f"--max_runs={most} lambdas, and none suits: raise it"
  if record["chosen"] is not None:
    for seed in range(1, criterion["seeds"]):
      run(None, seed)
      run(record["chosen"], seed)
  workdir_lib.write_json(workdir / "search.json", record)
  _draw(runs, criterion, workdir / "search.png")
  _tell(record, results)
  return record


def _check(config: Mapping, criterion: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the criterion with its defaults; raises if it is bad."""
  criterion = {flag: x[0] for flag, x in _FLAGS.items()} | dict(criterion)
  for flag, (_, good, values, _) in _FLAGS.items():
    if not good(criterion[flag]):
      raise SearchError(f"--{flag}={criterion[flag]}: it must be {values}")
  c = parse(config)
  m = c.method
  if m.penalty is None or m.lam is not None or m.controller is not None:
    raise SearchError(
      f"--config.method={m.name} has no lambda to search; use maestro (the"
      " variant configs/digits_od.py:maestro) or prox: the search trains the"
      " dense network by itself"
    )
  if not length_of(c, "discover").value:
    raise SearchError(
      "--config.discover.epochs=0: lambda does nothing; raise it"
    )
  right, wrong = "max_accuracy_loss", "max_loss_increase"
  if c.loss == "cross_entropy":
    criterion[right] = 0.005 if criterion[right] is None else criterion[right]
  else:
    right, wrong = wrong, right
  if criterion[right] is None or criterion[wrong] is not None:
    raise SearchError(
      f"config.loss={c.loss!r} needs --{right}, without --{wrong}"
    )
  return criterion


def _open(workdir: pathlib.Path, config: Any, criterion: Mapping) -> dict:
  """Returns an empty record, if the workdir is not another search's."""
  record = {"criterion": criterion, "config": workdir_lib.plain(config)}
  path = workdir / "search.json"
  if path.exists():
    old = workdir_lib.read_json(path)
    for part, prefix, remedy in (
      ("config", "--config.", ""),
      ("criterion", "--", ", or delete this file: finished runs are kept"),
    ):
      there, here = (
        workdir_lib.flatten(old.get(part, {})),
        workdir_lib.flatten(record[part]),
      )
      differ = [
        f"{prefix}{key}: {there.get(key)} there, {here.get(key)} here"
        for key in here | there
        if there.get(key) != here.get(key)
        and not workdir_lib.PLACES.fullmatch(key)
        and not (key in ("max_runs", "seeds") and there.get(key, 0) < here[key])
      ]
      if differ:
        raise SearchError(
          f"{path} is of a search with another {part} ({'; '.join(differ)});"
          f" choose another --workdir{remedy}"
        )
  return record | {"runs": [], "chosen": None, "verdict": None, "total": {}}


def _score(dense: dict) -> tuple[str, int, str]:
  """Returns key, factor and unit; factor * (run - dense) is what is lost."""
  if dense["val_accuracy"] is None:
    return "val_loss", 1, ""
  return "val_accuracy", -100, " points"


def _limit(criterion: Mapping[str, Any]) -> float:
  if criterion["max_loss_increase"] is not None:
    return criterion["max_loss_increase"]
  return 100 * criterion["max_accuracy_loss"]


def _judge(
  runs: list[dict], criterion: Mapping[str, Any]
) -> tuple[bool, str, str | None]:
  """Judges the newest run: accepted, why, and the verdict if it ends it all."""
  dense, row = runs[0], runs[-1]
  key, factor, unit = _score(dense)
  limit, lost = _limit(criterion), factor * (row[key] - dense[key])
  suits = lost <= limit + _ROUNDING
  why = f"{lost:.3g}{unit} worse, {'<=' if suits else '>'} {limit:.3g}"
  over = " and ".join(
    f"{name} are {100 * row[f'{cost}_fraction']:.3g} % > {100 * budget:.3g} %"
    for cost, name in (("params", "params"), ("macs", "MACs"))
    if (budget := criterion[f"max_{cost}"]) is not None
    and row[f"{cost}_fraction"] > budget + _ROUNDING
  )
  at = f"at lambda {row['lam']:g}"
  larger = "" if len(runs) > 2 else "; the first lambda: try a larger --start"
  if suits and over:
    why += f", but {over}"
    verdict = f"no lambda meets both: {at} accuracy suits but {over}{larger}"
    return False, why, verdict.replace("accuracy", key[4:])
  if min(row["params_fraction"], row["macs_fraction"]) >= 1:
    verdict = (
      f"no lambda suits: {at} no rank has moved far enough to save anything, so"
      " a smaller one is pointless"
    )
    return False, why + ", but as large as dense", verdict
  if suits:
    return (
      True,
      why,
      f"chosen on validation with seed 0: {row['lam']:g}{larger}",
    )
  return False, why, None


def _total(runs: list[dict]) -> dict[str, float]:
  macs = sum(row["macs_total"] for row in runs)
  return {
    "runs": len(runs),
    "wall_seconds": sum(row["wall_seconds"] for row in runs),
    "macs_total": macs,
    "relative_to_one_dense_run": macs / runs[0]["macs_total"],
  }


def _tell(record: dict, results: dict) -> None:
  """Prints the lambdas, the choice, the runs compared and what it all cost."""
  runs, chosen = record["runs"], record["chosen"]
  key, factor, unit = _score(runs[0])
  form, judged = ".2f" if unit else ".5f", [r for r in runs if not r["seed"]]
  head = [
    "lambda",
    f"val {key[4:]}{' %' * bool(unit)}",
    f"lost{unit and ' (points)'}",
  ]
  rows = [[*head, "params %", "MACs %", "accepted", "why"]]
  for row in judged:
    lost = factor * (row[key] - runs[0][key])
    texts = [f"{abs(factor) * row[key]:{form}}"]
    texts += ["" if row["lam"] is None else f"{lost:{form}}"]
    texts += [f"{100 * row[f'{k}_fraction']:.1f}" for k in ("params", "macs")]
    if row["lam"] is None:
      rows.append(["dense", *texts, "", row["why"]])
    else:
      accepted = "yes" if row["accepted"] else "no"
      rows.append([f"{row['lam']:g}", *texts, accepted, row["why"]])
  print("\n" + "\n".join(report.align(rows, left=(0, 6))))
  print(f"\n{record['verdict']}")
  if chosen is not None:
    shown = [
      result for (x, _), result in results.items() if x in (None, chosen)
    ]
    print(
      f"\nTest split, which the choice did not see:\n{report.compare(shown)}"
    )
  print()
  for name, part in {"to choose": judged, "in all": runs}.items():
    total = _total(part)
    print(
      f"{name}: {total['runs']} runs, {total['wall_seconds']:,.0f} s,"
      f" {report.si(total['macs_total'])} training MACs ="
      f" {total['relative_to_one_dense_run']:.2f} x one dense run"
    )


def _draw(runs: list[dict], criterion: Mapping, path: pathlib.Path) -> None:
  """Draws validation score against MACs, the region that suits shaded."""
  key, factor, unit = _score(runs[0])
  level, limit = abs(factor) * runs[0][key], _limit(criterion)
  found = [r for r in runs if r["lam"] is not None and not r["seed"]]
  xs = [100 * r["macs_fraction"] for r in found]
  lost = [factor * (r[key] - runs[0][key]) for r in found]
  # A network that learnt nothing would flatten all others: cut it off.
  low = min(max(lost), max(10 * limit, 5 if unit else level))
  low = max(low, 2 * limit, 1e-3 * level)
  high = -1.4 * max(limit, -min(lost), 0.1 * low)
  worse = math.copysign(1, factor)  # the direction of a lower score
  blue, orange, green = style.COLOURS[:3]
  right = 1.15 * max(100, *xs)
  suits = [
    0,
    right if criterion["max_macs"] is None else 100 * criterion["max_macs"],
  ]
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(
      title="Validation score and cost of each lambda (seed 0)",
      xlabel="MACs (% of dense)",
      ylabel="validation accuracy (%)" if unit else "validation loss",
      xlim=(0, right),
      ylim=sorted((level + worse * 1.2 * low, level + worse * high)),
    )
    edges = level + worse * limit, level + worse * high
    axes.fill_between(
      suits, *edges, color=green, alpha=0.12, lw=0, label="suits"
    )
    dashed = {"color": "#6b6b6b", "linewidth": 1, "linestyle": (0, (4, 3))}
    axes.axhline(level, label=f"dense: {level:.4g}", **dashed)
    ys = [level + worse * min(y, low) for y in lost]
    axes.plot(xs, ys, color=blue)
    for i, (row, x, y) in enumerate(zip(found, xs, ys, strict=True)):
      cut, colour = lost[i] > low, orange if row["accepted"] else blue
      axes.plot(x, y, "v" if cut else "o", color=colour, markersize=6)
      below = i + 1 == len(ys) or ys[i + 1] > y  # away from the line
      axes.annotate(
        f"λ = {row['lam']:g}{' (chosen)' * row['accepted']}"
        + f": {abs(factor) * row[key]:.4g}" * cut,
        (x, y),
        (6, -3 if below else 3),
        textcoords="offset points",
        va="top" if below else "bottom",
        fontsize=8,
        color=colour,
      )
    axes.legend(loc="lower right" if unit else "upper right")
    figure.savefig(path)


def main(argv: list[str]) -> None:
  """Searches, as the flags say."""
  values = flags.FLAGS
  if argv[1:] or values.evaluate:
    raise UserError(f"unexpected: {' '.join(argv[1:]) or '--evaluate'}")
  if values.config is None:
    raise UserError("--config=FILE is missing, e.g. configs/digits_od.py")
  workdir = values.workdir
  if not workdir:
    name = config_flags.get_config_filename(values["config"])
    workdir = f"{default_workdir(name)}_search"

  criterion = {flag: values[flag].value for flag in _FLAGS}
  record = search(cli.config_of(values.config), workdir, criterion)
  if record["chosen"] is None:
    sys.exit(EXIT_NONE_SUITS)


if __name__ == "__main__":
  cli.run(main)
