"""VGG-19 on CIFAR-10: discovers its ranks for 180 epochs, settles for 120.

  python -m maestro.main --config=configs/vgg_od.py

Reads CIFAR-10 from --config.data.data_dir or TFDS_DATA_DIR. Dense: 20,040,522
parameters, 398,136,320 MACs; 300 epochs of dense training are 16 PMACs, which
is work for a GPU or TPU. Lambda, 16e-6, is the paper's for ResNet-18, untested
here. Variants, of which smoke goes with any other:

  paper   the paper's recipe: 300 epochs of sampling at constant lambda, SGD
          with weight decay 1e-4 on everything, x0.1 at 50 % and 75 %, threshold
          1e-7; nothing settles. The learning rate, 0.1, is ours; all but 500
          training images are trained on
  gpu     24 + 16 epochs in bfloat16, batches of 512, all but 500 training
          images: meant for minutes on one data-centre GPU; untested
  short   300 + 100 steps of 32 images out of 3,200, on CPUs: a demonstration,
          from which nothing follows about accuracy. Lambda, 1e-3, is what it
          takes to move ranks within 300 steps
  smoke   two epochs of 8 steps with an eighth of the channels, to see that
          everything runs
  race, nested
          for a budget, or any size: see resnet_od.py
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
  extras = ["smoke", *common.WAYS]
  variants = common.variants_of(arg, extras, common.RECIPES)
  c = common.cifar10(variants)
  c.model.name = "vgg19"
  common.ways(c, variants)
  return c.lock()
