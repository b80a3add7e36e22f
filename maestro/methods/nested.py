"""Any size from one network: joint training along a chain of nested profiles.

  warm     some steps of the dense network (discover); half of all with batch
           norm
  order    all layers in fisher order, at full rank: the function is as it was
  chain    for budgets b_1 < ... < b_L, a profile each, from the bottom up: the
           knapsack on the parts lost in series, with ranks of at least those of
           the level below
  train    each step *one* level for all layers, drawn by weights; what lies
           beyond its ranks is neither computed nor, by that step, changed
  deploy   the chain's own profiles

One-layer ordered dropout never sees the joint cuts that deployment makes; the
chain sees no others. `maestro.training.levels` trains.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maestro import schema
from maestro.cost.allocation import knapsack
from maestro.cost.budget import COSTS, WHERE, Budget, Ranks, Tables
from maestro.methods import fisher, race
from maestro.methods.proposals import Tails, series
from maestro.methods.table import Method
from maestro.schema import ConfigError
from maestro.trees import Layers, Tree


@dataclasses.dataclass(frozen=True)
class Options:
  """The chain of a nested network.

  Attributes:
    levels: fractions of the dense network's cost, descending.
    kind: of cost: "macs", "params" or "bytes".
    weights: of the levels, in the same order; None is 1, but 1.5 and 3 for the
      two smallest.
    examples: training examples from which moments are taken.
  """

  levels: Sequence[schema.Ratio] = (1.0, 0.8, 0.6, 0.5, 0.4, 0.25)
  kind: str = "macs"
  weights: Sequence[schema.Positive] | None = None
  examples: schema.Count = 512

  def __post_init__(self):
    where = "config.method.nested"
    if len(self.levels) < 2:
      raise ConfigError(
        f"{where}.levels: {tuple(self.levels)} is no chain; give two or more"
      )
    pairs = zip(self.levels, self.levels[1:], strict=False)
    if any(a <= b for a, b in pairs):
      raise ConfigError(f"{where}.levels: {tuple(self.levels)} do not descend")
    schema.check_name(self.kind, COSTS, f"{where}.kind")
    if self.weights is not None and len(self.weights) != len(self.levels):
      raise ConfigError(
        f"{where}.weights: {len(self.weights)} of them for"
        f" {len(self.levels)} levels"
      )

  @property
  def names(self) -> tuple[str, ...]:
    """Of the levels, the largest first."""
    return tuple(f"{self.kind}:{level:g}" for level in self.levels)

  @property
  def shares(self) -> tuple[float, ...]:
    """The chance of each level, the largest first."""
    given = self.weights
    if given is None:
      given = [1.0] * (len(self.levels) - 2) + [1.5, 3.0]
    return tuple(weight / sum(given) for weight in given)


@dataclasses.dataclass(frozen=True, eq=False)
class Nested:
  """The chain of a method in a run.

  Attributes:
    options: see `Options`.
    tables: what ranks cost; the least is 1.
    limits: {path: largest rank} of the layers that are factored.
    layers: of the model.
    see: (params, batch_stats) -> what the layers see, with moments `both`.
  """

  options: Options
  tables: Tables
  limits: Mapping[str, int]
  layers: Layers
  see: Callable[[Tree, Tree], Any]

  def start(self, params: Tree, batch_stats: Tree) -> tuple[Tree, list[Ranks]]:
    """Returns factors in fisher order, and a profile a level, largest first."""
    moments = self.see(params, batch_stats).both(self.options.examples)
    factors = fisher.decompose(
      params, race.rules_of(self.limits), self.layers, moments
    )
    tails = fisher.lost_energy(params, self.layers, moments)["fisher"]
    return factors, chain(self.tables, limits_of(self), tails)


def limits_of(nested: Nested) -> list[int]:
  """What the levels may cost, the largest first.

  Raises:
    ConfigError: one is below what rank 1 in every layer costs.
  """
  names = nested.options.names
  where = "config.method.nested.levels"
  return [
    race.limit_of(nested.tables, Budget.parse(name), where) for name in names
  ]


def chain(tables: Tables, limits: Sequence[int], tails: Tails) -> list[Ranks]:
  """Returns nested profiles within limits, from the bottom up.

  From the top down, a level can corner those below it: ranks that a large
  budget barely needs are missing where each counts.

  Args:
    tables: costs; the least candidates are the least ranks.
    limits: descending.
    tails: {path: part lost at rank 0 .. R}.

  Returns:
    A profile a limit, each within the one before it.
  """
  score, floor = series(tails), tables.smallest
  profiles = []
  for limit in reversed(limits):
    floor = knapsack(tables, score, tables.whole, limit, floor=floor)
    profiles.append(floor)
  return profiles[::-1]


def options_of(section: Mapping) -> Options:
  return Options(**schema.bind(Options, section, "config.method.nested"))


def check(m: Method) -> None:
  """Refuses a chain at another time, or with what has no meaning along it.

  Raises:
    ConfigError: names the key.
  """
  options_of(m.nested or {})
  if m.decompose != "settle":
    raise ConfigError(
      f"config.method.decompose: {m.decompose!r}, but a chain begins at the"
      ' start of settle; set it to "settle"'
    )
  for name in ("race", "budget", "sampler", "shrink"):
    if getattr(m, name) is not None:
      where = WHERE if name == "budget" else f"config.method.{name}"
      raise ConfigError(
        f"{where}: a nested network has the ranks of its levels"
        " (config.method.nested); remove it"
      )
  if m.proximal or m.trainable != "all":
    raise ConfigError(
      "config.method.nested: cannot be combined with proximal steps or frozen"
      " parameters"
    )
