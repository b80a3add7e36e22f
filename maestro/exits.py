"""Ways to end a process that leave no thread behind, and crash on none."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def end_at_once(code: int) -> NoReturn:
  """Ends this process, from whatever thread."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # of a closed pipe
      stream.flush()
  os._exit(code)


def exit_early(code: int) -> NoReturn:
  """`sys.exit` in the midst of work.

  Libraries' native threads may still compute or write then; they crash
  (SIGABRT, SIGSEGV) when Python is taken apart under them. So the process ends
  after Python's own threads, before that.
  """
  atexit.register(end_at_once, code)
  sys.exit(code)
