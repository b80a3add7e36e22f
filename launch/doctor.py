"""Looks whether a host is fit for a run: python -m launch.doctor.

  python -m launch.doctor --workdir=/shared/runs/try
  python -m launch.doctor --workdir=/shared/runs/try \
      --coordinator=10.0.0.1:7650 --num_processes=4 --process_id=I

Without the last three flags it looks at this host alone. With them, started on
all hosts at once, it joins them as a run would, and compares versions, clocks,
and whether the workdir is one that all share. Prints a table, one line for each
check, with a remedy where there is something to mend; every process prints its
own. Exit codes: 0 fit, perhaps with warnings, 1 something failed, 2 bad flags,
69 another process was lost. It makes the workdir, writes a few MB into it, and
deletes them again.
"""

import dataclasses
import importlib.metadata
import ipaddress
import json
import os
import pathlib
import platform
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator

from absl import flags

from maestro import cli
from maestro.errors import UserError
from maestro.parallel import processes, roll_call
from maestro.runs.workdir import appears

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
OK, WARNING, FAILED = "ok", "warning", "failed"
FEW_BYTES = 5e9  # less free space than this is worth a warning
SLOW_WRITE = 20e6  # bytes a second: a save of 1 GB would take a minute
SAMPLE = 8 << 20  # bytes that are written to measure it
SKEW = 2.0  # seconds of difference between clocks worth a warning


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the table.

  Attributes:
    check: what was looked at.
    state: OK, WARNING or FAILED.
    found: what it is.
    remedy: what to do, where it is not OK.
  """

  check: str
  state: str
  found: str
  remedy: str = ""


# ---------------------------------------------------------------------------
# This host
# ---------------------------------------------------------------------------


def versions() -> dict[str, str]:
  """Returns the versions that must be the same on all hosts."""
  found = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "missing"
  return found


def check_versions(found: dict[str, str]) -> Finding:
  """Says the versions, and which packages are missing."""
  text = ", ".join(f"{name} {version}" for name, version in found.items())
  if missing := [
    name for name, version in found.items() if version == "missing"
  ]:
    remedy = f"pip install {' '.join(missing)}"
    return Finding("versions", FAILED, text, remedy)
  return Finding("versions", OK, text)


def check_devices() -> Finding:
  """Says the devices of this process; warns of CPUs beside an accelerator."""
  import jax

  try:
    devices = jax.local_devices()
  except RuntimeError as error:
    remedy = "mend the driver, or say JAX_PLATFORMS=cpu"
    return Finding("devices", FAILED, " ".join(str(error).split()), remedy)
  kind = devices[0].device_kind
  text = f"{len(devices)} x {kind} ({devices[0].platform})"
  if devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
    if pathlib.Path("/dev/nvidia0").exists():
      remedy = 'JAX does not use the GPU: pip install "jax[cuda13]"'
      return Finding("devices", WARNING, text, remedy)
    if pathlib.Path("/dev/accel0").exists():
      remedy = 'JAX does not use the TPU: pip install "jax[tpu]"'
      return Finding("devices", WARNING, text, remedy)
  return Finding("devices", OK, text)


def check_address(coordinator: str, count: int) -> Finding:
  """Looks whether all hosts can reach the coordinator by its name."""
  host, port = processes.host_and_port(coordinator)
  check = "coordinator"
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  except OSError as error:
    remedy = "give an address that every host can resolve"
    return Finding(check, FAILED, f"{host}: {error}", remedy)
  address = str(found[0][4][0])
  text = address if address == host else f"{host} is {address}"
  if ipaddress.ip_address(address).is_loopback and count > 1:
    remedy = (
      "no other host reaches that; unless all processes are on this one, give"
      " its address in the network"
    )
    return Finding(check, WARNING, f"{text}, a loopback", remedy)
  return Finding(check, OK, text)


def check_port(coordinator: str) -> Finding:
  """Looks whether process 0 could listen; only to be called by it."""
  host, port = processes.host_and_port(coordinator)
  try:
    roll_call.listen(roll_call.Place(host, port, 1, 0)).close()
  except UserError as error:
    return Finding("port", FAILED, *str(error).split("; ", 1))
  return Finding("port", OK, f"{port} is free")


def check_workdir(workdir: pathlib.Path) -> Finding:
  """Makes the workdir, if it is not there."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    remedy = "mend its permissions, or choose another --workdir"
    return Finding("workdir", FAILED, f"{workdir}: {error.strerror}", remedy)
  return Finding("workdir", OK, str(workdir.absolute()))


def check_space(workdir: pathlib.Path) -> Finding:
  """Says the free space, to us, below the workdir."""
  free = shutil.disk_usage(workdir).free
  text = f"{free / 1e9:.1f} GB free"
  if free < FEW_BYTES:
    remedy = f"free space, or choose another --workdir than {workdir}"
    return Finding("space", WARNING, text, remedy)
  return Finding("space", OK, text)


