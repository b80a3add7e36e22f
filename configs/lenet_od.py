"""LeNet on MNIST: discovers its ranks for 10 epochs, then settles for 10.

  python -m maestro.main --config=configs/lenet_od.py

Reads MNIST from --config.data.data_dir or TFDS_DATA_DIR. Dense: 44,426
parameters, 281,640 MACs. Variants:

  paper   the paper's schedule: 20 epochs of sampling at constant lambda and
          learning rate, nothing settles; PyTorch's initial weights, and all but
          500 training images
  smoke   two epochs, to see that everything runs
"""

from ml_collections import ConfigDict, config_dict


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config; `arg` is a comma-separated list of variants."""
  variants = {name for name in arg.split(",") if name}
  if unknown := variants - {"paper", "smoke"}:
    raise ValueError(f"unknown variants {sorted(unknown)}; known: paper, smoke")
  c = ConfigDict()
  c.seed = 0
  c.method = "maestro"  # see maestro/methods/table.py, e.g. "dense"
  c.model = ConfigDict({"name": "lenet", "dtype": config_dict.placeholder(str)})
  c.data = ConfigDict(
    {
      "name": "mnist",
      "val_examples": 5000,
      "data_dir": config_dict.placeholder(str),
    }
  )
  c.loss = "cross_entropy"
  c.batch_size = 128
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
      "epochs": 10,
      "schedule": {"name": "constant", "learning_rate": 0.01},
      "lam": 3e-3,
      "sampler": {"name": "one_layer", "over": "pairs"},
      "shrink": True,
    }
  )
  c.settle = ConfigDict(
    {
      "epochs": 10,
      "schedule": {
        "name": "piecewise",
        "learning_rate": 0.01,
        "boundaries": (0.6,),
        "factor": 0.1,
      },
      "lam": 0.0,
      "sampler": {"name": "full"},
      "shrink": False,
    }
  )
  c.truncate = ConfigDict(
    {"max_compilations": 8, "min_saving": 0.25, "multiple_of": 1}
  )
  c.checkpoint = ConfigDict({"every_epochs": 1, "keep": 2})
  c.eval_every_epochs = 1
  c.init_from = config_dict.placeholder(str)
  c.num_devices = config_dict.placeholder(int)
  if "paper" in variants:
    c.discover.epochs = 20
    c.settle.epochs = 0
    c.discover.lam = 3e-4
    c.model.kernel_init = "torch"
    c.data.val_examples = 500  # nothing is chosen; the paper holds none back
  if "smoke" in variants:
    c.discover.epochs = 1
    c.settle.epochs = min(c.settle.epochs, 1)
  return c.lock()
