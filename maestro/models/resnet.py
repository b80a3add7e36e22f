"""ResNets of basic blocks: 18 and 34 layers, and 20 thin ones for CIFAR."""

import functools
from collections.abc import Sequence

import flax.linen as linen
import jax
import jax.numpy as jnp

from maestro import nn
from maestro.errors import UserError
from maestro.schema import Count

_CONV_INIT = linen.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
STEMS = ("cifar", "imagenet")


class Block(linen.Module):
  """Basic block: conv 3x3, conv 3x3, and a 1x1 shortcut where shapes change."""

  features: int
  stride: int = 1
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv = functools.partial(
      nn.Conv, use_bias=False, kernel_init=_CONV_INIT, dtype=self.dtype
    )
    norm = functools.partial(
      linen.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    ones = ((1, 1), (1, 1))  # not "SAME", which pads a stride of 2 otherwise
    strides = (self.stride, self.stride)
    y = conv(self.features, (3, 3), strides, ones, name="conv1")(x)
    y = linen.relu(norm(name="norm1")(y))
    y = conv(self.features, (3, 3), (1, 1), ones, name="conv2")(y)
    y = norm(name="norm2")(y)
    if self.stride > 1 or x.shape[-1] != self.features:
      x = conv(self.features, (1, 1), strides, "VALID", name="shortcut")(x)
      x = norm(name="shortcut_norm")(x)
    return linen.relu(x + y)


class ResNet18(linen.Module):
  """ResNet-18 (He et al., 2016, type A of their table 1 for the stages).

  With stem="cifar", 10 classes and inputs [b, 32, 32, 3]: 11,173,962 parameters
  and 555,422,720 MACs. With stem="imagenet", 1000 classes and 224 x 224 pixels:
  11,689,512 and 1,814,073,344.

  Attributes:
    num_classes: number of logits.
    stem: "cifar", a 3x3 convolution, or "imagenet", 7x7 with stride 2 and a
      3x3 max-pool with stride 2.
    width: channels of the first stage; each later stage has twice as many.
    stage_sizes: blocks of each stage.
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  num_classes: Count
  stem: str = "cifar"
  width: Count = 64
  stage_sizes: Sequence[Count] = (2, 2, 2, 2)
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    if self.stem not in STEMS:
      raise UserError(
        f"config.model.stem: {self.stem!r} is unknown; one of {STEMS}"
      )
    cifar = self.stem == "cifar"
    size, stride, pad = (3, 1, 1) if cifar else (7, 2, 3)
    x = nn.Conv(
      self.width,
      (size, size),
      (stride, stride),
      ((pad, pad), (pad, pad)),
      use_bias=False,
      kernel_init=_CONV_INIT,
      dtype=self.dtype,
      name="stem",
    )(x)
    x = linen.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      name="stem_norm",
    )(x)
    x = linen.relu(x)
    if not cifar:
      x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore
    for i, blocks in enumerate(self.stage_sizes):
      for j in range(blocks):
        x = Block(
          self.width * 2**i,
          stride=2 if i > 0 and j == 0 else 1,
          dtype=self.dtype,
          name=f"stage{i + 1}_block{j + 1}",
        )(x, train)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(
      self.num_classes,
      kernel_init=_DENSE_INIT,
      dtype=self.dtype,
      name="classifier",
    )(x)


class ResNet34(ResNet18):
  """ResNet-34: as `ResNet18` with 3, 4, 6 and 3 blocks."""

  stage_sizes: Sequence[Count] = (3, 4, 6, 3)


class ResNet20(ResNet18):
  """ResNet-20 for CIFAR (He et al., 2016, section 4.2): three thin stages.

  With 10 classes and inputs [b, 32, 32, 3]: 272,474 parameters and 40,813,184
  MACs. Shortcuts that change the shape are 1x1 convolutions with batch norm
  (their type B), where the paper pads with zeros.
  """

  width: Count = 16
  stage_sizes: Sequence[Count] = (3, 3, 3)
