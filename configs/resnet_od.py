"""ResNet-18 on CIFAR-10: discovers its ranks for 180 epochs, settles for 120.

  python -m maestro.main --config=configs/resnet_od.py

Reads CIFAR-10 from --config.data.data_dir or TFDS_DATA_DIR. Dense: 11,173,962
parameters, 555,422,720 MACs; 300 epochs of dense training are 22 PMACs, which
is work for a GPU or TPU. Lambda is the paper's, 16e-6, which it found for
sampling to the end; untested with a settling phase. ResNet-34 is
--config.model.name=resnet34, ResNet-50 resnet50. Variants, of which smoke and
partial go with any other, and race, nested and pufferfish with any but paper:

  paper   the paper's recipe: 300 epochs of sampling at constant lambda, SGD
          with weight decay 1e-4 on everything, x0.1 at 50 % and 75 %, threshold
          1e-7; nothing settles. The learning rate, 0.1, is ours; all but 500
          training images are trained on
  gpu     24 + 16 epochs in bfloat16, batches of 512, all but 500 training
          images: minutes on one data-centre GPU. Dense 93.95 % (one seed); for
          methods that factor from the start, lower its learning rate of 0.4
  short   300 + 100 steps of 32 images out of 3,200, on CPUs: a demonstration,
          from which nothing follows about accuracy. Lambda, 1e-3, is what it
          takes to move ranks within 300 steps
  smoke   two epochs of 8 steps with an eighth of the channels, to see that
          everything runs
  race    for a budget, --config.budget=macs:0.4, instead of a lambda; the
          dense warm-up is a fifth of the epochs
  nested  for any size: one network with levels of 100 to 25 % of the MACs; the
          dense warm-up is half of the epochs
  partial decomposes the last stage alone and leaves the classifier dense: the
          paper's choice for ResNet-50 on ImageNet beside the full one, all
          layers, which is the default here
  pufferfish
          another method, by its published choice of layers: stem, first block,
          shortcuts and classifier stay dense; discover is its dense warm-up,
          after which the other 14 convolutions have a quarter of their rank.
          3,336,266 parameters, 216,208,384 MACs. For its recipe set the warm-up
          too, e.g. --config.discover.epochs=80 --config.settle.epochs=220.
          With partial, a quarter of the rank in the last stage: of ResNet-50,
          its published 15.2M parameters
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
  extras = ["smoke", "partial", "pufferfish", *common.WAYS]
  variants = common.variants_of(arg, extras, common.RECIPES)
  c = common.cifar10(variants)
  c.model.name = "resnet18"
  c.model.stem = "cifar"
  common.ways(c, variants)
  if "pufferfish" in variants:
    if not c.settle.epochs:
      raise ValueError(
        "pufferfish trains its factors in settle: not with paper"
      )
    c.method = "pufferfish"
    dense = r"stem|classifier|stage1_block1/.*|.*/shortcut"
    c.rules = ({"path": dense, "decompose": False}, {"path": ".*"})
  if "partial" in variants:
    c.rules = ({"path": "stage4_.*"},)
  return c.lock()
