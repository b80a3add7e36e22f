"""Ends a process in order when it is told to: SIGTERM, Ctrl-C.

A command that has nothing to save ends at once. A training run polls: it ends
after the current dispatch, and saves. Where neither happens within seconds,
since no Python runs (a compilation) or none that polls (an evaluation), a
thread ends the process. That loses no more than kill -9 does, which is what
followed the newest checkpoint, and leaves no traceback.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from maestro.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Interrupted

GRACE = 5.0  # seconds from a signal to the end of what does not serve it


class _Busy:
  """What the process is at, for the thread that would end it."""

  def __init__(self) -> None:
    self.saving = 0
    self.until = 0.0  # when the next poll is expected, by time.monotonic


_busy = _Busy()


@contextlib.contextmanager
def saving() -> Iterator[None]:
  """Keeps the process alive while something is written."""
  _busy.saving += 1
  try:
    yield
  finally:
    _busy.saving -= 1


def expect_poll(seconds: float) -> None:
  """Says how long the next poll may take, if longer than usual."""
  _busy.until = time.monotonic() + seconds


@contextlib.contextmanager
def polling() -> Iterator[Callable[[], bool]]:
  """Yields a function that tells whether SIGTERM has come.

  A second one ends what runs at once, by Interrupted. Off the main thread,
  which alone gets signals, none ever comes.
  """
  asked = threading.Event()

  def on_signal(*_):
    if asked.is_set():
      raise Interrupted("stopped at once, by a second SIGTERM")
    asked.set()

  if threading.current_thread() is not threading.main_thread():
    yield asked.is_set
    return
  before = signal.signal(signal.SIGTERM, on_signal)
  try:
    yield asked.is_set
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def watching() -> Iterator[None]:
  """Ends a command by SIGTERM or Ctrl-C, whatever it is at."""

  def on_signal(*_):
    raise Interrupted("stopped by SIGTERM")

  before = signal.signal(signal.SIGTERM, on_signal)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  # Written to by the signal itself, also while no Python runs.
  descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  over = threading.Event()
  threading.Thread(target=_watch, args=(reader, over), daemon=True).start()
  try:
    yield
  finally:
    over.set()
    signal.set_wakeup_fd(descriptor)
    signal.signal(signal.SIGTERM, before)
    os.close(writer)  # which ends the thread


def _watch(reader: int, over: threading.Event) -> None:
  """Gives the main thread its time after each signal."""
  came = []
  while number := os.read(reader, 1):
    if number[0] in (signal.SIGTERM, signal.SIGINT):
      came.append(number[0])
      last = threading.Thread(target=_end, args=(list(came), over), daemon=True)
      last.start()
  os.close(reader)


def _end(came: list[int], over: threading.Event) -> None:
  """Ends the process, unless it is over in time or writes something."""
  at_once = len(came) > 1 or came[0] == signal.SIGINT
  end = time.monotonic() + (1.0 if at_once else GRACE)
  while not over.wait(0.05):
    now = time.monotonic()
    if _busy.saving:
      end = max(end, now + 1.0)
    if now < end or (not at_once and now < _busy.until):
      continue
    sys.stdout.flush()
    print(
      f"\nstopped by {signal.Signals(came[-1]).name} in the midst of a"
      " computation. What was saved before is whole; run the same command again"
      " to go on from there.",
      file=sys.stderr,
      flush=True,
    )
    terminated = came[0] == signal.SIGTERM
    os._exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)
