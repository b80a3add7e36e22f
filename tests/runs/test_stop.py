"""Signals: in order where something is saved, within seconds where not."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

# What a command may be at, as the body of its main.
BUSY = {
  "python": "ready(); [time.sleep(0.01) for _ in iter(int, 1)]",
  "no_python": "ready(); big = 10 ** 10 ** 8 // 7 ** 10 ** 7",
  "swallowed": """
    ready()
    while True:
      try:
        time.sleep(0.01)
      except BaseException:
        pass
  """,
  "mending": """
    ready()
    while True:
      try:
        time.sleep(0.01)
      except Exception as error:
        print("it is damaged, delete it", error, flush=True)
  """,
  "polling": """
    with stop.polling() as asked:
      ready()
      while not asked():
        time.sleep(0.01)
    raise Interrupted("stopped at step 3; saved")
  """,
  "deaf": """
    with stop.polling() as asked:
      ready()
      while True: time.sleep(0.01)
  """,
  "saving": """
    with stop.polling(), stop.saving():
      ready()
      for _ in range(25): time.sleep(0.1)
      print("written", flush=True)
    while True: time.sleep(0.01)
  """,
}


def start(body):
  text = f"""
import signal, sys, time
# A shell that starts the tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from maestro import cli
from maestro.errors import Interrupted
from maestro.runs import stop
stop.GRACE = 1.0

def ready():
  print("ready", flush=True)

def main(argv):
{textwrap.indent(textwrap.dedent(body).strip(), "  ")}

cli.run(main)
"""
  process = subprocess.Popen(
    [sys.executable, "-c", text],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  return process


def end(process):
  began = time.monotonic()
  out, err = process.communicate(timeout=30)
  assert "Traceback" not in err, err
  return process.returncode, out + err, time.monotonic() - began


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", BUSY)
def test_sigterm_ends_a_command_cleanly(name):
  process = start(BUSY[name])
  process.send_signal(signal.SIGTERM)
  code, text, _ = end(process)
  assert code == 75
  assert "un the same command again" in text
  assert "delete it" not in text
  assert ("step 3; saved" in text) == (name == "polling")
  assert ("written" in text) == (name == "saving")


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["python", "swallowed", "deaf"])
def test_ctrl_c_ends_a_command_cleanly(name):
  process = start(BUSY[name])
  process.send_signal(signal.SIGINT)
  code, text, _ = end(process)
  assert code == 130
  assert "un the same command again" in text


def test_a_second_sigterm_ends_a_run_that_polls_at_once():
  process = start(BUSY["deaf"].replace("with", "stop.GRACE = 60\nwith", 1))
  process.send_signal(signal.SIGTERM)
  time.sleep(0.3)
  process.send_signal(signal.SIGTERM)
  code, text, seconds = end(process)
  assert code == 75 and seconds < 10
  assert "second SIGTERM" in text or "in the midst" in text


ENDINGS = {
  "Interrupted('stopped at step 3; saved')": 75,
  "KeyboardInterrupt": 130,
  "UserError('config.seed: no')": 2,
  "LostError('process 1 is lost')": 69,
  "OSError(errno.ENOSPC, 'No space left', 'file')": 2,
  "OSError(errno.EIO, 'unforeseen', 'file')": 1,
  "RuntimeError('unforeseen')": 1,
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("error", ENDINGS)
def test_nothing_is_taken_apart_under_native_threads(error):
  # What libraries do at exit, with threads of theirs at work, may crash.
  text = f"""
import atexit, errno, os
atexit.register(os.abort)
from maestro import cli
from maestro.errors import Interrupted, LostError, UserError

def main(argv):
  raise {error}

cli.run(main)
"""
  done = subprocess.run(
    [sys.executable, "-c", text], capture_output=True, text=True, timeout=60
  )
  assert done.returncode == ENDINGS[error], done.stderr
  assert ("Traceback" in done.stderr) == ("unforeseen" in error)
  assert done.stdout + done.stderr
