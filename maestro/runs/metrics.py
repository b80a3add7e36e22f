"""Write a run's metrics: a progress line, JSON lines and TensorBoard events."""

import json
import math
import numbers
import os
import pathlib
import shutil
import sys
import time

import tensorboardX

from maestro.errors import UserError
from maestro.parallel import processes
from maestro.runs.workdir import sealed, unsealed

FILE = "metrics.jsonl"
_QUIET_SECONDS = 10.0  # between progress lines where there is no terminal


class MetricsError(UserError):
  """metrics.jsonl is missing, or damaged; names the line."""


class Writer:
  """Write metrics of one run to stdout, `metrics.jsonl` and `tensorboard/`.

  A context manager. `write` keeps values, `progress` and `message` only print.

  Args:
    workdir: the run's directory; made if absent.
    total_steps: the step at which the run ends (percentage, time left).
    resume_step: the step the run resumes at. Later records, of the interrupted
      attempt, are dropped, so that each step stands once. 0 starts afresh:
      every earlier record goes.
  """

  def __init__(self, workdir, *, total_steps, resume_step=0):
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / FILE
    _drop_after(path, resume_step)
    self._total = total_steps
    self._file = path.open("a", encoding="utf-8")
    # Events are named by the second and opened for overwriting: the suffix
    # keeps two quick attempts apart. `purge_step` hides what is at or after it.
    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"),
      purge_step=resume_step + 1 if resume_step else 0,
      flush_secs=10,
      filename_suffix=f".{os.getpid()}.{resume_step}",
    )
    self._started = time.monotonic()
    self._first: tuple[int, float] | None = None  # step, time of first report
    self._line = ""  # the latest progress line
    self._printed = True  # whether it reached stdout (without a terminal)
    self._printed_at = -math.inf
    self._width = 0  # columns the line takes on the terminal; 0: none is open

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def close(self):
    """Print the last progress line and close the files."""
    if self._file.closed:
      return
    if self._width:
      print(flush=True)
      self._width = 0
    elif not self._printed:
      self._print_line()
    self._file.close()
    self._board.close()

  def write(self, step, epoch, values):
    """Append one record: `{"step": .., "epoch": .., "train/loss": .., ...}`.

    Numbers that JSON cannot hold (NaN, infinities) become null.
    """
    step = int(step)
    record = {"step": step, "epoch": _number("epoch", epoch)}
    for key, value in values.items():
      if key in record:
        raise ValueError(f"metric {key!r}: the record has a field of that name")
      record[key] = _number(key, value)
    self._file.write(_line(record))
    self._file.flush()
    for key in values:
      # tensorboardX logs a warning for each NaN: the gap in the curve says it.
      if record[key] is not None:
        self._board.add_scalar(key, record[key], step)

  def progress(self, step, text="", *, examples_per_second=None):
    """Show the progress line: done, speed, time so far and time left.

    On a terminal it overwrites itself; elsewhere a full line is printed for
    the first and the last step and at most every 10 s between.
    """
    elapsed = time.monotonic() - self._started
    done = 100 * step / self._total if self._total else 100.0
    parts = [f"{done:5.1f} %", f"step {step}/{self._total}", text]
    if examples_per_second is not None:
      parts.append(f"{examples_per_second:,.0f} examples/s")
    parts.append(f"elapsed {_duration(elapsed)}")
    # Before the first report there was compilation, which says nothing of what
    # is left.
    if self._first is None:
      self._first = step, elapsed
    elif step > self._first[0]:
      pace = (elapsed - self._first[1]) / (step - self._first[0])
      left = max(pace * (self._total - step), 0.0)
      parts.append(f"eta {_duration(left)}")
    self._line = "  ".join(p for p in parts if p).replace("\n", " ")
    self._printed = False
    if sys.stdout.isatty():
      self._overwrite(self._line)
    else:
      waited = time.monotonic() - self._printed_at
      if waited >= _QUIET_SECONDS or step >= self._total:
        self._print_line()

  def message(self, text):
    """Print a full line, leaving the progress line below it whole."""
    if self._width:
      first, *rest = str(text).split("\n")
      print("\r" + "\n".join([first.ljust(self._width), *rest]))
      self._width = 0
      self._overwrite(self._line)
    else:
      print(text, flush=True)

  def _print_line(self):
    print(self._line, flush=True)
    self._printed = True
    self._printed_at = time.monotonic()

  def _overwrite(self, line):
    # A line that wraps cannot be overwritten; the last column wraps on some.
    line = line[: max(shutil.get_terminal_size().columns - 1, 1)]
    print("\r" + line.ljust(self._width), end="", flush=True)
    self._width = len(line)


def writer(workdir, *, total_steps, resume_step=0):
  """Return a writer for this process: the first writes, all others do not."""
  if processes.first():
    return Writer(workdir, total_steps=total_steps, resume_step=resume_step)
  return Silent()


class Silent(Writer):
  """Keeps and shows nothing: for all processes of a run but the first."""

  def __init__(self):
    pass

  def close(self):
    pass

  def write(self, step, epoch, values):
    pass

  def progress(self, step, text="", *, examples_per_second=None):
    pass

  def message(self, text):
    pass


def read(workdir):
  """Read `metrics.jsonl` back as a list of records, null as None.

  A torn last line, what a killed process leaves, is ignored.

  Raises:
    MetricsError: there is no `metrics.jsonl`, or a line that is not the last
      is altered or no record; names the line.
  """
  path = pathlib.Path(workdir) / FILE
  if not path.exists():
    raise MetricsError(
      f"{path}: not found; is {workdir} the workdir of a run that has started?"
    )
  lines = path.read_bytes().split(b"\n")
  # Empty if the file ends in a newline, as it should; or torn, or lacks it.
  if b"}" not in lines[-1]:
    lines.pop()
  records = []
  for number, line in enumerate(lines, 1):
    try:
      records.append(_parse(line))
    except ValueError as error:
      raise MetricsError(
        f"{path}, line {number}: not a record ({error}); delete that line"
      ) from None
  return records


def _line(record):
  return json.dumps(sealed(record), allow_nan=False) + "\n"


def _parse(line):
  try:
    record = json.loads(line)
  except RecursionError as error:
    raise ValueError("nested too deeply") from error
  if not isinstance(record, dict) or not isinstance(record.get("step"), int):
    raise ValueError("an object with an integer 'step' is expected")
  return unsealed(record)


def _drop_after(path, step):
  """Drop the records after `step` (all of them for 0) and a torn line."""
  if not path.exists():
    return
  kept = [r for r in read(path.parent) if step and r["step"] <= step]
  new = path.with_name(path.name + ".tmp")
  with new.open("w", encoding="utf-8") as file:
    file.writelines(map(_line, kept))
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)


def _number(key, value):
  """Turn a Python, NumPy or JAX scalar into what JSON holds."""
  if isinstance(value, numbers.Integral):
    return int(value)
  try:
    value = value.item() if hasattr(value, "item") else float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"metric {key!r}: not one number ({error})") from None
  if isinstance(value, numbers.Integral):
    return int(value)
  return float(value) if math.isfinite(value) else None


def _duration(seconds):
  """Write seconds as 5s, 1m20s, 2h05m or 3d04h."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02}s"
  minutes = seconds // 60
  if minutes < 1440:
    return f"{minutes // 60}h{minutes % 60:02}m"
  return f"{minutes // 1440}d{minutes // 60 % 24:02}h"
