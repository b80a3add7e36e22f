"""Orbax is quiet, others are not, and what its threads fail of is heard."""

import asyncio
import logging
import threading

import absl.logging
import pytest

from maestro.runs import orbax_logs

ABSL = absl.logging.get_absl_logger()


@pytest.fixture
def shown():
  """Returns a function that tells whether a record is let by."""

  def ask(logger, path, level, error=None, text="text"):
    error = error and (type(error), error, None)
    record = logger.makeRecord("x", level, path, 1, text, (), error)
    return bool(logger.filter(record))

  return ask


def in_a_thread(call):
  thread = threading.Thread(target=call)
  thread.start()
  thread.join()


@pytest.mark.parametrize(
  ("path", "level", "passes"),
  [
    ("/a/orbax/checkpoint.py", logging.INFO, False),
    ("/a/orbax/checkpoint.py", logging.WARNING, True),
    ("/a/orbax/checkpoint.py", logging.ERROR, False),
    ("/a/mine.py", logging.INFO, True),
    ("/a/mine.py", logging.ERROR, True),
  ],
)
def test_only_orbaxs_own_lines_are_kept_back(path, level, passes, shown):
  assert shown(ABSL, path, level) is passes


def test_an_error_in_a_thread_of_orbax_is_told_at_once(shown):
  told, error = [], OSError("full")
  args = ABSL, "/a/orbax/async.py", logging.ERROR
  with orbax_logs.failures(told.append):
    shown(*args, error)  # in the main thread, which raises it by itself
    in_a_thread(lambda: shown(*args))  # tells of no exception
    in_a_thread(lambda: shown(ABSL, "/a/mine.py", logging.ERROR, error))
    in_a_thread(lambda: shown(*args[:2], logging.INFO, error))
    assert not told
    in_a_thread(lambda: shown(*args, error))
    assert told == [error]
  in_a_thread(lambda: shown(*args, error))
  assert told == [error]


def test_reads_that_nobody_waits_for_are_not_shown(caplog):
  """As orbax leaves them, when one array of many cannot be read."""

  class Read:
    def __init__(self, text):
      self.text = text

    def __await__(self):
      yield from asyncio.sleep(0).__await__()
      raise ValueError(self.text)

  async def leave(awaitable):
    task = asyncio.ensure_future(awaitable)
    await asyncio.sleep(0.01)
    del task

  asyncio.run(leave(Read('Error reading "u/c/0" in OCDBT database at "/a"')))
  assert "never retrieved" not in caplog.text
  asyncio.run(leave(Read("of a user")))
  assert "never retrieved" in caplog.text
