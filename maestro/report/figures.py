"""Figures of one run: ranks, importances, score and cost over the epochs."""

import math
import os
import pathlib
import tempfile

import matplotlib
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import numpy as np

from maestro.report.style import COLOURS, INK, STAGES, STYLE
from maestro.report.tables import (
  SCORES,
  as_list,
  full_rank_of,
  load,
  read_json,
)
from maestro.runs import metrics

MANY_LAYERS = 12  # beyond this, one line and label for each is not legible


def figures(workdir, *, out=None):
  """Draw a run's figures; return the paths of those its records suffice for.

  `ranks.png`: each layer's rank over the epochs; `importance.png`: spectra at
  the start, the end of discover and the end; `cost.png`: validation score and
  cost over the epochs; `levels.png`: validation score of each level of a nested
  network. They go to `workdir/report`, or to `out`; a directory
  that is made for them holds all of them or does not exist.
  """
  workdir = pathlib.Path(workdir)
  out = pathlib.Path(out) if out else workdir / "report"
  results = load(workdir)
  records = sorted(metrics.read(workdir), key=lambda record: record["step"])
  end, steps = records[-1]["step"] if records else 0, results.get("steps", 0)
  if end < steps:  # a file cut short is told from one of a kill by this alone
    print(
      f"{workdir / metrics.FILE} ends at step {end} of {steps}, so do figures"
    )
  drawn = {
    "ranks.png": lambda: _draw_ranks(records, results),
    "importance.png": lambda: _draw_importance(workdir, results),
    "cost.png": lambda: _draw_cost(records, results),
    "levels.png": lambda: _draw_levels(records, results),
  }
  paths: list[pathlib.Path] = []
  out.parent.mkdir(parents=True, exist_ok=True)
  # A place of its own: two processes may draw the same report.
  with (
    tempfile.TemporaryDirectory(prefix=".report", dir=out.parent) as place,
    matplotlib.rc_context(STYLE),
  ):
    new = pathlib.Path(place, "new")
    for name, draw in drawn.items():
      figure = draw()
      if figure is not None:
        new.mkdir(exist_ok=True)
        figure.savefig(new / name)
        paths.append(out / name)
    if not paths:
      return paths
    try:
      new.rename(out)
    except OSError:  # beside files of others
      for path in paths:
        os.replace(new / path.name, path)
  return paths


def _series(records, key):
  """Return epochs [N] and values [N] of a metric, null as NaN."""
  found = [(r.get("epoch", r["step"]), r[key]) for r in records if key in r]
  return np.array(found, dtype=float).reshape(-1, 2).T


def _boundary(records):
  """Return the epoch at which discover ends and settle begins, or None."""
  epochs, phases = _series(records, "phase")
  if not (np.any(phases == 0) and np.any(phases == 1)):
    return None
  return epochs[phases == 0][-1]


def _rank_curves(records, results):
  """Return {layer: (epochs, rank / full rank)} in the network's order."""
  full = {}
  for layer in results.get("layers") or []:
    path, stack = layer.get("path"), as_list(layer.get("rank"))
    full[path] = full_rank_of(layer)
    for i in range(len(stack)):
      full[f"{path}/{i}"] = full[path] / len(stack)
  full["total"] = sum(full_rank_of(x) for x in results.get("layers") or [])
  keys = {k[5:]: k for r in records for k in r if k.startswith("rank/")}
  order = {path: i for i, path in enumerate(full)}
  curves = {}
  for path in sorted(keys, key=lambda path: order.get(path, len(order))):
    epochs, ranks = _series(records, keys[path])
    # Ranks only shrink: where the results do not say, the first is full.
    whole = full.get(path) or np.nanmax(ranks, initial=0)
    if whole:
      curves[path] = epochs, 100 * ranks / whole
  return curves


def _draw_ranks(records, results):
  curves = _rank_curves(records, results)
  total = curves.pop("total", None)
  if not curves:
    return None
  _, totals = _series(records, "rank/total")
  title = "Rank of each layer during training"
  if len(totals) and np.isfinite(totals[[0, -1]]).all():
    title += f": {totals[0]:,.0f} to {totals[-1]:,.0f} in total"
  if len(curves) > MANY_LAYERS:
    return _draw_rank_map(records, curves, total, title)
  figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
  axes = figure.add_subplot()
  ends = []
  for label, (epochs, shares), colour in zip(
    _short(curves), curves.values(), COLOURS, strict=False
  ):
    _step_line(axes, epochs, shares, color=colour)
    ends.append((shares[-1], label, colour))
  if total is not None:
    _step_line(axes, *total, color=INK, linewidth=2.6)
    ends.append((total[1][-1], "total", INK))
  axes.set(title=title, xlabel="epoch", ylabel="rank (% of full rank)")
  axes.set_ylim(0, 112)
  axes.set_yticks(range(0, 101, 20))
  _epoch_axis(axes, records, [e for e, _ in curves.values()])
  _label_ends(axes, ends)
  return figure


