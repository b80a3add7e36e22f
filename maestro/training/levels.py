"""The levels of a nested network: their steps, statistics, costs and scores."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro import lowrank, sampling, streams, trees
from maestro.cost.budget import Ranks
from maestro.cost.count import count_cost
from maestro.training.state import TrainState
from maestro.trees import Layers, Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
  """One level of a chain, as a step is compiled for it.

  Attributes:
    index: 0 is the largest.
    ranks: rank tree of host arrays, which become shapes.
  """

  index: int
  ranks: Tree

  def statistics(self, state: TrainState) -> Tree:
    """Its batch statistics."""
    stats = state.levels["batch_stats"]
    return jax.tree.map(lambda x: x[self.index], stats)

  def with_statistics(self, state: TrainState, stats: Tree) -> TrainState:
    """Sets them; those of the largest level are the network's, too."""
    every = jax.tree.map(
      lambda x, new: x.at[self.index].set(new),
      state.levels["batch_stats"],
      stats,
    )
    state = state.replace(levels=state.levels | {"batch_stats": every})
    return state.replace(batch_stats=stats) if self.index == 0 else state


def stacked(
  profiles: Sequence[Ranks], batch_stats: Tree, layers: Layers
) -> dict[str, Tree]:
  """Returns the levels of a state: all start from the dense statistics."""
  n = len(profiles)
  ranks = {
    path: jnp.stack(
      [jnp.full(layers[path].lead, p[path], jnp.int32) for p in profiles]
    )
    for path in profiles[0]
  }
  return {
    "ranks": trees.unflatten_ranks(ranks),
    "batch_stats": jax.tree.map(lambda x: jnp.stack([x] * n), batch_stats),
  }


def split(levels: Tree) -> list[tuple[Tree, Tree]]:
  """Returns (ranks, batch_stats) of each level, the largest first.

  Args:
    levels: of a state, on the devices or the host; {} has none.
  """
  if not levels:
    return []
  ranks = jax.device_get(levels["ranks"])
  n = len(next(iter(trees.flatten_ranks(ranks).values())))
  stats = levels.get("batch_stats", {})
  return [
    (
      jax.tree.map(lambda x, i=i: np.asarray(x[i]), ranks),
      jax.tree.map(lambda x, i=i: x[i], stats),
    )
    for i in range(n)
  ]


def draws(
  seed: int, shares: Sequence[float], steps_per_epoch: int
) -> Callable[[int], int]:
  """Returns step -> the level that it trains, a function of the seed alone."""

  @functools.lru_cache(maxsize=2)
  def of_epoch(epoch: int) -> np.ndarray:
    key = streams.stream(seed, "levels", epoch)
    keys = jax.random.split(key, steps_per_epoch)
    draw = functools.partial(sampling.level, shares=jnp.asarray(shares))
    return np.asarray(jax.jit(jax.vmap(draw))(keys))

  def level(step: int) -> int:
    epoch, place = divmod(step, steps_per_epoch)
    return int(of_epoch(epoch)[place])

  return level


def variables(params: Tree, ranks: Tree, stats: Tree) -> dict[str, Any]:
  """The network at a level, for an evaluation that serves all of them."""
  given = {"params": params, "ranks": jax.tree.map(jnp.asarray, ranks)}
  return given | ({"batch_stats": stats} if stats else {})


def rows_of(
  params: Tree,
  levels: Tree,
  names: Sequence[str],
  layers: Layers,
  score: Callable[[dict], Mapping[str, Mapping[str, float]]],
) -> list[dict[str, Any]]:
  """Describes each level's network as it would be deployed, for results.json.

  Args:
    params: of the whole network, in factors.
    levels: of a state; {} has none.
    names: of the levels, the largest first.
    layers: of the model.
    score: variables -> {"val": metrics, "test": metrics}.
  """
  rows = []
  for name, (ranks, stats) in zip(names, split(levels), strict=True):
    small = lowrank.extract(params, ranks, layers)
    cost = count_cost(layers, small)
    given = {"params": small} | ({"batch_stats": stats} if stats else {})
    scores = score(given)
    flat = trees.flatten_ranks(ranks)
    rows.append(
      {
        "name": name,
        "ranks": {path: np.asarray(r).tolist() for path, r in flat.items()},
        "params": cost.params,
        "macs": cost.macs,
        "bytes": cost.bytes,
        "metrics": dict(scores["test"]),
        "val_metrics": dict(scores["val"]),
      }
    )
  return rows
