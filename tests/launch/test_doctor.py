"""Tests launch/doctor.py: what is ok, a warning or failed, alone and joined."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from launch import doctor
from maestro.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]


def _states(findings):
  return {finding.check: finding.state for finding in findings}


def test_the_versions_of_this_host_are_fit():
  assert doctor.check_versions(doctor.versions()).state == doctor.OK
  finding = doctor.check_versions({"python": "3.11", "flax": "missing"})
  assert (finding.state, finding.remedy) == (doctor.FAILED, "pip install flax")


def test_devices_are_named():
  finding = doctor.check_devices()
  assert finding.state == doctor.OK
  assert "(cpu)" in finding.found


@pytest.mark.parametrize(
  ("address", "count", "state"),
  [
    ("127.0.0.1:7650", 1, doctor.OK),
    ("127.0.0.1:7650", 2, doctor.WARNING),
    ("[::1]:7650", 2, doctor.WARNING),
    ("10.0.0.1:7650", 2, doctor.OK),
    ("no-such-host.invalid:7650", 2, doctor.FAILED),
  ],
)
def test_a_coordinator_that_others_cannot_reach_is_seen(address, count, state):
  finding = doctor.check_address(address, count)
  assert finding.state == state
  assert (not finding.remedy) == (state == doctor.OK)


def test_a_port_that_is_taken_is_seen():
  with socket.create_server(("127.0.0.1", 0)) as server:
    taken = f"127.0.0.1:{server.getsockname()[1]}"
    assert doctor.check_port(taken).state == doctor.FAILED
  assert doctor.check_port(taken).state == doctor.OK


def test_the_disk_is_measured_and_left_as_it_was(tmp_path, monkeypatch):
  assert doctor.check_writing(tmp_path).state in (doctor.OK, doctor.WARNING)
  assert not list(tmp_path.iterdir())
  assert doctor.check_writing(tmp_path / "none").state == doctor.FAILED
  monkeypatch.setattr(doctor, "FEW_BYTES", 1e30)
  assert doctor.check_space(tmp_path).state == doctor.WARNING
  (tmp_path / "file").touch()
  assert doctor.check_workdir(tmp_path / "file").state == doctor.FAILED


def test_differences_between_hosts_are_named():
  old, new = {"python": "3.11", "jax": "0.10"}, {"python": "3.11", "jax": "1"}
  assert doctor.compare_versions([old, old]).state == doctor.OK
  finding = doctor.compare_versions([old, old, new])
  assert finding.state == doctor.FAILED
  assert finding.found == "process 2 has jax 1, process 0 0.10"
  assert doctor.compare_clocks([5.0, 5.4, 4.9], 0.1).state == doctor.OK
  finding = doctor.compare_clocks([5.0, 95.0], 0.1)
  assert finding.state == doctor.WARNING
  assert "process 1" in finding.remedy
  assert doctor.compare_workdirs([True, True]).state == doctor.OK
  finding = doctor.compare_workdirs([True, False])
  assert finding.state == doctor.FAILED
  assert "process 1 does" in finding.found


def test_a_workdir_of_all_is_seen_and_left_empty(tmp_path, monkeypatch):
  # The second process answers as the first does, but for a clock far ahead.
  def exchange(text):
    try:
      return [text, repr(json.loads(text) + 90.0)]
    except (TypeError, ValueError):
      return [text, text]

  monkeypatch.setattr(processes, "exchange", exchange)
  findings = list(doctor.all_hosts(tmp_path))
  assert _states(findings) == {
    "same versions": doctor.OK,
    "clocks": doctor.WARNING,
    "same workdir": doctor.OK,
  }
  assert not list(tmp_path.iterdir())
  lines = doctor.table(findings).splitlines()
  assert lines[0] == "ok      same versions  on all 2 processes"
  assert lines[1].startswith("warning clocks         90.0 s apart")


def _start(*args):
  return subprocess.Popen(
    [sys.executable, "-m", "launch.doctor", *args],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.slow  # starts JAX twice, and waits for a file that does not come
def test_two_processes_compare_their_hosts(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  # The second sees another directory of the same name: it is not shared.
  started = [
    _start(
      f"--workdir={tmp_path / name}",
      f"--coordinator=127.0.0.1:{port}",
      "--num_processes=2",
      f"--process_id={i}",
    )
    for i, name in enumerate(("one", "other"))
  ]
  try:
    outs = [process.communicate(timeout=100)[0] for process in started]
  finally:
    for process in started:
      process.kill()
  for process, out in zip(started, outs, strict=True):
    assert process.returncode == 1, out
    assert re.search("^ok +same versions +on all 2 processes$", out, re.M), out
    assert re.search("^failed +same workdir +process 1 does not", out, re.M)
  assert not list(tmp_path.glob("*/.doctor_*"))
