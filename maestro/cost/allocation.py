"""Rules that choose ranks for a budget: pure functions of tables and losses.

A rule never exceeds the budget. `uniform`, `threshold` and `energy` read the
factors alone; `greedy` and `dp` read losses. Profiles are {layer path: rank}.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from maestro import lowrank, trees
from maestro.cost.budget import Ranks, Tables

_CELLS = 4000  # of dp's discretised cost
Loss = Callable[[Ranks], float]


# ---------------------------------------------------------------------------
# One number for all layers
# ---------------------------------------------------------------------------


def uniform_levels(tables: Tables) -> dict[str, np.ndarray]:
  """Levels of `uniform`: the same fraction of each layer's rank.

  level_i[b] = (b + 1) / R_i
  """
  return {
    path: np.arange(1, rank + 1) / max(rank, 1)
    for path, rank in tables.whole.items()
  }


def threshold_levels(
  tables: Tables, params: trees.Tree, ranks: trees.Tree
) -> dict[str, np.ndarray]:
  """Levels of `threshold`: components at or above one importance are kept.

  level_i[b] = -importance_i[b], a norm over the elements of a stacked layer.
  """
  scores = lowrank.importance(params, ranks)
  levels = {}
  for path, rank in tables.whole.items():
    score = np.asarray(scores[path], np.float64)
    score = score.reshape((-1, score.shape[-1]))[:, :rank]
    levels[path] = -np.linalg.norm(score, axis=0)
  return levels


def energy_levels(
  tables: Tables, params: trees.Tree, ranks: trees.Tree
) -> dict[str, np.ndarray]:
  """Levels of `energy`: each layer keeps the same fraction of its energy.

    e_i[b] = (||u[:, b]|| ||v[b, :]||)^2,
    level_i[b] = sum_{c < b} e_i[c] / sum_c e_i[c]

  so that the rank at a fraction f is the smallest prefix that holds f. Right
  after an SVD, e is the squared singular value.
  """
  masked = trees.factored(lowrank.mask(params, ranks))
  flat = trees.flatten_ranks(ranks)
  levels = {}
  for path, rank in tables.whole.items():
    n = np.ndim(flat[path])
    u = np.asarray(masked[path]["u"], np.float64)
    v = np.asarray(masked[path]["v"], np.float64)
    maps = math.prod(u.shape[:n])
    u = u.reshape((maps, -1, u.shape[-1]))
    v = v.reshape((maps, u.shape[-1], -1))
    e = np.sum(np.sum(u**2, axis=1) * np.sum(v**2, axis=2), axis=0)[:rank]
    before = np.concatenate([[0.0], np.cumsum(e)[:-1]]) if rank else e
    levels[path] = before / max(e.sum(), np.finfo(float).tiny)
  return levels


def by_level(
  tables: Tables, levels: Mapping[str, np.ndarray], limit: int
) -> Ranks:
  """Keeps the components of level <= t, for the largest t that fits the limit.

  First components join before all others: a layer of rank 0 cuts the network
  off. Ranks are snapped to the largest candidate that costs no more, so t is
  not wasted on a rank between break-even and the whole layer.

  Args:
    tables: costs.
    levels: {path: [R]}, non-decreasing; the order in which components join.
    limit: the most that the network may cost.
  """
  every = np.concatenate(list(levels.values()))
  span = np.ptp(every) + 1 if every.size else 0.0
  order = {p: np.append(x[:1] - span, x[1:]) for p, x in levels.items()}

  def at(t: float) -> Ranks:
    return {
      path: tables.snap(path, int(np.searchsorted(level, t, side="right")))
      for path, level in order.items()
    }

  steps = np.unique(np.concatenate([*order.values(), [-np.inf]]))
  low, high = 0, len(steps) - 1  # the least always fits
  while low < high:
    middle = (low + high + 1) // 2
    if tables.total(at(steps[middle])) <= limit:
      low = middle
    else:
      high = middle - 1
  return at(steps[low])


# ---------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------


def grid_ranks(candidates: np.ndarray, costs: np.ndarray, size: int) -> list:
  """Chooses at most `size` ranks to measure, geometric in what they cost.

  The largest candidate, which costs no loss, is not among them; the smallest
  is. All others, if there are no more than `size`.
  """
  below = candidates[:-1]
  if below.size <= size:
    return below.tolist()
  cost = costs[below].astype(float)
  least = max(cost[1], 1e-9)
  wanted = np.geomspace(least, cost[-1] * 0.9, size - 1) if size > 1 else []
  chosen = {int(below[np.abs(cost - w).argmin()]) for w in wanted}
  return sorted(chosen | {int(below[0])})


def loss_table(
  tables: Tables, base: Ranks, loss: Loss, grid: int
) -> dict[str, np.ndarray]:
  """Measures what cutting one layer alone costs: {path: [rank + 1]}.

    increase_i[r] = loss(layer i at r, the others at base) - loss(base)

  for `grid` ranks of each layer, linear in between, and non-increasing in r:
  what noise says against that is averaged away from above.

  Args:
    tables: costs.
    base: ranks to start from; ranks above are not tabulated.
    loss: of a profile.
    grid: most ranks of a layer to measure.
  """
  start = loss(base)
  increases = {}
  for path, top in base.items():
    ranks = tables.candidates[path]
    ranks = ranks[ranks <= top]
    at = grid_ranks(ranks, tables.costs[path], grid)
    found = [loss(base | {path: r}) - start for r in at]
    # From the top down, each at least what a larger rank cost.
    found = np.maximum.accumulate([0.0, *found[::-1]])[::-1]
    increases[path] = np.interp(np.arange(top + 1), [*at, top], found)
  return increases


def greedy(
  tables: Tables,
  limits: Sequence[int],
  loss: Loss,
  *,
  grid: int,
  refresh: int,
  screen: Loss | None = None,
) -> list[Ranks]:
  """Removes slice after slice, each the least harmful for what it saves.

    argmin over slices of  (loss(without the slice) - loss) / cost saved

  A slice is the end of one layer's ranks, an eighth of them or more; what it
  saves beyond the limit does not count. Scores come from a table of single
  layers, measured once. They go stale as other layers are cut, so the best
  slices of the three best layers are measured again, in as many rounds as
  `refresh` evaluations allow, spread evenly over the way; those of all layers
  in every round, if they allow that. A layer's later scores from the table are
  scaled by the ratio of its last measurement to the table's.

  Args:
    tables: costs.
    limits: of each profile; any order.
    loss: of a profile.
    grid: most ranks of a layer to measure for the table.
    refresh: most evaluations after it.
    screen: a cheaper loss for the table; None is `loss`.

  Returns:
    A profile for each limit, each nested in those of larger limits.

  Source: the paper's deployment without retraining; the caching is ours.
  """
  ranks = tables.whole
  increases = loss_table(tables, ranks, screen or loss, grid)
  ratio = dict.fromkeys(ranks, 1.0)
  start = total = tables.total(ranks)
  way, spent = max(start - min(limits), 1), 0
  # A layer is cut some sixteen times on the way.
  every = refresh >= 16 * len(ranks) ** 2
  width = len(ranks) if every else min(3, len(ranks))
  now = loss(ranks)
  results: dict[int, Ranks] = {}
  for limit in sorted(set(limits), reverse=True):
    while total > limit:
      over, moves = total - limit, {}
      for path, rank in ranks.items():
        move = best_slice(tables, path, rank, increases[path], over)
        if move is not None:
          moves[path] = move

      def score(path, increase, moves=moves, over=over):
        return increase / min(moves[path][1], over)

      order = sorted(moves, key=lambda p: score(p, moves[p][2] * ratio[p]))
      best, after = order[0], now + moves[order[0]][2] * ratio[order[0]]
      due = every or spent <= refresh * (start - total) / way
      if due and spent + width <= refresh:
        measured = {}
        for path in order[:width]:
          to, _, table = moves[path]
          measured[path] = loss(ranks | {path: to})
          if table > 1e-6:
            change = (measured[path] - now) / table
            ratio[path] = float(np.clip(change, 0.1, 10.0))
        spent += len(measured)
        best = min(measured, key=lambda p: score(p, measured[p] - now))
        after = measured[best]
      ranks, now = ranks | {best: moves[best][0]}, after
      total -= moves[best][1]
    results[limit] = ranks
  return [results[limit] for limit in limits]


def best_slice(
  tables: Tables, path: str, rank: int, increases: np.ndarray, over: int
) -> tuple[int, int, float] | None:
  """Returns (rank left, cost saved, increase) of a layer's best slice.

    argmin over r of  (increases[r] - increases[rank]) / min(saved, over)

  Looking at all sizes matters: the first factors below a whole, merged layer
  have given up many ranks and save next to nothing.
  """
  costs, below = tables.costs[path], tables.candidates[path]
  below = below[below < rank]
  if not below.size:
    return None
  saved = costs[rank] - costs[below]
  wanted = max(rank - max(rank // 8, 1), int(below[0]))
  allowed = (below <= wanted) | (saved >= over)
  below, saved = below[allowed], saved[allowed]
  increase = increases[below] - increases[rank]
  counted = np.minimum(saved, over)
  i = np.lexsort((-counted, increase / counted))[0]
  return int(below[i]), int(saved[i]), float(increase[i])


def dp(
  tables: Tables,
  limits: Sequence[int],
  loss: Loss,
  *,
  grid: int,
  again: bool = True,
) -> list[Ranks]:
  """Minimises the sum of single layers' losses by dynamic programming.

    min over r of  sum_i increase_i[r_i]  with  fixed + sum_i cost_i[r_i] <= C

  The largest limit comes first, and no rank of a profile is above the one
  before, so that profiles are nested.

  Args:
    tables: costs.
    limits: of each profile; any order.
    loss: of a profile.
    grid: most ranks of a layer to measure.
    again: measure the increases anew from each profile for the next one, so
      that sums are taken over shorter steps; else once, from the whole network.

  Returns:
    A profile for each limit.
  """
  ranks, results = tables.whole, {}
  increases = None
  for limit in sorted(set(limits), reverse=True):
    if tables.total(ranks) > limit:
      if increases is None or again:
        increases = loss_table(tables, ranks, loss, grid)
      ranks = knapsack(tables, increases, ranks, limit)
    results[limit] = ranks
  return [results[limit] for limit in limits]


def knapsack(
  tables: Tables,
  increases: Mapping[str, np.ndarray],
  top: Ranks,
  limit: int,
  cells: int = _CELLS,
  floor: Ranks | None = None,
) -> Ranks:
  """Solves the multiple-choice knapsack of `dp` for ranks of at most `top`.

  Costs are rounded up to at most `cells` units, so the limit holds; `fill`
  spends what the rounding leaves. Ranks are at least `floor`, which must be
  candidates and within the limit.
  """
  paths = list(top)
  low = {p: 0 if floor is None else floor[p] for p in paths}
  choices = {
    p: [int(r) for r in tables.candidates[p] if low[p] <= r <= top[p]]
    for p in paths
  }
  # Above its least cost, each layer is charged what a rank adds.
  free = {p: int(tables.costs[p][choices[p][0]]) for p in paths}
  room = limit - tables.fixed - sum(free.values())
  extra = {
    p: [int(tables.costs[p][r]) - free[p] for r in choices[p]] for p in paths
  }
  unit = math.gcd(*(x for xs in extra.values() for x in xs)) or 1
  unit *= max(1, -(-(room // unit) // cells))
  size = room // unit
  best, picks = np.zeros(size + 1), []
  for path in paths:
    value, pick = np.full(size + 1, np.inf), np.zeros(size + 1, int)
    for i, (rank, x) in enumerate(zip(choices[path], extra[path], strict=True)):
      x = -(-x // unit)
      if x > size:
        continue
      found = best[: size + 1 - x] + increases[path][rank]
      better = found < value[x:]
      value[x:] = np.where(better, found, value[x:])
      pick[x:] = np.where(better, i, pick[x:])
    best, picks = value, [*picks, pick]
  ranks, cell = {}, size
  for path, pick in zip(reversed(paths), reversed(picks), strict=True):
    i = int(pick[cell])
    ranks[path] = choices[path][i]
    cell -= -(-extra[path][i] // unit)
  return fill(tables, increases, {p: ranks[p] for p in paths}, top, limit)


def fill(
  tables: Tables,
  increases: Mapping[str, np.ndarray],
  ranks: Ranks,
  top: Ranks,
  limit: int,
) -> Ranks:
  """Spends what is left of a limit where it lowers the loss most per cost."""
  ranks, left = dict(ranks), limit - tables.total(ranks)
  while True:
    options: list[tuple[float, str, int, Any]] = []
    for path, rank in ranks.items():
      costs, c = tables.costs[path], tables.candidates[path]
      c = c[(c > rank) & (c <= top[path])]
      c = c[costs[c] - costs[rank] <= left]
      if c.size:
        price = (costs[c] - costs[rank]).astype(float)
        gain = (increases[path][rank] - increases[path][c]) / price
        i = int(gain.argmax())
        options.append((float(gain[i]), path, int(c[i]), int(price[i])))
    if not options:
      return ranks
    _, path, rank, price = max(options)
    ranks[path], left = rank, left - price