def _draw_rank_map(records, curves, total, title):
  """Draw one row a layer, its colour the rank; the total above."""
  count = len(curves)
  height = min(max(4.2, 1.7 + 0.135 * count), 12)
  figure = matplotlib.figure.Figure(figsize=(7, height), layout="constrained")
  top, axes = figure.subplots(
    2, 1, sharex=True, height_ratios=(1, height - 1.9)
  )
  epochs = np.unique(np.concatenate([e for e, _ in curves.values()]))
  gap = float(np.median(np.diff(epochs))) if len(epochs) > 1 else 1.0
  edges = np.append(epochs, epochs[-1] + gap)
  cells = np.full((count, len(epochs)), np.nan)
  for row, (at, shares) in zip(cells, curves.values(), strict=True):
    row[np.searchsorted(epochs, at)] = shares
  mesh = axes.pcolormesh(
    edges, np.arange(count + 1), cells, cmap="YlGnBu", vmin=0, vmax=100
  )
  axes.grid(False)
  axes.invert_yaxis()
  every = math.ceil(count / (9.5 * (height - 1.7)))
  ticks = np.arange(0, count, every)
  labels = _short(curves)
  axes.set_yticks(ticks + 0.5, [labels[i] for i in ticks], fontsize=6.5)
  axes.tick_params(axis="y", length=0)
  axes.set(xlabel="epoch", ylabel="layer, input to output")
  bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=7 * height - 5)
  bar.set_label("rank (% of full rank)")
  bar.outline.set_visible(False)
  top.set_title(title)
  if total is not None:
    _step_line(top, *total, color=INK, linewidth=2.0)
  top.set(ylabel="total (%)", ylim=(0, 125), yticks=(0, 50, 100))
  at = _boundary(records)
  if at is not None:
    axes.axvline(at, color="white", linewidth=2.6)  # dashes show on any colour
  for panel in (top, axes):
    _epoch_axis(panel, records, [edges], words=panel is top)
  return figure


def _draw_cost(records, results):
  dense = results.get("dense") or {}
  costs = []
  for key, name, colour in (
    ("params", "params", COLOURS[0]),
    ("macs", "MACs", COLOURS[1]),
  ):
    epochs, values = _series(records, f"cost/{key}")
    if len(values) and dense.get(key):
      costs.append((epochs, 100 * values / dense[key], name, colour))
  for score in SCORES:
    at, scores = _series(records, f"val/{score}")
    if len(scores):
      break
  if not costs and not len(scores):
    return None
  figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
  panels = figure.subplots(
    bool(costs) + bool(len(scores)), 1, sharex=True, squeeze=False
  )[:, 0]
  panels[0].set_title("Validation score and cost during training")
  every = [at] * bool(len(scores)) + [epochs for epochs, *_ in costs]
  last = []
  if len(scores):
    scale, unit = (100, " (%)") if score == "accuracy" else (1, "")
    _line(panels[0], at, scale * scores, color=COLOURS[2])
    panels[0].set_ylabel(f"validation {score}{unit}")
    panels[0].margins(y=0.15)
    if np.isfinite(scores[-1]):
      text = f"{scale * scores[-1]:.4g}{' %' if scale == 100 else ''}"
      last.append((panels[0], [(scale * scores[-1], text, COLOURS[2])]))
  if costs:
    axes = panels[-1]
    axes.axhline(100, color="#8c8c8c", linewidth=1, linestyle=(0, (4, 3)))
    ends = []
    for epochs, shares, name, colour in costs:
      _step_line(axes, epochs, shares, color=colour)
      ends.append((shares[-1], f"{name} {shares[-1]:.1f} %", colour))
    axes.set_ylabel("cost (% of dense)")
    axes.set_ylim(0, 1.12 * max(100, *(np.nanmax(s) for _, s, *_ in costs)))
    last.append((axes, [*ends, (100, "dense", "#6b6b6b")]))
  panels[-1].set_xlabel("epoch")
  for panel in panels:
    _epoch_axis(panel, records, every, words=panel is panels[0])
  for panel, ends in last:
    _label_ends(panel, ends)
  return figure


