"""Many processes: where one stands, what they agree on, and real ones."""

import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from maestro import chaos, data
from maestro.errors import (
  EXIT_ERROR,
  EXIT_LOST,
  EXIT_TERMINATED,
  UserError,
)
from maestro.parallel import processes
from maestro.parallel.loopback import Command
from maestro.parallel.processes import Join
from maestro.runs import checkpoint, goodput, workdir
from maestro.training import agreement, loop

ROOT = pathlib.Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "local.sh"
LAUNCHED = ("SLURM_", "OMPI_", "JAX_COORDINATOR")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
  for name in os.environ:
    if name.startswith(LAUNCHED):
      monkeypatch.delenv(name)


def place(**options):
  return processes.place_of(Join(**options))


# ---------------------------------------------------------------------------
# Where a process stands
# ---------------------------------------------------------------------------


def test_a_process_without_options_is_alone():
  assert place() is None
  assert processes.alone() and processes.first()
  assert processes.exchange("x") == ["x"]


def test_a_process_stands_where_it_is_told():
  found, devices = place(
    coordinator="[fe80::1]:7650", num_processes=4, process_id=3
  )
  assert (found.host, found.port) == ("fe80::1", 7650)
  assert (found.count, found.index) == (4, 3)
  assert devices is None


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"coordinator": "a:1"}, "--num_processes, --process_id missing"),
    ({"process_id": 0}, "--coordinator, --num_processes missing"),
    (
      {"coordinator": "nowhere", "num_processes": 2, "process_id": 0},
      "write HOST:PORT",
    ),
    (
      {"coordinator": "a:70000", "num_processes": 2, "process_id": 0},
      "write HOST:PORT",
    ),
    (
      {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
      "--process_id: 2 is none of 2 processes; use 0 to 1",
    ),
    (
      {"coordinator": "::1:0", "num_processes": 2, "process_id": 0},
      "write HOST:PORT",
    ),
    ({"distributed": True}, "finds no TPU pod, SLURM or Open MPI"),
  ],
)
def test_what_does_not_fit_is_said_before_anything_is_done(options, text):
  with pytest.raises(UserError, match=text):
    place(**options)


SLURM = {
  "SLURM_JOB_ID": "70001",
  "SLURM_STEP_NODELIST": "node[07-08]",
  "SLURM_NTASKS": "4",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_NUM_NODES": "2",
}
OMPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "3",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize("env", [SLURM, OMPI], ids=["slurm", "ompi"])
def test_a_launcher_tells_where_a_process_stands(env, monkeypatch):
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(processes.socket, "gethostbyname", lambda h: "10.0.0.1")
  found, devices = place()
  assert (found.count, found.index) == (4, 3)
  assert found.host in ("node07", "10.96.0.1")
  assert devices == [1]


@pytest.mark.parametrize(
  "name",
  ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_SIZE"],
)
def test_an_environment_that_is_no_launchers_is_said(name, monkeypatch):
  env = SLURM if name.startswith("SLURM") else {}
  for other, value in (env | {name: "four"}).items():
    monkeypatch.setenv(other, value)
  with pytest.raises(UserError, match=f"{name}='four' in the environment"):
    place()


def test_a_single_task_of_slurm_is_alone(monkeypatch):
  for name, value in (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}).items():
    monkeypatch.setenv(name, value)
  assert place() is None


