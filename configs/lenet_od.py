"""LeNet on MNIST: one network with levels of 100 to 25 % of the MACs.

  python -m maestro.main --config=configs/lenet_od.py

Reads MNIST from --config.data.data_dir or TFDS_DATA_DIR. Dense: 44,426
parameters, 281,640 MACs. An epoch of dense warm-up, then 19 along a chain of
nested profiles. Variants:

  race     for a budget, --config.budget=macs:0.4
  maestro  by a lambda: ordered dropout and group lasso discover ranks for 10
           epochs, which settle for 10
  paper    the same on the paper's schedule: 20 epochs of sampling at constant
           lambda and learning rate, nothing settles; PyTorch's initial weights,
           and all but 500 training images
  smoke    two epochs, to see that everything runs
"""

import pathlib
import runpy
import types

from ml_collections import ConfigDict, config_dict

common = types.SimpleNamespace(
  **runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))
)


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config; `arg` is a comma-separated list of variants."""
  variants = common.variants_of(arg, ["paper", "smoke", *common.WAYS])
  c = common.base()
  c.model = ConfigDict({"name": "lenet", "dtype": config_dict.placeholder(str)})
  c.data = ConfigDict(
    {
      "name": "mnist",
      "val_examples": 5000,
      "data_dir": config_dict.placeholder(str),
    }
  )
  c.discover.epochs = 10
  c.discover.schedule.learning_rate = 0.01
  c.discover.lam = 3e-3
  c.settle.epochs = 10
  c.settle.schedule = ConfigDict(
    {
      "name": "piecewise",
      "learning_rate": 0.01,
      "boundaries": (0.6,),
      "factor": 0.1,
    }
  )
  if "paper" in variants:
    c.discover.epochs = 20
    c.settle.epochs = 0
    c.discover.lam = 3e-4
    c.model.kernel_init = "torch"
    c.data.val_examples = 500  # nothing is chosen; the paper holds none back
  if "smoke" in variants:
    c.discover.epochs = 1
    c.settle.epochs = min(c.settle.epochs, 1)
  by_lambda = variants & {"maestro", "paper"}
  if not by_lambda:
    c.settle.schedule.boundaries = (0.8,)
  default = "maestro" if by_lambda else "nested"
  common.go(c, variants, warm_up=1, default=default)
  return c.lock()
