"""MLP 64-256-128-10 on scikit-learn's digits: finds its ranks in a minute.

  python -m maestro.main --config=configs/digits_od.py

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
  c.model = ConfigDict({"name": "mlp", "features": (256, 128)})
  c.data = ConfigDict({"name": "digits"})
  c.loss = "cross_entropy"
  c.batch_size = 32
  c.optimizer = ConfigDict(
    {
      "name": "sgd",
      "momentum": 0.9,
      "weight_decay": 0.0,
      "clip_norm": config_dict.placeholder(float),
    }
  )
  c.rules = ({"path": ".*"},)
  c.lasso = "hierarchical"
  c.threshold = 1e-5
  c.discover = ConfigDict(
    {
      "epochs": 40,
      "schedule": {"name": "constant", "learning_rate": 0.02},
      "lam": 1.2e-3,
      "sampler": {"name": "one_layer", "over": "pairs"},
      "shrink": True,
    }
  )
  c.settle = ConfigDict(
    {
      "epochs": 20,
      "schedule": {"name": "cosine", "learning_rate": 0.05},
      "lam": 0.0,
      "sampler": {"name": "full"},
      "shrink": False,
    }
  )
  c.truncate = ConfigDict(
    {"max_compilations": 8, "min_saving": 0.25, "multiple_of": 1}
  )
  c.checkpoint = ConfigDict({"every_epochs": 10, "keep": 2})
  c.eval_every_epochs = 1
  c.init_from = config_dict.placeholder(str)
  c.num_devices = config_dict.placeholder(int)
  if "smoke" in variants:
    c.discover.epochs = c.settle.epochs = 1
  return c.lock()
