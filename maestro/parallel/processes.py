"""Many processes as one run: how they join, agree, and stop together.

Each process runs the same command and holds the devices of its host. All of
them make the same decisions, from the same numbers; the first alone writes
metrics and reports, and speaks. What must not differ between them (configs,
data, ranks) is compared, what one alone can find out (a file that cannot be
written) is told to all. In a run of one process nothing of this happens.
"""

import atexit
import contextlib
import dataclasses
import difflib
import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maestro.errors import (
  EXIT_ERROR,
  EXIT_INTERRUPTED,
  EXIT_TERMINATED,
  Interrupted,
  UserError,
)
from maestro.exits import end_at_once
from maestro.parallel.roll_call import Line, Place


@dataclasses.dataclass(frozen=True)
class Join:
  """How a process is told to join others.

  Attributes:
    coordinator: "host:port" of process 0, as all others see it.
    num_processes: of the run.
    process_id: of this one, from 0.
    distributed: whether to ask JAX where it stands, as on a TPU pod.
    join_timeout: seconds until all must be there.
    lost_timeout: seconds of silence after which a process counts as lost.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  distributed: bool = False
  join_timeout: float = 1800.0
  lost_timeout: float = 60.0


_NOTICED = 5.0  # seconds within which the loss of a process is noticed
_LAST = 10.0  # seconds that a process which fails may take to end by itself
_line: Line | None = None
_stopping = False  # whether all have agreed to stop


def join(how: Join) -> None:
  """Joins the processes of the run, if there are others.

  To be called before JAX is used. Without options it looks for what SLURM
  (`srun`) and Open MPI (`mpirun`) tell.

  Raises:
    UserError: the options do not fit, or not all processes came in time.
  """
  global _line
  found = place_of(how)
  if found is None or found[0].count == 1:
    return
  place, devices = found
  _line = Line(place, how.join_timeout, how.lost_timeout)
  # Signals are the loop's own: this service would take SIGTERM for itself.
  jax.config.update("jax_enable_preemption_service", False)
  host = f"[{place.host}]" if ":" in place.host else place.host
  jax.distributed.initialize(
    f"{host}:{_line.port}",
    place.count,
    place.index,
    local_device_ids=devices,
    cluster_detection_method="deactivate",
    initialization_timeout=max(int(how.join_timeout), 1),
    heartbeat_timeout_seconds=max(int(2 * how.lost_timeout), 10),
  )
  if place.index:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def place_of(how: Join) -> tuple[Place, list[int] | None] | None:
  """Where this process stands; None if it is alone."""
  given = {
    "--coordinator": how.coordinator,
    "--num_processes": how.num_processes,
    "--process_id": how.process_id,
  }
  if any(value is not None for value in given.values()):
    if missing := [key for key, value in given.items() if value is None]:
      raise UserError(
        f"{', '.join(missing)} missing; give all of {', '.join(given)}, or none"
      )
    count, index = how.num_processes, how.process_id
    address, devices, hosts = how.coordinator, None, 1
  elif how.distributed or _started_by_launcher():
    address, count, index, devices = _detected(how.join_timeout)
    hosts = _number("SLURM_STEP_NUM_NODES")
  else:
    return None
  assert count is not None and index is not None and address is not None
  host, port = host_and_port(address)
  if not 0 <= index < count:
    raise UserError(
      f"--process_id: {index} is none of {count} processes; use 0 to"
      f" {count - 1}"
    )
  if hosts > 1:
    _refuse_loopback(host, hosts)
  return Place(host, port, count, index), devices


def host_and_port(address: str) -> tuple[str, int]:
  """Reads "host:port"; IPv6 addresses stand in brackets.

  Raises:
    UserError: it is none.
  """
  host, _, port = address.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise UserError(
      f"--coordinator: {address!r} is no address; write HOST:PORT, such as"
      " 10.0.0.1:7650 or [fd00::1]:7650"
    )
  return host, int(port)


def _started_by_launcher() -> bool:
  slurm = "SLURM_PROCID" in os.environ and _number("SLURM_STEP_NUM_TASKS") > 1
  return slurm or _number("OMPI_COMM_WORLD_SIZE") > 1


def _number(name: str) -> int:
  """A number that a launcher has put into the environment; 1 without it."""
  text = os.environ.get(name, "1")
  if not text.isdecimal():
    raise UserError(
      f"{name}={text!r} in the environment is no number; unset it, or give"
      " --coordinator, --num_processes and --process_id"
    )
  return int(text)


def _detected(timeout: float) -> tuple[str, int, int, list[int] | None]:
  # What `jax.distributed.initialize` does first; JAX has no public name for it.
  from jax._src import clusters

  try:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, int(timeout)
    )
  except Exception as error:
    raise UserError(
      f"JAX cannot tell where this process stands ({error}); give"
      " --coordinator, --num_processes and --process_id"
    ) from error
  address, count, index, devices = found
  if address is None or count is None or index is None:
    raise UserError(
      "--distributed: JAX finds no TPU pod, SLURM or Open MPI here; give"
      " --coordinator, --num_processes and --process_id"
    )
  return address, count, index, list(devices) if devices else None


def _refuse_loopback(host: str, hosts: int) -> None:
  try:
    address = socket.gethostbyname(host)
  except OSError as error:
    raise UserError(
      f"--coordinator: {host!r} cannot be resolved ({error}); give an address"
      " that every host can reach"
    ) from error
  if ipaddress.ip_address(address).is_loopback:
    raise UserError(
      f"--coordinator: {host!r} is {address} here, which no other of the"
      f" {hosts} hosts can reach; give its address in the network (mend"
      " /etc/hosts, or use --coordinator)"
    )


# ---------------------------------------------------------------------------
# Who is who
# ---------------------------------------------------------------------------


def alone() -> bool:
  """Whether the run has one process."""
  return _line is None


def first() -> bool:
  """Whether this process writes and speaks for all."""
  return _line is None or jax.process_index() == 0


# ---------------------------------------------------------------------------
# Agreement
# ---------------------------------------------------------------------------


def exchange(text: str) -> list[str]:
  """Returns what every process says here, in order; all must come here."""
  return [text] if _line is None else _line.exchange(text)


def agree(what: str, text: str, remedy: str) -> None:
  """Checks that all processes have the same text.

  Args:
    what: it is, for the error.
    text: of this process, of lines that are compared one by one.
    remedy: what to do if they differ.

  Raises:
    UserError: on all processes; names those that differ, and a line.
  """
  texts = exchange(text)
  differ = [i for i, other in enumerate(texts) if other != texts[0]]
  if not differ:
    return
  old, new = texts[0].splitlines(), texts[differ[0]].splitlines()
  changed = [x for x in difflib.ndiff(old, new) if x[0] in "+-"]
  raise UserError(
    f"{what} of process {', '.join(map(str, differ))} differs from that of"
    f" process 0 ({'; '.join(changed[:4])}); {remedy}"
  )


class _Stop:
  """Polls whether any process is asked to stop; the same answer on all."""

  def __init__(self, asked: Callable[[], bool]):
    devices = np.asarray(jax.devices())
    mesh = Mesh(devices, ("all",), axis_types=(AxisType.Auto,))
    self._asked, self._agreed = asked, False
    self._split = NamedSharding(mesh, PartitionSpec("all"))
    self._join = jax.jit(
      lambda flags: flags.max(),
      out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    self._flag: jax.Array | None = None  # of the poll before

  def __call__(self) -> bool:
    global _stopping
    mine = np.full(jax.local_device_count(), self._asked(), np.int32)
    flags = jax.make_array_from_process_local_data(self._split, mine)
    if self._flag is not None:
      self._agreed |= bool(self._flag)
    self._flag = self._join(flags)
    _stopping |= self._agreed
    return self._agreed


def stop_agreed(asked: Callable[[], bool]) -> Callable[[], bool]:
  """Returns a poll whose answers are the same on all processes.

  All must poll equally often. An answer is that of the poll before: meanwhile
  the devices have joined the flags of all, so that nobody waits.
  """
  return asked if _line is None else _Stop(asked)


# ---------------------------------------------------------------------------
# The end
# ---------------------------------------------------------------------------


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """Ends the process in order, and tells the others where it does not.

  Where one fails, the others would wait for it for ever: they end, too, with
  its exit code and what it says.
  """
  try:
    yield
  except BaseException as error:
    if _line is not None:
      _leave_by(error, _line)
    raise
  if _line is not None:
    _leave(_line)


def _leave(line: Line) -> None:
  line.leave()
  jax.distributed.shutdown()


def _leave_by(error: BaseException, line: Line) -> None:
  match error:
    case Interrupted() if _stopping:
      return _leave(line)
    case Interrupted():
      code = EXIT_TERMINATED
    case KeyboardInterrupt():
      code = EXIT_INTERRUPTED
    case UserError():
      code = error.exit_code
    case OSError():
      code = EXIT_ERROR
    case _:
      # It may have failed since another one is gone, which is about to be
      # noticed, and ends this process.
      time.sleep(_NOTICED)
      code = 1
  line.fail(str(error) or type(error).__name__, code)
  # At exit JAX would wait for all, and abort; and before that, Python for
  # threads of orbax, which may wait for the others.
  atexit.register(end_at_once, code)
  last = threading.Timer(_LAST, end_at_once, [code])
  last.daemon = True
  last.start()
  return None


def fail(error: UserError) -> NoReturn:
  """Ends this process and all others at once, from whatever thread."""
  print(f"error: {error}", file=sys.stderr, flush=True)
  if _line is not None:
    _line.fail(str(error), error.exit_code)
  end_at_once(error.exit_code)
