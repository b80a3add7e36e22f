"""LeNet-5 as the paper trains it on MNIST."""

import flax.linen as linen
import jax

from maestro import nn


class LeNet(linen.Module):
  """Convolutions 1-6-16, 5x5 valid, then 256-120-84-10; max-pool and ReLU.

  With inputs [b, 28, 28, 1] and 10 classes: 44,426 parameters, 281,640 MACs.

  Attributes:
    num_classes: number of logits.
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  num_classes: int
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    del train
    for i, width in enumerate((6, 16), 1):
      conv = nn.Conv(
        width, (5, 5), padding="VALID", dtype=self.dtype, name=f"conv{i}"
      )
      x = linen.relu(nn.max_pool(conv(x), 2))  # cheaper in this order
    x = x.reshape((x.shape[0], -1))
    for i, width in enumerate((120, 84), 1):
      x = linen.relu(nn.Dense(width, dtype=self.dtype, name=f"fc{i}")(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="fc3")(x)
