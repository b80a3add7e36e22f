"""Where a run's wall clock went, over all of its attempts: goodput.json.

An attempt is one start of the run's command. Its time is booked to sections,
each second to one: to the innermost that is open, or to "compile" while JAX
traces, lowers and compiles, whichever is open then. The file is written every
ten seconds and at every save, so that a killed attempt has its record, too; it
is of the first process, as all files are.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from maestro.errors import Interrupted, UserError
from maestro.runs import workdir as workdir_lib
from maestro.runs.stop import GRACE

FILE = "goodput.json"
SECTIONS = (
  *("setup", "restore", "compile", "input", "steps"),
  *("ranks", "evaluate", "save", "report", "other"),
)
_COMPILE = "/jax/core/compile/"
_EVERY = 10.0  # seconds between two writes


@dataclasses.dataclass
class Attempt:
  """One start of a run's command.

  Attributes:
    began: when, in UTC.
    ended: "finished", "stopped", "failed", or "" if it runs or was killed.
    from_step: at which it began.
    saved_step: the newest that it has saved, or resumed from.
    step: the last one that it is known to have made.
    wall_seconds: from its begin to the last write.
    processes: of the run.
    devices: of all processes.
    seconds: {section: booked time}; their sum is wall_seconds.
    longest: {section: its longest stretch, with all within}; "dispatch" is
      that of steps between two polls for SIGTERM.
  """

  began: str
  ended: str = ""
  from_step: int = 0
  saved_step: int = 0
  step: int = 0
  wall_seconds: float = 0.0
  processes: int = 1
  devices: int = 1
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  longest: dict[str, float] = dataclasses.field(default_factory=dict)


class _Recorder:
  """Books the time of the attempt that runs."""

  def __init__(self, path: pathlib.Path, earlier: list[Attempt], began: float):
    self._path, self._earlier = path, earlier
    self._began, self._since, self._written = began, began, -math.inf
    utc = datetime.datetime.now(datetime.UTC)
    utc -= datetime.timedelta(seconds=time.monotonic() - began)
    self.attempt = Attempt(
      utc.isoformat(timespec="seconds"),
      processes=jax.process_count(),
      devices=jax.device_count(),
      seconds=dict.fromkeys(SECTIONS, 0.0),
    )
    if earlier:  # it would go on from there, should it end before it does
      self.at(earlier[-1].saved_step)
    self.open = ["setup"]
    self.book()
    self.open = ["other"]
    self._compiled: list[tuple[float, float]] = []  # (start, seconds) booked

  def at(self, step: int) -> None:
    """Takes a saved step for the attempt's begin."""
    attempt = self.attempt
    attempt.from_step = attempt.saved_step = attempt.step = step

  def book(self) -> float:
    """Books the time since the last call; returns the time."""
    now = time.monotonic()
    self.attempt.seconds[self.open[-1]] += now - self._since
    self._since = now
    return now

  def compiled(self, event: str, duration_secs: float, **kwargs: Any) -> None:
    """Takes what ends now, and may hold earlier events, for compilation."""
    del kwargs
    if not event.startswith(_COMPILE):
      return
    start, within = self.book() - duration_secs, 0.0
    while self._compiled and self._compiled[-1][0] >= start:
      within += self._compiled.pop()[1]
    self._compiled.append((start, duration_secs))
    booked = self.attempt.seconds
    new = min(max(duration_secs - within, 0.0), booked[self.open[-1]])
    booked[self.open[-1]] -= new
    booked["compile"] += new

  def longest(self, name: str, seconds: float) -> None:
    known = self.attempt.longest
    known[name] = max(known.get(name, 0.0), seconds)

  def write(self, at_once: bool = True) -> None:
    """Writes the file; a full disk is told by what matters more."""
    now = self.book()
    if not at_once and now - self._written < _EVERY:
      return
    self._written = now
    self.attempt.wall_seconds = now - self._began
    attempts = [*self._earlier, self.attempt]
    content = {"attempts": [dataclasses.asdict(a) for a in attempts]}
    with contextlib.suppress(OSError):
      workdir_lib.write_json(self._path, content | {"sum": summary(attempts)})


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recording(workdir: pathlib.Path, began: float) -> Iterator[None]:
  """Records an attempt at the run of a workdir, in this process's first thread.

  Args:
    workdir: of the run; it exists, and nobody else writes to it.
    began: when the attempt did, by time.monotonic.
  """
  global _recorder
  before, path = _recorder, workdir / FILE
  try:
    earlier = read(workdir) if path.exists() else []
  except UserError as error:
    print(f"{str(error).partition(';')[0]}; attempts are counted anew")
    earlier = []
  recorder = _recorder = _Recorder(path, earlier, began)
  listen = recorder.compiled
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield
    recorder.attempt.ended = "finished"
  except BaseException as error:
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    recorder.attempt.ended = "stopped" if stopped else "failed"
    raise
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
    recorder.write()
    _recorder = before


