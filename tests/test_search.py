"""Tests the search for lambda: what stops it, what it records and resumes."""

import copy
import json
import os
import pathlib
import signal
import sys
import warnings

import pytest
from absl.testing import flagsaver

from maestro import cli, search
from maestro.errors import Interrupted, UserError
from maestro.runs import workdir
from maestro.training import loop as train

DENSE = 0.95
# lambda -> validation accuracy, params and MACs as fractions of dense = 1000
PLANTED = {
  0.016: (0.10, 0.05, 0.04),
  0.008: (0.92, 0.15, 0.10),
  0.004: (0.9465, 0.31, 0.20),
  0.002: (0.951, 0.60, 0.50),
  0.001: (0.952, 0.90, 0.80),
}
CONFIG = {
  "model": {"name": "mlp", "features": (8,)},
  "data": {"name": "digits"},
  "discover": {"epochs": 1, "schedule": {"name": "constant"}, "lam": 1.0},
  "settle": {"epochs": 1, "schedule": {"name": "constant"}},
  "optimizer": {"name": "sgd"},
  "batch_size": 32,
  "seed": 7,
}
USUAL = {"start": 0.016, "max_accuracy_loss": 0.0035}


class FakeTrain:
  """Stands in for train.train: planted results, and who was trained."""

  def __init__(self):
    self.planted = dict(PLANTED)
    self.called, self.trained = [], []
    self.interrupt_at = "never"
    self.test_accuracy = lambda lam: 0.5

  def __call__(self, config, workdir):
    c = train.parse(config)
    lam = None if c.method.name == "dense" else c.discover.lam
    self.called.append((lam, c.seed))
    path = pathlib.Path(workdir) / "results.json"
    if path.exists():
      return json.loads(path.read_text())
    if self.interrupt_at == lam:
      raise Interrupted("stopped at step 3 of 8")
    self.trained.append((lam, c.seed))
    value, params, macs = (DENSE, 1, 1) if lam is None else self.planted[lam]
    if c.loss == "squared_error":
      test, val = {"loss": 0.0}, {"loss": 1 - value}
    else:
      test = {"accuracy": self.test_accuracy(lam), "loss": 1.0}
      val = {"accuracy": value + 0.001 * c.seed, "loss": 0.3}
    results = {
      "config": json.loads(json.dumps(config)),
      "seed": c.seed,
      "wall_seconds": 10.0,
      "dense": {"params": 1000, "macs": 1000},
      "final": {
        "params": round(1000 * params),
        "macs": round(1000 * macs),
        "metrics": test,
        "val_metrics": val,
      },
      "layers": [],
      "train": {"macs_total": 4000 if lam is None else 2000},
      "alarms": [],
    }
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))
    return results


@pytest.fixture
def fake(monkeypatch):
  fake = FakeTrain()
  monkeypatch.setattr(train, "train", fake)
  monkeypatch.setattr(search.jax, "clear_caches", lambda: None)
  return fake


def run(workdir, config=CONFIG, **criterion):
  return search.search(config, workdir, USUAL | criterion)


# ---------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------


def test_takes_the_largest_lambda_that_suits(fake, tmp_path):
  record = run(tmp_path)
  assert record["chosen"] == 0.004  # loses 0.35 points, up to rounding
  assert fake.trained == [(None, 0), (0.016, 0), (0.008, 0), (0.004, 0)]
  assert [row["accepted"] for row in record["runs"]] == [False] * 3 + [True]


def test_zero_tolerance(fake, tmp_path):
  assert run(tmp_path, max_accuracy_loss=0)["chosen"] == 0.002


@pytest.mark.parametrize("mislead", (lambda lam: lam or 1, lambda lam: 0.0))
def test_test_split_has_no_say(fake, tmp_path, mislead):
  fake.test_accuracy = mislead  # perfect or useless where it would matter
  assert run(tmp_path)["chosen"] == 0.004
  assert "metrics" not in json.dumps(run(tmp_path)["runs"])


def test_budgets_that_are_met(fake, tmp_path):
  assert run(tmp_path, max_params=0.31, max_macs=0.2)["chosen"] == 0.004


@pytest.mark.parametrize(
  ("budgets", "said"),
  (
    ({"max_params": 0.2}, "params are 31 % > 20 %"),
    ({"max_macs": 0.1}, "MACs are 20 % > 10 %"),
    (
      {"max_params": 0.2, "max_macs": 0.1},
      "params are 31 % > 20 % and MACs are 20 % > 10 %",
    ),
  ),
)
def test_no_lambda_meets_both(fake, tmp_path, capsys, budgets, said):
  record = run(tmp_path, seeds=3, **budgets)
  assert record["chosen"] is None
  assert fake.trained[-1] == (0.004, 0)  # neither a smaller one, nor seeds
  out = capsys.readouterr().out
  said = f"no lambda meets both: at lambda 0.004 accuracy suits but {said}"
  assert said in out and "0.016" in out
  assert "larger --start" not in out


def test_first_lambda_says_that_a_larger_may_do(fake, tmp_path):
  record = run(tmp_path / "a", start=0.004)
  assert record["chosen"] == 0.004 and "larger --start" in record["verdict"]
  record = run(tmp_path / "b", start=0.004, max_params=0.2)
  assert record["chosen"] is None and "larger --start" in record["verdict"]


