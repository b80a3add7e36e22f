"""Trains profiles side by side and keeps the best: see `maestro.methods.race`.

All candidates are prefixes of the same factors and start from one state. In a
heat they have one shape, the largest rank of any of them in each layer, and
what is beyond their own ranks is zero and stays so: one compilation serves all.
Their steps are steps of the run, on its batches and at its learning rates, so
that the winner has made them already. A run that is stopped within a race
begins it anew from the end of discover, to the same numbers.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro import lowrank, trees
from maestro.cost.allocation import loss_table
from maestro.cost.budget import LATENCY, Ranks, Tables
from maestro.cost.count import count_cost, layer_macs
from maestro.errors import Interrupted, UserError
from maestro.methods.proposals import (
  Proposal,
  neighbours,
  one_more,
  propose,
  series,
)
from maestro.methods.race import Options, Race, Score, limit_of
from maestro.parallel import processes
from maestro.runs.checkpoint import Checkpoints
from maestro.runs.metrics import Silent, Writer
from maestro.training import optim
from maestro.training.build import Training
from maestro.training.feed import Feed
from maestro.training.latency import Meter, meeting
from maestro.training.results import Ledger
from maestro.training.rounds import TrainingError, run_round
from maestro.training.state import (
  TrainState,
  begin_average,
  cut_to,
  form_of,
  plain_ranks,
  variables_of,
)

_GRID = 6  # ranks of a layer whose losses are measured, at most
_LEAST = 128  # examples that say anything


@dataclasses.dataclass
class Candidate:
  """A profile in a race.

  Attributes:
    proposal: its name and ranks.
    state: after its steps so far.
    ledger: what these have counted.
    losses: on training images, after each heat.
  """

  proposal: Proposal
  state: TrainState
  ledger: Ledger
  losses: list[float] = dataclasses.field(default_factory=list)

  @property
  def score(self) -> tuple[float, str]:
    """By which candidates are sorted."""
    return self.losses[-1], self.proposal.name


class _Quiet(Silent):
  """Passes on progress, under a name; keeps no records of candidates."""

  def __init__(self, writer: Writer, name: str):
    self._writer, self._name = writer, name

  def message(self, text):
    self._writer.message(text)

  def progress(self, step, text="", *, examples_per_second=None):
    text = f"race: {self._name} {text}"
    self._writer.progress(step, text, examples_per_second=examples_per_second)


def check(t: Training, state: TrainState, workdir: pathlib.Path) -> None:
  """Measures before training whether a budget of latency can be met.

  Tables depend on shapes alone; the race reads them from the workdir.

  Args:
    t: the run.
    state: dense, at its start.
    workdir: of the run.

  Raises:
    UserError: the network that is fastest by the tables exceeds the budget.
  """
  plan = t.method.race
  if plan is None or plan.budget.kind != LATENCY:
    return
  if not processes.alone():
    raise UserError(
      "config.budget: milliseconds are measured by one process alone; give a"
      " budget of MACs, such as macs:0.25, to a run of many processes"
    )
  meter = Meter.of(t, plan.options, state, workdir)
  fastest = plan.tables(meter).smallest
  if meter([fastest])[0] > plan.budget.value:
    raise meter.refusal(plan.budget, [fastest])


def race(
  t: Training,
  plan: Race,
  state: TrainState,
  feed: Feed,
  ledger: Ledger,
  *,
  writer: Writer,
  checkpoints: Checkpoints,
  stop_asked: Callable[[], bool],
) -> TrainState:
  """Returns the state of the best profile, some steps into settle.

  Args:
    t: the run.
    plan: its method's race.
    state: dense, at the end of discover.
    feed: gives each step its data.
    ledger: gets what the score and all candidates cost.
    writer: of the metrics.
    checkpoints: to name the last good one.
    stop_asked: true once the run is to stop.

  Raises:
    TrainingError: the loss of every candidate is not finite.
    UserError: no profile measured meets a budget of latency.
    Interrupted: the run was asked to stop.
  """
  options = plan.options
  meter = Meter.of(t, options, state, checkpoints.directory.parent)
  tables = plan.tables(meter)
  examples = _examples(t, tables, options, 3 * t.dense.macs, options.examples)
  params = t.placement.whole(state.params)
  score = plan.score(params, state.batch_stats, examples)
  judge = t.judge(options.judged)
  losses, measured = _measured(t, tables, options, score, judge)
  spent = 3 * examples * t.dense.macs + measured
  ledger.race = {"score_macs": spent, "macs": 0, "heats": []}
  limit = limit_of(tables, plan.budget)

  def offer(limit: int) -> list[Proposal]:
    return propose(tables, limit, score.tails, losses)

  if plan.budget.kind == LATENCY:
    proposals, limit = meeting(offer, tables, limit, plan.budget, meter)
  else:
    proposals = offer(limit)
  shape = _union(proposals)
  if options.regrow:
    shape = one_more(tables, shape)
  # In three heats, and of neighbours, each candidate twice or so.
  field = 2 * (len(proposals) + options.neighbours)
  passes = field * _macs(t, shape)
  judged = _examples(t, tables, options, passes, options.judged)
  track = _Track(
    t=t,
    feed=feed,
    ledger=ledger,
    writer=writer,
    checkpoints=checkpoints,
    stop_asked=stop_asked,
    judge=lambda variables: judge(variables, judged),
    judged=judged,
  )

  def enter(proposals: list[Proposal]) -> list[Candidate]:
    made = [_candidate(t, state, score, p, shape, ledger) for p in proposals]
    track.everyone.extend(made)
    return made

  def won(winner: Candidate) -> TrainState:
    if plan.budget.kind == LATENCY:
      ranks = winner.proposal.ranks
      ledger.race["latency"] = meter.record(plan.budget, tables, ranks)
    return _won(t, winner, track)

  if len(proposals) == 1:
    writer.message(
      f"race: all scores propose {_text(proposals[0].ranks)}; none is needed"
    )
    return won(enter(proposals)[0])
  n = _steps(t, options, proposals, shape)
  race = track.heat(enter(proposals), n)
  near = neighbours(
    tables,
    limit,
    series(score.tails["fisher"]),
    race[0].proposal.ranks,
    top=shape,
    most=options.neighbours,
  )
  known = [proposal.ranks for proposal in proposals]
  near = [proposal for proposal in near if proposal.ranks not in known]
  if plan.budget.kind == LATENCY:
    near = meter.within(plan.budget, near)
  if near:
    race = sorted(race + track.heat(enter(near), n), key=lambda c: c.score)
  for factor in (2, 4):
    race = race[: -(-len(race) // 2)]
    if len(race) > 1:
      _cut_together(t, race, ledger)
      race = track.heat(race, factor * n)
  return won(race[0])


@dataclasses.dataclass(frozen=True, eq=False)
class _Track:
  """Where candidates train and are judged.

  Attributes:
    t: the run.
    feed: gives each step its data.
    ledger: of the run.
    writer: of its metrics.
    checkpoints: to name the last good one.
    stop_asked: true once the run is to stop.
    judge: variables -> loss on training examples.
    judged: how many of them.
    everyone: that has entered.
  """

  t: Training
  feed: Feed
  ledger: Ledger
  writer: Writer
  checkpoints: Checkpoints
  stop_asked: Callable[[], bool]
  judge: Callable[[Any], float]
  judged: int
  everyone: list[Candidate] = dataclasses.field(default_factory=list)

  def heat(self, candidates: list[Candidate], steps: int) -> list[Candidate]:
    """Trains and judges all; returns those that are finite, the best first."""
    alive = []
    for c in candidates:
      if not self._train(c, steps):
        self.writer.message(f"race: {c.proposal.name} has diverged")
        continue
      self.ledger.compiles(f"judge, {form_of(c.state.params)}")
      c.losses.append(self.judge(variables_of(c.state)))
      stored = count_cost(self.t.layers, c.state.params).macs
      self.ledger.race["score_macs"] += self.judged * stored
      if math.isfinite(c.losses[-1]):
        alive.append(c)
    if not alive:
      raise TrainingError(
        "every profile of the race has diverged; lower the learning rate"
        " (config.settle.schedule.learning_rate), in a new workdir"
      )
    alive.sort(key=lambda c: c.score)
    _tell(self.writer, self.ledger, alive, steps)
    return alive

  def _train(self, c: Candidate, steps: int) -> bool:
    """Trains a candidate; False if its loss is not finite."""
    step, n = int(c.state.step), self.t.clock.steps_per_epoch
    end = min(step + steps, self.t.clock.total)
    while step < end:
      try:
        c.state, done = run_round(
          self.t,
          c.state,
          self.feed,
          c.ledger,
          min(end, step - step % n + n),
          writer=_Quiet(self.writer, c.proposal.name),
          checkpoints=self.checkpoints,
          stop_asked=self.stop_asked,
        )
      except TrainingError:
        return False
      step = done.step
      if self.stop_asked():
        raise Interrupted(
          f"stopped within the race, at step {step}; it begins anew from the"
          " newest checkpoint"
        )
    return True


# ---------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------


def _text(ranks: Ranks) -> str:
  return ", ".join(f"{path} {rank}" for path, rank in ranks.items())


def _union(proposals: list[Proposal]) -> Ranks:
  """The largest rank of any proposal, layer by layer."""
  paths = proposals[0].ranks
  return {p: max(other.ranks[p] for other in proposals) for p in paths}


def _rank_tree(t: Training, ranks: Ranks) -> dict:
  return trees.unflatten_ranks(
    {
      path: jnp.full(t.layers[path].lead, rank, jnp.int32)
      for path, rank in ranks.items()
    }
  )


def _candidate(
  t: Training,
  state: TrainState,
  score: Score,
  proposal: Proposal,
  shape: Ranks,
  ledger: Ledger,
) -> Candidate:
  """Starts a profile, in the shapes of another one that holds it."""
  _, tx = t.optimizer(ledger.discover_steps)
  tree = _rank_tree(t, proposal.ranks)
  wide = lowrank.truncate(score.params, jax.device_get(_rank_tree(t, shape)))
  params = lowrank.mask(wide, tree)
  made = state.replace(
    params=params,
    ranks=tree,
    opt_state=optim.restart(tx, params, state.step),
  )
  # Steps donate their state: what candidates share is copied.
  made = begin_average(jax.tree.map(jnp.copy, made))
  made = t.placement.put(made, params)
  own = dataclasses.replace(
    ledger, macs=0, examples=0, sums={}, train_seconds=0.0
  )
  return Candidate(proposal, made, own)


def _cut_together(
  t: Training, candidates: list[Candidate], ledger: Ledger
) -> None:
  """Cuts those that are left to the ranks that they need together."""
  _, tx = t.optimizer(ledger.discover_steps)
  union = _union([c.proposal for c in candidates])
  shape = jax.device_get(_rank_tree(t, union))
  for c in candidates:
    state = cut_to(tx, c.state, shape)
    c.state = t.placement.put(state, state.params)


def _won(t: Training, winner: Candidate, track: _Track) -> TrainState:
  """Returns the winner's state, cut to its ranks; the run counts its steps."""
  ledger = track.ledger
  own = winner.ledger
  every = sum(c.ledger.macs for c in track.everyone)
  ledger.race["macs"] = every - own.macs
  ledger.macs += own.macs + ledger.race["macs"] + ledger.race["score_macs"]
  ledger.examples += own.examples
  ledger.train_seconds += own.train_seconds
  ledger.sums = own.sums
  _, tx = t.optimizer(ledger.discover_steps)
  state = cut_to(tx, winner.state, jax.device_get(winner.state.ranks))
  ledger.ranks = plain_ranks(state.ranks)
  return t.placement.put(state, state.params)


