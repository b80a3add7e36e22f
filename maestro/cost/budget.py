"""Budgets, what each rank of each layer costs, and ranks that fit."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from maestro import lowrank, trees
from maestro.cost.count import Cost, count_cost, layer_macs
from maestro.errors import UserError
from maestro.schema import ConfigError
from maestro.trees import LayerSpec, Tree

COSTS = ("params", "macs", "bytes")
LATENCY = "latency_ms"
KINDS = (*COSTS, LATENCY)
NANOSECONDS = 10**6  # of a millisecond, the unit of tables of latency
Ranks = dict[str, int]  # a profile: {layer path: rank}, one rank a layer


class BudgetError(UserError):
  """A budget cannot be read or met; says what can."""


# ---------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Budget:
  """An upper bound on what a network may cost; written `kind:value`.

  Attributes:
    kind: "params", "macs" or "bytes", as `count_cost` counts them, or
      "latency_ms", the time of a forward pass on this device.
    value: a fraction in (0, 1] of the dense network's cost, or milliseconds.
  """

  kind: str
  value: float

  def __post_init__(self):
    if self.kind not in KINDS:
      raise BudgetError(
        f"budget {self}: unknown kind {self.kind!r}; use one of"
        f" {', '.join(KINDS)}, as in macs:0.5"
      )
    if self.kind == LATENCY:
      if not 0 < self.value < math.inf:
        raise BudgetError(f"budget {self}: milliseconds must be above 0")
    elif not 0 < self.value <= 1:
      raise BudgetError(
        f"budget {self}: must be in (0, 1], a fraction of the dense network"
      )

  @classmethod
  def parse(cls, text: str) -> "Budget":
    """Reads "macs:0.5", "latency_ms:4", ..."""
    kind, colon, value = text.strip().partition(":")
    try:
      number = float(value)
    except ValueError:
      number = None
    if not colon or number is None:
      raise BudgetError(
        f"budget {text!r}: write it as kind:value, e.g. macs:0.5; the kinds are"
        f" {', '.join(KINDS)}"
      )
    return cls(kind, number)

  def limit(self, dense: int) -> int:
    """The most that a network may cost, of a dense one that costs `dense`.

    floor(value * dense),  value as written: 0.29 of 100 is 29, not 28.999...

    In nanoseconds for latency_ms, whatever the dense one takes.
    """
    of = NANOSECONDS if self.kind == LATENCY else dense
    return math.floor(trees.as_written(self.value) * of)

  def __str__(self) -> str:
    return f"{self.kind}:{self.value:g}"


# ---------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
  """What the extracted network costs, layer by layer and rank by rank.

    cost of a network at ranks r  =  fixed + sum_i costs[i][r_i]

  Attributes:
    kind: of `KINDS`; latency_ms is in nanoseconds.
    costs: {path: int64 [R + 1]} for rank 0 .. R, the layer's current rank. A
      layer is stored in the form that `extract` gives it: factors, or the
      merged kernel where that holds no more numbers.
    candidates: {path: ascending ranks} worth choosing: no larger rank is as
      cheap. Between break-even and R nothing is saved, so R stands for them
      all: the whole layer, merged.
    fixed: cost of everything else.
    dense: cost of the whole dense network.
  """

  kind: str
  costs: Mapping[str, np.ndarray]
  candidates: Mapping[str, np.ndarray]
  fixed: int
  dense: int

  def total(self, ranks: Mapping[str, int]) -> int:
    """Cost of the network at these ranks."""
    return self.fixed + sum(int(c[ranks[p]]) for p, c in self.costs.items())

  @property
  def whole(self) -> Ranks:
    """The current ranks."""
    return {path: len(c) - 1 for path, c in self.costs.items()}

  @property
  def smallest(self) -> Ranks:
    """The cheapest ranks."""
    return {path: int(c[0]) for path, c in self.candidates.items()}

  @property
  def least_useful(self) -> float:
    """The part of the dense cost at which every layer can keep a component."""
    first = {p: min(1, len(c) - 1) for p, c in self.costs.items()}
    snapped = {p: self.snap(p, rank) for p, rank in first.items()}
    return math.ceil(1e4 * self.total(snapped) / self.dense) / 1e4

  def snap(self, path: str, rank: int) -> int:
    """The largest candidate that costs no more than a rank.

    Only rank 0 becomes 0, which would cut the layer off: below the first
    multiple, it is that one.
    """
    costs, ranks = self.costs[path], self.candidates[path]
    i = np.searchsorted(costs[ranks], costs[rank:].min(), side="right") - 1
    least = 1 if rank > 0 and ranks[0] == 0 else 0
    return int(ranks[min(max(i, least), len(ranks) - 1)])

  def limit(self, budget: Budget) -> int:
    """The budget in units of cost.

    Raises:
      BudgetError: it is below the smallest reachable cost, or above that of
        the current ranks.
    """
    limit = budget.limit(self.dense)
    low, high = self.total(self.smallest), self.total(self.whole)
    if limit < low:
      least = math.ceil(1e4 * low / self.dense) / 1e4
      raise BudgetError(
        f"budget {budget} cannot be reached: the smallest is"
        f" {self.kind}:{least:.4f} ({low:,} of {self.dense:,}), with every rank"
        " at its least"
      )
    if limit > high:
      most = math.floor(1e4 * high / self.dense) / 1e4
      raise BudgetError(
        f"budget {budget} is above what this checkpoint costs: the maximum is"
        f" {self.kind}:{most:.4f} ({high:,} of {self.dense:,}). A checkpoint of"
        " higher ranks (--checkpoint=discover, if it is not this one) allows"
        " more"
      )
    return limit


def cost_tables(
  layers: Mapping[str, LayerSpec],
  params: Tree,
  ranks: Tree,
  kind: str,
  *,
  multiple_of: int = 1,
  least: int = 0,
) -> Tables:
  """Tabulates costs; equal to `count_cost(layers, extract(params, ranks))`.

  Args:
    layers: {path: LayerSpec}, from `maestro.layers`.
    params: parameters, concrete or abstract.
    ranks: tree of the current ranks; a stacked or grouped layer counts as its
      largest.
    kind: of `COSTS`.
    multiple_of: candidates are multiples of it, or whole layers.
    least: candidates are at least this, where the layer has so many.
  """
  if multiple_of < 1:
    raise BudgetError(f"--multiple_of={multiple_of} is below 1")
  flat = current(layers, params, ranks)

  def cost(level: int | None) -> dict[str, int]:
    at = {p: np.minimum(r, level or 0) for p, r in flat.items()}
    at = flat if level is None else at
    counted = count_cost(layers, params, trees.unflatten_ranks(at))
    return {row.path: getattr(row, kind) for row in counted.layers}

  empty, stored = cost(0), cost(None)
  merged = dense_cost(layers, params)
  dense = {row.path: getattr(row, kind) for row in merged.layers}
  costs, candidates = {}, {}
  for path, rank in flat.items():
    spec, top = layers[path], int(np.max(rank, initial=0))
    # An adapter is merged into its kernel, whatever its rank.
    adapter = spec.weight in trees.get(params, path)
    # The cost of factors is linear in their rank.
    step = (stored[path] - empty[path]) // max(top, 1)
    table = np.array(
      [
        dense[path]
        if adapter or lowrank.dense_is_cheaper(spec.n_in, spec.n_out, r)
        else empty[path] + r * step
        for r in range(top + 1)
      ],
      np.int64,
    )
    costs[path] = table
    candidates[path] = useful(table, least=least, multiple_of=multiple_of)
  rest = getattr(merged, kind) - sum(dense[path] for path in flat)
  return Tables(kind, costs, candidates, rest, getattr(merged, kind))


def useful(
  costs: np.ndarray, *, least: int = 0, multiple_of: int = 1
) -> np.ndarray:
  """Returns the ranks than which no larger one is as cheap, the last included.

  Args:
    costs: of rank 0 .. R.
    least: the smallest that counts, if there are so many.
    multiple_of: of all but the last.
  """
  top = len(costs) - 1
  after = np.minimum.accumulate(costs[::-1])[::-1]
  below = [
    r
    for r in range(min(least, top), top)
    if r % multiple_of == 0 and costs[r] < after[r + 1]
  ]
  return np.array([*below, top])


def dense_cost(layers: Mapping[str, LayerSpec], params: Tree) -> Cost:
  """Counts the cost of the network with every layer merged."""
  merge = functools.partial(lowrank.merge, layers=layers)
  return count_cost(layers, jax.eval_shape(merge, params))


def current(
  layers: Mapping[str, LayerSpec], params: Tree, ranks: Tree
) -> dict[str, np.ndarray]:
  """Returns {path: rank} of every factored layer; what `ranks` lacks is full.

  Raises:
    BudgetError: no layer is factored.
  """
  full = trees.flatten_ranks(lowrank.full_ranks(params, layers))
  if not full:
    raise BudgetError(
      "this network has no factored layers, so there are no ranks to choose;"
      " a run of a method with factors, such as --config.method=maestro, has"
    )
  given = trees.flatten_ranks(ranks)
  return {path: np.asarray(given.get(path, r)) for path, r in full.items()}


def rank_tree(now: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> dict:
  """Turns {path: rank} into a tree: each element's rank is cut down to it."""
  return trees.unflatten_ranks(
    {
      path: np.minimum(rank, ranks[path]).astype(np.int32)
      for path, rank in now.items()
    }
  )


