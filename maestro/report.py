"""Turn finished runs into tables and figures: `python -m maestro.report RUN`.

RUN is a run's workdir or its `results.json`. One run prints its per-layer
table, several print a comparison; `--out=DIR` also draws the figures.
"""

import argparse
import collections
import json
import math
import pathlib
import statistics
import sys
from typing import Any

import matplotlib
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import numpy as np

from maestro import metrics
from maestro.errors import UserError

NOT_RUN = "not run"

# What a run is of does not depend on these.
_NOT_IDENTITY = ("seed", "workdir", "data_dir")
# The first that any run has is the one that is compared.
_SCORES = ("accuracy", "perplexity", "loss")

_MANY_LAYERS = 12  # beyond this, one line and label for each is not legible
STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": "#8c8c8c",
  "axes.grid": True,
  "axes.labelcolor": "#333333",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlepad": 8.0,
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "figure.dpi": 150,
  "figure.facecolor": "white",
  "font.size": 9,
  "grid.color": "#e8e8e8",
  "grid.linewidth": 0.6,
  "legend.frameon": False,
  "lines.linewidth": 1.6,
  "savefig.dpi": 150,
  "xtick.color": "#555555",
  "xtick.labelsize": 8,
  "ytick.color": "#555555",
  "ytick.labelsize": 8,
}
INK, GREY = "#222222", "#a8adb3"
COLOURS = (
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#cc79a7",
  "#c98a00",
  "#3f9fdb",
  "#7a5195",
  "#8c6d31",
  "#5f6b6d",
  "#a6192e",
  "#3b7d23",
  "#1b3a8c",
)
_STAGES = {
  "start": GREY,
  "end of discover": "#0072b2",
  "final": "#d55e00",
}


class RunError(UserError):
  """A run cannot be reported on; says which file and what to do."""


def load(run):
  """Read the results of a run, given its workdir or its `results.json`."""
  run = pathlib.Path(run)
  if not run.exists():
    raise RunError(f"{run}: not found; give a run's workdir or results.json")
  path = run / "results.json" if run.is_dir() else run
  if not path.exists():
    raise RunError(
      f"{run}: has no results.json; a run writes it when it finishes, "
      "so start it again with this workdir to finish it"
    )
  results = _read_json(path)
  if not isinstance(results, dict) or "final" not in results:
    raise RunError(f"{path}: not a run's results: an object with 'final'")
  return results


def _read_json(path):
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise RunError(f"{path}: {error.strerror}") from None
  except ValueError as error:
    raise RunError(
      f"{path}: not valid JSON ({error}); delete it and start the run again "
      "with this workdir to write it anew"
    ) from None


# ------------------------------------------------------------------- tables


def layer_table(results):
  """Tabulate one run's layers: rank, form, cost and share of the dense cost.

  A share is of the whole dense network. Where layers state `dense_params` and
  `dense_macs`, two more columns compare each layer with its own dense form.
  """
  layers = results.get("layers") or []
  final, dense = results.get("final") or {}, results.get("dense") or {}
  kinds = (("params", "params"), ("macs", "MACs"))
  own = [k for k in kinds if any(f"dense_{k[0]}" in x for x in layers)]

  head = ["layer", "rank", "form"]
  for _, name in kinds:
    head += [name, "share"]
  head += [f"{name} of dense layer" for _, name in own]
  rows = [head]

  def add(path, rank, form, costs, dense_costs):
    row = [path, rank, form]
    for key, _ in kinds:
      row += [
        _integer(costs.get(key)),
        _percent(costs.get(key), dense.get(key)),
      ]
    rows.append(
      row + [_percent(costs.get(k), dense_costs.get(k)) for k, _ in own]
    )

  for layer in layers:
    own_dense = {k: layer.get(f"dense_{k}") for k, _ in kinds}
    form = layer.get("form") or NOT_RUN
    add(str(layer.get("path")), _rank(layer), form, layer, own_dense)
  # What belongs to no linear layer: batch norm, embeddings, ...
  rest = {
    key: final[key] - sum(layer[key] for layer in layers)
    for key, _ in kinds
    if _has(final, key) and all(_has(layer, key) for layer in layers)
  }
  if layers and any(rest.values()):
    add("rest", "", "", {"params": 0, "macs": 0} | rest, {})
    rows[-1][7:] = [""] * len(own)
  add("total", _total_rank(layers), "", final, dense)

  lines = align(rows, left=(0, 2))
  rule = "-" * max(map(len, lines))
  lines = [lines[0], rule, *lines[1:-1], rule, lines[-1], ""]
  for key, name in kinds:
    lines.append(
      f"{_integer(final.get(key))} of {_integer(dense.get(key))} {name} "
      f"({_percent(final.get(key), dense.get(key))})"
    )
  return "\n".join([*lines, *_score_lines(final)])


