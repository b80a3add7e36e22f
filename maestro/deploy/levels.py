"""Sizes of a nested run: its trained levels, and ranks between two of them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maestro import data as data_lib
from maestro import lowrank, trees
from maestro.cost.budget import COSTS, Budget, BudgetError, Ranks, cost_tables
from maestro.training import chain
from maestro.training import levels as levels_lib
from maestro.training.judge import make_judge
from maestro.training.opened import Run


def trained(run: Run) -> list[tuple[Budget, Any, Any]]:
  """Returns (budget, rank tree, batch_stats) of each level, largest first.

  [] for a run of one size, or one that has not begun to settle.
  """
  found = zip(chain.names_of(run), levels_lib.split(run.levels), strict=True)
  return [(Budget.parse(name), *level) for name, level in found]


def choose(
  run: Run,
  budgets: Sequence[Budget],
  log: Callable[[str], None] | None = None,
) -> list[tuple[Any, Any]]:
  """Returns (rank tree, batch_stats) for budgets on a nested run's chain.

  A level that was trained comes with its own statistics; ranks between two of
  them with None: those statistics are to be computed. Profiles off the chain
  lose tens of points, so there are no other rules.

  Raises:
    BudgetError: a budget is of another kind, or below the smallest level.
  """
  levels = trained(run)
  chosen = []
  for budget in budgets:
    if budget.kind not in COSTS:
      raise BudgetError(
        f"budget {budget}: a nested network serves {', '.join(COSTS)}; choose a"
        " level by one of them"
      )
    own = [(tree, stats) for b, tree, stats in levels if b == budget]
    if own:
      chosen += own
      continue
    ranks, tree = _between(run, budget)
    if log:
      text = ", ".join(f"{path} {rank}" for path, rank in ranks.items())
      log(f"{budget}: no trained level, but ranks between two ({text})")
    chosen.append((tree, None))
  return chosen


def _between(run: Run, budget: Budget) -> tuple[Ranks, Any]:
  """The largest point within a budget on the way from a level to the next.

  r_i(t) = floor(low_i + t (high_i - low_i)),  0 <= t < 1
  """
  tables = cost_tables(run.layers, run.params, run.ranks, budget.kind)
  limit = budget.limit(tables.dense)
  profiles = [_profile(tree) for _, tree, _ in trained(run)][::-1]
  # Of another kind of cost, a larger level may cost less.
  fitting = [i for i, r in enumerate(profiles) if tables.total(r) <= limit]
  if not fitting:
    least = tables.total(profiles[0]) / tables.dense
    raise BudgetError(
      f"budget {budget} is below the smallest level of this nested network,"
      f" {budget.kind}:{np.ceil(1e4 * least) / 1e4:.4f}; train one with a"
      " smaller level (config.method.nested.levels)"
    )
  low, *above = profiles[fitting[-1] :]
  high = above[0] if above else low

  def at(t: float) -> Ranks:
    return {p: int(low[p] + t * (high[p] - low[p]) + 1e-9) for p in low}

  # Costs need not rise with ranks, where merging is cheaper: all are tried.
  steps = {
    (r - low[p]) / (high[p] - low[p])
    for p in low
    for r in range(low[p] + 1, high[p] + 1)
  }
  best = max(
    (t for t in {0.0, *steps} if tables.total(at(t)) <= limit), default=0.0
  )
  ranks = at(best)
  flat = {
    path: np.full(run.layers[path].lead, rank, np.int32)
    for path, rank in ranks.items()
  }
  return ranks, trees.unflatten_ranks(flat)


def _profile(tree: Any) -> Ranks:
  flat = trees.flatten_ranks(tree)
  return {path: int(np.max(rank, initial=0)) for path, rank in flat.items()}


def off_chain(run: Run, tree: Any) -> bool:
  """Whether ranks are none of a nested run's levels, nor between two."""
  profile = _profile(tree)
  profiles = [_profile(t) for _, t, _ in trained(run)]
  for high, low in itertools.pairwise(profiles):
    if all(low[p] <= r <= high[p] for p, r in profile.items() if p in low):
      return False
  return bool(profiles)


_EXAMPLES = 512  # training images on which losses are compared


def warning(run: Run, tree: Any, dataset: data_lib.Dataset | None) -> str:
  """Says what ranks off the chain lose, beside the smallest level.

  Args:
    run: a nested one.
    tree: ranks off its chain.
    dataset: of the run; without it nothing is measured.
  """
  text = "these ranks are on no level of this nested network, nor between two"
  if dataset is None:
    return f"{text}: expect to lose tens of points of accuracy"
  judge = make_judge(
    run.model,
    loss=run.config.loss,
    preprocess=dataset.preprocess,
    split=dataset.train,
    examples=_EXAMPLES,
    seed=run.config.seed,
  )
  name, level, _ = trained(run)[-1]
  losses = []
  for ranks in (tree, level):
    variables = {"params": lowrank.extract(run.params, ranks, run.layers)}
    if run.batch_stats:
      variables["batch_stats"] = run.batch_stats
    losses.append(judge(variables))
  return (
    f"{text}: the loss on {min(_EXAMPLES, len(dataset.train))} training"
    f" examples is {losses[0]:.4f}, that of {name} {losses[1]:.4f}"
  )