def test_max_runs(fake, tmp_path):
  record = run(tmp_path, max_runs=2)
  assert record["chosen"] is None and "--max_runs=2" in record["verdict"]
  assert len(fake.trained) == 3
  assert run(tmp_path, max_runs=3)["chosen"] == 0.004  # may be raised
  assert len(fake.trained) == 4


@pytest.mark.parametrize("value", (0.90, 0.95))
def test_stops_where_halving_is_pointless(fake, tmp_path, value):
  fake.planted[0.008] = value, 1, 1
  record = run(tmp_path)
  assert record["chosen"] is None and "pointless" in record["verdict"]
  assert fake.trained[-1] == (0.008, 0)


def test_regression_is_judged_by_loss(fake, tmp_path, capsys):
  config = CONFIG | {"loss": "squared_error"}
  more = {"max_accuracy_loss": None, "max_loss_increase": 0.0035}
  record = run(tmp_path, config, **more)
  assert record["chosen"] == 0.004
  assert record["runs"][0]["val_accuracy"] is None
  assert "val loss" in capsys.readouterr().out
  assert (tmp_path / "search.png").exists()


# ---------------------------------------------------------------------------
# Records, seeds, resuming
# ---------------------------------------------------------------------------


def test_seeds_repeat_dense_and_chosen(fake, tmp_path, capsys):
  record = run(tmp_path, seeds=3)
  assert fake.trained[4:] == [(None, 1), (0.004, 1), (None, 2), (0.004, 2)]
  assert record["chosen"] == 0.004
  assert [r["lam"] for r in record["runs"] if r["accepted"]] == [0.004]
  out = capsys.readouterr().out
  assert "chosen on validation with seed 0: 0.004" in out
  compared = out.split("Test split")[1]
  assert "50.00 ± 0.00" in compared and "0.016" not in compared
  assert "to choose: 4 runs, 40 s, 10,000 training MACs = 2.50 x" in out
  assert "in all: 8 runs, 80 s, 22,000 training MACs = 5.50 x" in out


def test_search_json(fake, tmp_path):
  record = run(tmp_path)
  found = workdir.read_json(tmp_path / "search.json")
  assert found == json.loads(json.dumps(record))
  assert record["criterion"] == {
    "start": 0.016,
    "max_runs": 8,
    "seeds": 1,
    "max_accuracy_loss": 0.0035,
    "max_loss_increase": None,
    "max_params": None,
    "max_macs": None,
  }
  assert record["runs"][2] == {
    "lam": 0.008,
    "seed": 0,
    "workdir": "lam=0.008/seed0",
    "val_accuracy": 0.92,
    "val_loss": 0.3,
    "params_fraction": 0.15,
    "macs_fraction": 0.1,
    "wall_seconds": 10.0,
    "macs_total": 2000,
    "accepted": False,
    "why": "3 points worse, > 0.35",
  }
  assert record["total"] == {
    "runs": 4,
    "wall_seconds": 40.0,
    "macs_total": 10000,
    "relative_to_one_dense_run": 2.5,
  }


def test_runs_differ_in_lambda_method_and_seed_alone(fake, tmp_path):
  config = copy.deepcopy(CONFIG)
  run(tmp_path, config, seeds=2)
  assert config == CONFIG
  for row in json.loads((tmp_path / "search.json").read_text())["runs"]:
    ran = workdir.read_json(tmp_path / row["workdir"] / "results.json")[
      "config"
    ]
    want = json.loads(json.dumps(CONFIG)) | {"seed": row["seed"]}
    if row["lam"] is None:
      want["method"] = "dense"
    else:
      want["discover"]["lam"] = row["lam"]
    assert ran == want


def test_resumes_after_an_interruption(fake, tmp_path):
  fake.interrupt_at = 0.008
  with pytest.raises(Interrupted):
    run(tmp_path)
  record = json.loads((tmp_path / "search.json").read_text())
  assert [r["lam"] for r in record["runs"]] == [None, 0.016]
  assert record["chosen"] is None and record["total"]["runs"] == 2
  fake.interrupt_at = "never"
  fake.trained.clear()
  record = run(tmp_path)
  assert fake.trained == [(0.008, 0), (0.004, 0)]
  assert record["chosen"] == 0.004 and record["total"]["runs"] == 4
  fake.trained.clear()
  assert run(tmp_path) == record and not fake.trained


@pytest.mark.parametrize(
  ("change", "said"),
  (
    ({"start": 0.008}, r"--start: 0.016 there, 0.008 here.*delete"),
    ({"max_params": 0.5}, r"--max_params: None there, 0.5 here"),
    ({"max_runs": 7}, r"--max_runs: 8 there, 7 here"),
    (
      {"config": CONFIG | {"batch_size": 64}},
      r"--config.batch_size: 32 there, 64 here.*choose another --workdir",
    ),
    ({"config": CONFIG | {"threshold": 1e-4}}, r"threshold: None there"),
  ),
)
def test_refuses_the_workdir_of_another_search(fake, tmp_path, change, said):
  run(tmp_path)
  before = (tmp_path / "search.json").read_text()
  with pytest.raises(UserError, match=said):
    run(tmp_path, **change)
  assert (tmp_path / "search.json").read_text() == before


