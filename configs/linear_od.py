"""A linear map of rank 3 on the unit ball: finds the rank, and its SVD.

  python -m maestro.main --config=configs/linear_od.py

Inputs are uniform on the unit ball in R^9, targets x A with A [9, 6] of rank 3.
Variants: smoke (two epochs, to see that everything runs).
"""

from ml_collections import ConfigDict, config_dict


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config; `arg` is a comma-separated list of variants."""
  variants = {name for name in arg.split(",") if name}
  if unknown := variants - {"smoke"}:
    raise ValueError(f"unknown variants {sorted(unknown)}; known: smoke")
  c = ConfigDict()
  c.seed = 0
  c.method = "maestro"  # see maestro/methods/table.py, e.g. "dense"
  c.model = ConfigDict({"name": "linear_map", "features": 6})
  c.data = ConfigDict(
    {"name": "linear", "in_features": 9, "out_features": 6, "rank": 3}
  )
  c.loss = "squared_error"
  c.batch_size = 64
  c.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9})
  c.rules = ({"path": ".*"},)
  c.lasso = "hierarchical"
  c.threshold = 1e-5
  c.discover = ConfigDict(
    {
      "epochs": 60,
      "schedule": {"name": "constant", "learning_rate": 0.1},
      "lam": 1e-3,
      "sampler": {"name": "one_layer", "over": "pairs"},
      "shrink": True,
    }
  )
  c.settle = ConfigDict(
    {
      "epochs": 20,
      "schedule": {"name": "constant", "learning_rate": 0.1},
      "lam": 0.0,
      "sampler": {"name": "one_layer", "over": "pairs"},
      "shrink": False,
    }
  )
  c.truncate = ConfigDict(
    {"max_compilations": 8, "min_saving": 0.25, "multiple_of": 1}
  )
  c.checkpoint = ConfigDict({"every_epochs": 20, "keep": 2})
  c.eval_every_epochs = 1
  c.init_from = config_dict.placeholder(str)
  c.num_devices = config_dict.placeholder(int)
  if "smoke" in variants:
    c.discover.epochs = c.settle.epochs = 1
  return c.lock()
