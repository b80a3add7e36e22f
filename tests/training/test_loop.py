"""The training loop: resuming, shrinking, cutting, options and bad input."""

import copy
import itertools
import json
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import data as data_lib
from maestro import trees
from maestro.errors import Interrupted, UserError
from maestro.report import figures
from maestro.runs import checkpoint, metrics
from maestro.runs import workdir as workdir_lib
from maestro.training import build
from maestro.training import loop as train
from maestro.training import state as state_lib
from maestro.training.config import parse

ROOT = pathlib.Path(__file__).parents[2]

# Ranks fall from the first epoch on, and are cut within discover.
BASE = {
  "model": {"name": "mlp", "features": [16]},
  "data": {"name": "digits"},
  "batch_size": 128,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "threshold": 0.3,
  "discover": {
    "epochs": 4,
    "schedule": {"name": "constant", "learning_rate": 0.05},
    "lam": 2e-2,
    "sampler": {"name": "one_layer"},
    "shrink": True,
  },
  "settle": {
    "epochs": 2,
    "schedule": {"name": "cosine", "learning_rate": 0.05},
  },
  "truncate": {"min_saving": 0.1, "max_compilations": 8, "multiple_of": 2},
  "checkpoint": {"every_epochs": 1, "keep": 1},
  "mesh": {"data": 1},
}
SHORT = {"discover.epochs": 1, "settle.epochs": 1}


