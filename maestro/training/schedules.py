"""Learning rates of the phases: (clock, steps, options) -> optax schedule."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import jax.numpy as jnp
import optax

from maestro import schema
from maestro.schema import ConfigError, Positive, Range, Share, Weight
from maestro.training.durations import Clock, Duration


def constant(
  clock: Clock, steps: int, *, learning_rate: Weight
) -> optax.Schedule:
  """Keeps one learning rate."""
  del clock, steps
  return optax.constant_schedule(learning_rate)


def piecewise(
  clock: Clock,
  steps: int,
  *,
  learning_rate: Weight,
  boundaries: Sequence[Annotated[float, Range("(0, 1)")]],
  factor: Weight = 0.1,
) -> optax.Schedule:
  """Multiplies by `factor` at each boundary, a fraction of the phase."""
  del clock
  at = collections.Counter(round(b * steps) for b in boundaries)
  return optax.piecewise_constant_schedule(
    learning_rate, {step: factor**n for step, n in at.items()}
  )


def cosine(
  clock: Clock,
  steps: int,
  *,
  learning_rate: Weight,
  warmup_epochs: Weight = 0.0,
  warmup: str | None = None,
  final_fraction: Share = 0.0,
) -> optax.Schedule:
  """Rises linearly, then falls along a cosine to a fraction of the peak.

  Step i of n of warm-up has the rate (i + 1) / n of the peak; `warmup` is its
  length in any unit, such as "steps:500", in place of epochs.
  """
  n = _warmup_steps(clock, steps, warmup_epochs, warmup)
  left = max(steps, 1) - n
  decay = optax.cosine_decay_schedule(learning_rate, left, final_fraction)
  return _after_warmup(decay, learning_rate, n)


def linear(
  clock: Clock,
  steps: int,
  *,
  learning_rate: Weight,
  warmup_epochs: Weight = 0.0,
  warmup: str | None = None,
  final_fraction: Share = 0.0,
) -> optax.Schedule:
  """Rises as `cosine` does, then falls along a line to a fraction of the peak.

  Lines of two phases can be one, whichever part of it a phase is.
  """
  n = _warmup_steps(clock, steps, warmup_epochs, warmup)
  left, final = max(steps, 1) - n, final_fraction * learning_rate
  return _after_warmup(
    optax.linear_schedule(learning_rate, final, left), learning_rate, n
  )


def inverse_sqrt(
  clock: Clock,
  steps: int,
  *,
  learning_rate: Positive,
  warmup: str,
  begun: str | None = None,
) -> optax.Schedule:
  """Rises linearly, then falls as one over the root of the step.

    rate(i) = peak * min((i + 1) / n, sqrt(n / (i + 1)))

  with n steps of warm-up: the schedule of Vaswani et al. (2017), section 5.3,
  called Noam, whose peak is (width * n)^-1/2. There is no end that it knows of;
  `warmup` and `begun` are lengths in any unit, such as "steps:4000". Where a
  method ends the earlier phase before its time, the rate falls by a step.

  Args:
    clock: of the run.
    steps: of the phase.
    learning_rate: the peak.
    warmup: n; of a phase that ends before it, only the rise is seen.
    begun: how far an earlier phase has come, which this one goes on from.
  """
  del steps
  n = clock.steps(Duration.parse(warmup, "schedule.warmup"))
  done = 0
  if begun is not None:
    done = clock.steps(Duration.parse(begun, "schedule.begun"))
  if not n:
    raise ConfigError(
      f"schedule.warmup: {warmup!r} is no step; the rate falls from its end"
    )

  def rate(step):
    i = step + done + 1.0
    return learning_rate * jnp.minimum(i / n, jnp.sqrt(n / i))

  return rate


def _warmup_steps(
  clock: Clock, steps: int, epochs: float, length: str | None
) -> int:
  where, text = "schedule.warmup_epochs", f"epochs:{epochs}"
  if length is not None:
    where, text = "schedule.warmup", length
  n = clock.steps(Duration.parse(text, where))
  if n >= max(steps, 1):
    raise ConfigError(
      f"{where}: {text} leaves nothing of a phase of {max(steps, 1)} steps"
    )
  return n


def _after_warmup(decay: optax.Schedule, peak: float, n: int) -> optax.Schedule:
  if not n:
    return decay
  rise = optax.linear_schedule(peak / n, peak, max(n - 1, 1))
  return optax.join_schedules([rise, decay], [n])


SCHEDULES = {
  "constant": constant,
  "cosine": cosine,
  "inverse_sqrt": inverse_sqrt,
  "linear": linear,
  "piecewise": piecewise,
}


def bind(
  phase: str, section: Mapping
) -> Callable[[Clock, int], optax.Schedule]:
  """Checks a phase's section; returns (clock, steps) -> schedule."""
  where = f"config.{phase}.schedule"
  return schema.make(SCHEDULES, section, where, given=("clock", "steps"))


def make(
  sections: Mapping[str, Mapping], clock: Clock, end: int | None = None
) -> optax.Schedule:
  """Joins the schedules of the phases: {"discover": section, "settle": ...}.

  Args:
    sections: of the config.
    clock: the lengths as they were planned.
    end: the step at which discover ends, if earlier: settle gets what is left.
  """
  end = clock.discover if end is None else end
  schedules, boundaries = [], []
  for name, steps, stop in (
    ("discover", clock.discover, end),
    ("settle", clock.total - end, clock.total),
  ):
    if steps:
      schedules.append(bind(name, sections[name])(clock, steps))
      boundaries.append(stop)
  return optax.join_schedules(schedules, boundaries[:-1])
