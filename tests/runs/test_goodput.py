"""Where a run's time goes: every second once, whatever ends an attempt."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

import maestro.goodput as command
from maestro.errors import Interrupted, UserError
from maestro.runs import goodput, stop
from maestro.runs.goodput import Attempt


@pytest.fixture
def clock(monkeypatch):
  """Returns a function that lets seconds pass."""
  now = [100.0]

  def pass_by(seconds):
    now[0] += seconds

  monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
  return pass_by


def compiled(seconds):
  jax.monitoring.record_event_duration_secs("/jax/core/compile/x", seconds)


def seconds_of(attempt):
  return {name: s for name, s in attempt.seconds.items() if s}


def test_each_second_is_booked_once(tmp_path, clock):
  with goodput.recording(tmp_path, 97.0):
    clock(1)
    with goodput.spent("steps"):
      clock(2)
      with goodput.spent("input"):
        clock(4)
      clock(8)
    with goodput.spent("save"):
      clock(16)
    with goodput.spent("save"):
      clock(5)
  (attempt,) = goodput.read(tmp_path)
  expected = {"setup": 3, "other": 1, "steps": 10, "input": 4, "save": 21}
  assert seconds_of(attempt) == expected
  assert attempt.wall_seconds == 39
  assert attempt.longest == {"steps": 14, "input": 4, "save": 16}
  assert attempt.ended == "finished"


def test_compiling_is_taken_from_what_is_open_and_counted_once(tmp_path, clock):
  with goodput.recording(tmp_path, 100.0):
    with goodput.spent("steps"):
      clock(10)
      compiled(3)  # traced within the program below
      clock(1)
      compiled(9)  # from second 2 to second 11
      clock(2)
      compiled(2)
    with goodput.spent("evaluate"):
      clock(5)
      compiled(1)
    jax.monitoring.record_event_duration_secs("/jax/other", 7.0)
  (attempt,) = goodput.read(tmp_path)
  assert seconds_of(attempt) == {"compile": 12, "steps": 2, "evaluate": 4}


def test_what_jax_compiles_is_heard(tmp_path):
  x = jnp.arange(3.0)
  with goodput.recording(tmp_path, goodput.time.monotonic()):
    jax.jit(lambda x: jnp.sort(jnp.sin(x) * 3.25))(x).block_until_ready()
  (attempt,) = goodput.read(tmp_path)
  assert attempt.seconds["compile"] > 0
  assert sum(attempt.seconds.values()) == pytest.approx(attempt.wall_seconds)


@pytest.mark.parametrize(
  ("error", "ended"),
  [
    (Interrupted, "stopped"),
    (KeyboardInterrupt, "stopped"),
    (OSError, "failed"),
  ],
)
def test_an_attempt_says_how_it_ended(tmp_path, error, ended):
  with pytest.raises(error), goodput.recording(tmp_path, 0.0):
    raise error
  assert goodput.read(tmp_path)[0].ended == ended


def test_a_killed_attempt_has_its_record(tmp_path, clock):
  with goodput.recording(tmp_path, 100.0):
    goodput.resumed(20)
    with goodput.spent("steps"):
      clock(3)
    goodput.saved(30)
    goodput.reached(31, 0.5)
    (soon,) = goodput.read(tmp_path)  # within ten seconds nothing is written
    clock(10)
    goodput.reached(40, 0.25)
    (later,) = goodput.read(tmp_path)
  assert soon.ended == ""
  assert (soon.from_step, soon.saved_step, soon.step) == (20, 30, 20)
  assert (later.saved_step, later.step, later.wall_seconds) == (30, 40, 13)
  assert later.longest["dispatch"] == 0.5


def test_an_attempt_that_never_resumes_makes_no_step_again(tmp_path, clock):
  with goodput.recording(tmp_path, 100.0):
    goodput.resumed(0)
    goodput.reached(25)
    goodput.saved(20)
  with pytest.raises(OSError), goodput.recording(tmp_path, 100.0):
    raise OSError  # while it reads its checkpoint
  with goodput.recording(tmp_path, 100.0):
    goodput.resumed(20)
  attempts = goodput.read(tmp_path)
  assert [steps for steps, _ in goodput.lost(attempts)] == [5, 0, 0]


def test_without_a_recording_nothing_is_kept(tmp_path):
  with goodput.spent("steps"):
    goodput.resumed(1)
    goodput.reached(2, 0.1)
    goodput.saved(2)
  assert not list(tmp_path.iterdir())


def test_steps_that_are_made_again_are_no_goodput():
  attempts = [
    Attempt("", "", 0, 20, 30, 100.0, seconds={"steps": 60.0, "save": 10.0}),
    Attempt("", "", 20, 20, 20, 10.0, seconds={"restore": 10.0}),
    Attempt("", "finished", 20, 50, 50, 90.0, seconds={"steps": 60.0}),
  ]
  assert goodput.lost(attempts) == [(10, 20.0), (0, 0.0), (0, 0.0)]
  total = goodput.summary(attempts)
  assert total["goodput"] == pytest.approx((120 - 20) / 200)
  assert (total["lost_steps"], total["lost_seconds"]) == (10, 20.0)
  assert total["seconds"]["steps"] == 120
  assert "50 % of 200 s in 3 attempts" in goodput.line(attempts)


def test_grace_covers_what_a_stop_may_take():
  assert goodput.grace({"dispatch": 1.0}) is None
  for dispatch, save in ((0.01, 0.2), (3.0, 0.2), (3.0, 40.0)):
    seconds = goodput.grace({"dispatch": dispatch, "save": save})
    assert seconds is not None
    # As long as a process waits for the dispatch, and then saves.
    assert seconds >= 2 * (max(stop.GRACE, 3 * dispatch) + save)
    assert seconds <= 2 * (max(stop.GRACE, 3 * dispatch) + save) + 1


def test_a_damaged_file_is_told_and_counted_anew(tmp_path, capsys):
  with goodput.recording(tmp_path, 0.0):
    pass
  path = tmp_path / goodput.FILE
  path.write_text(path.read_text().replace("finished", "Finished"))
  with pytest.raises(UserError, match=r"damaged.*delete it"):
    goodput.read(tmp_path)
  with goodput.recording(tmp_path, 0.0):
    pass
  assert "counted anew" in capsys.readouterr().out
  assert len(goodput.read(tmp_path)) == 1


def test_attempts_of_another_version_are_said(tmp_path):
  goodput.workdir_lib.write_json(
    tmp_path / goodput.FILE, {"attempts": [{"start": 1}]}
  )
  with pytest.raises(UserError, match="another version"):
    goodput.read(tmp_path)


def test_a_full_disk_ends_no_run_here(tmp_path, monkeypatch):
  def full(path, value):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(goodput.workdir_lib, "write_json", full)
  with goodput.recording(tmp_path, 0.0):
    goodput.saved(1)


def _call(monkeypatch, capsys, *args):
  """Calls the command in this process; returns what it prints."""
  values = {"workdir": None, "json": False, "grace": False} | dict(args)
  fake = type("Flags", (), {"FLAGS": type("Values", (), values)})
  monkeypatch.setattr(command, "flags", fake)
  command.main(sys.argv[:1])
  return capsys.readouterr().out


def test_the_command_prints_a_table_sums_and_seconds(
  tmp_path, monkeypatch, capsys
):
  where = ("workdir", str(tmp_path))
  with pytest.raises(UserError, match="--workdir=DIR is missing"):
    _call(monkeypatch, capsys)
  with pytest.raises(UserError, match="name the directory of a run"):
    _call(monkeypatch, capsys, where)
  with goodput.recording(tmp_path, goodput.time.monotonic()):
    pass
  with pytest.raises(UserError, match="has not saved yet"):
    _call(monkeypatch, capsys, where, ("grace", True))
  with (
    goodput.recording(tmp_path, goodput.time.monotonic()),
    goodput.spent("save"),
  ):
    goodput.resumed(5)
  text = _call(monkeypatch, capsys, where)
  assert "5 to 5" in text and text.count("finished") == 2
  assert "in 2 attempts" in text
  assert int(_call(monkeypatch, capsys, where, ("grace", True))) == 11
  total = json.loads(_call(monkeypatch, capsys, where, ("json", True)))
  assert total["attempts"] == 2 and set(total["seconds"]) == {*goodput.SECTIONS}