def test_a_loopback_coordinator_of_two_hosts_is_refused(monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(processes.socket, "gethostbyname", lambda h: "127.0.1.1")
  with pytest.raises(UserError, match=r"'node07' is 127\.0\.1\.1 here"):
    place()


# ---------------------------------------------------------------------------
# What they agree on
# ---------------------------------------------------------------------------


class Said:
  """Stands for a line on which the other processes have said something."""

  def __init__(self, change):
    self.change = change

  def exchange(self, text):
    return [text, text, self.change(text)]


@pytest.fixture
def others(monkeypatch):
  """Makes process 2 of three say something else than this one."""

  def say(change):
    monkeypatch.setattr(processes, "_line", Said(change))

  return say


CONFIG = {"seed": 0, "data": {"name": "digits", "data_dir": "/a"}}


def test_equal_configs_pass(others):
  others(lambda text: text)
  agreement.configs(CONFIG)


def test_where_data_is_may_differ_between_hosts(others):
  here = []
  others(lambda text: here.append(text) or text)
  agreement.configs(CONFIG)
  agreement.configs({**CONFIG, "data": {"name": "digits", "data_dir": "/b"}})
  assert here[0] == here[1]


@pytest.mark.parametrize(
  ("old", "new"), [("seed: 0", "seed: 1"), ("JAX ", "JAX 9")]
)
def test_processes_with_another_config_are_named(old, new, others):
  others(lambda text: text.replace(old, new))
  with pytest.raises(UserError, match="of process 2 differs") as error:
    agreement.configs(CONFIG)
  assert new in str(error.value)


def test_processes_with_other_data_are_named(others):
  others(lambda text: text.replace("train: 1", "train: 2"))
  with pytest.raises(UserError, match=r"'digits'.* of process 2 differs"):
    agreement.data(data.make("digits"))


def test_the_end_of_a_run_that_not_all_see_is_said(tmp_path, others):
  others(lambda text: text)
  agreement.finished(tmp_path, None)
  others(lambda text: "{}")
  with pytest.raises(UserError, match="that all hosts share"):
    agreement.finished(tmp_path, {"final": {"macs": 1}})


def test_a_workdir_that_is_not_shared_is_said(tmp_path, others, monkeypatch):
  others(lambda text: text)
  at_once = functools.partial(workdir.appears, seconds=0.0)
  monkeypatch.setattr(workdir, "appears", at_once)
  with pytest.raises(UserError, match="all hosts share"):
    agreement.workdir(tmp_path)


FAILS = """
import threading, time, types
from maestro.errors import UserError
from maestro.parallel import processes
processes._LAST = 0.5
say = lambda text, code: print(code, text)
processes._line = types.SimpleNamespace(fail=say)
threading.Thread(target=time.sleep, args=(600,)).start()
with processes.ending():
  raise UserError("no good")
"""


def test_a_process_that_fails_waits_for_no_thread():
  """Python would, for those of orbax, which may wait for other processes."""
  done = subprocess.run(
    [sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=100
  )
  assert done.returncode == EXIT_ERROR
  assert done.stdout == "2 no good\n" and "UserError: no good" in done.stderr


# ---------------------------------------------------------------------------
# Real ones
# ---------------------------------------------------------------------------

REAL = {
  "model": {"name": "mlp", "features": [128]},
  "data": {"name": "digits"},
  "batch_size": 36,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "method": "maestro",
  "discover": {
    "epochs": 6,
    "lam": 1e-3,
    "schedule": {"name": "constant", "learning_rate": 0.05},
    "sampler": {"name": "one_layer"},
  },
  "settle": {
    "epochs": 3,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "mesh": {"data": 1, "fsdp": 2},
  "checkpoint": {"every_epochs": 1, "keep": 20},
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Two processes that train REAL, a device each."""
  # This process has its devices before XLA_FLAGS is set for others.
  assert jax.device_count() == 8
  path = tmp_path_factory.mktemp("config") / "config.py"
  path.write_text(
    "import json\n"
    "from ml_collections import ConfigDict\n"
    "def get_config(arg=''):\n"
    f"  return ConfigDict(json.loads({json.dumps(REAL)!r})).lock()\n"
  )
  words = [sys.executable, "-m", "maestro.main", f"--config={path}"]
  return Command(words, processes=2)


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
  """Workdirs of a run of two processes, whole and stopped in its midst."""
  root = tmp_path_factory.mktemp("runs")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", "")
    patch.setenv("PYTHON", sys.executable)
    line = [LAUNCHER, "--processes=2", "--", command.words[-1]]
    whole = subprocess.run(
      [*line, f"--workdir={root / 'whole'}"], capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    assert "finished" in whole.stdout
    stopped = chaos.Attempt(command, root / "stopped", chosen=1)
    until = time.monotonic() + 300
    while not (root / "stopped" / "checkpoints" / "29").exists():
      assert time.monotonic() < until and stopped.wait(0.01) is None
    stopped.chosen.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == EXIT_TERMINATED, stopped.output
    assert stopped.others == {EXIT_TERMINATED}, stopped.output
  return root


@pytest.mark.quick(0)
def test_sigterm_to_one_process_saves_and_stops_all(finished):
  log = (finished / "stopped" / "log.txt").read_text()
  assert "saved" in log and "Traceback" not in log
  assert not (finished / "stopped" / "results.json").exists()


@pytest.mark.quick(0)
def test_two_processes_go_on_to_the_same_bits(finished, command, monkeypatch):
  """After SIGTERM to one of them, and then SIGKILL."""
  monkeypatch.setenv("XLA_FLAGS", "")
  saved = finished / "stopped" / "checkpoints"
  before = checkpoint.list_steps(saved)
  run = chaos.Attempt(command, finished / "stopped", chosen=1)
  until = time.monotonic() + 300
  while checkpoint.list_steps(saved)[-1] == before[-1]:
    assert time.monotonic() < until and run.wait(0.01) is None
  run.chosen.kill()
  # Long before the 60 s after which silence means a loss.
  assert run.wait(20) == -signal.SIGKILL
  assert run.others == {EXIT_LOST}, run.output
  assert "process 1 (" in run.output and "is lost" in run.output
  run = chaos.Attempt(command, finished / "stopped")
  assert run.wait(300) == 0, run.output
  attempts = goodput.read(finished / "stopped")
  assert [a.ended for a in attempts] == ["stopped", "", "finished"]
  for one, following in itertools.pairwise(attempts):
    assert following.from_step >= one.saved_step
  # No less than a process may wait for its dispatch, twice.
  grace = goodput.summary(attempts)["grace_seconds"]
  assert grace is not None and 10 <= grace < 60
  assert not list(chaos.differences(finished / "stopped", finished / "whole"))


@pytest.mark.quick(0)
def test_a_full_disk_of_one_process_ends_all(command, tmp_path, monkeypatch):
  """At once: those whose disks are well would wait for it, by orbax."""
  monkeypatch.setenv("XLA_FLAGS", "")
  whole = Command([*command.words, "--config.mesh.fsdp=1"], processes=2)
  whole.words.append("--config.mesh.data=2")  # so that the first writes all
  run = chaos.Attempt(whole, tmp_path / "run", limit=20_000)
  assert run.wait(100) == EXIT_ERROR and run.others == {EXIT_ERROR}, run.output
  assert (
    "process 0 (" in run.output and "has stopped: cannot save" in run.output
  )
  assert "File too large; if the disk is full" in run.output


def test_parts_are_written_by_those_that_have_them(finished):
  saved = finished / "whole" / "checkpoints" / "29"
  text = (saved / "_CHECKPOINT_METADATA").read_text()
  record = json.loads(text)["custom_metadata"]["maestro"]
  assert record["format"] == 2
  assert "sum" in record["leaves"]["params/fc1/u"]
  assert "digest" in record["leaves"]["params/fc2/bias"]
  for i in range(2):
    assert (saved / "state" / f"ocdbt.process_{i}").is_dir()


def _back_at(step, workdir):
  """Turns a finished run into one that was killed after a step."""
  (workdir / "results.json").unlink()
  for saved in (workdir / "checkpoints").iterdir():
    if int(saved.name) > step:
      shutil.rmtree(saved)


@pytest.mark.quick(0)
def test_other_processes_and_devices_go_on(
  finished, command, tmp_path, monkeypatch
):
  """From two, to one with eight devices, to two that have two each."""
  whole = json.loads((finished / "whole" / "results.json").read_text())
  run = tmp_path / "run"
  shutil.copytree(finished / "whole", run)
  _back_at(116, run)
  eight = REAL | {"mesh": {"data": 1, "fsdp": 2, "model": 4}}
  found = [loop.train(eight, run)]
  _back_at(145, run)
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
  pair = Command([*command.words, "--config.mesh.data=2"], processes=2)
  attempt = chaos.Attempt(pair, run)
  assert attempt.wait(300) == 0, attempt.output
  assert "resuming from step 145" in attempt.output
  found.append(json.loads((run / "results.json").read_text()))
  for results in found:
    assert [row["rank"] for row in results["layers"]] == [
      row["rank"] for row in whole["layers"]
    ]
    a, b = results["final"]["val_metrics"], whole["final"]["val_metrics"]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
  attempts = goodput.read(run)
  assert [(a.ended, a.from_step, a.processes, a.devices) for a in attempts] == [
    ("finished", 0, 2, 2),
    ("finished", 116, 1, 8),
    ("finished", 145, 2, 4),
  ]
