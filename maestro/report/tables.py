"""Turn finished runs into tables and figures: `python -m maestro.report RUN`.

RUN is a run's workdir or its `results.json`. One run prints its per-layer
table, several print a comparison; `--out=DIR` also draws the figures.
"""

import collections
import json
import pathlib
import statistics

import numpy as np

from maestro.errors import UserError
from maestro.methods.table import METHODS
from maestro.runs import workdir

NOT_RUN = "not run"
# What a run is of does not depend on these.
_NOT_IDENTITY = ("seed", "workdir", "data_dir")
# The first that any run has is the one that is compared.
SCORES = ("accuracy", "perplexity", "loss")


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
  return read_json(path, keys={"final": dict})


def read_json(path, **checks):
  """Reads one of a run's JSON files."""
  remedy = (
    "delete it and start the run again with this workdir to write it anew"
  )
  try:
    return workdir.read_json(path, remedy=remedy, **checks)
  except workdir.WorkdirError as error:
    raise RunError(str(error)) from error


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


def level_table(results):
  """Tabulate the levels of a nested network; "" for a run of one size."""
  rows = [["level", "params", "MACs", "share", "accuracy, test", "loss, test"]]
  dense = results.get("dense") or {}
  for level in results.get("levels") or []:
    scores = level.get("metrics") or {}
    accuracy = scores.get("accuracy")
    rows.append(
      [
        str(level.get("name")),
        _integer(level.get("params")),
        _integer(level.get("macs")),
        _percent(level.get("macs"), dense.get("macs")),
        "" if accuracy is None else f"{100 * accuracy:.2f} %",
        f"{scores['loss']:.4f}" if "loss" in scores else NOT_RUN,
      ]
    )
  return "\n" + text_table(rows) + "\n" if len(rows) > 1 else ""


def compare(results):
  """Tabulate runs, those that differ by seed alone as one row: plain text."""
  return text_table(_comparison(results))


def compare_markdown(results):
  """Tabulate runs as `compare` does, in Markdown."""
  return markdown_table(_comparison(results))


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

  score = next((s for s in SCORES if any(s in scores(r) for r in unique)), "")
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
      method = METHODS.get(name)
      # Others have no lambda, or one of their own.
      uses = method is None or (method.penalty and method.lam is None)
      if lam and uses:
        name += f" lam={config[lam[0]]:g}"
      if budget := config.get("budget") or config.get("method.budget"):
        name += f" {budget}"
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
    if value >= max(10**6, 0.9995 * 10**exponent):
      return f"{value / 10**exponent:.3g} {prefix}"
  return f"{value:,.0f}"


def as_list(value):
  return list(np.ravel(value)) if value is not None else []


def _rank(layer):
  """Write a rank: `37 / 120`, `-` if always dense; a stack's as a list."""
  ranks = as_list(layer.get("rank"))
  full = as_list(layer.get("full_rank"))
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
    ranks = as_list(layer.get("rank"))
    total += sum(ranks)
    full += full_rank_of(layer)
  return f"{total:,} / {full:,}" if full else "-"


def full_rank_of(layer):
  """Return a layer's full rank, summed over its stack."""
  full = as_list(layer.get("full_rank"))
  stack = len(as_list(layer.get("rank")))
  return sum(full) if len(full) > 1 else sum(full) * max(stack, 1)


def align(rows, *, left=(0,)):
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


def text_table(rows):
  """Formats rows of cells, the first a head, for a terminal."""
  lines = align(rows, left=(0,))
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(rows):
  """Formats rows of cells, the first a head, for a page."""
  head, *rest = ([cell.replace("|", "\\|") for cell in row] for row in rows)
  rule = ["---", *["---:"] * (len(head) - 1)]
  return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rest])
