"""Lengths of training: in epochs, steps, examples or a fraction of the run."""

import dataclasses
import math
from collections.abc import Mapping

from maestro.schema import ConfigError

UNITS = ("epochs", "steps", "examples", "fraction")


@dataclasses.dataclass(frozen=True)
class Duration:
  """A length of training; written `unit:value`, such as "steps:5000".

  Attributes:
    unit: one of UNITS.
    value: how many; as a fraction, of the whole run, in (0, 1].
  """

  unit: str
  value: float

  @classmethod
  def parse(cls, text: str | None, where: str, default: str = "") -> "Duration":
    """Reads "epochs:2.5", "steps:5000", "examples:1e6" or "fraction:0.1".

    Args:
      text: None takes the default.
      where: the key that it is the value of.
      default: in the same notation.

    Raises:
      ConfigError: names the key.
    """
    text = default if text is None else text
    unit, colon, value = text.strip().partition(":")
    try:
      number = float(value)
    except ValueError:
      number = -1.0
    if not colon or unit not in UNITS or not 0 <= number < float("inf"):
      raise ConfigError(
        f"{where}: {text!r} is no length of training; write it as unit:value,"
        f" e.g. steps:5000; the units are {', '.join(UNITS)}"
      )
    if unit == "fraction" and number > 1:
      raise ConfigError(f"{where}: {text!r} is more than the whole run")
    return cls(unit, number)


@dataclasses.dataclass(frozen=True)
class Clock:
  """What turns lengths into steps.

  Attributes:
    steps_per_epoch: without a last, smaller batch.
    batch_size: examples a step.
    discover: steps of the discover phase.
    settle: steps of the settle phase.
  """

  steps_per_epoch: int
  batch_size: int
  discover: int = 0
  settle: int = 0

  @property
  def total(self) -> int:
    """Steps of the whole run."""
    return self.discover + self.settle

  def steps(self, length: Duration) -> int:
    """Rounds a length to steps: at least one, unless it is none at all."""
    size = {
      "epochs": self.steps_per_epoch,
      "steps": 1,
      "examples": 1 / self.batch_size,
      "fraction": self.total,
    }[length.unit]
    return max(round(length.value * size), int(length.value > 0))

  def epochs(self, step: int) -> float:
    """Epochs that are made by a step; a whole number at the end of one."""
    whole, more = divmod(step, self.steps_per_epoch)
    return whole + more / self.steps_per_epoch if more else whole

  def text(self, step: int) -> str:
    """The epoch, from 1, in which a step ends, for people."""
    epoch, last = (math.ceil(self.epochs(n)) for n in (step, self.total))
    return f"epoch {epoch}/{last}"

  def of(self, discover: Duration, settle: Duration) -> "Clock":
    """Returns the clock of a run of two phases.

    A phase that is a fraction f of the run is f / (1 - f) of the other one.

    Raises:
      ConfigError: nothing says how long the run is, or it has no step, or more
        than an int32 counts.
    """
    lengths = (discover, settle)
    parts = [x.value for x in lengths if x.unit == "fraction"]
    if len(parts) > 1 or 1 in parts:
      raise ConfigError(
        "config.discover.length, config.settle.length: a fraction of the run"
        " needs the other phase in epochs, steps or examples"
      )
    known = sum(self.steps(x) for x in lengths if x.unit != "fraction")
    share = sum(parts)
    rest = max(round(known * share / (1 - share)), int(share > 0))
    if not known or known + rest >= 2**31:
      raise ConfigError(
        "config.discover.epochs and config.settle.epochs, or lengths in their"
        f" place, make {known + rest:,} steps: "
        + ("lower them" if known else "no training; raise one")
      )
    steps = [rest if x.unit == "fraction" else self.steps(x) for x in lengths]
    return dataclasses.replace(self, discover=steps[0], settle=steps[1])


@dataclasses.dataclass(frozen=True)
class Periods:
  """Steps from one of the things that a run does at times to the next.

  Attributes:
    log: a record of training metrics; None: at the end of each epoch.
    evaluate: on the validation split.
    save: a checkpoint.
    shrink: {phase: a lowering of ranks}, for the phases that do so.
  """

  log: int | None
  evaluate: int
  save: int
  shrink: Mapping[str, int]


def every(step: int, n: int | None) -> bool:
  """True at steps n, 2n, ...; never if n is None."""
  return n is not None and step % n == 0
