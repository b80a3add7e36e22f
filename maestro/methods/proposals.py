"""Profiles for a budget: what different scores of components would keep.

A score tells what a layer's prefix of rank r loses, tail[r] in [0, 1]; layers
are taken as independent, and a profile minimises over all that fit the budget

  sum:     sum_i tail_i[r_i]
  series:  sum_i -log(1 - tail_i[r_i])

(the product of what layers in series keep). No score is always best: that of
two profiles which of them *trains* better is found by training, see
`maestro.training.race`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from maestro.cost.allocation import by_level, knapsack, uniform_levels
from maestro.cost.budget import Ranks, Tables

_LEAST_KEPT = 1e-3  # below which the logarithm is cut
_LEAST_MOVE = 0.01  # of a limit, of what makes a neighbour

Tails = Mapping[str, np.ndarray]  # {path: part lost at rank 0 .. R}


@dataclasses.dataclass(frozen=True)
class Proposal:
  """A profile, and who proposed it.

  Attributes:
    name: such as "fisher, series".
    ranks: the profile.
  """

  name: str
  ranks: Ranks


def series(tails: Tails) -> dict[str, np.ndarray]:
  """Scores of which the sum is that of layers in series, see the heading."""
  return {
    path: -np.log(np.maximum(1 - tail, _LEAST_KEPT))
    for path, tail in tails.items()
  }


def propose(
  tables: Tables,
  limit: int,
  tails: Mapping[str, Tails],
  losses: Tails | None = None,
) -> list[Proposal]:
  """Returns different profiles within a limit, the uniform one first.

  Args:
    tables: costs; its least candidates are the least ranks.
    limit: the most that a network may cost.
    tails: {order: parts lost}, as of `fisher.lost_energy`.
    losses: {path: increase of the loss at rank 0 .. R}, measured; None if not.
  """
  found = {"uniform": by_level(tables, uniform_levels(tables), limit)}
  scores = {}
  for order, lost in tails.items():
    scores[f"{order}, sum"] = lost
    scores[f"{order}, series"] = series(lost)
  if losses is not None:
    scores["measured"] = losses
  for name, increases in scores.items():
    found[name] = knapsack(tables, increases, tables.whole, limit)
  names: dict[tuple, str] = {}
  for name, ranks in found.items():  # the first of equals keeps its name
    names.setdefault(tuple(sorted(ranks.items())), name)
  return [Proposal(name, dict(ranks)) for ranks, name in names.items()]


def one_more(tables: Tables, ranks: Ranks) -> Ranks:
  """The next larger candidates, of layers that have any."""
  found = {}
  for path, rank in ranks.items():
    c = tables.candidates[path]
    above = int(np.searchsorted(c, rank, side="right"))
    found[path] = int(c[min(above, len(c) - 1)])
  return found


def neighbours(
  tables: Tables,
  limit: int,
  score: Tails,
  ranks: Ranks,
  *,
  top: Ranks,
  most: int,
) -> list[Proposal]:
  """Returns profiles with one layer a step up or down, the rest refilled.

  Only steps that move at least 1 % of the limit, the largest of them first: a
  component of a large convolution outweighs many of a classifier.

  Args:
    tables: costs.
    limit: the most that a network may cost.
    score: of parts lost, by which the rest is refilled.
    ranks: whose neighbours.
    top: the largest ranks.
    most: how many.
  """
  moves = []
  for path, rank in ranks.items():
    c, costs = tables.candidates[path], tables.costs[path]
    at = int(np.searchsorted(c, rank))
    for name, other in (("-", at - 1), ("+", at + 1)):
      if 0 <= other < len(c) and c[other] <= top[path]:
        moved = abs(int(costs[c[other]]) - int(costs[rank]))
        moves.append((moved, path, int(c[other]), name))
  found: list[Proposal] = []
  for moved, path, rank, sign in sorted(moves, reverse=True):
    if len(found) == most or moved < _LEAST_MOVE * limit:
      break
    least = {p: int(c[0]) for p, c in tables.candidates.items()} | {path: rank}
    if tables.total(least) > limit:
      continue
    near = knapsack(tables, score, top | {path: rank}, limit, floor=least)
    if near != ranks and all(near != other.ranks for other in found):
      found.append(Proposal(f"{path} {sign}", near))
  return found