# ---------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------


def _macs(t: Training, ranks: Ranks) -> int:
  """MACs of a forward pass with factors at these ranks, none merged."""
  return t.dense.macs + sum(
    layer_macs(t.layers[path], rank) - layer_macs(t.layers[path], None)
    for path, rank in ranks.items()
  )


def _whole(t: Training, ranks: Ranks) -> int:
  """MACs of a run that settles at these ranks, an example a step."""
  settle = t.clock.total - t.clock.discover
  macs = t.clock.discover * t.dense.macs + settle * _macs(t, ranks)
  return t.macs_per_example * macs


def _steps(
  t: Training, options: Options, proposals: list[Proposal], shape: Ranks
) -> int:
  """Steps of the first heat, such that the race costs its share of the run.

  Of the field, all train n steps, half of them 2 n more, half of these 4 n; the
  winner's 7 n are no loss. That later heats have smaller shapes is not counted
  on.
  """
  field = len(proposals) + options.neighbours
  half = -(-field // 2)
  lost = field + 2 * half + 4 * -(-half // 2) - 7
  share = options.share * _whole(t, proposals[0].ranks)
  n = share / (max(lost, 1) * t.macs_per_example * _macs(t, shape))
  return max(1, min(int(n), (t.clock.total - t.clock.discover) // 14))


def _examples(
  t: Training, tables: Tables, options: Options, macs: int, most: int
) -> int:
  """Examples, at `macs` each, that a fifth of the race's share allows."""
  whole = _whole(t, tables.smallest)
  allowed = 0.2 * options.share * whole * t.clock.batch_size
  return max(min(int(allowed / macs), most), min(_LEAST, most))


def _measured(
  t: Training, tables: Tables, options: Options, score: Score, judge: Callable
) -> tuple[dict[str, np.ndarray] | None, int]:
  """Losses of single layers' prefixes, and the MACs that they took.

  On as many examples as a fifth of the race's share allows; None on too few.
  """
  passes = sum(min(_GRID, len(c) - 1) for c in tables.candidates.values()) + 1
  n = _examples(t, tables, options, passes * t.dense.macs, options.judged)
  if not options.measured or n <= _LEAST:
    return None, 0

  @jax.jit
  def merge(params, ranks):
    return lowrank.merge(lowrank.mask(params, ranks), t.layers)

  def loss(ranks: Ranks) -> float:
    merged = merge(score.params, _rank_tree(t, ranks))
    return judge({**score.rest, "params": merged}, n)

  found = loss_table(tables, tables.whole, loss, _GRID)
  return found, passes * n * t.dense.macs


def _tell(
  writer: Writer, ledger: Ledger, race: list[Candidate], steps: int
) -> None:
  """Writes down a heat: who is how good, the best first."""
  ledger.race["heats"].append(
    {
      "steps": steps,
      "candidates": [
        {
          "name": c.proposal.name,
          "ranks": c.proposal.ranks,
          "loss": c.losses[-1],
        }
        for c in race
      ],
    }
  )
  best = race[0]
  writer.message(
    f"race: {len(race)} profiles, {steps} more steps each; the best is"
    f" {best.proposal.name} ({_text(best.proposal.ranks)}), training loss"
    f" {best.losses[-1]:.4f}; the last one's is {race[-1].losses[-1]:.4f}"
  )
