"""Runs trainings in processes of their own, and writes results files."""

import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maestro.errors import UserError


class RunError(UserError):
  """A training did not finish; says where its log is."""


def make_folder(path: str | os.PathLike, flag: str) -> None:
  """Makes a folder, and those around it.

  Raises:
    UserError: it cannot be made, or written to; names the flag that gave it.
  """
  try:
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    writable = os.access(path, os.W_OK)
    why = None if writable else "Permission denied"
  except OSError as error:
    why = error.strerror
  if why:
    raise UserError(
      f"{flag}: cannot write to {path} ({why}); name a folder that can be"
      " written"
    )


def run(
  config: str, workdir: str | os.PathLike, overrides: Sequence[str] = ()
) -> None:
  """Trains, or resumes, by `python -m maestro.main`; a finished run stays.

  Args:
    config: config file, with its variants after a colon.
    workdir: directory of the run; its log.txt gets what the run prints.
    overrides: more arguments, e.g. "--config.discover.lam=1e-3".

  Raises:
    RunError: the run ended with an error, or was interrupted.
  """
  workdir = pathlib.Path(workdir)
  command = [sys.executable, "-m", "maestro.main", f"--config={config}"]
  command += [f"--workdir={workdir}", *overrides]
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / "log.txt").open("a") as log:
    code = subprocess.run(command, stdout=log, stderr=log).returncode
  if code:
    raise RunError(f"{workdir} ended with code {code}; see its log.txt")


def run_all(
  function: Callable[..., Any], jobs: Sequence[tuple], at_a_time: int
) -> list[Any]:
  """Calls function(*job) for all jobs in threads; says how far it is.

  Returns:
    The results, in the order of the jobs.

  Raises:
    RunError: of the first job that failed; those that run are waited for, the
      others are not begun.
  """
  started = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
    futures = [pool.submit(function, *job) for job in jobs]
    try:
      for done, future in enumerate(
        concurrent.futures.as_completed(futures), start=1
      ):
        future.result()
        seconds = (time.monotonic() - started) * (len(jobs) - done) / done
        left = f"  eta {round(seconds / 60)} min" if done < len(jobs) else ""
        print(f"{done} of {len(jobs)} runs{left}", flush=True)
    except BaseException:
      pool.shutdown(wait=True, cancel_futures=True)
      raise
  return [future.result() for future in futures]


def run_rows(
  function: Callable[..., Any],
  rows: Sequence[tuple],
  seeds: Sequence[int],
  at_a_time: int,
) -> dict[tuple, list[Any]]:
  """Calls function(*row, seed) for all, seed by seed: {row: one a seed}."""
  jobs = [(*row, seed) for seed in seeds for row in rows]
  found = dict(zip(jobs, run_all(function, jobs, at_a_time), strict=True))
  return {row: [found[*row, seed] for seed in seeds] for row in rows}


def write_results(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
  """Writes a results file: indented JSON, each list of numbers on one line.

  Raises:
    ValueError: a number is not finite, which JSON cannot hold.
  """
  text = json.dumps(record, indent=1, allow_nan=False)
  innermost = r"\[[^\[\]{}]*\]"
  text = re.sub(innermost, lambda match: " ".join(match[0].split()), text)
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text + "\n", encoding="utf-8")
