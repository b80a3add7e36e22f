"""Disturbed runs: what is compared, and a short round of disturbances."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from maestro import chaos
from maestro.parallel.loopback import Command
from maestro.report import figures
from maestro.runs import checkpoint, workdir
from maestro.training import loop

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {
  "model": {"name": "mlp", "features": [8]},
  "data": {"name": "digits"},
  "batch_size": 359,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "discover": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
    "sampler": {"name": "one_layer"},
  },
  "settle": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "mesh": {"data": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Two finished runs of one config."""
  root = tmp_path_factory.mktemp("runs")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "figures", lambda workdir: None)
    for name in ("one", "other"):
      loop.train(CONFIG, root / name)
  return root


@pytest.fixture
def runs(finished, tmp_path):
  shutil.copytree(finished, tmp_path / "runs")
  return tmp_path / "runs" / "one", tmp_path / "runs" / "other"


def test_two_runs_of_one_config_are_equal(runs):
  assert not list(chaos.differences(*runs))


def edit_json(path, change):
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(workdir.sealed(value)))


def change_record(run):
  path = run / "metrics.jsonl"
  lines = path.read_text().splitlines()
  record = json.loads(lines[1])
  record["train/loss"] += 1e-9
  lines[1] = json.dumps(workdir.sealed(record))
  path.write_text("\n".join(lines) + "\n")


def change_leaf(run):
  """Saves the last step again, with one number changed in its last bit."""
  steps = checkpoint.list_steps(run / "checkpoints")
  leaves, extra = checkpoint.load_leaves(run / "checkpoints", steps[-1])
  shutil.rmtree(run / "checkpoints" / str(steps[-1]))
  leaves["params/fc1/bias"][0] = np.nextafter(leaves["params/fc1/bias"][0], 9)
  state = {}
  for path, x in leaves.items():
    node, *rest = [state, *path.split("/")]
    for name in rest[:-1]:
      node = node.setdefault(name, {})
    node[rest[-1]] = x
  with checkpoint.Checkpoints(run / "checkpoints", keep=9) as saved:
    saved.save(steps[-1], state, extra)


CHANGES = {
  "results.json": lambda run: edit_json(
    run / "results.json",
    lambda r: r["final"]["metrics"].update(
      loss=r["final"]["metrics"]["loss"] + 1e-9
    ),
  ),
  "importance.json": lambda run: (run / "importance.json").unlink(),
  "metrics.jsonl": change_record,
  "params/fc1/bias": change_leaf,
  "checkpoints of steps": lambda run: shutil.rmtree(
    run / "checkpoints" / str(checkpoint.list_steps(run / "checkpoints")[0])
  ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_least_difference_is_found(name, runs):
  CHANGES[name](runs[0])
  (found,) = chaos.differences(*runs)
  assert name in found


def test_a_step_at_which_a_run_was_stopped_is_no_difference(runs):
  saved = runs[0] / "checkpoints"
  first, *_ = checkpoint.list_steps(saved)
  (saved / str(first)).rename(saved / str(first + 1))
  assert not list(chaos.differences(*runs))


def test_what_a_clock_measures_is_no_difference(runs):
  edit_json(runs[0] / "results.json", lambda r: r.update(wall_seconds=1e9))
  assert not list(chaos.differences(*runs))


@pytest.mark.quick(0)
def test_a_few_disturbances_leave_no_trace(tmp_path):
  config = tmp_path / "config.py"
  config.write_text(
    "import json\n"
    "from ml_collections import ConfigDict\n"
    "def get_config(arg=''):\n"
    f"  return ConfigDict(json.loads({json.dumps(CONFIG)!r})).lock()\n"
  )
  command = Command(
    [sys.executable, "-m", "maestro.main", f"--config={config}"]
  )
  events = chaos.disturb(command, tmp_path / "runs", kills=3, seed=2)
  assert len(events) == 3
  assert not [event for event in events if event.fault]
  text = chaos.table(events)
  assert len(text.splitlines()) == 4 and "as it should" in text


def test_only_the_kinds_that_are_asked_for_come(monkeypatch, tmp_path):
  class Ends:
    began = 0.0

    def __init__(self, command, workdir):
      workdir.mkdir(parents=True)

    def wait(self, seconds):
      return 0

  came = []

  def disturbed(kind, command, place, *rest):
    place.mkdir()
    (place / "results.json").touch()
    came.append(kind)
    return chaos.Event(kind, len(came), 0.0, 0, 0, 0.0)

  monkeypatch.setattr(chaos, "Attempt", Ends)
  monkeypatch.setattr(chaos, "_disturb_once", disturbed)
  monkeypatch.setattr(chaos, "_step", lambda place: 1)
  monkeypatch.setattr(chaos, "differences", lambda *places: [])
  kinds = ("terminate", "flip")
  chaos.disturb(Command(["x"]), tmp_path / "some", 20, 0, kinds)
  assert set(came) == set(kinds)
  came.clear()
  chaos.disturb(Command(["x"]), tmp_path / "all", 60, 0)
  assert set(came) == set(chaos.KINDS)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("config", "processes"), [("digits_od", 1), ("lenet_od", 1), ("digits_od", 2)]
)
def test_many_disturbances_leave_no_trace(config, processes, tmp_path):
  path = ROOT / "configs" / f"{config}.py"
  command = Command(
    [sys.executable, "-m", "maestro.main", f"--config={path}:smoke"], processes
  )
  events = chaos.disturb(command, tmp_path / "runs", kills=20, seed=0)
  assert not [event for event in events if event.fault]


def test_the_flags_of_a_config_are_passed_on_however_they_are_written():
  argv = ["chaos", "--config", "a.py:smoke", "--kills=3", "--config.seed=1"]
  argv += ["--config.model.features", "(8,)", "--workdir", "x"]
  assert chaos.flags_of_config(argv) == [
    "--config=a.py:smoke",
    "--config.seed=1",
    "--config.model.features=(8,)",
  ]
