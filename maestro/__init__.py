"""Trainable low-rank decompositions: layers that find their own ranks."""

from maestro import nn, ops, sampling
from maestro.adapt import factored
from maestro.cost.count import Cost, LayerCost, count_cost
from maestro.deploy.artifact import load, load_stablehlo
from maestro.deploy.functions import export_model
from maestro.deploy.to_torch import to_torch
from maestro.errors import UserError
from maestro.introspect import check_ranks, layers
from maestro.lowrank import (
  Rule,
  decompose,
  extract,
  full_ranks,
  group_lasso,
  importance,
  mask,
  merge,
  shrink,
  truncate,
)
from maestro.methods.fisher import reorder
from maestro.pytorch import from_torch
from maestro.trees import LayerSpec, LowRankError

__version__ = "0.1.0"
__all__ = [
  "Cost",
  "LayerCost",
  "LayerSpec",
  "LowRankError",
  "Rule",
  "UserError",
  "check_ranks",
  "count_cost",
  "decompose",
  "export_model",
  "extract",
  "factored",
  "from_torch",
  "full_ranks",
  "group_lasso",
  "importance",
  "layers",
  "load",
  "load_stablehlo",
  "mask",
  "merge",
  "nn",
  "ops",
  "reorder",
  "sampling",
  "shrink",
  "to_torch",
  "truncate",
]
