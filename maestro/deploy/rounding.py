"""Which weights of a network can be int8, and what that changes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from maestro import trees
from maestro.deploy import int8, packing, verify
from maestro.trees import LayerSpec


def fit(
  params: Any,
  profiles: Sequence[packing.Profile],
  layers: Mapping[str, LayerSpec],
  networks: Sequence[Mapping[str, Any]],
  outputs: Callable[[Any], Any],
  tolerance: float,
) -> tuple[list[tuple[dict[str, Any], float]], dict[str, list[str]]]:
  """Rounds all sizes of a network to int8, as far as a tolerance allows.

  Args:
    params: of the network, as `packing.pack` takes them.
    profiles: its sizes, the largest first.
    layers: {path: LayerSpec} of the model.
    networks: variables of each size in float32.
    outputs: of variables, on some inputs.
    tolerance: largest relative difference of outputs, of any size.

  Returns:
    Of each size its variables, as they come back from int8, and the difference;
    and which weights are "int8", and which "float32".
  """
  stored = packing.laid_out(params, profiles, layers)
  sizes = [
    (packing.extractor(stored, p.ranks, layers), network, outputs(network))
    for p, network in zip(profiles, networks, strict=True)
  ]

  def compare(
    params: Any, n: int | None = None
  ) -> list[tuple[dict[str, Any], float]]:
    found = []
    for extract, network, expected in sizes[:n]:
      variables = {**network, "params": extract(params)}
      gap = verify.difference(expected, outputs(variables))
      found.append((variables, gap))
    return found

  def worst(params: Any, n: int | None = None) -> float:
    return max(gap for _, gap in compare(params, n))

  chosen = choose(stored, layers, worst, tolerance)
  left = [name for name in weighted(stored, layers) if name not in chosen]
  done = compare(rounded(stored, layers, chosen))
  return done, {"int8": chosen, "float32": left}


def weighted(params: Any, layers: Mapping[str, LayerSpec]) -> dict[str, int]:
  """{path of a weight or factor: its numbers}, of all that can be int8."""
  found = {}
  for path, spec in layers.items():
    node = trees.get(params, path)
    for leaf in _axes(node, spec):
      found[f"{path}/{leaf}".lstrip("/")] = np.size(node[leaf])
  return found


def _axes(node: Any, spec: LayerSpec) -> dict[str, range]:
  """{leaf: the axes within a channel}, as the layer holds its weight."""
  lead = len(spec.lead)
  if not isinstance(node, Mapping):  # of kind "other"
    return {}
  if "u" in node:
    return {
      "u": range(lead, node["u"].ndim - 1),
      "v": range(lead + 1, node["v"].ndim),
    }
  axes = int8.weight_axes(spec)
  return {} if axes is None or spec.weight not in node else {spec.weight: axes}


def rounded(
  params: Any, layers: Mapping[str, LayerSpec], weights: Collection[str]
) -> Any:
  """Returns params whose weights, by paths, are what int8 gives back."""
  changes: dict[str, dict[str, Any]] = {}
  for name in weights:
    path, _, leaf = name.rpartition("/")
    node = changes.setdefault(path, dict(trees.get(params, path)))
    axes = _axes(node, layers[path])[leaf]
    node[leaf] = int8.dequantize(*int8.quantize(np.asarray(node[leaf]), axes))
  return trees.replace(params, changes)


def choose(
  params: Any,
  layers: Mapping[str, LayerSpec],
  difference: Callable[..., float],
  tolerance: float,
) -> list[str]:
  """Chooses weights to be int8: all, or as many as the tolerance allows.

  Their rounding errors are independent, so the squares add up. Where all of
  them are too many, those with the largest square for the bytes that they would
  save stay as they are: the fewest of them that suffice, by bisection.

  Args:
    params: as they are stored.
    layers: {path: LayerSpec} of the model.
    difference: of rounded params from these, the worst over all sizes, or over
      the n largest if called with n.
    tolerance: largest difference.

  Returns:
    Paths of the weights, e.g. "fc1/u".
  """
  numbers = weighted(params, layers)

  def found(weights: Collection[str], *n: int) -> float:
    return difference(rounded(params, layers, weights), *n)

  if found(numbers) <= tolerance:
    return list(numbers)
  square = {name: found([name], 1) ** 2 / numbers[name] for name in numbers}
  order = sorted(numbers, key=lambda name: -square[name])
  few, many = 0, len(order)  # left out: too few, and enough
  while many - few > 1:
    middle = (few + many) // 2
    if found(order[middle:]) <= tolerance:
      many = middle
    else:
      few = middle
  return [name for name in numbers if name in order[many:]]
