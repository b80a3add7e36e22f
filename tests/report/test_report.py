"""Tests of the report: numbers in tables, grouping of runs, figures, errors."""

import copy
import itertools
import json
import os
import re
import subprocess
import sys

import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.text
import numpy as np
import PIL.Image
import pytest

from maestro.errors import UserError
from maestro.report import __main__ as report_main
from maestro.report import figures
from maestro.report import tables as report
from maestro.runs import metrics

# The settled lam = 1e-3 LeNet: its real totals, made-up layers.
LENET = {
  "config": {
    "name": "lenet_od",
    "method": "maestro",
    "seed": 0,
    "optim": {"lam": 1e-3},
    "data": {"data_dir": "/a"},
  },
  "git": "abc",
  "device": "cpu",
  "seed": 0,
  "steps": 9380,
  "wall_seconds": 131.4,
  "dense": {"params": 44426, "macs": 281640},
  "final": {
    "params": 10306,
    "macs": 200900,
    "metrics": {"accuracy": 0.99, "loss": 0.0312},
    "val_metrics": {"accuracy": 0.9885, "loss": 0.0377},
  },
  "layers": [
    {"path": "conv1", "rank": 6, "full_rank": 6, "params": 156, "macs": 86400},
    {
      "path": "conv2",
      "rank": 9,
      "full_rank": 16,
      "params": 1510,
      "macs": 95616,
    },
    {"path": "fc1", "rank": 18, "full_rank": 120, "params": 6888, "macs": 6768},
    {"path": "fc2", "rank": 5, "full_rank": 84, "params": 1104, "macs": 1020},
    {"path": "fc3", "rank": 7, "full_rank": 10, "params": 642, "macs": 658},
  ],
  "train": {
    "examples_per_second": 9000,
    "macs_total": 1.234e12,
    "compilations": 3,
  },
}
for _layer in LENET["layers"]:
  _layer["form"] = "dense" if _layer["path"] == "conv1" else "factored"


def change(results, **paths):
  """Copy results with values at dotted paths replaced (None: removed)."""
  results = copy.deepcopy(results)
  for path, value in paths.items():
    *parents, last = path.split("__")
    at = results
    for parent in parents:
      at = at[parent]
    if value is None:
      del at[last]
    else:
      at[last] = value
  return results


