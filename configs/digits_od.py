"""MLP 64-256-128-10 on scikit-learn's digits: comes to a budget in a minute.

  python -m maestro.main --config=configs/digits_od.py

10 epochs of dense warm-up, then profiles within --config.budget=macs:0.4 race,
and the best one settles: 60 epochs in all. Variants:

  nested   for any size: one network with levels of 100 to 25 % of the MACs
  maestro  by a lambda: ordered dropout and group lasso discover ranks for 40
           epochs, which settle for 20
  smoke    two epochs, to see that everything runs
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
  variants = common.variants_of(arg, ["smoke", *common.WAYS])
  c = common.base()
  c.model = ConfigDict({"name": "mlp", "features": (256, 128)})
  c.data = ConfigDict({"name": "digits"})
  c.batch_size = 32
  c.discover.epochs = 40
  c.discover.schedule.learning_rate = 0.02
  c.discover.lam = 1.2e-3
  c.settle.epochs = 20
  c.settle.schedule = ConfigDict({"name": "cosine", "learning_rate": 0.05})
  c.checkpoint.every_epochs = 10
  if "smoke" in variants:
    c.discover.epochs = c.settle.epochs = 1
  common.go(c, variants, warm_up=10, default="race")
  return c.lock()