# ---------------------------------------------------------------------------
# Ranks in proportion to a profile
# ---------------------------------------------------------------------------


BUDGETS = ("macs", "params")
WHERE = "config.budget, or config.method.budget"  # in messages


def parse_budget(text: str, kinds: Sequence[str] = BUDGETS) -> Budget:
  """Reads a budget whose costs are known before training, as "macs:0.5".

  Raises:
    ConfigError: it is no budget, or of another kind.
  """
  try:
    budget = Budget.parse(text)
  except BudgetError as error:
    raise ConfigError(f"{WHERE}: {error}") from error
  if budget.kind not in kinds:
    raise ConfigError(
      f"{WHERE}: {text!r} is of another kind than {tuple(kinds)}, which are"
      " known before training"
    )
  return budget


def weight_cost(spec: LayerSpec, rank: int | None, kind: str) -> int:
  """Cost of a layer's weight in its final form; a rank of None is dense."""
  if rank is not None and lowrank.dense_is_cheaper(spec.n_in, spec.n_out, rank):
    rank = None
  if kind == "macs":
    return layer_macs(spec, rank)
  numbers = spec.n_in * spec.n_out
  if rank is not None:
    numbers = rank * (spec.n_in + spec.n_out)
  return numbers * math.prod(spec.lead)


