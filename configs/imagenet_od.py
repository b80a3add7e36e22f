"""ResNet-50 on ImageNet, 90 epochs: a network for a budget of half its MACs.

  python -m maestro.main --config=configs/imagenet_od.py

Reads imagenet2012, which tensorflow-datasets prepares in array_record format,
from --config.data.data_dir or TFDS_DATA_DIR; photographs are decoded while it
trains, on every core (--config.data.workers). Dense: 25,557,032 parameters and
4.1 GMACs, which is work for a machine of TPUs or GPUs; no run of ours has been
made. Without the data, experiments/photographs.py makes a set to rehearse with.

By the common recipe: SGD with momentum, batches of 1,024 at a rate that rises
to 0.4 in five epochs and falls along a line to 0, weight decay 5e-5 but on
biases and scales, label smoothing 0.1, bfloat16. A fifth of the epochs train
the dense network, then a race chooses the ranks. Variants:

  nested   one network with levels of 100 to 25 % of the MACs, half of it dense
  maestro  by a lambda: ordered dropout and group lasso discover ranks
  partial  decomposes the last stage alone and leaves the classifier dense: the
           paper's smaller choice beside all layers, which is the default here
  paper    the paper's recipe with maestro: batches of 256, rate 0.1 divided by
           ten after 30, 60 and 80 epochs, weight decay 1e-4 but on biases and
           scales, no label smoothing, float32; nothing settles
  smoke    two epochs of 4 steps of small squares, ResNet-18 with an eighth of
           the channels
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
  known = ["smoke", "partial", "paper", *common.WAYS]
  variants = common.variants_of(arg, known)
  c = common.base()
  c.model = ConfigDict(
    {"name": "resnet50", "stem": "imagenet", "width": 64, "dtype": "bfloat16"}
  )
  c.data = ConfigDict(
    {
      "name": "imagenet2012",
      "val_examples": 10_000,
      "train_examples": config_dict.placeholder(int),
      "size": 224,
      "workers": config_dict.placeholder(int),
      "data_dir": config_dict.placeholder(str),
    }
  )
  c.batch_size = 1024
  c.optimizer.nesterov = True
  c.optimizer.weight_decay = 5e-5
  c.optimizer.decay_paths = r".*(kernel|u|v)"
  c.label_smoothing = 0.1
  c.discover.epochs, c.settle.epochs = 54, 36
  c.discover.lam = 16e-6
  c.threshold = 1e-5
  c.truncate = ConfigDict(
    {"max_compilations": 24, "min_saving": 0.2, "multiple_of": 8}
  )
  c.batch_norm_examples = 16_384
  c.checkpoint.every_epochs = c.eval_every_epochs = 2
  c.log_every_steps = 100
  if "paper" in variants:
    if variants & {"race", "nested"}:
      raise ValueError("paper is a recipe of maestro: not with race or nested")
    c.model.dtype = None
    c.batch_size = 256
    c.optimizer.nesterov = False
    c.optimizer.weight_decay = 1e-4
    c.label_smoothing = None
    c.discover.epochs, c.settle.epochs = 90, 0
    c.threshold = 1e-7
  if "smoke" in variants:
    c.model.update({"name": "resnet18", "width": 8})  # compiled in seconds
    c.batch_size = 8
    c.data.size, c.data.val_examples, c.data.train_examples = 64, 8, 32
    c.batch_norm_examples = 16
    c.discover.epochs, c.settle.epochs = 1, min(c.settle.epochs, 1)
    c.checkpoint.every_epochs = c.eval_every_epochs = 1
    c.log_every_steps = 1
  epochs = c.discover.epochs + c.settle.epochs
  part = 2 if "nested" in variants else 5
  default = "maestro" if "paper" in variants else "race"
  common.go(c, variants, warm_up=max(epochs // part, 1), default=default)
  if c.method == "race":
    c.budget = "macs:0.5"
  if "partial" in variants:
    c.rules = ({"path": "stage4_.*"},)
  if "paper" in variants:
    c.discover.schedule = ConfigDict(
      {
        "name": "piecewise",
        "learning_rate": 0.1,
        "boundaries": (30 / 90, 60 / 90, 80 / 90),
        "factor": 0.1,
      }
    )
  else:
    small = "smoke" in variants
    peak, rise = (0.02, "steps:2") if small else (0.4, "epochs:5")
    common.one_line(c, peak, rise)
  return c.lock()
