"""A small vision Transformer on CIFAR-10: any size from one network.

  python -m maestro.main --config=configs/vit_od.py

Reads CIFAR-10 from --config.data.data_dir or TFDS_DATA_DIR. 4 blocks, 128 wide,
on patches of 4 x 4: 809,354 parameters, 55,838,976 MACs dense. 20 epochs, the
first half of them dense, then a chain of levels of 100 to 25 % of the MACs;
products of activations count in these, and cannot shrink. Variants:

  race    for a budget, --config.budget=macs:0.5, instead of any size; the dense
          warm-up is two epochs
  gpu     8 blocks, 256 wide (6,350,602 parameters), in bfloat16, 60 epochs
  smoke   two epochs of 8 steps with a small network, to see that all runs
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
  variants = common.variants_of(arg, ["race", "gpu", "smoke"])
  c = common.cifar10(set())
  c.model = ConfigDict(
    {
      "name": "vit",
      "patch": 4,
      "layers": 4,
      "width": 128,
      "hidden": 512,
      "heads": 4,
      "dropout": 0.0,
      "scan": False,
      "dtype": config_dict.placeholder(str),
    }
  )
  c.optimizer = ConfigDict(
    {
      "name": "muon",
      "adam_rate": 0.35,
      "weight_decay": 0.05,
      "decay_paths": r".*(kernel|u|v)",
      "clip_norm": 1.0,
    }
  )
  c.label_smoothing = 0.1
  c.truncate.multiple_of = 1
  c.batch_norm_examples = None
  c.checkpoint.every_epochs = 1
  c.eval_every_epochs = 2
  epochs, peak, rise = 20, 5e-3, "epochs:0.5"
  if "gpu" in variants:
    c.model.update({"layers": 8, "width": 256, "hidden": 1024, "heads": 8})
    c.model.dtype = "bfloat16"
    c.batch_size = 512
    c.data.val_examples = 500
    c.checkpoint.every_epochs, c.eval_every_epochs = 15, 10
    epochs, peak = 60, 4e-3
  c.discover.epochs = epochs // (10 if "race" in variants else 2)
  c.settle.epochs = epochs - c.discover.epochs
  c.method = "nested"
  if "race" in variants:
    c.method, c.budget = "race", "macs:0.5"
  if "smoke" in variants:
    c.model.update(
      {"patch": 8, "layers": 1, "width": 32, "hidden": 64, "heads": 2}
    )
    c.batch_size = 64
    c.data.train_examples, c.data.val_examples = 512, 128
    c.discover.epochs = c.settle.epochs = 1
    rise = "steps:2"
  common.one_line(c, peak, rise)
  return c.lock()
