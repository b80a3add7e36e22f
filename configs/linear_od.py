"""A linear map of rank 3 on the unit ball: finds the rank, and its SVD.

  python -m maestro.main --config=configs/linear_od.py

Inputs are uniform on the unit ball in R^9, targets x A with A [9, 6] of rank 3.
Variants: smoke (two epochs, to see that everything runs).
"""

import pathlib
import runpy
import types

from ml_collections import ConfigDict

common = types.SimpleNamespace(
  **runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))
)


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config; `arg` is a comma-separated list of variants."""
  variants = common.variants_of(arg, ["smoke"])
  c = common.base()
  c.model = ConfigDict({"name": "linear_map", "features": 6})
  c.data = ConfigDict(
    {"name": "linear", "in_features": 9, "out_features": 6, "rank": 3}
  )
  c.loss = "squared_error"
  c.batch_size = 64
  c.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9})
  c.discover.epochs = 60
  c.discover.lam = 1e-3
  c.settle.epochs = 20
  c.settle.sampler = ConfigDict({"name": "one_layer", "over": "pairs"})
  c.checkpoint.every_epochs = 20
  if "smoke" in variants:
    c.discover.epochs = c.settle.epochs = 1
  return c.lock()
