"""A multi-layer perceptron on flattened inputs."""

from collections.abc import Sequence

import flax.linen as linen
import jax

from maestro import nn
from maestro.schema import Count


class MLP(linen.Module):
  """Dense layers with ReLU between them: [b, ...] -> [b, num_classes].

  Attributes:
    num_classes: number of logits.
    features: widths of the hidden layers.
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  num_classes: Count
  features: Sequence[Count] = (256, 128)
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    del train
    x = x.reshape((x.shape[0], -1))
    for i, width in enumerate(self.features, 1):
      x = linen.relu(nn.Dense(width, dtype=self.dtype, name=f"fc{i}")(x))
    name = f"fc{len(self.features) + 1}"
    return nn.Dense(self.num_classes, dtype=self.dtype, name=name)(x)