@pytest.mark.parametrize(
  ("change", "said"),
  (
    ({"start": 0.0}, "--start"),
    ({"start": -1.0}, "--start"),
    ({"start": None}, "--start"),
    ({"start": float("nan")}, "--start"),
    ({"max_runs": 0}, "--max_runs"),
    ({"seeds": 0}, "--seeds"),
    ({"max_accuracy_loss": -0.01}, "--max_accuracy_loss"),
    ({"max_accuracy_loss": 1.0}, "--max_accuracy_loss"),
    ({"max_loss_increase": -0.01}, "--max_loss_increase"),
    ({"max_loss_increase": 0.01}, "--max_loss_increase"),
    ({"max_params": 20.0}, "--max_params"),
    ({"max_macs": 0.0}, "--max_macs"),
    ({"config": CONFIG | {"method": "dense"}}, "--config.method=dense"),
    ({"config": CONFIG | {"loss": "squared_error"}}, "--max_loss_increase"),
    ({"config": CONFIG | {"typo": 1}}, "config.typo"),
    (
      {"config": CONFIG | {"discover": CONFIG["discover"] | {"epochs": 0}}},
      "--config.discover.epochs",
    ),
  ),
)
def test_bad_input(fake, tmp_path, change, said):
  with pytest.raises(UserError, match=said):
    run(tmp_path, **change)
  assert not fake.called


def test_default_tolerance_is_half_a_point(fake, tmp_path):
  record = search.search(CONFIG, tmp_path, {"start": 0.016})
  assert record["criterion"]["max_accuracy_loss"] == 0.005


# ---------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------

DIGITS = pathlib.Path(__file__).parents[1] / "configs/digits_od.py"


@pytest.fixture
def command(monkeypatch, tmp_path):
  """Runs the command line in this process; returns the exit code."""
  before = signal.getsignal(signal.SIGTERM)

  def command(*more):
    argv = [
      "search",
      f"--config={DIGITS}:maestro,smoke",
      f"--workdir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, *more])
    with flagsaver.flagsaver(), warnings.catch_warnings():
      warnings.filterwarnings(
        "ignore", r"the load_module\(\)"
      )  # ml_collections
      with pytest.raises(SystemExit) as stop:
        cli.run(search.main)
    return stop.value.code or 0

  yield command
  signal.signal(signal.SIGTERM, before)


def test_exit_codes(fake, command, capsys):
  flags = "--start=0.016", "--max_accuracy_loss=0.0035"
  assert command() == 2
  assert "error: --start=None: it must be above 0" in capsys.readouterr().err
  assert command("--start=0", "--max_runs=3") == 2
  assert command(*flags, "--evaluate") == 2
  assert command(*flags, "--config.method=dense") == 2
  assert not fake.called
  assert command(*flags, "--max_runs=2") == 3
  assert command(*flags, "--max_runs=3") == 0
  assert command(*flags, "--seeds=2") == 0
  assert command("--start=0.008") == 2
  assert "--start: 0.016 there, 0.008 here" in capsys.readouterr().err


def test_sigterm_between_runs(fake, command, monkeypatch, capsys):
  flags = "--start=0.016", "--max_accuracy_loss=0.0035"
  with monkeypatch.context() as patch:
    patch.setattr(
      search.jax, "clear_caches", lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert command(*flags) == 75
  assert "stopped by SIGTERM. Run the same" in capsys.readouterr().out
  assert command(*flags) == 0
  assert fake.trained.count((None, 0)) == 1


def test_default_workdir(fake, command, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert command("--workdir=", "--start=0.004") == 0  # the last one counts
  assert (tmp_path / "runs/digits_od_maestro,smoke_search/search.json").exists()


@pytest.mark.quick(0)
def test_digits_end_to_end(command, monkeypatch, tmp_path, capsys):
  # Programs that both runs share are compiled once: half the time.
  monkeypatch.setattr(search.jax, "clear_caches", lambda: None)
  flags = "--config.mesh.data=1", "--start=0.01", "--max_runs=1"
  flags += "--config.settle.epochs=0", "--config.model.features=(8,)"
  code = command(*flags, "--max_accuracy_loss=0.9")
  record = json.loads((tmp_path / "search.json").read_text())
  assert code == (3 if record["chosen"] is None else 0)
  assert (tmp_path / "search.png").exists()
  dense, row = record["runs"]
  assert (dense["params_fraction"], dense["macs_fraction"]) == (1, 1)
  results = workdir.read_json(tmp_path / row["workdir"] / "results.json")
  assert results["config"]["discover"]["lam"] == 0.01
  val = results["final"]["val_metrics"]
  assert row["val_accuracy"] == val["accuracy"]
  assert "x one dense run" in capsys.readouterr().out
  assert command(*flags, "--max_accuracy_loss=0.9") == code  # all finished
  assert json.loads((tmp_path / "search.json").read_text()) == record
