"""ResNet-20 on CIFAR-10, for CPUs: any size from one network.

  python -m maestro.main --config=configs/resnet20_od.py

Reads CIFAR-10 from --config.data.data_dir or TFDS_DATA_DIR. Dense: 272,474
parameters, 40,813,184 MACs. 12 epochs of SGD, the first half of them dense,
then a chain of levels of 100 to 25 % of the MACs. The learning rate falls along
one line over both phases, wherever the first one ends. Variants:

  race    for a budget, --config.budget=macs:0.5, instead of any size; the dense
          warm-up is one epoch
  short   8 epochs on 16,000 images: 1,000 steps, from which little follows
          about accuracy after a whole schedule
  smoke   two epochs of 8 steps with 8 channels, to see that everything runs
"""

import pathlib
import runpy
import types

from ml_collections import ConfigDict

common = types.SimpleNamespace(
  **runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))
)

PEAK = 0.1  # learning rate


def one_line(c: ConfigDict) -> None:
  """Sets rates that fall along one line, over both phases."""
  common.one_line(c, PEAK)


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config; `arg` is a comma-separated list of variants."""
  variants = common.variants_of(arg, ["race", "short", "smoke"])
  c = common.cifar10(set())
  c.model.name = "resnet20"
  c.model.width = 16
  c.optimizer.nesterov = True
  c.optimizer.weight_decay = 5e-4
  c.truncate.multiple_of = 1
  c.batch_norm_examples = 2048
  c.checkpoint.every_epochs = 1
  c.eval_every_epochs = 2
  epochs = 12
  if "short" in variants:
    epochs = 8
    c.data.train_examples = 16_000
  c.discover.epochs = 1 if "race" in variants else epochs // 2
  c.settle.epochs = epochs - c.discover.epochs
  c.method = "nested"
  if "race" in variants:
    c.method, c.budget = "race", "macs:0.5"
  if "smoke" in variants:
    c.model.width = 8
    c.batch_size = 64
    c.data.train_examples, c.data.val_examples = 512, 128
    c.batch_norm_examples = 128
    c.discover.epochs = c.settle.epochs = 1
  one_line(c)
  return c.lock()
