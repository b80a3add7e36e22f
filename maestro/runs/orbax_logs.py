"""Keeps orbax from flooding the terminal, and hears what its threads fail of.

Orbax logs some thirty INFO lines a save, and pages of what it raises as well. A
filter hides just these and leaves the user's levels and handlers alone. When
one array of many fails, it closes its loop while the others go on, and each of
them has a traceback that nobody can catch, or is logged by asyncio.

A thread of orbax that cannot write logs that at once; what it raises comes only
when all processes have met, which those whose disks are well do not for twenty
minutes.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import absl.logging

_told: Callable[[BaseException], None] | None = None


@contextlib.contextmanager
def failures(tell: Callable[[BaseException], None]) -> Iterator[None]:
  """Tells of every error in a thread of orbax, in that thread, at once."""
  global _told
  before, _told = _told, tell
  try:
    yield
  finally:
    _told = before


def _is_not_orbax_chatter(record: logging.LogRecord) -> bool:
  if "/orbax/" not in record.pathname:
    return True
  error = record.exc_info and record.exc_info[1]
  aside = threading.current_thread() is not threading.main_thread()
  if record.levelno >= logging.ERROR and error and aside and _told is not None:
    _told(error)
  return record.levelno == logging.WARNING


# What asyncio says of tasks in which orbax reads arrays, and of nobody else's.
_READS = ("tensorstore_spec", "deserialize()", "in OCDBT database")


def _is_not_of_other_reads(record: logging.LogRecord) -> bool:
  text = record.getMessage()
  return not any(name in text for name in _READS)


def _report_unraisable(unraisable: Any, report=sys.unraisablehook) -> None:
  if "Event loop is closed" not in str(unraisable.exc_value):
    report(unraisable)


absl.logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
logging.getLogger("asyncio").addFilter(_is_not_of_other_reads)
sys.unraisablehook = _report_unraisable
