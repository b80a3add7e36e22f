"""The peers in plain Flax: four networks of `flax.linen` only.

Written as a user of Flax would write them. Modules have the names that they
have in `maestro.models`, so that one tree of parameters serves both.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

_ONES = ((1, 1), (1, 1))


def _norm(train: bool, dtype: str | None):
  return functools.partial(
    nn.BatchNorm,
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
  )


class MLP(nn.Module):
  """The peer of `maestro.models.MLP`."""

  num_classes: int
  features: tuple[int, ...] = (256, 128)
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits [b, num_classes] of images [b, h, w, c]."""
    del train
    x = x.reshape((x.shape[0], -1))
    for i, width in enumerate(self.features, 1):
      x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"fc{i}")(x))
    name = f"fc{len(self.features) + 1}"
    return nn.Dense(self.num_classes, dtype=self.dtype, name=name)(x)


class LeNet(nn.Module):
  """The peer of `maestro.models.LeNet`, pooled by `flax.linen.max_pool`."""

  num_classes: int
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    del train
    conv = functools.partial(nn.Conv, padding="VALID", dtype=self.dtype)
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    for i, width in enumerate((6, 16), 1):
      x = nn.relu(conv(width, (5, 5), name=f"conv{i}")(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape((x.shape[0], -1))
    for i, width in enumerate((120, 84), 1):
      x = nn.relu(dense(width, name=f"fc{i}")(x))
    return dense(self.num_classes, name="fc3")(x)


class Block(nn.Module):
  """The peer of `maestro.models.resnet.Block`."""

  features: int
  stride: int = 1
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = _norm(train, self.dtype)
    strides = (self.stride, self.stride)
    y = conv(self.features, (3, 3), strides, _ONES, name="conv1")(x)
    y = nn.relu(norm(name="norm1")(y))
    y = conv(self.features, (3, 3), (1, 1), _ONES, name="conv2")(y)
    y = norm(name="norm2")(y)
    if self.stride > 1 or x.shape[-1] != self.features:
      x = conv(self.features, (1, 1), strides, name="shortcut")(x)
      x = norm(name="shortcut_norm")(x)
    return nn.relu(x + y)


class ResNet18(nn.Module):
  """The peer of `maestro.models.ResNet18` with stem="cifar"."""

  num_classes: int
  width: int = 64
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Conv(
      self.width,
      (3, 3),
      padding=_ONES,
      use_bias=False,
      dtype=self.dtype,
      name="stem",
    )(x)
    x = nn.relu(_norm(train, self.dtype)(name="stem_norm")(x))
    for i in range(4):
      for j in range(2):
        x = Block(
          self.width * 2**i,
          stride=2 if i > 0 and j == 0 else 1,
          dtype=self.dtype,
          name=f"stage{i + 1}_block{j + 1}",
        )(x, train)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)


class VGG19(nn.Module):
  """The peer of `maestro.models.VGG19`, pooled by `flax.linen.max_pool`."""

  num_classes: int
  width: int = 64
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    stages = ((2, 1), (2, 2), (4, 4), (4, 8), (4, 8))
    for i, (convolutions, multiple) in enumerate(stages, 1):
      for j in range(1, convolutions + 1):
        x = nn.Conv(
          self.width * multiple,
          (3, 3),
          padding=_ONES,
          dtype=self.dtype,
          name=f"conv{i}_{j}",
        )(x)
        x = nn.relu(_norm(train, self.dtype)(name=f"norm{i}_{j}")(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape((x.shape[0], -1))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)


NETWORKS = {
  "lenet": LeNet,
  "mlp": MLP,
  "resnet18": ResNet18,
  "vgg19": VGG19,
}
