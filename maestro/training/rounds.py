"""The steps of a round: dispatched ahead, read one dispatch late, checked."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from maestro import trees
from maestro.cost.count import count_cost, layer_macs
from maestro.errors import UserError
from maestro.parallel import processes
from maestro.runs import goodput, stop
from maestro.runs.checkpoint import Checkpoints
from maestro.runs.metrics import Writer
from maestro.training.build import Training
from maestro.training.durations import every
from maestro.training.feed import Feed
from maestro.training.levels import Level, split
from maestro.training.results import Ledger, rank_text
from maestro.training.state import (
  TrainState,
  added,
  form_of,
  means,
  reset_metrics,
)


class TrainingError(UserError):
  """Training cannot go on; says where it stopped and what can be resumed."""


@dataclasses.dataclass(frozen=True)
class Round:
  """What became of a round's steps.

  Attributes:
    loss: of the last step.
    step: after the last step.
    whole: whether all of its steps were made.
    examples_per_second: of its steps.
    input_wait: share of its time in which steps waited for their data; None
      where it lies on the devices.
    replaced: examples that stood for others that could not be read.
  """

  loss: float
  step: int
  whole: bool
  examples_per_second: float
  input_wait: float | None = None
  replaced: int = 0

  @property
  def record(self) -> dict[str, float]:
    """What metrics.jsonl has of it."""
    record: dict[str, float] = {"examples_per_second": self.examples_per_second}
    if self.input_wait is not None:
      record |= {"input_wait": self.input_wait, "replaced": self.replaced}
    return record


def end_of_round(t: Training, ledger: Ledger, step: int) -> int:
  """The next step at which an epoch or a phase ends, or something is due."""
  phase, p = ledger.phase(step), t.periods
  periods = (t.clock.steps_per_epoch, p.evaluate, p.save, p.shrink.get(phase))
  ends = [step - step % n + n for n in periods if n is not None]
  if phase == "discover":
    ends.append(ledger.discover_steps)
  return min(*ends, t.clock.total)


@goodput.spent("steps")
def run_round(
  t: Training,
  state: TrainState,
  feed: Feed,
  ledger: Ledger,
  end: int,
  *,
  writer: Writer,
  checkpoints: Checkpoints,
  stop_asked: Callable[[], bool],
) -> tuple[TrainState, Round]:
  """Makes the steps up to the end of a round, all in one epoch and phase.

  Args:
    t: the run.
    state: donated.
    feed: gives each step its data.
    ledger: gets what the steps cost.
    end: the step to stop at.
    writer: of the metrics.
    checkpoints: to name the last good one.
    stop_asked: true once the run is to stop after the current dispatch.

  Raises:
    TrainingError: a loss is not finite.
  """
  step = first = int(state.step)
  name, method, started = ledger.phase(step), t.method, time.monotonic()
  schedule, _ = t.optimizer(ledger.discover_steps)
  # Levels are compiled one by one, and cost what they are cut to.
  chain = _chain(t, state) if name == "settle" else []
  macs = [count_cost(t.layers, state.params).macs]
  macs = [m for _, m in chain] or macs
  if chain and t.taught:
    macs = [m + macs[0] for m in macs]
  cost = 0
  form, ranks = form_of(state.params), jax.device_get(state.ranks)
  waited, replaced = feed.waited, feed.replaced

  def read(step: int, losses: jax.Array, window: Mapping | None) -> float:
    """Reads a dispatch that ended at a step; the device is at the next one."""
    loss = _finite(losses, step, checkpoints)
    seconds = time.monotonic() - started
    wait = ""
    if feed.streams:
      wait = f" waits for data {(feed.waited - waited) / seconds:.0%}"
    writer.progress(
      step,
      f"{t.clock.text(step)} {name} loss {loss:.3f}{rank_text(ranks)}{wait}",
      examples_per_second=(step - first) * t.clock.batch_size / seconds,
    )
    if window is not None:
      sums = added({}, window)
      check_finite(means(sums), step, checkpoints)
      rate = {"learning_rate": float(schedule(step - 1))}
      writer.write(step, t.clock.epochs(step), means(sums) | rate)
      ledger.sums = added(ledger.sums, sums)
    return loss

  unread, loss = None, float("nan")
  while step < end and not (stop_asked() and step > first):
    n = 1 if chain else dispatch_size(t, step, end)
    at = t.level(step) if chain else 0
    level = chain[at][0] if chain else None
    said = f", level {at}" if chain else ""
    ledger.compiles(f"{name}, {n} steps, {form}{said}")
    program = t.program(name, ledger.discover_steps, n, level)
    cost += n * macs[at]
    with goodput.spent("input"):
      data = feed(step)
    began = time.monotonic()
    state, losses = program(state, data)
    step += n
    if method.project and every(step, method.project_every) and not state.ranks:
      size = (method.project_every or 1) * float(schedule(step - 1))
      size *= method.project_lams[name]
      params = method.project(t.placement.whole(state.params), size)
      state = state.replace(params=t.placement.put(params, params))
    # One dispatch late, so that the device never waits for the host.
    if unread is not None:
      loss = read(*unread)
    window = None
    if every(step, t.periods.log) and step < end:
      window, state = state.metrics, reset_metrics(state)
    unread = step, losses, window
    if step - n > first:  # the first may compile
      seconds = time.monotonic() - began
      stop.expect_poll(3 * seconds)
      goodput.reached(step - n, seconds)
  if unread is not None:
    loss = read(*unread)
  goodput.reached(step)
  seconds = time.monotonic() - started
  examples = (step - first) * t.clock.batch_size
  ledger.macs += t.macs_per_example * t.clock.batch_size * cost
  ledger.examples += examples
  ledger.train_seconds += seconds
  done = Round(loss, step, step == end, examples / max(seconds, 1e-9))
  if feed.streams:
    wait = (feed.waited - waited) / max(seconds, 1e-9)
    own = feed.replaced - replaced
    replaced = sum(map(int, processes.exchange(str(own))))
    ledger.replaced += replaced
    if replaced:
      writer.message(
        f"{replaced} training examples could not be read; the next ones stood"
        " for them"
      )
    done = dataclasses.replace(done, input_wait=wait, replaced=replaced)
  return state, done


@functools.lru_cache(maxsize=1)
def _levels(t: Training, items: tuple) -> list[tuple[Level, int]]:
  """The levels of a chain, with the MACs of their factors."""
  found = []
  for i, profile in enumerate(items):
    ranks = {
      path: np.full(t.layers[path].lead, rank, np.int32)
      for path, rank in profile
    }
    macs = t.dense.macs + sum(
      layer_macs(t.layers[path], rank) - layer_macs(t.layers[path], None)
      for path, rank in profile
    )
    found.append((Level(i, trees.unflatten_ranks(ranks)), macs))
  return found


def _chain(t: Training, state: TrainState) -> list[tuple[Level, int]]:
  # One object a level and run, so that programs are found again.
  profiles = tuple(
    tuple(
      (path, int(np.max(rank, initial=0)))
      for path, rank in trees.flatten_ranks(ranks).items()
    )
    for ranks, _ in split(state.levels)
  )
  return _levels(t, profiles)


def dispatch_size(t: Training, step: int, end: int) -> int:
  """Steps of the next dispatch: up to the next thing that the host does."""
  n = min(t.steps_per_dispatch, end - step)
  for period in (t.periods.log, t.method.project_every):
    n = min(n, period - step % period) if period else n
  return n


# ---------------------------------------------------------------------------
# Numbers that are not finite
# ---------------------------------------------------------------------------

_REMEDY = (
  "lower the learning rate (config.discover.schedule.learning_rate) or lambda"
  " (config.discover.lam), or set config.optimizer.clip_norm, in a new workdir"
)


def _finite(losses: jax.Array, step: int, checkpoints: Checkpoints) -> float:
  """Returns the last of a dispatch's losses; `step` is the step after it."""
  values = np.asarray(losses)
  bad = np.flatnonzero(~np.isfinite(values))
  if bad.size:
    at = step - len(values) + int(bad[0])
    raise TrainingError(
      f"loss is {values[bad[0]]} at step {at}; stopped."
      f" {_last_good(checkpoints)}; {_REMEDY}"
    )
  return float(values[-1])


def check_finite(
  record: Mapping[str, float], step: int, checkpoints: Checkpoints
) -> None:
  """Raises TrainingError if a metric is NaN or infinite."""
  for key, value in record.items():
    if not np.isfinite(value):
      raise TrainingError(
        f"{key} is {value} at step {step}; stopped."
        f" {_last_good(checkpoints)}; {_REMEDY}"
      )


def _last_good(checkpoints: Checkpoints) -> str:
  if checkpoints.latest is None:
    return "there is no checkpoint yet"
  return (
    f"the last good checkpoint is step {checkpoints.latest} in"
    f" {checkpoints.directory}"
  )