def compare(results):
  """Tabulate runs, those that differ by seed alone as one row: plain text."""
  rows = _comparison(results)
  lines = align(rows, left=(0,))
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def compare_markdown(results):
  """Tabulate runs as `compare` does, in Markdown."""
  head, *rows = (
    [cell.replace("|", "\\|") for cell in row] for row in _comparison(results)
  )
  rule = ["---", *["---:"] * (len(head) - 1)]
  return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def _comparison(results):
  groups = collections.defaultdict(list)
  unique = [r for i, r in enumerate(results) if r not in results[:i]]
  seen = collections.Counter()
  for one in unique:
    key = json.dumps(_identity(one), sort_keys=True, default=str)
    # A seed's second run is no second sample: it opens a row of its own.
    again = seen[key, one.get("seed")]
    seen[key, one.get("seed")] += 1
    groups[key, again].append(one)

  def scores(run):
    return (run.get("final") or {}).get("metrics") or {}

  score = next((s for s in _SCORES if any(s in scores(r) for r in unique)), "")
  scale = 100 if score == "accuracy" else 1
  digits = "{:.2f}" if score != "loss" else "{:.4f}"
  head = ["run", "seeds", "accuracy %" if scale == 100 else score or "score"]
  head += ["params", "% of dense", "MACs", "% of dense", "train MACs", "wall s"]
  rows = [head]
  labels = _labels({key: _identity(runs[0]) for key, runs in groups.items()})
  for key, runs in groups.items():
    finals = [run.get("final") or {} for run in runs]
    denses = [run.get("dense") or {} for run in runs]
    values = [
      scores(run)[score] * scale for run in runs if _has(scores(run), score)
    ]
    if values:
      sd = digits.format(statistics.stdev(values)) if len(values) > 1 else "-"
      cell = f"{digits.format(statistics.mean(values))} ± {sd}"
      if len(values) < len(runs):
        cell += f" ({len(values)} of {len(runs)})"
    else:
      cell = NOT_RUN
    row = [labels[key], str(len(runs)), cell]
    for cost in ("params", "macs"):
      row.append(_mean(_integer, [final.get(cost) for final in finals]))
      shares = [
        100 * final[cost] / dense[cost]
        for final, dense in zip(finals, denses, strict=True)
        if _has(final, cost) and dense.get(cost)
      ]
      row.append(_mean("{:.1f}".format, shares))
    trains = [(run.get("train") or {}).get("macs_total") for run in runs]
    row.append(_mean(si, trains))
    row.append(
      _mean("{:,.0f}".format, [run.get("wall_seconds") for run in runs])
    )
    rows.append(row)
  return rows


def _identity(results):
  """Return the config as {dotted key: value}, without what is no identity."""
  found = {}

  def visit(prefix, value):
    if isinstance(value, dict) and value:
      for key, inner in value.items():
        if key not in _NOT_IDENTITY:
          visit(f"{prefix}.{key}" if prefix else key, inner)
    elif prefix:
      found[prefix] = value

  visit("", results.get("config") or {})
  return found


def _labels(configs):
  """Name each (config, repeat): as short as tells them apart."""
  names = {}
  for key, config in configs.items():
    name = config.get("name")
    if not name:
      name = config.get("method.name") or config.get("method") or "unnamed"
      lam = [k for k in config if k.split(".")[-1] == "lam"]
      if lam and name != "dense":
        name += f" lam={config[lam[0]]:g}"
    names[key] = str(name)
  labels = {}
  for key, name in names.items():
    same = [configs[k] for k in configs if names[k] == name]
    differ = [
      k
      for k in dict.fromkeys(k for config in same for k in config)
      if any(c.get(k) != same[0].get(k) for c in same)
    ]
    parts = [f"{k}={configs[key].get(k)}" for k in differ]
    repeat = [f"(repeat {key[1] + 1})"] if key[1] else []
    labels[key] = " ".join([name, *parts, *repeat])
  return labels


def _score_lines(final):
  tests, vals = final.get("metrics") or {}, final.get("val_metrics") or {}
  names = ["accuracy", "loss"]
  if "accuracy" not in tests and "accuracy" not in vals and "loss" in tests:
    names.remove("accuracy")  # a regression: there is none to run
  names += [k for k in [*tests, *vals] if k not in names]
  names = list(dict.fromkeys(names))
  rows = []
  for name in names:
    row = [name, f"{_score(name, tests.get(name))} (test)"]
    if vals:
      row.append(f"{_score(name, vals.get(name))} (validation)")
    rows.append(row)
  return align(rows, left=(0, 1, 2))


def _score(name, value):
  if value is None:
    return NOT_RUN
  return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4f}"


def _has(mapping, key):
  return mapping.get(key) is not None


def _mean(text, values):
  """Write the mean of the values there are, and of how many if not all."""
  there = [value for value in values if value is not None]
  if not there:
    return NOT_RUN
  missing = f" ({len(there)} of {len(values)})"
  return text(statistics.mean(there)) + missing * (len(there) < len(values))


