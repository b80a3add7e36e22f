"""Budgets, what each rank of each layer costs, and profiles of ranks."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maestro import lowrank
from maestro.cost import Cost, count_cost
from maestro.errors import UserError
from maestro.lowrank import LayerSpec, Tree

COSTS = ("params", "macs", "bytes")
LATENCY = "latency_ms"
KINDS = (*COSTS, LATENCY)
Ranks = dict[str, int]  # a profile: {layer path: rank}, one rank a layer


class BudgetError(UserError):
  """A budget cannot be read or met; says what can."""


class ProfileError(UserError):
  """A profile of ranks does not fit a network; names the layer."""


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
    kind: of `COSTS`.
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
    # 0.29 * 100 is a little less than 29.
    limit = math.floor(budget.value * self.dense * (1 + 1e-12))
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
) -> Tables:
  """Tabulates costs; equal to `count_cost(layers, extract(params, ranks))`.

  Args:
    layers: {path: LayerSpec}, from `maestro.layers`.
    params: parameters, concrete or abstract.
    ranks: tree of the current ranks; a stacked or grouped layer counts as its
      largest.
    kind: of `COSTS`.
    multiple_of: candidates are multiples of it, or whole layers.
  """
  if multiple_of < 1:
    raise BudgetError(f"--multiple_of={multiple_of} is below 1")
  flat = current(layers, params, ranks)

  def cost(level: int | None) -> dict[str, int]:
    at = {p: np.minimum(r, level or 0) for p, r in flat.items()}
    at = flat if level is None else at
    counted = count_cost(layers, params, lowrank.unflatten_ranks(at))
    return {row.path: getattr(row, kind) for row in counted.layers}

  empty, stored = cost(0), cost(None)
  merged = dense_cost(layers, params)
  dense = {row.path: getattr(row, kind) for row in merged.layers}
  costs, candidates = {}, {}
  for path, rank in flat.items():
    spec, top = layers[path], int(np.max(rank, initial=0))
    # An adapter is merged into its kernel, whatever its rank.
    adapter = spec.weight in lowrank.get(params, path)
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
    after = np.minimum.accumulate(table[::-1])[::-1]
    useful = [
      r for r in range(top) if r % multiple_of == 0 and table[r] < after[r + 1]
    ]
    costs[path], candidates[path] = table, np.array([*useful, top])
  rest = getattr(merged, kind) - sum(dense[path] for path in flat)
  return Tables(kind, costs, candidates, rest, getattr(merged, kind))


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
  full = lowrank.flatten_ranks(lowrank.full_ranks(params, layers))
  if not full:
    raise BudgetError(
      "this network has no factored layers, so there are no ranks to choose;"
      " a run of a method with factors, such as --config.method=maestro, has"
    )
  given = lowrank.flatten_ranks(ranks)
  return {path: np.asarray(given.get(path, r)) for path, r in full.items()}


def rank_tree(now: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> dict:
  """Turns {path: rank} into a tree: each element's rank is cut down to it."""
  return lowrank.unflatten_ranks(
    {
      path: np.minimum(rank, ranks[path]).astype(np.int32)
      for path, rank in now.items()
    }
  )


# ---------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------


def read_profile(path: str | pathlib.Path) -> dict:
  """Reads a profile file, {"ranks": {layer path: rank}}.

  Raises:
    ProfileError: it is missing, no JSON, or names a layer twice.
  """

  def once(pairs):
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:  # JSON readers keep the last without a word
      raise ProfileError(
        f"{path}: {twice[0]!r} is there twice; a layer has one rank, also if"
        " its weight is tied and used in two places"
      )
    return dict(pairs)

  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
    return json.loads(text, object_pairs_hook=once)
  except OSError as error:
    raise ProfileError(f"cannot read profile {path}: {error}") from error
  except json.JSONDecodeError as error:
    raise ProfileError(f"{path} is not valid JSON: {error}") from error


def parse_profile(
  profile: Any,
  layers: Mapping[str, LayerSpec],
  params: Tree,
  ranks: Tree | None = None,
) -> dict:
  """Turns {"ranks": {path: rank}} into a rank tree; checks every entry.

  Layers that the profile does not name keep their current ranks. The rank of a
  stacked or grouped layer is one number for all elements, or nested lists.

  Args:
    profile: as read from JSON.
    layers: {path: LayerSpec}, from `maestro.layers`.
    params: parameters that the profile is for.
    ranks: their current ranks; None takes all that is stored.

  Raises:
    ProfileError: no profile, an unknown layer, a dense layer, a bad rank.
  """
  entries = profile.get("ranks") if isinstance(profile, Mapping) else None
  if not isinstance(entries, Mapping):
    raise ProfileError(
      'a profile is {"ranks": {layer path: rank}}; there is no such "ranks"'
    )
  now = current(layers, params, {} if ranks is None else ranks)
  flat = dict(now)
  for path, entry in entries.items():
    if path not in layers:
      raise ProfileError(
        f"profile: there is no layer {path!r}; the layers are {sorted(layers)}"
      )
    if path not in now:
      raise ProfileError(
        f"profile: layer {path!r} is dense (merged, or never decomposed) and"
        " cannot be truncated; leave it out, or use a checkpoint in which it"
        " has factors"
      )
    try:
      rank = np.asarray(entry)
    except ValueError:  # a ragged list
      rank = np.asarray(None)
    if rank.dtype.kind not in "iu" or rank.shape not in ((), now[path].shape):
      raise ProfileError(
        f"profile: layer {path!r}: {entry!r} is no rank of shape"
        f" {now[path].shape}"
      )
    if np.any(rank < 0) or np.any(rank > now[path].max(initial=0)):
      raise ProfileError(
        f"profile: layer {path!r}: rank {entry} is outside"
        f" [0, {now[path].max(initial=0)}], the ranks of this checkpoint"
      )
    flat[path] = np.minimum(now[path], rank)
  return lowrank.unflatten_ranks(
    {path: np.asarray(rank, np.int32)[()] for path, rank in flat.items()}
  )
