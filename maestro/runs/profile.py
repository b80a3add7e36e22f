"""Traces some steps of a run, to be looked at in XProf."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from maestro.parallel import processes


class Trace:
  """Traces a run's steps from its second dispatch on; the first one compiles.

  A context: what a run that ends early has made of them is written at its exit.

  Args:
    directory: gets the trace.
    steps: how many to trace, up to whole dispatches; None traces nothing. Of
      many processes the first one alone is traced.
  """

  def __init__(self, directory: pathlib.Path, steps: int | None):
    steps = steps if processes.first() else None
    self._directory, self._steps = directory, steps
    self._left, self._seen, self._on = steps or 0, False, False

  def of(self, program: Callable[..., Callable]) -> Callable[..., Callable]:
    """Returns (phase, discover, steps, level) -> calls that are traced."""
    if self._steps is None:
      return program

    def traced(phase: str, discover: int, steps: int, *level: Any) -> Callable:
      dispatch = program(phase, discover, steps, *level)

      def call(state: Any, data: Any) -> Any:
        if not self._left:
          return dispatch(state, data)
        if self._seen and not self._on:
          jax.block_until_ready(state)
          jax.profiler.start_trace(str(self._directory))
          self._on = True
        found = dispatch(state, data)
        if self._on:
          self._left = max(self._left - steps, 0)
          if not self._left:
            jax.block_until_ready(found)
            self._stop()
        self._seen = True
        return found

      return call

    return traced

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._on = False
    print(
      f"profile: {self._directory}; to look at it: pip install xprof,"
      f" xprof --logdir={self._directory}"
    )

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *_) -> None:
    if self._on:
      self._stop()
    elif self._left:
      print("profile: nothing to trace, there was no second dispatch")
