"""A race between profiles for a budget: what it needs beside training.

  warm     some steps of the dense network (discover)
  score    both-sided moments on training images; the fisher order
  propose  profiles within the budget, by several scores: `proposals`
  race     all train for n steps on the same batches, each a prefix of the same
           factors; neighbours of the best join; the best half trains for 2 n
           more, the best half of these for 4 n; the best one goes on
  settle   the rest of the run, at its ranks

`maestro.training.race` trains. Judged by the loss on training images, after
each heat, so that neither validation nor test images choose ranks.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from maestro import lowrank, schema
from maestro.cost.budget import (
  KINDS,
  LATENCY,
  WHERE,
  Budget,
  BudgetError,
  Tables,
  cost_tables,
  parse_budget,
)
from maestro.cost.layer_latency import Measure
from maestro.lowrank import Rule
from maestro.methods import fisher
from maestro.methods.table import Method
from maestro.schema import ConfigError
from maestro.trees import Layers, Tree


@dataclasses.dataclass(frozen=True)
class Options:
  """How long profiles race.

  Attributes:
    share: of the run's MACs that the losers' steps may cost. Moments, measured
      losses and judging may each cost a fifth of that more.
    examples: training examples, at most, from which moments are taken.
    judged: training examples, at most, on which candidates are judged.
    neighbours: of the best candidate, that join after the first heat.
    measured: whether losses of single layers' prefixes are measured for one
      more proposal.
    regrow: whether neighbours may have larger ranks than any proposal: those
      that a short race has shown to be worth more.
    latency_batch_size: examples of a forward pass, for a budget of latency_ms.
    latency_repeats: passes of which the median is taken.
  """

  share: schema.Ratio = 0.1
  examples: schema.Count = 512
  judged: schema.Count = 2048
  neighbours: schema.Natural = 2
  measured: bool = True
  regrow: bool = False
  latency_batch_size: schema.Count = 1
  latency_repeats: schema.Count = 30


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
  """A network whose components are in fisher order.

  Attributes:
    params: with factors at full rank; the function is the dense one.
    rest: the other variables, such as batch_stats.
    tails: {order: parts lost}, as of `fisher.lost_energy`.
  """

  params: Tree
  rest: Mapping[str, Tree]
  tails: Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Race:
  """The race of a method in a run.

  Attributes:
    options: see `Options`.
    budget: of the final network.
    tables: measure -> what ranks cost; the least is 1. Only for latency_ms is
      anything measured, as `latency_tables` does.
    limits: {path: largest rank} of the layers that are factored.
    layers: of the model.
    see: (params, batch_stats) -> what the layers see, with moments `both`.
  """

  options: Options
  budget: Budget
  tables: Callable[[Measure], Tables]
  limits: Mapping[str, int]
  layers: Layers
  see: Callable[[Tree, Tree], Any]

  def score(self, params: Tree, batch_stats: Tree, examples: int) -> Score:
    """Orders a dense network's components, and says what prefixes lose."""
    moments = self.see(params, batch_stats).both(examples)
    rules = rules_of(self.limits)
    return Score(
      fisher.decompose(params, rules, self.layers, moments),
      {"batch_stats": batch_stats} if batch_stats else {},
      fisher.lost_energy(params, self.layers, moments),
    )


def rules_of(limits: Mapping[str, int]) -> list[Rule]:
  """Rules that select these layers, at these ranks."""
  return [Rule(re.escape(path), rank) for path, rank in limits.items()]


def options_of(section: Mapping) -> Options:
  return Options(**schema.bind(Options, section, "config.method.race"))


def parse(text: str | None) -> Budget:
  """Reads the budget that profiles race for.

  Raises:
    ConfigError: it is missing, or no budget.
  """
  if text is None:
    raise ConfigError(
      f'{WHERE}: missing, as in "macs:0.5": it is what profiles race for'
    )
  return parse_budget(text, KINDS)


def check(m: Method) -> None:
  """Refuses a race without a budget, or at another time.

  Raises:
    ConfigError: names the key.
  """
  options_of(m.race or {})
  parse(m.budget)
  if m.decompose != "settle":
    raise ConfigError(
      f"config.method.decompose: {m.decompose!r}, but profiles race at the"
      ' start of settle; set it to "settle"'
    )


def tables_of(
  layers: Layers, shapes: Tree, limits: Mapping[str, int], kind: str
) -> Tables:
  """Tabulates what ranks of at least 1 cost.

  Args:
    layers: of the model.
    shapes: its dense parameters, abstract.
    limits: {path: largest rank} of the layers that are factored.
    kind: of cost.
  """
  params = jax.eval_shape(
    lambda params: lowrank.decompose(params, rules_of(limits), layers), shapes
  )
  return cost_tables(layers, params, {}, kind, least=1)


def limit_of(tables: Tables, budget: Budget, where: str = WHERE) -> int:
  """The most that a network may cost, at most what it costs as a whole.

  Raises:
    ConfigError: it is below what rank 1 in every layer costs. Whether latency
      is, measuring whole networks will tell.
  """
  whole = tables.total(tables.whole)  # below dense, if rules bound the ranks
  if budget.limit(tables.dense) >= whole:
    return whole
  if budget.kind == LATENCY:
    return max(budget.limit(tables.dense), tables.total(tables.smallest))
  try:
    return tables.limit(budget)
  except BudgetError as error:
    raise ConfigError(f"{where}: {error}") from error
