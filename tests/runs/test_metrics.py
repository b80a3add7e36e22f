"""Tests of the metrics writer: files, resume, and what reaches stdout."""

import io
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from maestro.runs import metrics


class Terminal(io.StringIO):
  """A stdout that says it is a terminal."""

  def isatty(self):
    return True

  def screen(self):
    """Return the lines a terminal would show, spaces on the right cut."""
    lines = []
    for line in self.getvalue().split("\n"):
      row = ""
      for part in line.split("\r"):
        row = part + row[len(part) :]
      lines.append(row.rstrip())
    return lines


@pytest.fixture
def clock(monkeypatch):
  """Give the writer a clock that the test sets."""
  clock = types.SimpleNamespace(now=100.0)
  clock.monotonic = lambda: clock.now
  monkeypatch.setattr(metrics, "time", clock)
  return clock


def use_terminal(monkeypatch, columns):
  # Not a fixture: pytest sets its own stdout between set-up and test.
  monkeypatch.setenv("COLUMNS", str(columns))
  stream = Terminal()
  monkeypatch.setattr("sys.stdout", stream)
  return stream


def steps(workdir):
  return [record["step"] for record in metrics.read(workdir)]


def fill(workdir, upto):
  with metrics.Writer(workdir, total_steps=10) as writer:
    for step in range(upto + 1):
      writer.write(step, step / 2, {"train/loss": 1.0 / (step + 1)})