def check_writing(workdir: pathlib.Path) -> Finding:
  """Writes a file as a checkpoint is written, and measures it."""
  data = os.urandom(SAMPLE)  # nothing that a file system could compress
  try:
    with tempfile.NamedTemporaryFile(dir=workdir, prefix=".doctor_") as file:
      start = time.perf_counter()
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
      seconds = time.perf_counter() - start
  except OSError as error:
    remedy = "mend its permissions, or choose another --workdir"
    return Finding("writing", FAILED, f"{workdir}: {error.strerror}", remedy)
  speed = SAMPLE / seconds
  text = f"{speed / 1e6:.0f} MB/s, to the disk"
  if speed < SLOW_WRITE:
    remedy = "saves will be slow; save less often, or choose a faster disk"
    return Finding("writing", WARNING, text, remedy)
  return Finding("writing", OK, text)


# ---------------------------------------------------------------------------
# All hosts
# ---------------------------------------------------------------------------


def compare_versions(all_versions: list[dict[str, str]]) -> Finding:
  """Looks whether all processes have the same versions."""
  first = all_versions[0]
  differ = [
    f"process {i} has {name} {other.get(name)}, process 0 {first[name]}"
    for i, other in enumerate(all_versions)
    for name in first
    if other.get(name) != first[name]
  ]
  check = "same versions"
  if differ:
    remedy = "install the same packages on all hosts"
    return Finding(check, FAILED, "; ".join(differ[:4]), remedy)
  return Finding(check, OK, f"on all {len(all_versions)} processes")


def compare_clocks(times: list[float], lag: float) -> Finding:
  """Compares clocks that were read within `lag` seconds of each other."""
  skew = max(max(times) - min(times) - lag, 0.0)
  text = f"{skew:.1f} s apart, at least"
  if skew > SKEW:
    late = max(range(len(times)), key=lambda i: abs(times[i] - times[0]))
    remedy = f"set the clock of process {late}'s host, or of 0's (NTP)"
    return Finding("clocks", WARNING, text, remedy)
  return Finding("clocks", OK, text)


def compare_workdirs(sees: list[bool]) -> Finding:
  """Looks whether all see the file that process 0 has written."""
  blind = [str(i) for i, saw in enumerate(sees) if not saw]
  if blind:
    found = f"process {', '.join(blind)} does not see process 0's files"
    remedy = "mount the same file system on all hosts, and put --workdir on it"
    return Finding("same workdir", FAILED, found, remedy)
  return Finding("same workdir", OK, f"all {len(sees)} processes see it")


def all_hosts(workdir: pathlib.Path) -> Iterator[Finding]:
  """Compares this process with the others; all must come here."""
  said = processes.exchange(json.dumps(versions()))
  yield compare_versions([json.loads(text) for text in said])
  # All leave an exchange at about the same time: that of the next one, at most,
  # is what lies between their readings.
  start = time.perf_counter()
  now = time.time()
  times = [float(text) for text in processes.exchange(repr(now))]
  yield compare_clocks(times, time.perf_counter() - start)
  name = ""
  if processes.first():
    name = f".doctor_{uuid.uuid4().hex}"
    (workdir / name).touch()
  try:
    name = processes.exchange(name)[0]
    sees = processes.exchange("yes" if appears(workdir / name) else "no")
  finally:
    if processes.first() and name:
      (workdir / name).unlink(missing_ok=True)
  yield compare_workdirs([answer == "yes" for answer in sees])


# ---------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------


def table(findings: list[Finding]) -> str:
  """Returns the findings as lines, each with its remedy."""
  width = max(len(finding.check) for finding in findings)
  lines = []
  for finding in findings:
    remedy = f": {finding.remedy}" if finding.remedy else ""
    lines.append(
      f"{finding.state:<8}{finding.check:<{width}}  {finding.found}{remedy}"
    )
  return "\n".join(lines)


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_string(
    "workdir", None, "Directory that the run would use; needed."
  )
  flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, for a run of many processes."
  )
  flags.DEFINE_integer(
    "num_processes", None, "How many processes the run has.", lower_bound=1
  )
  flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0.", lower_bound=0
  )
  flags.DEFINE_float(
    "join_timeout", 120.0, "Seconds until all processes must be there.", 1.0
  )


def main(argv: list[str]) -> None:
  """Checks this host, and all of them if there are others."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  if not values.workdir:
    raise UserError("--workdir=DIR is missing; name that of the run")
  workdir = pathlib.Path(values.workdir)
  out = sys.stdout  # joining silences all but the first process
  findings = [check_versions(versions()), check_workdir(workdir)]
  coordinator = values.coordinator
  if coordinator is not None:
    findings.append(check_address(coordinator, values.num_processes or 1))
    if values.process_id == 0:
      findings.append(check_port(coordinator))
  if any(finding.state == FAILED for finding in findings):
    # They would not meet; better to say so than to wait.
    print(table(findings), file=out)
    sys.exit(1)
  processes.join(
    processes.Join(
      coordinator=coordinator,
      num_processes=values.num_processes,
      process_id=values.process_id,
      join_timeout=values.join_timeout,
    )
  )
  with processes.ending():
    findings += [check_devices(), check_space(workdir), check_writing(workdir)]
    if not processes.alone():
      findings += all_hosts(workdir)
  print(table(findings), file=out, flush=True)
  if any(finding.state == FAILED for finding in findings):
    sys.exit(1)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