def config(changes=None, **more):
  """BASE with some keys, dotted, replaced."""
  c = copy.deepcopy(BASE)
  for path, value in ((changes or {}) | more).items():
    *sections, key = path.split(".")
    section = c
    for name in sections:
      section = section.setdefault(name, {})
    section[key] = value
  return c


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """The workdir of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("reference") / "run"
  train.train(config(), workdir)
  return workdir


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)


@pytest.fixture
def quickly(monkeypatch, jit):
  """Compiles quickly: for runs that are not compared with the reference."""
  monkeypatch.setattr(jax, "jit", jit)


def state_of(workdir, step=None):
  """Everything in a checkpoint, as host arrays by path."""
  with checkpoint.Checkpoints(workdir / "checkpoints", keep=9) as saved:
    step = saved.latest if step is None else step
    state, extra = saved.load(step, saved.shapes(step)[0])
  leaves = jax.tree_util.tree_leaves_with_path(state)
  arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
  return arrays, extra


def results_of(workdir):
  return workdir_lib.read_json(workdir / "results.json")


def files_of(workdir):
  return {
    path.relative_to(workdir): path.read_bytes()
    for path in workdir.rglob("*")
    if path.is_file()
  }


def assert_same_run(workdir, reference):
  """Bit-identical but for what a clock measures."""
  a, extra_a = state_of(workdir)
  b, extra_b = state_of(reference)
  assert a.keys() == b.keys()
  for path, x in b.items():
    assert a[path].dtype == x.dtype, path
    assert a[path].tobytes() == x.tobytes(), path
  for extra in (extra_a, extra_b):
    del extra["ledger"]["train_seconds"], extra["ledger"]["wall_seconds"]
  assert extra_a == extra_b
  results = [results_of(w) for w in (workdir, reference)]
  for r in results:
    del r["wall_seconds"], r["train"]["examples_per_second"], r["git"]
  assert results[0] == results[1]
  records = [metrics.read(w) for w in (workdir, reference)]
  for r in [*records[0], *records[1]]:
    r.pop("examples_per_second", None)
  assert records[0] == records[1]
  steps = [r["step"] for r in records[0]]
  assert steps == sorted(set(steps))
  spectra = [(w / "importance.json").read_text() for w in (workdir, reference)]
  assert spectra[0] == spectra[1]


# ---------------------------------------------------------------------------
# Interrupted runs
# ---------------------------------------------------------------------------


class Killed(BaseException):
  """Ends a run as a kill would, at a chosen moment."""


def test_the_reference_run_shrinks_and_is_cut_in_both_phases(reference):
  results = results_of(reference)
  programs = results["train"]["programs"]
  assert sum(p.startswith("discover") for p in programs) >= 2, programs
  assert sum(p.startswith("settle") for p in programs) == 1, programs
  assert results["train"]["compilations"] == len(programs) <= 8
  ranks = [r["rank/total"] for r in metrics.read(reference)]
  assert ranks[0] == 26 and 0 < ranks[-1] < 20, ranks
  assert results["alarms"] == []
  assert (reference / "report").is_dir()


KILLS = {
  "before_the_first_save": ("save", 1, "before"),
  "after_the_first_save": ("save", 1, "after"),
  "at_the_first_cut": ("cut", 1, "before"),
  "after_the_first_cut": ("cut", 1, "after"),
  "before_metrics": ("write", 3, "before"),
  "between_metrics_and_save": ("save", 3, "before"),
  "at_the_end_of_discover": ("save", 4, "after"),
  "at_the_cut_into_settle": ("cut", 2, "after"),
  "before_the_last_save": ("save", 6, "before"),
  "after_the_last_save": ("save", 6, "after"),
  "before_the_results": ("results", 3, "before"),
  "after_the_results": ("results", 3, "after"),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_resumes_bit_identically(
  moment, tmp_path, reference, monkeypatch
):
  point, at, when = KILLS[moment]
  owner, name = {
    "save": (checkpoint.Checkpoints, "save"),
    "write": (metrics.Writer, "write"),
    "cut": (train, "truncate_state"),
    "results": (train, "layer_table"),
  }[point]
  if point == "results":
    owner, name, at = train, "results_of", 1
    if when == "after":
      owner, name = train, "layer_table"
  original, count = getattr(owner, name), 0

  def hooked(*args, **kwargs):
    nonlocal count
    count += 1
    if count == at and when == "before":
      raise Killed
    result = original(*args, **kwargs)
    if count == at:
      raise Killed
    return result

  with monkeypatch.context() as patch:
    patch.setattr(owner, name, hooked)
    with pytest.raises(Killed):
      train.train(config(), tmp_path / "run")
  train.train(config(), tmp_path / "run")
  assert_same_run(tmp_path / "run", reference)


def write_config(path, changes=None):
  path.write_text(
    "import json\n"
    "from ml_collections import ConfigDict\n"
    "def get_config(arg=''):\n"
    f"  return ConfigDict(json.loads({json.dumps(config(changes))!r})).lock()\n"
  )
  return path


def start(config_file, workdir, *more):
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "maestro.main",
      f"--config={config_file}",
      f"--workdir={workdir}",
      *more,
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.quick(0)
def test_sigkill_at_any_time_loses_nothing_that_was_saved(tmp_path, reference):
  workdir = tmp_path / "run"
  file = write_config(tmp_path / "killed.py")
  steps_per_epoch = results_of(reference)["steps"] // 6
  # The last one is just after the cut into settle.
  for epoch in (1, 5):
    process = start(file, workdir)
    saved = workdir / "checkpoints" / str(epoch * steps_per_epoch)
    try:
      while process.poll() is None and not saved.exists():
        time.sleep(0.002)
      assert process.poll() is None, process.communicate()[0]
    finally:
      process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "results.json").exists()
  process = start(file, workdir)
  output = process.communicate(timeout=100)[0]
  assert process.returncode == 0, output
  assert "resuming from step" in output and "finished" in output
  assert_same_run(workdir, reference)


def stop_at(step, workdir, given, monkeypatch, total=48):
  """A run that SIGTERM stops after a step, one step a dispatch."""
  make, count = build.make_dispatch, 0

  def hooked(one, steps):
    dispatch = make(one, steps)

    def call(state, data):
      nonlocal count
      count += 1
      if count == step:
        signal.raise_signal(signal.SIGTERM)
      return dispatch(state, data)

    return call

  with monkeypatch.context() as patch:
    patch.setattr(build, "make_dispatch", hooked)
    with pytest.raises(Interrupted, match=f"step {step} of {total}"):
      train.train(given, workdir)


def test_sigterm_within_an_epoch_saves_and_resumes_bit_identically(
  tmp_path, reference, monkeypatch
):
  stop_at(11, tmp_path / "run", config(), monkeypatch)
  arrays, _ = state_of(tmp_path / "run")
  assert arrays["['step']"] == 11
  train.train(config(), tmp_path / "run")
  assert_same_run(tmp_path / "run", reference)


# 8 steps are an epoch: both phases end within one.
ODD = {
  "discover.length": "steps:13",
  "discover.shrink_every": "steps:6",
  "settle.length": "examples:768",
  "eval_every": "steps:5",
  "checkpoint.every": "steps:4",
  "truncate.max_compilations": 16,
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
  """The workdir of a run whose lengths are no whole epochs."""
  workdir = tmp_path_factory.mktemp("odd") / "run"
  train.train(config(ODD), workdir)
  return workdir


@pytest.mark.quick(0)
def test_phases_and_periods_may_end_within_an_epoch(odd):
  records = {r["step"]: r for r in metrics.read(odd)}
  assert list(records) == [0, 4, 5, 6, 8, 10, 12, 13, 15, 16, 19]
  evaluated = [step for step, r in records.items() if "val/loss" in r]
  assert evaluated == [5, 10, 13, 15, 19]
  phases = [r["phase"] for r in records.values()]
  assert phases == [0] * 8 + [1] * 3
  assert [r["epoch"] for r in records.values()] == [s / 8 for s in records]
  ranks = [records[step]["rank/total"] for step in records]
  falls = [a > b for a, b in itertools.pairwise(ranks)]
  # Only at steps 6, 12 and 13 may a rank fall, and at these it does.
  assert falls == [False] * 2 + [True] + [False] * 2 + [True] * 2 + [False] * 3


@pytest.mark.quick(0)
def test_means_are_of_whole_epochs_or_of_what_came_since(odd, tmp_path):
  train.train(config(ODD | {"log_every": "steps:1"}), tmp_path / "each")
  single = {r["step"]: r for r in metrics.read(tmp_path / "each")}
  records = {r["step"]: r for r in metrics.read(odd)}
  begins = {
    4: 0,
    5: 4,
    6: 5,
    8: 0,
    10: 8,
    12: 10,
    13: 8,
    15: 13,
    16: 13,
    19: 16,
  }
  # With a record of each step, a mean of the epoch's is at its end only.
  losses, mean = {}, {8: 0, 13: 8, 16: 13, 19: 16}
  for step in range(1, 20):
    losses[step] = single[step]["train/loss"]
    if step in mean:
      before = sum(losses[s] for s in range(mean[step] + 1, step))
      losses[step] = (step - mean[step]) * losses[step] - before
  for step, begin in begins.items():
    found = np.mean([losses[s] for s in range(begin + 1, step + 1)])
    assert records[step]["train/loss"] == pytest.approx(found, rel=1e-5), step


@pytest.mark.quick(1)
@pytest.mark.parametrize("step", [3, 5, 13, 14, 17])
def test_a_run_of_odd_lengths_resumes_bit_identically(
  step, tmp_path, odd, monkeypatch
):
  stop_at(step, tmp_path / "run", config(ODD), monkeypatch, total=19)
  train.train(config(ODD), tmp_path / "run")
  assert_same_run(tmp_path / "run", odd)


def test_the_unit_of_a_length_changes_nothing(odd, tmp_path):
  same = {
    "discover.length": "examples:1664",
    "discover.shrink_every": "epochs:0.75",
    "settle.length": f"fraction:{6 / 19}",
    "eval_every": "examples:640",
    "checkpoint.every": "epochs:0.5",
  }
  train.train(config(ODD | same), tmp_path / "run")
  a, b = state_of(tmp_path / "run")[0], state_of(odd)[0]
  assert {k: x.tobytes() for k, x in a.items()} == {
    k: x.tobytes() for k, x in b.items()
  }
  records = [metrics.read(w) for w in (tmp_path / "run", odd)]
  for r in [*records[0], *records[1]]:
    r.pop("examples_per_second", None)
  assert records[0] == records[1]


def test_a_finished_run_says_so_and_is_left_as_it_is(reference, capsys):
  before = files_of(reference)
  results = train.train(config(), reference)
  assert "finished" in capsys.readouterr().out
  assert files_of(reference) == before
  assert results == results_of(reference)


def test_a_moved_data_set_does_not_make_another_run(reference):
  changed = config({"data.data_dir": "/somewhere/else"})
  assert train.train(changed, reference) == results_of(reference)


# ---------------------------------------------------------------------------
# Shrinking and cutting
# ---------------------------------------------------------------------------


def test_ranks_never_rise_and_cost_falls_with_them(reference):
  records = metrics.read(reference)
  for key in ("rank/fc1", "rank/fc2", "rank/total", "cost/macs"):
    values = [r[key] for r in records]
    assert values == sorted(values, reverse=True), key
    assert values[-1] < values[0], key


def test_the_checkpoint_at_the_end_of_discover_is_kept(reference):
  saved = {int(p.name) for p in (reference / "checkpoints").iterdir()}
  assert saved == {32, 48}  # 8 steps an epoch, keep = 1


def assert_dead_is_zero(arrays):
  dead = 0
  for path, rank in arrays.items():
    if not path.startswith("['ranks']"):
      continue
    layer = path.removeprefix("['ranks']").removesuffix("['rank']")
    for name, x in arrays.items():
      if name.endswith(f"{layer}['u']"):
        assert not x[:, rank:].any(), name
        dead += x.shape[1] - rank
      elif name.endswith(f"{layer}['v']"):
        assert not x[rank:].any(), name
  return dead


@pytest.mark.usefixtures("quickly")
def test_what_is_dead_stays_exactly_zero_without_a_cut(tmp_path):
  # Bounded to one program a phase: ranks fall, factors keep their size.
  # The penalty and the momentum go on in settle, on rounded-up factors.
  changed = config(
    {
      "truncate.max_compilations": 5,
      "truncate.multiple_of": 16,
      "settle.lam": 1e-2,
      "settle.sampler": {"name": "independent"},
      "optimizer": {"name": "adamw", "weight_decay": 0.1},
      "discover.schedule.learning_rate": 0.01,
      "settle.schedule.learning_rate": 0.01,
    }
  )
  results = train.train(changed, tmp_path)
  assert results["train"]["compilations"] <= 5
  for step in (32, 48):
    arrays, _ = state_of(tmp_path, step)
    assert assert_dead_is_zero(arrays) > 0
    assert any(
      np.any(x) for path, x in arrays.items() if ".mu" in path or "mu" in path
    )


def test_what_is_dead_is_zero_in_the_reference(reference):
  for step in (32, 48):
    assert_dead_is_zero(state_of(reference, step)[0])


def test_a_cut_changes_no_evaluation(tmp_path, monkeypatch):
  original, pairs = state_lib.truncate_state, []

  def spy(tx, state, multiple_of):
    before = jax.device_get((state.params, state.ranks))
    state = original(tx, state, multiple_of)
    pairs.append((*before, jax.device_get(state.params)))
    return state

  monkeypatch.setattr(train, "truncate_state", spy)
  train.train(config(), tmp_path)
  assert len(pairs) == 2
  dataset = data_lib.make("digits")
  model = build.make_model(parse(config()), build.Facts.of(dataset))
  x = dataset.preprocess(jnp.asarray(dataset.val.inputs))
  for before, ranks, after in pairs:
    sizes = [
      sum(n["u"].shape[-1] for n in trees.factored(p).values())
      for p in (before, after)
    ]
    assert sizes[1] < sizes[0]
    before, ranks, after = jax.tree.map(jnp.asarray, (before, ranks, after))
    old = model.apply({"params": before}, x)
    new = model.apply({"params": after}, x)
    np.testing.assert_allclose(new, old, atol=1e-5)
    at_ranks = model.apply({"params": before, "ranks": ranks}, x)
    np.testing.assert_allclose(at_ranks, old, atol=1e-5)


def test_the_final_network_evaluates_as_the_last_epoch(reference):
  last, results = metrics.read(reference)[-1], results_of(reference)
  found = results["final"]["val_metrics"]
  assert abs(found["loss"] - last["val/loss"]) < 1e-5
  assert found["accuracy"] == pytest.approx(last["val/accuracy"])
  assert results["final"]["params"] <= last["cost/params"]
  assert results["final"]["macs"] < results["dense"]["macs"]


def test_evaluating_a_workdir_gives_its_results(reference):
  before = files_of(reference)
  found, results = train.evaluate_workdir(reference), results_of(reference)
  assert found["test"] == results["final"]["metrics"]
  assert found["val"] == results["final"]["val_metrics"]
  assert found["params"] == results["final"]["params"]
  assert found["macs"] == results["final"]["macs"]
  assert found["step"] == results["steps"]
  assert files_of(reference) == before


# ---------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------

BAD = {
  "batch_size": ({"batch_size": 5000}, "config.batch_size.*5000.*digits"),
  "unknown_key": ({"modle": 1}, "config.modle.*model"),
  "unknown_inner_key": ({"discover.lamda": 1.0}, "config.discover.lamda.*lam"),
  "wrong_type": ({"discover.lam": "1"}, "config.discover.lam.*float"),
  "wrong_epochs": ({"settle.epochs": 1.5}, "config.settle.epochs.*int"),
  "model": ({"model.name": "mpl"}, "config.model.name.*mlp"),
  "model_option": ({"model.width": 3}, "config.model.width"),
  "optimizer": ({"optimizer.name": "sgdd"}, "config.optimizer.name.*sgd"),
  "sampler": (
    {"discover.sampler.name": "one_layr"},
    "config.discover.sampler.name.*one_layer",
  ),
  "sampler_option": (
    {"discover.sampler.over": "pears"},
    "config.discover.sampler.*pairs",
  ),
  "schedule": (
    {"settle.schedule.name": "cosin"},
    "config.settle.schedule.name.*cosine",
  ),
  "loss": ({"loss": "squared_error"}, "config.loss.*digits.*cross_entropy"),
  "unknown_loss": ({"loss": "hinge"}, "config.loss.*hinge"),
  "vectors": (
    {"data": {"name": "linear"}, "loss": "squared_error"},
    "config.model.name.*linear",
  ),
  "data": ({"data.name": "digit"}, "config.data.name.*digits"),
  "data_option": ({"data.size": 3}, "config.data.size"),
  "no_data": (
    {"data": {"name": "mnist", "data_dir": "/no/such/place"}},
    "/no/such/place",
  ),
  "rule": ({"rules": [{"path": "conv.*"}]}, "conv.*matches no layer.*fc1"),
  "rank": (
    {"rules": [{"path": "fc1", "rank": 17}]},
    "fc1.*17.*outside.*16",
  ),
  "devices": ({"mesh": {"data": 99}}, "config.mesh.*99"),
  "split": ({"mesh": {"data": 3}}, "config.batch_size.*128.*3"),
  "lasso": ({"lasso": "ridge"}, "config.lasso.*flat"),
  "method": ({"method": "denes"}, "config.method.*dense"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config_is_named_before_anything_is_written(name, tmp_path):
  changes, message = BAD[name]
  with pytest.raises(UserError, match=message):
    train.train(config(changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.quick(0)
def test_a_workdir_of_another_config_is_left_alone(reference):
  before = files_of(reference)
  with pytest.raises(UserError, match=r"another config.*discover.lam.*workdir"):
    train.train(config({"discover.lam": 0.5}), reference)
  assert files_of(reference) == before


def test_a_workdir_below_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UserError, match=r"file/run.*--workdir"):
    train.train(config(), tmp_path / "file" / "run")
  assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_with_foreign_checkpoints_is_refused(tmp_path):
  (tmp_path / "checkpoints" / "8").mkdir(parents=True)
  with pytest.raises(UserError, match=r"no config.json.*--workdir"):
    train.train(config(), tmp_path)
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_broken_json_file_is_named(name, tmp_path, reference):
  workdir = tmp_path / "run"
  shutil.copytree(reference, workdir)
  (workdir / name).write_text("{")
  with pytest.raises(UserError, match=f"{name} is damaged"):
    train.train(config(), workdir)


# Orbax drops its other reads when the first one fails, which asyncio reports.
@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damaged", ["the_newest", "all"])
def test_damaged_checkpoints_are_set_aside_and_repeated(
  damaged, tmp_path, reference, capsys
):
  workdir = tmp_path / "run"
  shutil.copytree(reference, workdir)
  (workdir / "results.json").unlink()  # so that it is not finished
  steps = checkpoint.list_steps(workdir / "checkpoints")
  bad = steps if damaged == "all" else steps[-1:]
  # Every data file: which of them holds an array, small ones share, varies.
  for path in (workdir / "checkpoints").rglob("*"):
    step = path.relative_to(workdir / "checkpoints").parts[0]
    if path.is_file() and "d" in path.parts and int(step) in bad:
      content = bytearray(path.read_bytes())
      for i in range(len(content) // 2, len(content) // 2 + 8):
        content[i] ^= 255
      path.write_bytes(content)
  train.train(config(), workdir)
  out = capsys.readouterr().out
  for step in bad:
    assert f"checkpoints/{step} " in out and f"aside as {workdir}" in out
    assert list((workdir / "checkpoints").glob(f"{step}.damaged-*"))
  assert_same_run(workdir, reference)


@pytest.mark.usefixtures("quickly")
def test_a_loss_that_is_not_finite_names_step_and_last_checkpoint(tmp_path):
  changes = SHORT | {"settle.schedule.learning_rate": 1e30}
  with pytest.raises(UserError) as error:
    train.train(config(changes), tmp_path)
  message = str(error.value)
  assert "step" in message and "checkpoint is step 8" in message
  assert "learning_rate" in message and str(tmp_path) in message
  arrays, _ = state_of(tmp_path)
  assert arrays["['step']"] == 8
  assert all(np.all(np.isfinite(x)) for x in arrays.values())
  assert not (tmp_path / "results.json").exists()


@pytest.mark.usefixtures("quickly")
def test_a_loss_that_is_not_finite_at_once_says_there_is_no_checkpoint(
  tmp_path,
):
  changes = SHORT | {"discover.schedule.learning_rate": 1e30}
  with pytest.raises(UserError, match=r"no checkpoint yet.*clip_norm"):
    train.train(config(changes), tmp_path)


def test_init_from_what_is_no_run_is_refused(tmp_path):
  changes = SHORT | {"init_from": str(tmp_path / "nothing")}
  with pytest.raises(UserError, match=r"config.init_from.*nothing"):
    train.train(config(changes), tmp_path / "run")


def test_init_from_another_architecture_names_the_parameter(
  tmp_path, reference
):
  changes = {"init_from": str(reference), "model.features": [12]}
  with pytest.raises(UserError, match=r"config.init_from.*fc1.*16.*12"):
    train.train(config(changes), tmp_path / "run")


# ---------------------------------------------------------------------------
# Alarms
# ---------------------------------------------------------------------------


@pytest.mark.usefixtures("quickly")
def test_ranks_that_did_not_move_raise_an_alarm(tmp_path, capsys):
  changes = SHORT | {"discover.lam": 0.0, "threshold": 1e-6}
  results = train.train(config(changes), tmp_path)
  (alarm,) = results["alarms"]
  assert "no rank has moved" in alarm and "config.discover.lam" in alarm
  assert f"alarm: {alarm}" in capsys.readouterr().out


@pytest.mark.quick(0)
@pytest.mark.usefixtures("quickly")
def test_a_layer_that_died_raises_an_alarm_once(tmp_path):
  changes = SHORT | {"discover.epochs": 2, "threshold": 1e3}
  results = train.train(config(changes), tmp_path)
  died = [a for a in results["alarms"] if "has died" in a]
  assert died and len(set(died)) == len(died)
  assert "config.discover.lam" in died[0]
  assert math.isfinite(results["final"]["metrics"]["loss"])


# ---------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------

STILL = SHORT | {
  "discover.lam": 0.0,
  "discover.shrink": False,
  "discover.sampler": {"name": "full"},
  "discover.schedule.learning_rate": 0.0,
  "settle.schedule.learning_rate": 0.0,
}


@pytest.mark.usefixtures("quickly")
def test_a_dense_run_starts_a_decomposed_one_at_the_same_loss(tmp_path):
  dense = train.train(config(SHORT | {"method": "dense"}), tmp_path / "dense")
  assert dense["final"]["params"] == dense["dense"]["params"]
  assert dense["final"]["macs"] == dense["dense"]["macs"]
  assert dense["alarms"] == []
  assert metrics.read(tmp_path / "dense")[1]["train/penalty"] == 0
  train.train(
    config(STILL | {"init_from": str(tmp_path / "dense")}), tmp_path / "low"
  )
  wanted = dense["final"]["val_metrics"]
  record = metrics.read(tmp_path / "low")[1]
  assert record["val/loss"] == pytest.approx(wanted["loss"], abs=1e-5)
  assert record["rank/total"] == 26


@pytest.mark.usefixtures("quickly")
def test_a_run_starts_from_the_ranks_of_another(tmp_path, reference):
  train.train(config(STILL | {"init_from": str(reference)}), tmp_path)
  wanted = results_of(reference)["final"]["val_metrics"]
  record = metrics.read(tmp_path)[1]
  assert record["val/loss"] == pytest.approx(wanted["loss"], abs=1e-5)


@pytest.mark.quick(0)
@pytest.mark.usefixtures("quickly")
def test_several_steps_a_dispatch_train_as_one(tmp_path):
  runs = []
  for steps in (1, 4):
    workdir = tmp_path / str(steps)
    train.train(config(SHORT | {"steps_per_dispatch": steps}), workdir)
    runs.append(state_of(workdir)[0])
  assert runs[0].keys() == runs[1].keys()
  for path, x in runs[0].items():
    np.testing.assert_allclose(runs[1][path], x, atol=1e-5, err_msg=path)


OPTIONS = {
  "distillation": {
    "full_pass": {"distill": 0.5, "temperature": 2.0},
    "settle.epochs": 0,
  },
  "flat_lasso_adam_clipped": {
    "lasso": "flat",
    "optimizer": {"name": "adam", "clip_norm": 0.1},
  },
  "bfloat16_no_discover": {"model.dtype": "bfloat16", "discover.epochs": 0},
  "all_devices": {"mesh": {"data": 8}},
  "fsdp": {"mesh": {"data": 1, "fsdp": 8}},
  "model": {"mesh": {"data": 2, "model": 4}},
}


@pytest.mark.quick(1)
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_runs_and_learns(name, tmp_path):
  changes = SHORT | {"discover.lam": 1e-3} | OPTIONS[name]
  results = train.train(config(changes), tmp_path)
  records = metrics.read(tmp_path)
  assert results["final"]["metrics"]["loss"] < math.log(10)
  assert records[-1]["step"] == results["steps"]
  arrays, _ = state_of(tmp_path)
  assert {
    x.dtype for path, x in arrays.items() if path.startswith("['params']")
  } == {np.dtype("float32")}
  kept = train.evaluate_workdir(tmp_path)
  assert kept["test"] == results["final"]["metrics"]


@pytest.mark.quick(0)
@pytest.mark.parametrize("shape", [{"data": 1}, {"data": 2, "model": 4}])
def test_steps_move_nothing_between_host_and_devices(
  shape, tmp_path, monkeypatch
):
  make, guarded = build.make_dispatch, 0

  def hooked(one, steps):
    dispatch, calls = make(one, steps), 0

    def call(state, data):
      nonlocal calls, guarded
      calls += 1
      if calls == 1:  # which compiles, and moves constants
        return dispatch(state, data)
      guarded += 1
      with jax.transfer_guard("disallow"):
        return dispatch(state, data)

    return call

  monkeypatch.setattr(build, "make_dispatch", hooked)
  train.train(config({"mesh": shape, "log_every_steps": 3}), tmp_path)
  assert guarded >= 40


@pytest.mark.quick(0)
def test_a_run_goes_on_on_another_mesh(tmp_path, reference, monkeypatch):
  changes = {"mesh": {"data": 1, "fsdp": 2, "model": 4}}
  stop_at(20, tmp_path / "run", config(changes), monkeypatch)
  train.train(config({"mesh": {"data": 4}}), tmp_path / "run")
  found, wanted = results_of(tmp_path / "run"), results_of(reference)
  # Sums are rounded in another order; what is computed is the same.
  for split in ("metrics", "val_metrics"):
    a, b = found["final"][split], wanted["final"][split]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
  assert found["train"]["macs_total"] == wanted["train"]["macs_total"]
  (a, _), (b, _) = state_of(tmp_path / "run"), state_of(reference)
  assert {k: x.shape for k, x in a.items()} == {
    k: x.shape for k, x in b.items()
  }
  # Who looks at it later may have fewer devices.
  few = jax.devices()[:2]
  monkeypatch.setattr(jax, "devices", lambda: few)
  found = train.evaluate_workdir(tmp_path / "run")
  a, b = found["val"], wanted["final"]["val_metrics"]
  assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_metrics_every_few_steps_do_not_change_the_run(tmp_path, reference):
  train.train(config({"log_every_steps": 3}), tmp_path)
  ours, theirs = metrics.read(tmp_path), metrics.read(reference)
  steps = [r["step"] for r in ours]
  wanted = {0, *range(8, 49, 8), *range(3, 49, 3)}
  assert steps == sorted(wanted)
  by_step = {r["step"]: r for r in ours}
  for record in theirs:
    for key in ("val/loss", "rank/total", "learning_rate"):
      assert by_step[record["step"]].get(key) == record.get(key)
  assert all("train/loss" in r for r in ours[1:])
  a, b = state_of(tmp_path)[0], state_of(reference)[0]
  for path, x in b.items():
    assert a[path].tobytes() == x.tobytes(), path


@pytest.mark.quick(0)
def test_training_metrics_are_means_over_what_they_say(
  tmp_path, reference, monkeypatch
):
  def records(every):
    given = config({"log_every_steps": every})
    train.train(given, tmp_path / str(every))
    return {r["step"]: r for r in metrics.read(tmp_path / str(every))}

  singles, threes = records(1), records(3)
  keys = [key for key in singles[1] if key.startswith("train/")]
  assert {"train/loss", "train/accuracy", "train/penalty"} < set(keys)
  # Within an epoch: means since the record before.
  steps, ends = sorted(threes), range(0, 49, 8)
  for before, step in itertools.pairwise(steps):
    if step not in ends:
      for key in keys:
        parts = [singles[s][key] for s in range(before + 1, step + 1)]
        assert threes[step][key] == pytest.approx(np.mean(parts), rel=1e-5)
  # At its end: the epoch's, whatever was written within it.
  for record in metrics.read(reference)[1:]:
    for key in keys:
      wanted = pytest.approx(record[key], rel=1e-5)
      assert singles[record["step"]][key] == wanted
      assert threes[record["step"]][key] == wanted
  # Also where the epoch was interrupted between two records.
  given = config({"log_every_steps": 3})
  stop_at(14, tmp_path / "stopped", given, monkeypatch)
  train.train(given, tmp_path / "stopped")
  assert_same_run(tmp_path / "stopped", tmp_path / "3")
