"""A Transformer on Multi30k, German to English: for a budget, on CPUs.

  python -m maestro.main --config=configs/multi30k_od.py

Reads multi30k/ beside or in --config.data.data_dir or TFDS_DATA_DIR. 3 + 3
blocks, 128 wide; all products are factored, those with the tables too, whose
share of the MACs is half. The dense network trains for a seventh of the run,
then a race chooses the ranks of half of its MACs. Variants:

  nested  one network with levels of 100 to 25 % of the MACs
  maestro  by a lambda: ordered dropout and group lasso discover ranks
  gpu     6 + 6 blocks, 512 wide (54 million parameters), in bfloat16
  paper   that network by the paper's recipe: Noam's schedule, label smoothing,
          batches of 256; ranks of blocks are discovered all along
  smoke   two epochs of 16 steps with a small network, to see that all runs
"""

import pathlib
import runpy
import types

from ml_collections import ConfigDict, config_dict

common = types.SimpleNamespace(
  **runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))
)

LARGE = {"layers": 6, "width": 512, "hidden": 2048, "heads": 8}
NOAM = {"name": "inverse_sqrt", "warmup": "steps:4000"}


def one_line(c: ConfigDict, peak: float = 2e-3) -> None:
  """Sets rates that fall along one line, over both phases."""
  smoke = c.model.layers == 1
  common.one_line(c, peak, "steps:10" if smoke else "steps:200")


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config; `arg` is a comma-separated list of variants."""
  variants = common.variants_of(
    arg, ["smoke", *common.WAYS], one_of=("gpu", "paper")
  )
  c = common.base()
  c.model = ConfigDict(
    {
      "name": "transformer",
      "layers": 3,
      "width": 128,
      "hidden": 512,
      "heads": 4,
      "dropout": 0.1,
      "norm": "pre",
      "scan": False,
      "dtype": config_dict.placeholder(str),
    }
  )
  c.data = ConfigDict(
    {
      "name": "multi30k",
      "max_length": 48,
      "lengths": (16, 24, 32, 48),
      "vocabulary_size": config_dict.placeholder(int),
      "train_examples": config_dict.placeholder(int),
      "data_dir": config_dict.placeholder(str),
    }
  )
  c.optimizer = ConfigDict(
    {
      "name": "adamw",
      "b1": 0.9,
      "b2": 0.98,
      "eps": 1e-9,
      "weight_decay": 0.01,
      "clip_norm": 1.0,
    }
  )
  c.label_smoothing = 0.1
  c.discover.epochs, c.settle.epochs = 8, 6
  c.discover.lam = 1e-4
  peak, warm_up = 2e-3, 2
  if "gpu" in variants:
    c.model.update(LARGE)
    c.model.dtype = "bfloat16"
    c.batch_size = 256
    c.discover.epochs, c.settle.epochs = 18, 12
    peak, warm_up = 5e-4, 6
    c.eval_every_epochs = 5
    c.checkpoint.every_epochs = 10
  if "paper" in variants:
    c.model.update(LARGE | {"norm": "post"})
    c.batch_size = 256
    c.data.vocabulary_size = 9521  # as many as the paper's
    c.rules = ({"path": "(encoder|decoder)/.*"},)
    c.optimizer.name = "adam"
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = None
    c.discover.epochs, c.settle.epochs = 400, 0
    c.checkpoint.every_epochs = c.eval_every_epochs = 10
  if "smoke" in variants:
    c.model.update({"layers": 1, "width": 32, "hidden": 64})
    c.batch_size = 32
    c.data.train_examples = 512
    c.data.vocabulary_size = 500
    c.data.lengths = (48,)  # each is a compilation
    c.discover.epochs = 1
    c.settle.epochs = min(c.settle.epochs, 1)
  default = "maestro" if "paper" in variants else "race"
  common.go(c, variants, warm_up=warm_up, default=default)
  if c.method == "race":
    c.budget = "macs:0.5"
  if "paper" in variants:
    # (width * steps of warm-up)^-1/2
    rate = (c.model.width * 4000) ** -0.5
    noam = NOAM | {"learning_rate": rate}
    c.discover.schedule = ConfigDict(noam)
    # It goes on in settle, if there is one.
    begun = f"epochs:{c.discover.epochs}"
    c.settle.schedule = ConfigDict(noam | {"begun": begun})
  else:
    one_line(c, peak)
  return c.lock()
