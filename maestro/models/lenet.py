"""LeNet-5 as the paper trains it on MNIST."""

import functools

import flax.linen as linen
import jax

from maestro import nn
from maestro.errors import UserError
from maestro.schema import Count

KERNEL_INITS = {
  "lecun_normal": linen.initializers.lecun_normal(),
  "torch": linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


class LeNet(linen.Module):
  """Convolutions 1-6-16, 5x5 valid, then 256-120-84-10; max-pool and ReLU.

  With inputs [b, 28, 28, 1] and 10 classes: 44,426 parameters, 281,640 MACs.

  Attributes:
    num_classes: number of logits.
    kernel_init: a key of `KERNEL_INITS`; "torch" is PyTorch's default, uniform
      within 1 / sqrt(fan in). Its weights are smaller by sqrt(3), which matters
      here: a penalty needs less time to take them to zero.
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  num_classes: Count
  kernel_init: str = "lecun_normal"
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    del train
    if self.kernel_init not in KERNEL_INITS:
      raise UserError(
        f"config.model.kernel_init: {self.kernel_init!r} is unknown; one of"
        f" {sorted(KERNEL_INITS)}"
      )
    init = KERNEL_INITS[self.kernel_init]
    dense = functools.partial(nn.Dense, kernel_init=init, dtype=self.dtype)
    for i, width in enumerate((6, 16), 1):
      conv = nn.Conv(
        width,
        (5, 5),
        padding="VALID",
        kernel_init=init,
        dtype=self.dtype,
        name=f"conv{i}",
      )
      x = linen.relu(nn.max_pool(conv(x), 2))  # cheaper in this order
    x = x.reshape((x.shape[0], -1))
    for i, width in enumerate((120, 84), 1):
      x = linen.relu(dense(width, name=f"fc{i}")(x))
    return dense(self.num_classes, name="fc3")(x)