def fit_budget(
  profile: Mapping[str, Any],
  limits: Mapping[str, Any],
  layers: Mapping[str, LayerSpec],
  budget: str,
  dense: Cost,
) -> dict[str, np.ndarray]:
  """Raises ranks in proportion to a profile, as far as a budget allows.

    r_l = clip(floor(f * profile_l), 1, limit_l), 0 where the profile is 0

  with one factor f for all layers, which grows from 0. Where the next rank of a
  layer would exceed the budget, that layer stays as it is and the others go on,
  so that at the end no layer can have one more. The cost is that of the final
  network, `lowrank.extract`, which need not rise with the rank: merged, a layer
  may cost less than at a lower rank. A rank costs what the cheapest one at or
  above it does, and becomes the largest one of that cost.

  Args:
    profile: {path: real number, or array of them [*lead]} to scale.
    limits: the largest ranks possible, likewise.
    layers: from `maestro.layers`.
    budget: "macs:0.5" or "params:0.5".
    dense: cost of the dense network.

  Raises:
    ConfigError: even rank 1 in every layer costs more.
  """
  bound = parse_budget(budget)
  kind = bound.kind
  most = bound.limit(getattr(dense, kind))
  exact = np.vectorize(Fraction, otypes=[object])
  profile = {path: exact(x) for path, x in profile.items()}
  limits = {path: np.asarray(limits[path], np.int64) for path in profile}

  def at(path: str, f: Fraction) -> np.ndarray:
    r = np.asarray(profile[path] * f // 1, np.int64)
    return np.where(profile[path] > 0, np.clip(r, 1, limits[path]), 0)

  costs, least = {}, {}
  for path, limit in limits.items():
    spec, top = layers[path], int(np.max(limit, initial=0))
    costs[path] = np.array(
      [weight_cost(spec, rank, kind) for rank in range(top + 1)]
    )
    least[path] = np.minimum.accumulate(costs[path][::-1])[::-1]

  def spent_on(path: str, ranks: np.ndarray) -> int:
    return int(least[path][np.max(ranks, initial=0)])

  ranks = {path: at(path, Fraction(0)) for path in profile}
  spent = getattr(dense, kind) + sum(
    spent_on(path, r) - weight_cost(layers[path], None, kind)
    for path, r in ranks.items()
  )
  if spent > most:
    raise ConfigError(
      f"{WHERE}: {budget!r} is below what rank 1 in every factored"
      " layer costs; raise it, or let config.rules select more layers"
    )
  rises = {
    (j / r, path)
    for path in profile
    for r, limit in np.broadcast(profile[path], limits[path])
    for j in range(2, int(limit) + 1)
    if r > 0
  }
  full = set()
  for f, path in sorted(rises):
    if path in full:
      continue
    more = at(path, f)
    extra = spent_on(path, more) - spent_on(path, ranks[path])
    if spent + extra > most:
      full.add(path)
    else:
      ranks[path], spent = more, spent + extra
  for path, r in ranks.items():
    top = int(np.max(r, initial=0))
    largest = np.flatnonzero(costs[path] <= least[path][top])[-1]
    if top and largest > top:
      ranks[path] = np.where(r > 0, np.minimum(limits[path], largest), 0)
  return ranks
