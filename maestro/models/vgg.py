"""VGG-19 with batch normalisation."""

from collections.abc import Sequence

import flax.linen as linen
import jax

from maestro import nn
from maestro.schema import Count, Rate

_CONV_INIT = linen.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# (convolutions, multiple of the width) of the stages, each ended by a pool.
STAGES = ((2, 1), (2, 2), (4, 4), (4, 8), (4, 8))


class VGG19(linen.Module):
  """Sixteen 3x3 convolutions with bias and batch norm, then a classifier.

  With 10 classes and inputs [b, 32, 32, 3]: 20,040,522 parameters and
  398,136,320 MACs. With hidden=(4096, 4096), 1000 classes and 224 x 224 pixels:
  143,678,248 and 19,632,062,464.

  Attributes:
    num_classes: number of logits.
    width: channels of the first stage.
    hidden: widths of dense layers with ReLU before the classifier.
    dropout: after each of them.
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  num_classes: Count
  width: Count = 64
  hidden: Sequence[Count] = ()
  dropout: Rate = 0.5
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    for i, (convolutions, multiple) in enumerate(STAGES, 1):
      for j in range(1, convolutions + 1):
        x = nn.Conv(
          self.width * multiple,
          (3, 3),
          padding=((1, 1), (1, 1)),
          kernel_init=_CONV_INIT,
          dtype=self.dtype,
          name=f"conv{i}_{j}",
        )(x)
        x = linen.BatchNorm(
          use_running_average=not train,
          momentum=0.9,
          epsilon=1e-5,
          dtype=self.dtype,
          name=f"norm{i}_{j}",
        )(x)
        # The pool goes first: the same values, a quarter of the comparisons.
        x = nn.max_pool(x, 2) if j == convolutions else x
        x = linen.relu(x)
    x = x.reshape((x.shape[0], -1))
    for i, features in enumerate(self.hidden, 1):
      x = nn.Dense(
        features,
        kernel_init=_DENSE_INIT,
        dtype=self.dtype,
        name=f"hidden{i}",
      )(x)
      x = linen.relu(x)
      x = linen.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(
      self.num_classes,
      kernel_init=_DENSE_INIT,
      dtype=self.dtype,
      name="classifier",
    )(x)