def tensorboard_scalars(workdir):
  """Read {(tag, step): value} as TensorBoard would, purges included."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  found = {}
  files = sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.name)
  for path in files:
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField("session_log"):
        found = {k: v for k, v in found.items() if k[1] < event.step}
      for value in event.summary.value:
        found[value.tag, event.step] = value.simple_value
  return found


def test_round_trip(tmp_path):
  values = {
    "train/loss": jnp.float32(0.5),
    "rank/fc1": np.int32(37),
    "rank/total": jnp.int32(41),
    "val/accuracy": 0.25,
    "phase": 0,
  }
  with metrics.Writer(tmp_path / "a" / "b", total_steps=10) as writer:
    writer.write(jnp.int32(3), 1.5, values)
  (record,) = metrics.read(tmp_path / "a" / "b")
  assert record == {"step": 3, "epoch": 1.5} | {
    k: v.item() if hasattr(v, "item") else v for k, v in values.items()
  }
  assert isinstance(record["rank/fc1"], int)
  assert isinstance(record["rank/total"], int)
  found = tensorboard_scalars(tmp_path / "a" / "b")
  assert {key: step for key, step in found} == dict.fromkeys(values, 3)
  assert found["rank/fc1", 3] == 37


def test_lines_are_on_disk_at_once(tmp_path):
  with metrics.Writer(tmp_path, total_steps=10) as writer:
    writer.write(1, 0, {"train/loss": 1.0})
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -np.inf])
def test_not_finite_is_null(tmp_path, bad, caplog):
  with metrics.Writer(tmp_path, total_steps=10) as writer:
    writer.write(1, 0, {"train/loss": bad, "val/loss": jnp.float32(bad)})

  def refuse(token):
    raise AssertionError(token)

  text = (tmp_path / metrics.FILE).read_text()
  record = json.loads(text, parse_constant=refuse)
  assert record["train/loss"] is None
  assert record["val/loss"] is None
  assert not caplog.records  # tensorboardX would warn at every NaN


@pytest.mark.parametrize(
  "values", [{"rank/fc": np.zeros(2)}, {"a": "text"}, {"step": 1}, {"a": None}]
)
def test_bad_values_are_named(tmp_path, values):
  with metrics.Writer(tmp_path, total_steps=10) as writer:
    with pytest.raises(ValueError, match=repr(next(iter(values)))):
      writer.write(1, 0, values)
    writer.write(2, 0, {"fine": 1.0})
  assert steps(tmp_path) == [2]


def test_resume_keeps_each_step_once(tmp_path):
  fill(tmp_path, upto=7)
  before = metrics.read(tmp_path)
  with metrics.Writer(tmp_path, total_steps=10, resume_step=4) as writer:
    assert metrics.read(tmp_path) == before[:5]
    for step in range(5, 11):
      writer.write(step, step / 2, {"train/loss": 9.0})
  assert steps(tmp_path) == list(range(11))
  assert [p.name for p in tmp_path.glob("*.tmp")] == []
  found = tensorboard_scalars(tmp_path)
  assert sorted(step for _, step in found) == list(range(11))
  assert found["train/loss", 5] == 9.0
  assert found["train/loss", 4] == pytest.approx(0.2)


def test_fresh_start_drops_everything(tmp_path):
  fill(tmp_path, upto=3)
  fill(tmp_path, upto=2)
  assert steps(tmp_path) == [0, 1, 2]


def test_torn_last_line(tmp_path):
  fill(tmp_path, upto=4)
  path = tmp_path / metrics.FILE
  whole = path.read_bytes()
  for cut in range(2, 30):  # the last line is torn anywhere but its newline
    path.write_bytes(whole[:-cut])
    assert steps(tmp_path) == [0, 1, 2, 3]
  with metrics.Writer(tmp_path, total_steps=10, resume_step=4) as writer:
    writer.write(5, 2.5, {})
  assert steps(tmp_path) == [0, 1, 2, 3, 5]
  path.write_bytes(whole[:-1])  # complete but for its newline
  assert steps(tmp_path) == [0, 1, 2, 3, 4]
  with metrics.Writer(tmp_path, total_steps=10, resume_step=4) as writer:
    writer.write(5, 2.5, {})
  assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", ["{", "", "3", '{"epoch": 1}', '{"step": 1.5}'])
def test_other_bad_lines_are_named(tmp_path, bad):
  good = '{"step": 1, "epoch": 0}\n'
  (tmp_path / metrics.FILE).write_text(good + bad + "\n" + good)
  with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: .*delete"):
    metrics.read(tmp_path)
  with pytest.raises(ValueError, match="line 2"):
    metrics.Writer(tmp_path, total_steps=10, resume_step=5)


def test_read_without_a_file(tmp_path):
  with pytest.raises(metrics.MetricsError, match=r"metrics\.jsonl: not found"):
    metrics.read(tmp_path)
  with metrics.Writer(tmp_path, total_steps=10):
    pass
  assert metrics.read(tmp_path) == []


def test_terminal_shows_one_progress_line(tmp_path, monkeypatch, clock):
  terminal = use_terminal(monkeypatch, 100)
  with metrics.Writer(tmp_path, total_steps=200) as writer:
    clock.now += 20
    writer.progress(40, "loss 2.3017, a long text", examples_per_second=12345.6)
    clock.now += 30
    writer.progress(100, "loss 1.1")
    assert terminal.screen() == [
      " 50.0 %  step 100/200  loss 1.1  elapsed 50s  eta 50s"
    ]
    writer.message("shrunk fc1: 120 -> 37")
    clock.now += 50
    writer.progress(200, "loss 1.0")
    assert "\n" in terminal.getvalue()
  assert terminal.screen() == [
    "shrunk fc1: 120 -> 37",
    "100.0 %  step 200/200  loss 1.0  elapsed 1m40s  eta 0s",
    "",
  ]
  assert "40/200" in terminal.getvalue()
  assert "12,346 examples/s" in terminal.getvalue()


def test_terminal_never_wraps(tmp_path, monkeypatch):
  terminal = use_terminal(monkeypatch, 40)
  with metrics.Writer(tmp_path, total_steps=200) as writer:
    writer.progress(40, "x" * 100 + "\nsecond line")
    writer.message("a message\nof two lines")
  lines = terminal.screen()
  assert lines[:2] == ["a message", "of two lines"]
  assert len(lines) == 4
  assert len(lines[2]) == 39


def test_without_a_terminal_lines_are_rare(tmp_path, capsys, clock):
  with metrics.Writer(tmp_path, total_steps=100) as writer:
    for step in range(1, 101):
      clock.now += 1
      writer.progress(step, "loss 1")
      if step == 50:
        writer.message("note")
  lines = capsys.readouterr().out.splitlines()
  shown = [line.split()[3] for line in lines if line != "note"]
  assert shown == [f"{n}/100" for n in [*range(1, 100, 10), 100]]
  assert lines.count("note") == 1
  assert "\r" not in "".join(lines)


def test_without_a_terminal_the_last_line_comes(tmp_path, capsys, clock):
  writer = metrics.Writer(tmp_path, total_steps=100)
  with pytest.raises(KeyboardInterrupt), writer:
    writer.progress(1, "")
    clock.now += 1
    writer.progress(7, "")
    raise KeyboardInterrupt
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[3] for line in lines] == ["1/100", "7/100"]


def test_eta_counts_from_the_resumed_step(tmp_path, capsys, clock):
  kwargs = {"total_steps": 100, "resume_step": 60}
  with metrics.Writer(tmp_path, **kwargs) as writer:
    writer.progress(60, "")
    clock.now += 20
    writer.progress(68, "")
  first, second = capsys.readouterr().out.splitlines()
  assert "eta" not in first  # nothing is known yet
  assert second.endswith("elapsed 20s  eta 1m20s")


def test_eta_leaves_out_what_came_before_the_first_report(
  tmp_path, capsys, clock
):
  with metrics.Writer(tmp_path, total_steps=102) as writer:
    clock.now += 300  # compiles
    writer.progress(2, "")
    clock.now += 10
    writer.progress(12, "")
  first, second = capsys.readouterr().out.splitlines()
  assert "eta" not in first
  assert second.endswith("elapsed 5m10s  eta 1m30s")


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0, "0s"),
    (59.4, "59s"),
    (59.6, "1m00s"),
    (80, "1m20s"),
    (3599.7, "1h00m"),
    (7500, "2h05m"),
    (86399, "23h59m"),
    (3 * 86400 + 4 * 3600, "3d04h"),
  ],
)
def test_durations(seconds, text):
  assert metrics._duration(seconds) == text


def test_close_twice(tmp_path, capsys):
  writer = metrics.Writer(tmp_path, total_steps=1)
  writer.progress(1, "done")
  writer.close()
  writer.close()
  assert capsys.readouterr().out.count("done") == 1