def _integer(value):
  return NOT_RUN if value is None else f"{value:,.0f}"


def _percent(value, whole):
  return f"{100 * value / whole:.1f} %" if value is not None and whole else "-"


def si(value):
  """Writes a count with a prefix: 555 M, 1.2 G."""
  for exponent, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
    if value >= 10**exponent:
      return f"{value / 10**exponent:.3g} {prefix}"
  return f"{value:,.0f}"


def _as_list(value):
  return list(np.ravel(value)) if value is not None else []


def _rank(layer):
  """Write a rank: `37 / 120`, `-` if always dense; a stack's as a list."""
  ranks = _as_list(layer.get("rank"))
  full = _as_list(layer.get("full_rank"))
  if not ranks:
    return "-"
  if len(ranks) <= 4:
    text = ",".join(str(r) for r in ranks)
  else:
    text = f"{min(ranks)}..{max(ranks)} (mean {np.mean(ranks):.1f})"
  return f"{text} / {max(full)}" if full else text


def _total_rank(layers):
  total, full = 0, 0
  for layer in layers:
    ranks = _as_list(layer.get("rank"))
    total += sum(ranks)
    full += _full_rank(layer)
  return f"{total:,} / {full:,}" if full else "-"


def _full_rank(layer):
  """Return a layer's full rank, summed over its stack."""
  full = _as_list(layer.get("full_rank"))
  stack = len(_as_list(layer.get("rank")))
  return sum(full) if len(full) > 1 else sum(full) * max(stack, 1)


def align(rows, *, left):
  """Aligns rows of cells to lines; columns in `left` are left-aligned."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if i in left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return lines


# ------------------------------------------------------------------ figures


def figures(workdir, *, out=None):
  """Draw a run's figures; return the paths of those its records suffice for.

  `ranks.png`: each layer's rank over the epochs; `importance.png`: spectra at
  the start, the end of discover and the end; `cost.png`: validation score and
  cost over the epochs. They go to `workdir/report`, or to `out`.
  """
  workdir = pathlib.Path(workdir)
  out = pathlib.Path(out) if out else workdir / "report"
  results = load(workdir)
  records = sorted(metrics.read(workdir), key=lambda record: record["step"])
  drawn = {
    "ranks.png": lambda: _draw_ranks(records, results),
    "importance.png": lambda: _draw_importance(workdir, results),
    "cost.png": lambda: _draw_cost(records, results),
  }
  paths = []
  with matplotlib.rc_context(STYLE):
    for name, draw in drawn.items():
      figure = draw()
      if figure is not None:
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / name)
        paths.append(out / name)
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
    path, stack = layer.get("path"), _as_list(layer.get("rank"))
    full[path] = _full_rank(layer)
    for i in range(len(stack)):
      full[f"{path}/{i}"] = full[path] / len(stack)
  full["total"] = sum(_full_rank(x) for x in results.get("layers") or [])
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
  if len(curves) > _MANY_LAYERS:
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
  for score in _SCORES:
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


def _draw_importance(workdir, results):
  path = workdir / "importance.json"
  if not path.exists():
    return None
  stages = {}
  for stage, layers in _read_json(path).items():
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
  if len(names) > _MANY_LAYERS:
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
      colour = _STAGES.get(stage, COLOURS[(i + 2) % len(COLOURS)])
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
  axes.set_xlim(low, high if high > low else low + 1)
  axes.xaxis.get_major_locator().set_params(integer=True)
  at = _boundary(records)
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


# ------------------------------------------------------------- command line


def main(argv=None):
  """Print the tables of the runs named on the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m maestro.report",
    description="Print one run's layers, or compare several runs.",
  )
  parser.add_argument(
    "runs", nargs="+", metavar="RUN", help="a run's workdir or its results.json"
  )
  parser.add_argument(
    "--out",
    metavar="DIR",
    type=pathlib.Path,
    help="also draw the figures there (of several runs: in DIR/NAME)",
  )
  parser.add_argument(
    "--markdown", action="store_true", help="print the comparison as Markdown"
  )
  args = parser.parse_args(argv)
  try:
    results = [load(run) for run in args.runs]
    if args.markdown:
      print(compare_markdown(results))
    elif len(results) == 1:
      print(layer_table(results[0]))
    else:
      print(compare(results))
    if args.out:
      for path in _draw_all(args.runs, args.out):
        print(f"wrote {path}")
  except (ValueError, OSError) as error:
    print(f"maestro.report: {error}", file=sys.stderr)
    return 2
  return 0


def _draw_all(runs, out):
  names = collections.Counter()
  for run in runs:
    path = pathlib.Path(run)
    workdir = (path if path.is_dir() else path.parent).resolve()
    names[workdir.name] += 1
    again = names[workdir.name]
    name = workdir.name if again == 1 else f"{workdir.name}-{again}"
    yield from figures(workdir, out=out if len(runs) == 1 else out / name)


if __name__ == "__main__":
  sys.exit(main())