def _draw_levels(records, results):
  names = [level.get("name") for level in results.get("levels") or []]
  for score in SCORES:
    keys = [f"val/{score}", *(f"val/{score}@{name}" for name in names[1:])]
    curves = [_series(records, key) for key in keys]
    if names and all(len(values) for _, values in curves):
      break
  else:
    return None
  scale, unit = (100, " (%)") if score == "accuracy" else (1, "")
  figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
  axes, ends = figure.add_subplot(), []
  whole, *smaller = curves
  # Before the chain begins, there is the dense network alone.
  first = min(epochs[0] for epochs, _ in smaller)
  whole = whole[:, whole[0] >= first]
  for name, (epochs, values), colour in zip(
    names, [whole, *smaller], COLOURS, strict=False
  ):
    _line(axes, epochs, scale * values, color=colour)
    end = scale * values[-1]
    ends.append((end, f"{name}  {end:.4g}", colour))
  axes.set(
    title="Every level of one nested network",
    xlabel="epoch",
    ylabel=f"validation {score}{unit}",
  )
  _epoch_axis(axes, records, [epochs for epochs, _ in smaller], words=False)
  _label_ends(axes, ends)
  return figure


def _draw_importance(workdir, results):
  path = workdir / "importance.json"
  if not path.exists():
    return None
  stages = {}
  for stage, layers in read_json(path).items():
    stages[stage] = {}
    for name, values in layers.items():
      values = np.array(values, dtype=float)
      rows = values.reshape(-1, values.shape[-1]) if values.size else [values]
      for i, row in enumerate(rows):
        key = name if len(rows) == 1 else f"{name}/{i}"
        # A logarithm has no place for zeros: the curve ends before them.
        stages[stage][key] = np.where(row > 0, row, np.nan)
  names = list(dict.fromkeys(k for layers in stages.values() for k in layers))
  order = [x.get("path") for x in results.get("layers") or []]
  places = {name: i for i, name in enumerate(order)}
  names.sort(key=lambda n: places.get(n, places.get(n.rpartition("/")[0], 1e9)))
  if not names:
    return None
  if len(names) > MANY_LAYERS:
    return _draw_importance_by_stage(stages, names)
  return _draw_importance_by_layer(stages, names)


_IMPORTANCE_TITLE = "Importance of each component (zeros are not drawn)"


def _draw_importance_by_layer(stages, names):
  columns = min(len(names), 3 if len(names) <= 6 else 4)
  rows = math.ceil(len(names) / columns)
  figure = matplotlib.figure.Figure(
    figsize=(7, 1.4 + (2.2 if rows == 1 else 1.65 * rows)), layout="constrained"
  )
  panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
  titles = _short(names, 22)
  for axes, name, title in zip(panels, names, titles, strict=False):
    for i, (stage, layers) in enumerate(stages.items()):
      values = layers.get(name, np.array([]))
      colour = STAGES.get(stage, COLOURS[(i + 2) % len(COLOURS)])
      _line(axes, 1 + np.arange(len(values)), values, color=colour, label=stage)
    _mark_empty(axes, [layers.get(name) for layers in stages.values()])
    axes.set_title(title, fontsize=8.5, fontweight="normal", pad=4)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
  for axes in panels[len(names) :]:
    axes.set_axis_off()
  _share_log_limits(panels[: len(names)], stages)
  handles, labels = panels[0].get_legend_handles_labels()
  _heading(figure, _IMPORTANCE_TITLE)
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
  for axes in panels[max(len(names) - columns, 0) : len(names)]:
    axes.set_xlabel("component")  # the lowest of each column
  for axes in panels[: len(names) : columns]:
    axes.set_ylabel("importance (log)")
  return figure


def _draw_importance_by_stage(stages, names):
  """Draw one panel a stage, one thin line a layer, its colour the depth."""
  figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
  panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
  shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(names)))
  full = {
    n: max(len(layers.get(n, ())) for layers in stages.values()) for n in names
  }
  for axes, (stage, layers) in zip(panels, stages.items(), strict=True):
    for name, colour in zip(names, shades, strict=True):
      values = layers.get(name, np.array([]))
      x = 100 * (1 + np.arange(len(values))) / max(full[name], 1)
      _line(axes, x, values, color=colour, linewidth=0.9, alpha=0.9)
    axes.set_title(stage, fontsize=8.5, fontweight="normal", pad=4)
    axes.set(xlim=(0, 100), xticks=(0, 50, 100))
  _share_log_limits(panels, stages)
  panels[0].set_ylabel("importance (log)")
  figure.supxlabel("component (% of full rank)", fontsize=9, color="#333333")
  _heading(figure, _IMPORTANCE_TITLE)
  scale = matplotlib.cm.ScalarMappable(
    matplotlib.colors.BoundaryNorm(np.arange(len(names) + 1), len(names)),
    matplotlib.colors.ListedColormap(shades),
  )
  bar = figure.colorbar(scale, ax=list(panels), pad=0.015, aspect=30)
  ticks = np.unique(np.linspace(0, len(names) - 1, 7).round().astype(int))
  labels = _short(names)
  bar.set_ticks(
    list(ticks + 0.5), labels=[labels[i] for i in ticks], fontsize=6.5
  )
  bar.ax.tick_params(length=0)
  bar.ax.minorticks_off()
  bar.ax.invert_yaxis()
  bar.set_label("layer, input to output")
  bar.outline.set_visible(False)
  return figure