def make_run(workdir, layers=5, *, epochs=20, discover=10, full=64, **options):
  """Write a plausible run's files and return its workdir."""
  options = {"score": "accuracy", "stacked": False, "zeros": True} | options
  workdir.mkdir(parents=True)
  rng = np.random.default_rng(layers)
  paths = [f"fc{i + 1}" for i in range(layers)]
  if layers > 12:
    paths = [
      f"layer{i // 5 + 1}_{i % 5 // 2}/conv{i % 2}" for i in range(layers)
    ]
    paths = [f"{p}_{i}" if p in paths[:i] else p for i, p in enumerate(paths)]
  fulls = [full // 2 ** (i % 3) for i in range(layers)]
  target = rng.uniform(0.05, 0.9, layers)
  speed = rng.uniform(0.2, 0.7, layers)
  dense = {"params": 1000 * layers, "macs": 90000 * layers}
  with metrics.Writer(workdir, total_steps=epochs * 100) as writer:
    for epoch in range(epochs + 1):
      t = min(epoch, discover)
      left = target + (1 - target) * np.exp(-speed * np.maximum(t - 1, 0))
      ranks = [round(r * s) for r, s in zip(fulls, left, strict=True)]
      share = sum(ranks) / sum(fulls)
      values = {f"rank/{p}": r for p, r in zip(paths, ranks, strict=True)}
      values["rank/total"] = sum(ranks)
      values["cost/params"] = 2 * share**1.3 * dense["params"]
      values["cost/macs"] = 1.8 * share**0.8 * dense["macs"]
      values["phase"] = int(epoch > discover)
      values["train/loss"] = 2 * np.exp(-epoch / 4)
      noise = rng.normal(0, 0.002)
      score = 0.985 - 0.4 * np.exp(-epoch / 2) + noise
      score += 0.008 * (epoch > discover)
      if options["score"] == "loss":
        score = float("nan") if epoch == 3 else 1 - score
      values[f"val/{options['score']}"] = score
      writer.write(100 * epoch, epoch, values)
      writer.write(100 * epoch + 50, epoch + 0.5, {"train/loss": 1.0})
  spectra = {"start": {}, "end of discover": {}, "final": {}}
  for path, whole, rank in zip(paths, fulls, ranks, strict=True):
    b = np.arange(whole)
    spectra["start"][path] = list(3 * np.exp(-b / whole) * (1 - b / whole))
    found = 2 * np.exp(-2 * b / max(rank, 1)) * (1 - b / whole)
    found[rank:] = 0.0 if options["zeros"] else 3e-9
    spectra["end of discover"][path] = list(found)
    spectra["final"][path] = list(1.6 * found[:rank])
  (workdir / "importance.json").write_text(json.dumps(spectra))
  results = change(LENET, dense=dense)
  results["layers"] = [
    {
      "path": p,
      "rank": r,
      "full_rank": f,
      "params": 900,
      "macs": 80000,
      "form": "factored",
    }
    for p, r, f in zip(paths, ranks, fulls, strict=True)
  ]
  results["final"]["params"] = 900 * layers
  results["final"]["macs"] = 80000 * layers
  (workdir / "results.json").write_text(json.dumps(results))
  return workdir


def rows(table):
  return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


# ------------------------------------------------------------------- tables


def test_layer_table_numbers():
  table = report.layer_table(LENET)
  assert "10,306 of 44,426 params (23.2 %)" in table
  assert "200,900 of 281,640 MACs (71.3 %)" in table
  lines = rows(table)
  head = ["layer", "rank", "form", "params", "share", "MACs", "share"]
  assert lines[0] == head
  fc1 = next(line for line in lines if line[0] == "fc1")
  assert fc1 == [
    "fc1",
    "18 / 120",
    "factored",
    "6,888",
    "15.5 %",
    "6,768",
    "2.4 %",
  ]
  total = next(line for line in lines if line[0] == "total")
  assert total[1:] == ["45 / 236", "10,306", "23.2 %", "200,900", "71.3 %"]
  # What no layer accounts for stands in a row, so that the columns add up.
  rest = next(line for line in lines if line[0] == "rest")
  assert rest[1:] == ["6", "0.0 %", "10,438", "3.7 %"]
  assert table.splitlines()[-2:] == [
    "accuracy  99.00 % (test)  98.85 % (validation)",
    "loss      0.0312 (test)   0.0377 (validation)",
  ]


def test_layer_table_is_aligned():
  lines = report.layer_table(LENET).splitlines()
  end = lines.index("")
  width = len(lines[1])
  assert width <= 79
  numbers = [line for line in lines[:end] if not line.startswith("-")]
  assert {len(line) for line in numbers} == {width}


def test_layer_table_without_a_rest():
  results = change(LENET, final__params=10300, final__macs=190462)
  assert "rest" not in report.layer_table(results)


def test_layer_table_compares_layers_where_it_can():
  results = copy.deepcopy(LENET)
  results["layers"][2] |= {"dense_params": 30840, "dense_macs": 30720}
  lines = rows(report.layer_table(results))
  assert lines[0][-2:] == ["params of dense layer", "MACs of dense layer"]
  assert next(r for r in lines if r[0] == "fc1")[-2:] == ["22.3 %", "22.0 %"]
  assert next(r for r in lines if r[0] == "fc2")[-2:] == ["-", "-"]
  assert next(r for r in lines if r[0] == "total")[-2:] == ["23.2 %", "71.3 %"]


@pytest.mark.parametrize(
  ("rank", "full", "text"),
  [
    (37, 120, "37 / 120"),
    (0, 120, "0 / 120"),
    (None, None, "-"),
    ([3, 4], 8, "3,4 / 8"),
    ([3, 4], [8, 8], "3,4 / 8"),
    ([1, 2, 3, 4, 5, 6], 8, "1..6 (mean 3.5) / 8"),
  ],
)
def test_ranks(rank, full, text):
  results = copy.deepcopy(LENET)
  layer = results["layers"][2]
  layer |= {"rank": rank, "full_rank": full}
  assert rows(report.layer_table(results))[4][1] == text
  total = next(r for r in rows(report.layer_table(results)) if r[0] == "total")
  count = len(rank) if isinstance(rank, list) else 1
  whole = (np.max(full) if full is not None else 0) * count
  assert total[1] == f"{27 + np.sum(rank or 0)} / {116 + whole}"


def test_missing_numbers_are_not_invented():
  bare = {"final": {}, "layers": [{"path": "fc", "rank": 3, "full_rank": 4}]}
  table = report.layer_table(bare)
  assert "not run of not run params (-)" in table
  assert rows(table)[-2:] == [
    ["accuracy", "not run (test)"],
    ["loss", "not run (test)"],
  ]
  assert rows(report.compare([bare]))[2] == ["unnamed", "1"] + ["not run"] * 7


def test_regression_has_no_accuracy():
  results = change(
    LENET, final__metrics={"loss": 0.25}, final__val_metrics={"loss": 0.5}
  )
  table = report.layer_table(results)
  assert "accuracy" not in table
  assert table.endswith("loss  0.2500 (test)  0.5000 (validation)")
  head, _, row = rows(report.compare([results]))
  assert head[2] == "loss"
  assert row[2] == "0.2500 ± -"


# --------------------------------------------------------------- comparison


def seeds(values, **paths):
  return [
    change(
      LENET,
      seed=seed,
      config__seed=seed,
      config__data={"data_dir": f"/machine/{seed}"},
      final__metrics={"accuracy": value},
      **paths,
    )
    for seed, value in enumerate(values)
  ]


def test_compare_groups_seeds():
  runs = seeds([0.98, 0.99, 0.985]) + seeds([0.97], config__optim={"lam": 2e-3})
  head, _, first, second = rows(report.compare(runs))
  assert head == [
    *("run", "seeds", "accuracy %", "params", "% of dense", "MACs"),
    *("% of dense", "train MACs", "wall s"),
  ]
  assert first == [
    *("lenet_od optim.lam=0.001", "3", "98.50 ± 0.50", "10,306", "23.2"),
    *("200,900", "71.3", "1.23 T", "131"),
  ]
  assert second[:3] == ["lenet_od optim.lam=0.002", "1", "97.00 ± -"]


def test_compare_averages_costs():
  runs = seeds([0.98, 0.99])
  runs[0]["final"]["params"], runs[1]["final"]["params"] = 10000, 11000
  runs[1]["wall_seconds"] = None
  row = rows(report.compare(runs))[2]
  assert row[3:5] == ["10,500", f"{100 * 10500 / 44426:.1f}"]
  assert row[-1] == "131 (1 of 2)"


def test_compare_says_how_many_have_a_score():
  runs = seeds([0.98, 0.99])
  runs[1]["final"]["metrics"] = {}
  assert rows(report.compare(runs))[2][1:3] == ["2", "98.00 ± - (1 of 2)"]


def test_a_seed_again_is_no_second_sample():
  runs = seeds([0.98, 0.99])
  again = change(runs[0], final__metrics={"accuracy": 0.97})
  _, _, first, second = rows(report.compare([*runs, again, runs[0]]))
  assert first[:3] == ["lenet_od", "2", "98.50 ± 0.71"]
  assert second[:3] == ["lenet_od (repeat 2)", "1", "97.00 ± -"]


def test_runs_without_a_name():
  runs = seeds([0.98])
  runs[0]["config"].pop("name")
  dense = change(runs[0], config__method="dense")
  table = rows(report.compare([*runs, dense]))
  assert [row[0] for row in table[2:]] == ["maestro lam=0.001", "dense"]


def test_compare_markdown():
  runs = seeds([0.98, 0.99])
  for run in runs:
    run["config"]["name"] = "a|b"
  lines = report.compare_markdown(runs).splitlines()
  assert lines[1] == "| --- |" + " ---: |" * 8
  assert lines[2].startswith("| a\\|b | 2 | 98.50 ± 0.71 | 10,306 |")
  assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


# ------------------------------------------------------------------ figures


def check_png(path):
  with PIL.Image.open(path) as image:
    assert image.format == "PNG"
    assert 1000 <= image.width <= 1100
    # Something is drawn: not all of one colour.
    assert len(set(image.convert("L").resize((100, 60)).tobytes())) > 10


@pytest.mark.quick(1)
@pytest.mark.parametrize("layers", [3, 21])
def test_figures(tmp_path, layers):
  workdir = make_run(tmp_path / "run", layers)
  paths = figures.figures(workdir)
  assert paths == [
    workdir / "report" / name
    for name in ("ranks.png", "importance.png", "cost.png")
  ]
  for path in paths:
    check_png(path)


@pytest.mark.quick(0)
def test_a_report_is_whole_or_absent(tmp_path, monkeypatch):
  """Killed after any of its pictures, and drawn again over the remains."""
  workdir = tmp_path / "run"
  make_run(workdir)
  save, count = matplotlib.figure.Figure.savefig, 0

  def killed(self, path, **options):
    nonlocal count
    count += 1
    save(self, path, **options)
    if count == 2:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(matplotlib.figure.Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
      figures.figures(workdir)
  assert not (workdir / "report").exists()
  paths = figures.figures(workdir)
  assert len(paths) == 3 and all(path.exists() for path in paths)
  assert not list(workdir.glob(".report*"))
  mine = workdir / "report" / "mine.txt"
  mine.write_text("kept")
  figures.figures(workdir)
  assert mine.read_text() == "kept" and not list(workdir.glob(".report*"))


@pytest.mark.quick(0)
def test_two_at_once_draw_the_same_report(tmp_path, monkeypatch):
  workdir = make_run(tmp_path / "run")
  save, others = matplotlib.figure.Figure.savefig, []

  def meanwhile(self, path, **options):
    save(self, path, **options)
    if not others:
      others.append(None)
      others[0] = figures.figures(workdir)

  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", meanwhile)
  assert figures.figures(workdir) == others[0]
  assert len(list((workdir / "report").iterdir())) == 3
  assert not list(workdir.glob(".report*"))


def test_figures_of_a_dense_run(tmp_path):
  workdir = make_run(tmp_path / "run", 3, score="loss")
  (workdir / "importance.json").unlink()
  lines = metrics.read(workdir)
  for record in lines:
    for key in [k for k in record if k.startswith("rank/") or k == "phase"]:
      del record[key]
  text = "".join(json.dumps(record) + "\n" for record in lines)
  (workdir / metrics.FILE).write_text(text)
  assert [p.name for p in figures.figures(workdir)] == ["cost.png"]


@pytest.mark.quick(0)
def test_figures_of_a_single_record(tmp_path):
  for layers in (3, 21):
    workdir = make_run(tmp_path / str(layers), layers, epochs=0)
    assert len(figures.figures(workdir)) == 3


def test_figures_without_any_record(tmp_path):
  workdir = make_run(tmp_path / "run", 3)
  (workdir / "importance.json").write_text("{}")
  (workdir / metrics.FILE).write_text("")
  assert figures.figures(workdir) == []
  assert not (workdir / "report").exists()


@pytest.mark.quick(0)
def test_spectra_of_zeros_and_stacks(tmp_path):
  workdir = make_run(tmp_path / "run", 3)
  spectra = {
    "start": {"fc1": [1.0, 0.0], "fc2": [[2.0, 1e-30], [1.0, 0.0]], "fc3": []},
    "final": {"fc1": [0.0, 0.0], "fc2": [[0.0, 0.0], [1.0, 0.0]], "fc3": []},
  }
  (workdir / "importance.json").write_text(json.dumps(spectra))
  assert len(figures.figures(workdir)) == 3
  zeros = {"start": {"fc1": [0.0, 0.0]}}
  (workdir / "importance.json").write_text(json.dumps(zeros))
  assert len(figures.figures(workdir)) == 3


def test_stacked_layers_have_curves(tmp_path):
  results = {"layers": [{"path": "a/b", "rank": [2, 4], "full_rank": 8}]}
  records = [
    {"step": 1, "epoch": 1, "rank/a/b": 6, "rank/a/b/0": 2, "rank/total": 6},
  ]
  curves = figures._rank_curves(records, results)
  assert {k: list(v) for k, (_, v) in curves.items()} == {
    "a/b": [37.5],
    "a/b/0": [25.0],
    "total": [37.5],
  }


def test_boundary_is_the_last_epoch_of_discover():
  records = [
    {"step": i, "epoch": i / 2, "phase": int(i > 6)} for i in range(10)
  ]
  assert figures._boundary(records) == 3.0
  assert figures._boundary(records[:5]) is None
  assert figures._boundary([]) is None


@pytest.mark.parametrize("first", [0.0, 1.0, 2.0])
def test_the_words_of_both_phases_have_room_on_the_axis(first):
  """Also where ranks begin only when a race begins them."""
  records = [{"step": i, "epoch": i, "phase": int(i > 2)} for i in range(9)]
  axes = matplotlib.figure.Figure().subplots()
  figures._epoch_axis(axes, records, [np.arange(first, 9.0)])
  low, high = axes.get_xlim()
  assert low < 2.0 < high
  assert low == (0.0 if first == 2.0 else first)


def test_short_names_stay_apart():
  paths = [f"encoder/layers_{i}/self_attention/query" for i in range(12)]
  short = figures._short(paths)
  assert max(map(len, short)) <= 28
  assert len(set(short)) == 12
  assert figures._short(["fc1", "fc2"]) == ["fc1", "fc2"]
  same_start = ["a" * 40 + "b", "a" * 40 + "c"]
  assert figures._short(same_start) == same_start


def test_labels_do_not_meet():
  figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
  axes = figure.add_subplot()
  axes.set_ylim(0, 100)
  ends = [
    (y, f"layer{i}", "k") for i, y in enumerate([0] * 4 + [50] * 3 + [99])
  ]
  figures._label_ends(axes, ends)
  canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  # The text alone: an annotation's own extent has its arrow in it.
  boxes = [
    matplotlib.text.Text.get_window_extent(t, canvas.get_renderer())
    for t in axes.texts
  ]
  assert len(boxes) == 8
  for low, high in itertools.pairwise(boxes):
    assert low.y1 <= high.y0 + 0.5


# ------------------------------------------------------------- command line


def test_main_prints_one_run_and_draws_it(tmp_path, capsys):
  workdir = make_run(tmp_path / "run", 3)
  report_main.report([str(workdir)], out=tmp_path / "figures")
  out = capsys.readouterr().out
  assert "fc1" in out
  assert f"wrote {tmp_path / 'figures' / 'ranks.png'}" in out
  check_png(tmp_path / "figures" / "ranks.png")
  assert not (workdir / "report").exists()


def test_main_compares_several(tmp_path, capsys):
  paths = []
  for i, run in enumerate(seeds([0.98, 0.99])):
    path = tmp_path / f"{i}.json"
    path.write_text(json.dumps(run))
    paths.append(str(path))
  report_main.report(paths)
  assert "98.50 ± 0.71" in capsys.readouterr().out
  report_main.report(paths, markdown=True)
  assert "| --- |" in capsys.readouterr().out


def test_main_names_what_is_wrong(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "results.json").write_text('{"final": ')
  (tmp_path / "other.json").write_text("[]")
  for name, words in {
    "absent": "not found; give",
    "empty": "no results.json; .*start it again",
    "broken": r"broken.results.json is damaged.*start the run again",
    "other.json": "is damaged.*no object",
  }.items():
    with pytest.raises(UserError, match=words) as error:
      report_main.report([str(tmp_path / name)])
    assert str(tmp_path / name) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
  assert capsys.readouterr().out == ""


def test_main_needs_metrics_to_draw(tmp_path):
  workdir = make_run(tmp_path / "run", 3)
  (workdir / metrics.FILE).unlink()
  with pytest.raises(UserError, match=r"metrics\.jsonl: not found"):
    report_main.report([str(workdir)], out=tmp_path / "out")


@pytest.mark.quick(0)
def test_runs_as_a_module(tmp_path):
  def run(*args):
    return subprocess.run(
      [sys.executable, "-m", "maestro.report", *args],
      capture_output=True,
      text=True,
      env=os.environ | {"PYTHONIOENCODING": "utf-8"},
      check=False,
    )

  done = run("--help")
  assert done.returncode == 0
  assert "--out" in done.stdout
  missing = run(str(tmp_path / "absent"))
  assert missing.returncode == 2
  assert missing.stderr.startswith("error: ")
  assert missing.stderr.count("\n") == 1
  none = run()
  assert none.returncode == 2 and "no run is named" in none.stderr
  workdir = make_run(tmp_path / "run", 3)
  table = run(str(workdir), "--markdown")  # flags may come last
  assert table.returncode == 0 and table.stdout.startswith("| ")


def test_labels_name_the_budget_and_only_a_lambda_that_is_used():
  configs = [
    {"method": "maestro", "discover.lam": 1e-3},
    {"method": "nested", "discover.lam": 1e-3},
    {"method": "race", "discover.lam": 1e-3, "budget": "macs:0.4"},
    {"method.name": "cuttlefish", "discover.lam": 1e-3},
    {"method": "dense", "discover.lam": 1e-3},
  ]
  labels = report._labels({(i, 0): c for i, c in enumerate(configs)})
  want = ["maestro lam=0.001", "nested", "race macs:0.4", "cuttlefish", "dense"]
  assert list(labels.values()) == want
