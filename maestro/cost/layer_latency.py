"""What ranks take of a forward pass: tables of measured latencies.

Networks are measured whole, each dense but for one layer, cut to a rank of a
small grid: what that layer takes less (or more), in its place. Layers that are
alike (`LayerSpec`) are cut together and share the difference. What falls as
ranks rise is averaged, ranks between are interpolated. That latencies add up is
only a model: what they add up to must be measured.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maestro import lowrank, trees
from maestro.cost.budget import LATENCY, NANOSECONDS, Ranks, Tables, useful
from maestro.lowrank import Rule
from maestro.trees import LayerSpec, Tree

# Each network is a compilation: one dense, and 5 ranks of each distinct layer;
# fewer of each, but 2, so that they are no more than this.
_GRID = 5
_MOST = 32

Measure = Callable[[Sequence[Ranks]], list[float]]  # milliseconds of networks


def latency_tables(
  layers: Mapping[str, LayerSpec], limits: Mapping[str, int], measure: Measure
) -> Tables:
  """Tabulates latencies of ranks from 1, in nanoseconds.

  A layer costs what it takes above its fastest form; the rest is `fixed`, such
  that the dense network costs what was measured. Where a rank is no faster than
  a larger one, or than the whole layer, it is no candidate.

  Args:
    layers: of the model.
    limits: {path: largest rank} of the layers that are factored.
    measure: profiles -> latencies of the networks, as `extract` makes them;
      layers that a profile does not name are dense. Called once.
  """
  alike: dict[tuple[LayerSpec, int], list[str]] = {}
  for path, top in limits.items():
    alike.setdefault((layers[path], top), []).append(path)
  size = max(2, min(_GRID, _MOST // len(alike)))
  grids = {key: grid(key[0], key[1], size) for key in alike}
  profiles: list[Ranks] = [{}]
  for key, paths in alike.items():
    profiles += [{path: rank for path in paths} for rank in grids[key]]
  dense, *times = measure(profiles)
  fixed = round(dense * NANOSECONDS)
  costs, candidates = {}, {}
  for (spec, top), paths in alike.items():
    at = grids[spec, top]
    found, times = times[: len(at)], times[len(at) :]
    more = (np.array(found) - dense) * NANOSECONDS / len(paths)
    table = np.interp(np.arange(top + 1), at, rising(more.tolist()))
    table = np.rint(table).astype(np.int64)
    merged = [
      lowrank.dense_is_cheaper(spec.n_in, spec.n_out, r) for r in range(top + 1)
    ]
    table[merged] = 0
    least = int(min(table.min(), 0))  # of the dense layer, or of factors
    ranks = useful(table, least=1)
    for path in paths:
      costs[path], candidates[path] = table - least, ranks
      fixed += least
  return Tables(LATENCY, costs, candidates, fixed, round(dense * NANOSECONDS))


def grid(spec: LayerSpec, top: int, size: int) -> list[int]:
  """Chooses ranks to measure, of those up to `top` that stay factors.

  1, the largest one, and between them geometrically from a sixteenth of it. [1]
  if there is none: merged, it is dense.
  """
  numbers = spec.n_in * spec.n_out
  # The largest rank whose factors hold fewer numbers than the kernel.
  top = min(top, (numbers - 1) // (spec.n_in + spec.n_out))
  if top <= size:
    return list(range(1, top + 1)) or [1]
  between = np.geomspace(max(top / 16, 2), top, size - 1)
  return sorted({1, *(round(r) for r in between)})


def rising(values: Sequence[float]) -> list[float]:
  """Returns the nearest non-decreasing numbers, in least squares."""
  pools: list[tuple[float, int]] = []  # (mean, how many)
  for x in values:
    pools.append((float(x), 1))
    while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
      (a, n), (b, m) = pools[-2:]
      pools[-2:] = [((n * a + m * b) / (n + m), n + m)]
  return [x for x, n in pools for _ in range(n)]


def stored(
  layers: Mapping[str, LayerSpec], ranks: Mapping[str, int]
) -> dict[str, int]:
  """Returns the ranks of the layers that `extract` leaves factored."""
  return {
    path: rank
    for path, rank in ranks.items()
    if not lowrank.dense_is_cheaper(layers[path].n_in, layers[path].n_out, rank)
  }


def network_at(
  params: Tree, layers: Mapping[str, LayerSpec], ranks: Mapping[str, int]
) -> dict[str, Any]:
  """Returns a network to be timed: factors of some layers, at random.

  In the form of `extract`; what is not factored is shared with `params`.

  Args:
    params: dense.
    layers: of the model.
    ranks: of at least 1.
  """
  kept = stored(layers, ranks)
  rules = [Rule(re.escape(path), rank) for path, rank in kept.items()]
  shapes = jax.eval_shape(
    lambda params: lowrank.decompose(params, rules, layers), params
  )
  rng = np.random.default_rng(0)

  def fill(x: Any) -> np.ndarray:
    # Not zeros, which cost accelerators less power; too small to overflow.
    return (0.02 * rng.standard_normal(x.shape)).astype(x.dtype)

  nodes = {path: jax.tree.map(fill, trees.get(shapes, path)) for path in kept}
  return trees.replace(params, nodes)