def _heading(figure, text):
  figure.suptitle(text, x=0.01, ha="left", fontsize=10, fontweight="bold")


def _share_log_limits(panels, stages):
  """Set one log axis over all layers, cut where spectra are nothing."""
  every = np.concatenate(
    [v for layers in stages.values() for v in layers.values()] or [[np.nan]]
  )
  every = every[np.isfinite(every)]
  if every.size:
    top = every.max()
    for axes in panels:
      axes.set_yscale("log")
      axes.set_ylim(max(every.min(), 1e-9 * top) / 2, 2 * top)
  else:
    for axes in panels:
      axes.set_yticks([])


def _mark_empty(axes, spectra):
  """Say so where a layer has no component left to draw."""
  if not any(s is not None and np.isfinite(s).any() for s in spectra):
    axes.text(
      0.5,
      0.5,
      "all zero",
      transform=axes.transAxes,
      ha="center",
      color="#8c8c8c",
    )


def _short(paths, most=28):
  """Cut words of long paths, as little as it takes and never to the same."""
  short = best = list(paths)
  for size in range(12, 2, -1):
    if max(map(len, short), default=0) <= most:
      break
    short = ["/".join(_cut(w, size) for w in p.split("/")) for p in paths]
    if len(set(short)) == len(set(paths)):
      best = short
  return best


def _cut(word, size):
  """Shorten a word to `size`, but for the number it ends in: `layer_10`."""
  stem = word.rstrip("0123456789").removesuffix("_")
  number = word[len(stem) :]
  return stem[: max(size - len(number), 1)] + number


def _line(axes, x, y, **style):
  # A lone point has no line to show it.
  marker = "o" if np.isfinite(y).sum() == 1 else None
  axes.plot(x, y, marker=marker, markersize=4, **style)


def _step_line(axes, x, y, **style):
  # A rank holds until the next record: between them there is no slope.
  _line(axes, x, y, drawstyle="steps-post", **style)


def _epoch_axis(axes, records, epochs, *, words=True):
  """Fit the axis to the epochs; mark where discover ends."""
  low = min(float(e[0]) for e in epochs)
  high = max(float(e[-1]) for e in epochs)
  at = _boundary(records)
  if at is not None and at <= low:
    low = 0.0  # a race's ranks begin there: what was before is seen, too
  axes.set_xlim(low, high if high > low else low + 1)
  axes.xaxis.get_major_locator().set_params(integer=True)
  if at is None:
    return
  axes.axvline(at, color="#6b6b6b", linewidth=1, linestyle=(0, (2, 2)))
  if words:
    for text, shift, align in (
      ("discover", -4, "right"),
      ("settle", 4, "left"),
    ):
      axes.annotate(
        text,
        (at, 1),
        (shift, -3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha=align,
        va="top",
        fontsize=8,
        color="#6b6b6b",
        style="italic",
      )


def _label_ends(axes, ends):
  """Write each (y, text, colour) beside where its line ends, none on another.

  The places are the nearest (in the sum of squares) to the lines' ends that
  are a line of text apart: isotonic regression after taking out the gaps.
  """
  ends = sorted((e for e in ends if np.isfinite(e[0])), key=lambda e: e[0])
  size = 8
  axes.figure.draw_without_rendering()  # the layout is known after this
  height = axes.get_window_extent().height / axes.figure.dpi
  gap = 1.3 * size / 72 / height
  low, high = axes.get_ylim()
  ys = [(y - low) / (high - low) for y, *_ in ends]
  blocks = []  # of [mean of y - i * gap, count]
  for i, y in enumerate(ys):
    blocks.append([y - i * gap, 1])
    while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
      (a, m), (b, n) = blocks[-2:]
      blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
  places = [mean for mean, count in blocks for _ in range(count)]
  most = 1 - (len(ends) - 1) * gap
  for i, ((_, text, colour), y, place) in enumerate(
    zip(ends, ys, places, strict=True)
  ):
    place = max(min(place, most), 0) + i * gap
    axes.annotate(
      text,
      (1, y),
      (1.035, place),
      xycoords="axes fraction",
      textcoords="axes fraction",
      va="center",
      fontsize=size,
      color=colour,
      fontweight="bold" if text == "total" else "normal",
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-",
        "color": colour,
        "linewidth": 0.7,
        "shrinkA": 0,
        "shrinkB": 0,
        "relpos": (0, 0.5),
      },
    )
