"""Parameters, MACs and bytes of a network, per layer and in total.

MACs are multiply-accumulates of convolutions and of products with weights, for
the forward pass of one example; products of activations (attention) are a line
of their own. Look-ups of embeddings, normalisation, biases
and activations count 0 (the paper's convention). Parameters count everything
trainable. Factors count as the two products that they are; above break-even,
`maestro.ops` multiplies them out first and spends little more than a kernel.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro import lowrank, trees
from maestro.trees import LayerSpec


@dataclasses.dataclass(frozen=True)
class LayerCost:
  """Cost of one layer in the form in which it is stored.

  Attributes:
    path: the layer's slash-joined path.
    form: "dense" or "factored".
    rank: live components; nested lists for stacked or grouped layers; None if
      dense.
    full_rank: min(in, out) of the layer's map.
    params: trainable numbers, bias included.
    macs: multiply-accumulates of one example's forward pass.
    bytes: size of the parameters in their stored dtype.
  """

  path: str
  form: str
  rank: int | list | None
  full_rank: int
  params: int
  macs: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of a network; totals include what belongs to no listed layer."""

  layers: tuple[LayerCost, ...]
  params: int
  macs: int
  bytes: int


def _size(leaf: Any) -> tuple[int, int]:
  """(numbers, bytes) of an array or of its abstract value."""
  n = math.prod(leaf.shape)
  return n, n * jnp.dtype(leaf.dtype).itemsize


def layer_macs(spec: LayerSpec, rank: int | None) -> int:
  """MACs of one layer at a rank; None is the dense kernel."""
  maps = math.prod(spec.lead)
  n_in, n_out = spec.n_in, spec.n_out
  if rank is None:
    return spec.positions * maps * n_in * n_out
  # A factored look-up gathers rows of u, then multiplies them with v.
  look_up = spec.lookups * rank * n_out
  return maps * (spec.positions * rank * (n_in + n_out) + look_up)


def count_cost(
  layers: Mapping[str, LayerSpec],
  params: trees.Tree,
  ranks: trees.Tree | None = None,
) -> Cost:
  """Counts what a network costs at given ranks.

  Equal to the sizes of the leaves of `truncate(params, ranks)`: a stacked or
  grouped layer costs its largest rank in every element, as it is stored so.

  Args:
    layers: {path: LayerSpec}, from `maestro.layers`.
    params: parameters, concrete or abstract.
    ranks: tree of concrete ranks; None counts what is stored.
  """
  flat = {} if ranks is None else trees.flatten_ranks(ranks)
  for path in flat:
    node = trees.get(params, path) if path in layers else None
    if node is None or "u" not in node:
      raise trees.LowRankError(
        f"rank tree: layer {path!r} has no factors in these parameters, or is"
        f" none of the model's layers, which are {sorted(layers)}"
      )
  rows = []
  n_total = b_total = 0
  for leaf in jax.tree.leaves(params):
    n, b = _size(leaf)
    n_total, b_total = n_total + n, b_total + b
  for path, spec in layers.items():
    node = trees.unboxed(trees.get(params, path) or {})
    if spec.kind == "other":  # it may hold layers, which have rows of their own
      node = {k: x for k, x in node.items() if not isinstance(x, Mapping)}
    n = b = 0
    for leaf in jax.tree.leaves(node):
      size, size_bytes = _size(leaf)
      n, b = n + size, b + size_bytes
    macs, rank, live = 0, None, None
    if spec.weight in node or spec.kind == "other":
      macs += layer_macs(spec, None)
    if "u" in node and "v" in node:
      stored = node["u"].shape[-1]
      live = np.asarray(flat.get(path, np.full(spec.lead, stored)))
      trees.check_rank(live, stored, path)
      rank = lowrank.stored_rank(live, stored)
      macs += layer_macs(spec, rank)
      cut = (stored - rank) * math.prod(spec.lead)
      for name, width in (("u", spec.n_in), ("v", spec.n_out)):
        n -= cut * width
        n_total -= cut * width
        item = jnp.dtype(node[name].dtype).itemsize
        b -= cut * width * item
        b_total -= cut * width * item
    rows.append(
      LayerCost(
        path=path,
        form="dense" if rank is None else "factored",
        rank=None if live is None else live.tolist(),
        full_rank=spec.full_rank,
        params=n,
        macs=macs,
        bytes=b,
      )
    )
  return Cost(tuple(rows), n_total, sum(row.macs for row in rows), b_total)
