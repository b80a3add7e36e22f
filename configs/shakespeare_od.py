"""A small GPT on the characters of Tiny Shakespeare: for a budget, on CPUs.

  python -m maestro.main --config=configs/shakespeare_od.py

Reads tinyshakespeare/ beside or in --config.data.data_dir or TFDS_DATA_DIR. 4
blocks, 128 wide, on windows of 128 characters: losses are nats a character. The
dense network trains for a quarter of the run, then a race chooses the ranks of
half of its MACs; products of activations count in these, and cannot shrink.
Variants:

  nested  one network with levels of 100 to 25 % of the MACs
  maestro  by a lambda: ordered dropout and group lasso discover ranks
  gpu     6 blocks, 384 wide (10.7 million parameters), in bfloat16
  smoke   two epochs of 8 steps with a small network, to see that all runs
"""

import pathlib
import runpy
import types

from ml_collections import ConfigDict, config_dict

common = types.SimpleNamespace(
  **runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))
)


def one_line(c: ConfigDict, peak: float = 8e-3) -> None:
  """Sets rates that fall along one line, over both phases."""
  smoke = c.model.layers == 1
  common.one_line(c, peak, "steps:2" if smoke else "steps:100")


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config; `arg` is a comma-separated list of variants."""
  variants = common.variants_of(arg, ["gpu", "smoke", *common.WAYS])
  c = common.base()
  c.model = ConfigDict(
    {
      "name": "gpt",
      "length": 128,
      "positions": "rotary",
      "layers": 4,
      "width": 128,
      "heads": 4,
      "dropout": 0.0,
      "scan": False,
      "dtype": config_dict.placeholder(str),
    }
  )
  c.data = ConfigDict(
    {
      "name": "tinyshakespeare",
      "length": 128,
      "stride": 128,
      "train_examples": config_dict.placeholder(int),
      "data_dir": config_dict.placeholder(str),
    }
  )
  c.batch_size = 16
  c.optimizer = ConfigDict(
    {
      "name": "muon",
      "adam_rate": 0.35,
      "b2": 0.99,
      "weight_decay": 0.01,
      "clip_norm": 1.0,
    }
  )
  c.discover.epochs, c.settle.epochs = 2, 2
  c.discover.lam = 1e-4
  c.log_every_steps = 100
  peak, warm_up = 8e-3, 1
  if "gpu" in variants:
    c.model.update(
      {"length": 256, "layers": 6, "width": 384, "heads": 6, "dropout": 0.2}
    )
    c.model.dtype = "bfloat16"
    c.data.length, c.data.stride = 256, 64
    c.batch_size = 64
    c.discover.epochs, c.settle.epochs = 12, 8
    peak, warm_up = 4e-3, 4
    c.eval_every_epochs = c.checkpoint.every_epochs = 5
  if "smoke" in variants:
    c.model.update({"length": 32, "layers": 1, "width": 32, "heads": 2})
    c.data.length, c.data.stride, c.data.train_examples = 32, 32, 256
    c.discover.epochs = c.settle.epochs = 1
  common.go(c, variants, warm_up=warm_up, default="race")
  if c.method == "race":
    c.budget = "macs:0.5"
  if c.method == "maestro":  # whose lasso is in the loss: no step of one size
    peak *= c.optimizer.adam_rate
    del c.optimizer.adam_rate
    c.optimizer.name = "adamw"
  one_line(c, peak)
  return c.lock()
