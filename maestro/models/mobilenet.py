"""MobileNetV2: inverted residuals around depthwise convolutions."""

import functools
from collections.abc import Sequence

import flax.linen as linen
import jax
import jax.numpy as jnp

from maestro import nn
from maestro.errors import UserError
from maestro.schema import Count, Positive, Rate

_CONV_INIT = linen.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = linen.initializers.normal(0.01)
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


def _rounded(channels: float) -> int:
  """The nearest multiple of 8, but no less than 90 % of what was asked for."""
  near = max(8, int(channels + 4) // 8 * 8)
  return near + 8 if near < 0.9 * channels else near


class InvertedResidual(linen.Module):
  """Conv 1x1 to more channels, depthwise 3x3, conv 1x1 to fewer, and a sum.

  Attributes:
    features: channels of the output.
    expansion: by which the input's channels grow within; 1 has no first layer.
    stride: of the depthwise convolution.
    dtype: of the computation.
  """

  features: int
  expansion: int
  stride: int = 1
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    layer = functools.partial(_conv_norm, train=train, dtype=self.dtype)
    inner = x.shape[-1] * self.expansion
    y = x
    if self.expansion > 1:
      y = linen.relu6(layer(y, inner, "expand"))
    y = layer(y, inner, "depthwise", 3, self.stride, groups=inner)
    y = layer(linen.relu6(y), self.features, "project")
    same = self.stride == 1 and self.features == x.shape[-1]
    return x + y if same else y


def _conv_norm(
  x: jax.Array,
  features: int,
  name: str,
  window: int = 1,
  stride: int = 1,
  groups: int = 1,
  *,
  train: bool,
  dtype: str | None,
) -> jax.Array:
  """A convolution called `name`, and its batch norm."""
  pad = window // 2
  x = nn.Conv(
    features,
    (window, window),
    (stride, stride),
    ((pad, pad), (pad, pad)),
    feature_group_count=groups,
    use_bias=False,
    kernel_init=_CONV_INIT,
    dtype=dtype,
    name=name,
  )(x)
  return linen.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
    name=f"{name}_norm",
  )(x)


class MobileNetV2(linen.Module):
  """MobileNetV2 (Sandler et al., 2018), as in torchvision.

  With 1000 classes and inputs [b, 224, 224, 3]: 3,504,872 parameters and
  300,774,272 MACs. Depthwise convolutions have full rank 1 and stay dense.

  Attributes:
    num_classes: number of logits.
    multiplier: of all channels but the last, which are not fewer than 1280.
    stages: of each (expansion, channels, blocks, stride of the first block).
    dropout: before the classifier.
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  num_classes: Count
  multiplier: Positive = 1.0
  stages: Sequence[Sequence[Count]] = STAGES
  dropout: Rate = 0.2
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    if any(len(stage) != 4 for stage in self.stages):
      raise UserError(
        f"config.model.stages: {self.stages}, but each stage is (expansion,"
        " channels, blocks, stride)"
      )
    layer = functools.partial(_conv_norm, train=train, dtype=self.dtype)
    width = _rounded(32 * self.multiplier)
    x = linen.relu6(layer(x, width, "stem", 3, 2))
    count = 0
    for expansion, channels, blocks, stride in self.stages:
      for i in range(blocks):
        count += 1
        x = InvertedResidual(
          _rounded(channels * self.multiplier),
          expansion,
          stride=1 if i else stride,
          dtype=self.dtype,
          name=f"block{count}",
        )(x, train)
    last = _rounded(1280 * max(self.multiplier, 1.0))
    x = linen.relu6(layer(x, last, "head"))
    x = jnp.mean(x, axis=(1, 2))
    x = linen.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(
      self.num_classes,
      kernel_init=_DENSE_INIT,
      dtype=self.dtype,
      name="classifier",
    )(x)