@contextlib.contextmanager
def spent(section: str) -> Iterator[None]:
  """Books what runs within to a section; also a decorator."""
  recorder = _recorder
  if recorder is None:
    yield
    return
  start = recorder.book()
  recorder.open.append(section)
  try:
    yield
  finally:
    recorder.longest(section, recorder.book() - start)
    recorder.open.pop()


def resumed(step: int) -> None:
  """Says at which step the attempt begins."""
  if _recorder is not None:
    _recorder.at(step)


def reached(step: int, dispatch: float | None = None) -> None:
  """Says that a step was made, and how long its dispatch took to come back."""
  if _recorder is None:
    return
  _recorder.attempt.step = max(_recorder.attempt.step, step)
  if dispatch is not None:
    _recorder.longest("dispatch", dispatch)
  _recorder.write(at_once=False)


def saved(step: int) -> None:
  """Says that a step is on disk."""
  if _recorder is not None:
    _recorder.attempt.saved_step = step
    _recorder.write()


# ---------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------


def read(workdir: str | os.PathLike) -> list[Attempt]:
  """Reads the attempts of a workdir, oldest first.

  Raises:
    WorkdirError: there is no goodput.json, or it is damaged.
  """
  path = pathlib.Path(workdir) / FILE
  value = workdir_lib.read_json(
    path, keys={"attempts": list}, remedy="delete it, to count anew"
  )
  try:
    return [Attempt(**attempt) for attempt in value["attempts"]]
  except TypeError as error:
    raise workdir_lib.WorkdirError(
      f"{path} is of another version of maestro ({error}); delete it, to count"
      " anew"
    ) from error


def lost(attempts: Sequence[Attempt]) -> list[tuple[int, float]]:
  """Steps of each attempt that a later one made again, and their seconds.

  What was made after the last write of a killed attempt is not known.
  """
  found = []
  for attempt, following in zip(attempts, [*attempts[1:], None], strict=True):
    again = following.from_step if following else attempt.step
    steps = max(attempt.step - again, 0)
    made = max(attempt.step - attempt.from_step, 1)
    found.append((steps, attempt.seconds.get("steps", 0.0) * steps / made))
  return found


def summary(attempts: Sequence[Attempt]) -> dict[str, Any]:
  """Sums attempts up.

  Returns:
    "goodput": share of the attempts' wall clock in training steps that were not
    made again; "wall_seconds", "lost_steps", "lost_seconds" and "seconds" by
    section; "grace_seconds", see `grace`.
  """
  wall = sum(a.wall_seconds for a in attempts)
  seconds = {
    name: sum(a.seconds.get(name, 0.0) for a in attempts) for name in SECTIONS
  }
  steps, again = (sum(x) for x in zip((0, 0.0), *lost(attempts), strict=True))
  return {
    "goodput": (seconds["steps"] - again) / wall if wall else 0.0,
    "attempts": len(attempts),
    "wall_seconds": wall,
    "lost_steps": steps,
    "lost_seconds": again,
    "seconds": seconds,
    "grace_seconds": grace(_longest(attempts)),
  }


def grace(longest: Mapping[str, float]) -> int | None:
  """Seconds from SIGTERM to the end that a scheduler should give a run.

  Twice what it may take: the end of a dispatch (as long as `maestro.runs.stop`
  waits for one: three times the longest, and five seconds) and a save, as
  measured. None before any save.
  """
  if "save" not in longest:
    return None
  dispatch = max(GRACE, 3 * longest.get("dispatch", 0.0))
  return math.ceil(2 * (dispatch + longest["save"]))


def _longest(attempts: Sequence[Attempt]) -> dict[str, float]:
  names = {name for a in attempts for name in a.longest}
  return {n: max(a.longest.get(n, 0.0) for a in attempts) for n in names}


def line(attempts: Sequence[Attempt]) -> str:
  """Says in a line where the time went, the largest part first."""
  total = summary(attempts)
  parts = sorted(total["seconds"].items(), key=lambda item: -item[1])
  text = ", ".join(f"{name} {s:.1f} s" for name, s in parts[:4] if s)
  n = len(attempts)
  return (
    f"{100 * total['goodput']:.0f} % of {total['wall_seconds']:.0f} s"
    f"{f' in {n} attempts' if n > 1 else ''} were training steps ({text})"
  )
