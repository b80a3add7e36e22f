"""ResNets of basic blocks (18, 34, and 20 thin ones) and of bottlenecks."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as linen
import jax
import jax.numpy as jnp

from maestro import nn
from maestro.errors import UserError
from maestro.schema import Count

_CONV_INIT = linen.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
STEMS = ("cifar", "imagenet")


def _conv(dtype: str | None) -> Callable[..., nn.Conv]:
  return functools.partial(
    nn.Conv, use_bias=False, kernel_init=_CONV_INIT, dtype=dtype
  )


def _norm(train: bool, dtype: str | None) -> Callable[..., linen.BatchNorm]:
  return functools.partial(
    linen.BatchNorm,
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
  )


_ONES = ((1, 1), (1, 1))  # not "SAME", which pads a stride of 2 otherwise


class Block(linen.Module):
  """Basic block: conv 3x3, conv 3x3, and a 1x1 shortcut where shapes change."""

  features: int
  stride: int = 1
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv, norm = _conv(self.dtype), _norm(train, self.dtype)
    strides = (self.stride, self.stride)
    y = conv(self.features, (3, 3), strides, _ONES, name="conv1")(x)
    y = linen.relu(norm(name="norm1")(y))
    y = conv(self.features, (3, 3), (1, 1), _ONES, name="conv2")(y)
    y = norm(name="norm2")(y)
    if self.stride > 1 or x.shape[-1] != self.features:
      x = conv(self.features, (1, 1), strides, "VALID", name="shortcut")(x)
      x = norm(name="shortcut_norm")(x)
    return linen.relu(x + y)


class Bottleneck(linen.Module):
  """Bottleneck: conv 1x1, 3x3, 1x1, and a 1x1 shortcut where shapes change.

  The stride is that of the 3x3 convolution (v1.5, as in torchvision).

  Attributes:
    features: channels of the output.
    inner: channels of the 3x3 convolution.
    groups: of the 3x3 convolution.
    stride: of the block.
    dtype: of the computation.
  """

  features: int
  inner: int
  groups: int = 1
  stride: int = 1
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv, norm = _conv(self.dtype), _norm(train, self.dtype)
    strides = (self.stride, self.stride)
    y = conv(self.inner, (1, 1), padding="VALID", name="conv1")(x)
    y = linen.relu(norm(name="norm1")(y))
    y = conv(
      self.inner,
      (3, 3),
      strides,
      _ONES,
      feature_group_count=self.groups,
      name="conv2",
    )(y)
    y = linen.relu(norm(name="norm2")(y))
    y = conv(self.features, (1, 1), padding="VALID", name="conv3")(y)
    y = norm(name="norm3")(y)
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

  def block(self, stage: int) -> Callable[..., linen.Module]:
    """Returns the block of a stage, counted from 0."""
    return functools.partial(Block, self.width * 2**stage)

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    if self.stem not in STEMS:
      raise UserError(
        f"config.model.stem: {self.stem!r} is unknown; one of {STEMS}"
      )
    cifar = self.stem == "cifar"
    size, stride, pad = (3, 1, 1) if cifar else (7, 2, 3)
    x = _conv(self.dtype)(
      self.width,
      (size, size),
      (stride, stride),
      ((pad, pad), (pad, pad)),
      name="stem",
    )(x)
    x = linen.relu(_norm(train, self.dtype)(name="stem_norm")(x))
    if not cifar:
      x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore
    for i, blocks in enumerate(self.stage_sizes):
      for j in range(blocks):
        x = self.block(i)(
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


class ResNet50(ResNet18):
  """ResNet-50: as `ResNet18` with 3, 4, 6 and 3 bottlenecks, for ImageNet.

  With 1000 classes and inputs [b, 224, 224, 3]: 25,557,032 parameters and
  4,089,184,256 MACs.

  Attributes:
    width: channels of the stem and of the first stage's 3x3 convolutions; the
      stage has four times as many, and each later one twice as many as before.
    groups: of the 3x3 convolutions.
    group_width: channels of a group in the first stage; None is width / groups.
  """

  stem: str = "imagenet"
  stage_sizes: Sequence[Count] = (3, 4, 6, 3)
  groups: Count = 1
  group_width: Count | None = None

  def block(self, stage: int) -> Callable[..., linen.Module]:
    """Returns the block of a stage, counted from 0."""
    width = self.group_width or self.width // self.groups
    if self.group_width is None and self.width % self.groups:
      raise UserError(
        f"config.model.groups: {self.groups} groups do not divide"
        f" config.model.width={self.width}; set config.model.group_width"
      )
    return functools.partial(
      Bottleneck,
      self.width * 4 * 2**stage,
      self.groups * width * 2**stage,
      self.groups,
    )


class ResNeXt50(ResNet50):
  """ResNeXt-50 32x4d (Xie et al., 2017): 32 groups of 4 channels at first.

  With 1000 classes and inputs [b, 224, 224, 3]: 25,028,904 parameters and
  4,230,479,872 MACs. Grouped convolutions have a rank for each group.
  """

  groups: Count = 32
  group_width: Count | None = 4
