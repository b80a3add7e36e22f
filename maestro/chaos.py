"""Disturbs a run again and again, and checks that its results do not change.

Trains a config once undisturbed. Then trains it anew while processes are killed
and stopped at random times (so also while they compile, shrink, save and
evaluate), disks fill up, checkpoints are damaged and second processes come, and
compares every number of every checkpoint, record and result. It tells whether a
machine, a file system and a config can be trusted with a long run.

  python -m maestro.chaos --config=configs/digits_od.py:smoke
  python -m maestro.chaos --config=configs/lenet_od.py:smoke --kills=10 --seed=1
  python -m maestro.chaos --config=configs/digits_od.py:smoke --processes=2
  python -m maestro.chaos --config=configs/digits_od.py:smoke --kind=terminate

Disturbances, in random order:

  kill       SIGKILL
  terminate  SIGTERM: exit code 75 within seconds, saved or at the last save
  freeze     SIGSTOP, a second process meanwhile, SIGCONT
  intrude    a second process, which must be turned away
  disk_full  no file may grow beyond a random size
  truncate   SIGKILL, then a file of the newest checkpoint loses its end
  flip       SIGKILL, then one bit of the newest checkpoint flips

A run may have several processes, on this machine: one of them, chosen at
random, is disturbed, and the others must end with it.

After each the same command starts again; a run that finishes is compared, and
another one begins until --kills disturbances have been made. Prints a table;
exit codes: 0 all equal, 1 something differs, 2 bad input. Runs go to --workdir
(the default is runs/<config>_chaos), and those that are equal are deleted.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from maestro import cli
from maestro.errors import (
  EXIT_ERROR,
  EXIT_LOST,
  EXIT_TERMINATED,
  UserError,
)
from maestro.main import default_workdir
from maestro.parallel.loopback import Command
from maestro.report.tables import align
from maestro.runs import checkpoint, metrics
from maestro.runs import workdir as workdir_lib
from maestro.training.config import parse

KINDS = (
  *("kill", "terminate", "freeze", "intrude"),
  *("disk_full", "truncate", "flip"),
)
_PATIENCE = 120.0  # seconds from a signal to what is called a hang
_START = 5.0  # seconds in which Python starts, and a signal ends it at once

flags.declare_key_flag("config")
flags.declare_key_flag("workdir")
flags.DEFINE_integer("kills", 20, "How many disturbances.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the choice and times of disturbances.")
flags.DEFINE_multi_enum(
  "kind", None, KINDS, "Disturbances to choose from; the default is all."
)
flags.DEFINE_integer("processes", 1, "Of each run, on CPUs.", lower_bound=1)


@dataclasses.dataclass
class Event:
  """One disturbance and what came of it.

  Attributes:
    kind: of KINDS.
    run: which disturbed run, from 1.
    second: after the process began.
    step: the newest record of the run then.
    code: exit code of the process that was disturbed.
    seconds: that the process took to end.
    fault: what was wrong, "" if nothing.
  """

  kind: str
  run: int
  second: float
  step: int
  code: int | None
  seconds: float
  fault: str = ""


# Runs a command whose files cannot grow beyond a size.
_LIMITED = """
import os, resource, sys
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Attempt:
  """The processes that start at a run together, their output in a file.

  One of them is the `chosen` one, whose exit code is the run's.
  """

  def __init__(
    self,
    command: Command,
    workdir: pathlib.Path,
    limit: int | None = None,
    chosen: int = 0,
  ):
    workdir.mkdir(parents=True, exist_ok=True)
    self._log = workdir / "log.txt"
    self._start = self._log.stat().st_size if self._log.exists() else 0
    limited = [sys.executable, "-c", _LIMITED, str(limit)]
    limited = [] if limit is None else limited
    one = command.processes == 1
    env = os.environ if one else os.environ | {"JAX_PLATFORMS": "cpu"}
    # Through a pipe, so that a full disk does not silence the log.
    with self._log.open("ab") as log:
      self._tee = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    self.began = time.monotonic()
    self._all = [
      subprocess.Popen(
        [*limited, *line],
        env=env,
        stdout=self._tee.stdin,
        stderr=subprocess.STDOUT,
      )
      for line in command.lines(workdir)
    ]
    self.chosen = self._all[chosen]
    if self._tee.stdin is not None:
      self._tee.stdin.close()

  def wait(self, seconds: float) -> int | None:
    """Returns the exit code; None if any process still runs."""
    until = time.monotonic() + seconds
    try:
      for popen in self._all:
        popen.wait(max(until - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
      return None
    self._tee.wait()
    return self.chosen.returncode

  @property
  def others(self) -> set[int]:
    """Exit codes of all but the chosen one."""
    return {p.returncode for p in self._all if p is not self.chosen}

  def kill(self) -> None:
    """Kills them all."""
    for popen in self._all:
      popen.kill()

  @property
  def output(self) -> str:
    """What this process has printed."""
    return self._log.read_bytes()[self._start :].decode(errors="replace")


def main(argv: list[str]) -> None:
  """Disturbs a config's run, as the flags say."""
  values = flags.FLAGS
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  if values.config is None:
    raise UserError("--config=FILE is missing, e.g. configs/digits_od.py:smoke")
  parse(cli.config_of(values.config))  # a wrong one shows now
  name = config_flags.get_config_filename(values["config"])
  workdir = pathlib.Path(values.workdir or f"{default_workdir(name)}_chaos")
  if workdir.exists() and any(workdir.iterdir()):
    raise UserError(f"--workdir: {workdir} is not empty; choose another one")
  words = [sys.executable, "-m", "maestro.main", *flags_of_config(sys.argv)]
  command = Command(words, values.processes)
  kinds = values.kind or KINDS
  events = disturb(command, workdir, values.kills, values.seed, kinds)
  print(f"\n{table(events)}\n")
  bad = [event for event in events if event.fault]
  good = len(events) - len(bad)
  print(f"{good} of {len(events)} disturbances left no trace")
  if bad:
    print(f"look at {workdir}: each run has its log.txt")
    sys.exit(1)


def flags_of_config(argv: list[str]) -> list[str]:
  """The flags of a command line by which it has its config."""
  own = []
  for arg, following in zip(argv[1:], [*argv[2:], ""], strict=True):
    if arg.startswith(("--config", "--allow_import")):
      own.append(arg if "=" in arg else f"{arg}={following}")
  return own


def disturb(
  command: Command,
  workdir: pathlib.Path,
  kills: int,
  seed: int,
  kinds: Sequence[str] = KINDS,
) -> list[Event]:
  """Runs a training command undisturbed, then disturbed; compares.

  Args:
    command: that trains.
    workdir: where the runs go.
    kills: how many disturbances.
    seed: of their choice and times.
    kinds: to choose from.

  Raises:
    UserError: the undisturbed run fails.
  """
  reference = workdir / "undisturbed"
  print("an undisturbed run ...", flush=True)
  process = Attempt(command, reference)
  if code := process.wait(1e6):
    raise UserError(
      f"the undisturbed run ended with code {code}; see {reference}/log.txt"
    )
  whole = time.monotonic() - process.began
  print(f"took {whole:.0f} s", flush=True)
  steps = max(_step(reference), 1)
  rng, began = random.Random(seed), time.monotonic()
  events: list[Event] = []
  run = 0
  while len(events) < kills:
    run += 1
    place = workdir / f"disturbed{run}"
    own: list[Event] = []
    while not (place / "results.json").exists():
      if len(events) + len(own) == kills:
        code = Attempt(command, place).wait(whole * 3 + _PATIENCE)
        if code != 0:
          own[-1].fault = own[-1].fault or f"then ended with code {code}"
          break
        continue
      kind = rng.choice(kinds)
      own.append(_disturb_once(kind, command, place, run, whole, steps, rng))
      done = len(events) + len(own)
      pace = (time.monotonic() - began) / done
      left = pace * (kills - done)
      said = f"{done} of {kills}: {kind} in run {run}, eta {left:.0f} s"
      print(f"{said} {own[-1].fault}".rstrip(), flush=True)
    faults = [event for event in own if event.fault]
    if not faults and own:
      own[-1].fault = "; ".join(differences(place, reference))
      faults = [event for event in own if event.fault]
    if not faults:
      shutil.rmtree(place)
    events += own
  return events


def _disturb_once(
  kind: str,
  command: Command,
  place: pathlib.Path,
  run: int,
  whole: float,
  steps: int,
  rng: random.Random,
) -> Event:
  """Starts the run, disturbs it at a random time, and waits for its end."""
  limit = None
  if kind == "disk_full":
    limit = int(2 ** rng.uniform(8, 20))
  process = Attempt(command, place, limit, rng.randrange(command.processes))
  at = rng.uniform(0, whole * (1 - 0.7 * _step(place) / steps))
  code = process.wait(at)
  signalled, second = time.monotonic(), time.monotonic() - process.began
  event = Event(kind, run, second, _step(place), code, 0.0)
  allowed: set[int | None] = {0}
  if code is None:
    if kind in ("freeze", "intrude"):
      event.fault = _intrude(process, command, place, kind == "freeze")
    elif kind == "terminate":
      process.chosen.send_signal(signal.SIGTERM)
      allowed.add(EXIT_TERMINATED)
      if second < _START or (place / "results.json").exists():
        allowed.add(-signal.SIGTERM)  # nobody may hear it yet, or any more
    elif kind != "disk_full":
      process.chosen.kill()
      allowed.add(-signal.SIGKILL)
    patience = 3 * whole if kind in ("freeze", "intrude", "disk_full") else 0.0
    code = process.wait(patience + _PATIENCE)
    event.seconds = time.monotonic() - signalled
    if code is None:
      process.kill()
      process.wait(_PATIENCE)
      event.fault = event.fault or "does not end"
      return event
  if kind == "disk_full":
    allowed.add(EXIT_ERROR)
  if code == 0 and event.code is None:
    event.seconds = 0.0  # it ran to its end
  event.code = code
  if code not in allowed:
    event.fault = event.fault or f"exit code {code}"
  # Or by JAX's own abort, where it notices first that process 0 has gone.
  if bad := process.others - {code, EXIT_LOST, -signal.SIGABRT}:
    event.fault = event.fault or f"exit codes {bad} of other processes"
  if "Traceback" in process.output:
    event.fault = event.fault or "a traceback"
  unfinished = not (place / "results.json").exists()
  if kind in ("truncate", "flip") and unfinished:
    _damage(place, kind, rng)
  return event


def _intrude(
  process: Attempt, command: Command, place: pathlib.Path, freeze: bool
) -> str:
  """Starts a second run on the workdir; returns what was wrong."""
  if not (place / "lock").exists():
    return ""  # the first one has not begun: the second would be the first
  if freeze:
    process.chosen.send_signal(signal.SIGSTOP)
  second = Attempt(command, place)
  code = second.wait(_PATIENCE)
  if freeze:
    process.chosen.send_signal(signal.SIGCONT)
  if code is None:
    second.kill()
    return "a second process is not turned away"
  turned_away = code == 2 and "is in use by process" in second.output
  ended = code == 0 and process.wait(_PATIENCE) == 0  # after the first one
  return "" if turned_away or ended else f"a second process ended with {code}"


def _damage(place: pathlib.Path, kind: str, rng: random.Random) -> None:
  """Damages a file of the newest checkpoint."""
  steps = _steps(place)
  if not steps:
    return
  newest = place / "checkpoints" / str(steps[-1])
  files = sorted(p for p in newest.rglob("*") if p.is_file())
  files = [path for path in files if path.stat().st_size]
  if not files:
    return
  path = rng.choice(files)
  content = bytearray(path.read_bytes())
  if kind == "truncate":
    content = content[: rng.randrange(len(content))]
  else:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def _steps(place: pathlib.Path) -> list[int]:
  directory = place / "checkpoints"
  return checkpoint.list_steps(directory) if directory.exists() else []


def _step(place: pathlib.Path) -> int:
  try:
    return max((r["step"] for r in metrics.read(place)), default=0)
  except (OSError, UserError):
    return 0


# ---------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------

# What a clock measures.
_CLOCK = ("wall_seconds", "train_seconds", "examples_per_second", "git")
_CLOCK += ("input_wait",)


def _timeless(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _timeless(v) for k, v in value.items() if k not in _CLOCK}
  return [_timeless(v) for v in value] if isinstance(value, list) else value


def differences(run: pathlib.Path, reference: pathlib.Path) -> Iterator[str]:
  """Says in what two finished runs differ, but for what a clock measures."""
  for name in ("results.json", "importance.json"):
    found = [
      _timeless(workdir_lib.read_json(place / name))
      if (place / name).exists()
      else None
      for place in (run, reference)
    ]
    if found[0] != found[1]:
      yield f"{name} differs"
  records = [_timeless(metrics.read(place)) for place in (run, reference)]
  if records[0] != records[1]:
    yield f"{metrics.FILE} differs"
  kept, wanted = _steps(run), _steps(reference)
  # A run that SIGTERM has stopped within an epoch saved one step more, for
  # which an older one is no longer kept.
  more, less = set(kept) - set(wanted), set(wanted) - set(kept)
  if kept[-1:] != wanted[-1:] or len(less) > len(more):
    yield f"checkpoints of steps {kept}, not {wanted}"
    return
  for step in sorted(set(kept) & set(wanted)):
    ours, theirs = (
      checkpoint.load_leaves(place / "checkpoints", step)
      for place in (run, reference)
    )
    if json.dumps(_timeless(ours[1])) != json.dumps(_timeless(theirs[1])):
      yield f"what step {step} has counted differs"
    for path in sorted(ours[0].keys() | theirs[0].keys()):
      a, b = ours[0].get(path), theirs[0].get(path)
      if a is None or b is None or a.tobytes() != b.tobytes():
        yield f"step {step}: {path} differs"
        break


def table(events: list[Event]) -> str:
  """Lays the disturbances out as text."""
  rows = [["#", "run", "disturbance", "at s", "step", "exit", "took s", ""]]
  for i, event in enumerate(events, 1):
    rows.append(
      [
        str(i),
        str(event.run),
        event.kind,
        f"{event.second:.1f}",
        str(event.step),
        "" if event.code is None else str(event.code),
        f"{event.seconds:.1f}",
        event.fault or "as it should",
      ]
    )
  return "\n".join(align(rows, left=(2, 7)))


if __name__ == "__main__":
  cli.run(main)
