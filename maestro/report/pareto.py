"""Score against cost of a run's networks at several budgets."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure

from maestro.report.style import COLOURS, STYLE
from maestro.report.tables import align


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Lays rows of `maestro.deploy.choose.allocate` out as text."""
  scores = [s for s in ("accuracy", "loss") if s in rows[0]]
  timed = any("latency_ms" in row for row in rows)
  head = ["budget", "params", "% of dense", "MACs", "% of dense"]
  head += ["ms"] * timed + [f"val {s}{' %' * (s != 'loss')}" for s in scores]
  cells = [head]
  for row in rows:
    line = [row["budget"] or "(whole)"]
    for kind in ("params", "macs"):
      line += [f"{row['cost'][kind]:,}", f"{100 * row['fraction'][kind]:.1f}"]
    if timed:
      line.append(f"{row['latency_ms']:.4g}" if "latency_ms" in row else "")
    line += [
      f"{row[s]:.4f}" if s == "loss" else f"{100 * row[s]:.2f}" for s in scores
    ]
    cells.append(line)
  return "\n".join(align(cells, left=(0,)))


def draw(record: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws validation loss against cost, one line for each kind of cost."""
  rows = record["rows"]
  whole, cut = rows[0], rows[1:]
  kinds = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}
  shown = [k for k in kinds if any(r["budget"].startswith(k) for r in cut)]
  shown = shown or ["macs"]
  with matplotlib.rc_context(STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(0.6 + 5.4 * len(shown), 3.8), layout="constrained"
    )
    figure.suptitle(
      f"{record['run']}, {record['checkpoint']}, {record['rule']}", fontsize=9
    )
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, shown, strict=True):
      own = [
        row
        for row in cut
        if row["budget"].startswith(
          (kind, "latency_ms") if kind == "macs" else kind
        )
      ]
      points = sorted(
        (100 * r["fraction"][kind], r["loss"]) for r in [whole, *own]
      )
      axes.plot(*zip(*points, strict=True), color=COLOURS[0])
      names: dict[tuple[float, float], list[str]] = {}
      for row in [whole, *own]:
        point = 100 * row["fraction"][kind], row["loss"]
        name = (row["budget"] or "whole").removeprefix(f"{kind}:")
        names.setdefault(point, []).append(name)
      for row in [*own, whole]:
        point = 100 * row["fraction"][kind], row["loss"]
        colour = COLOURS[0 if row["budget"] else 1]
        axes.plot(*point, "o", color=colour)
        if point not in names:  # equal networks share a label
          continue
        name = ", ".join(names.pop(point))
        if "accuracy" in row:
          name += f": {100 * row['accuracy']:.2f} %"
        below = name.startswith("whole")  # at the right end, so to the left
        axes.annotate(
          name,
          point,
          (5, -13 if below else 5),
          textcoords="offset points",
          ha="right" if below else "left",
          fontsize=7,
        )
      axes.set(xlabel=f"{kinds[kind]} (% of dense)", xlim=(0, 110))
      axes.margins(y=0.15)
    panels[0].set_ylabel("validation loss")
    figure.savefig(path)
