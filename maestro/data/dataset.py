"""The types that every data set of this package is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from maestro.errors import UserError


class DataError(UserError):
  """Say which data set or `config.data` key is wrong, and the remedy."""


# eq=False: comparing arrays has no single truth value; identity is enough.
@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Hold one split of a data set in host memory.

  Attributes:
    inputs: [n, ...], in the stored dtype (uint8 for images).
    targets: [n] int32 class labels, or [n, d] float32 regression targets.
  """

  inputs: np.ndarray
  targets: np.ndarray

  def __len__(self) -> int:
    return len(self.inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Hold the three splits of a data set and the way to its model inputs.

  Attributes:
    name: Key of `maestro.data.DATASETS`.
    train: Split to fit.
    val: Split to choose hyperparameters, ranks and checkpoints on.
    test: Split to report, once.
    num_classes: Number of classes; None for regression targets.
    preprocess: Pure JAX function `(inputs, key=None) -> float32 inputs` on a
      batch, to be run on device. A key is given in training only and asks for
      augmentation.
  """

  name: str
  train: Split
  val: Split
  test: Split
  num_classes: int | None
  preprocess: Callable[..., jax.Array]

  def __post_init__(self):
    for name in ("train", "val", "test"):
      self._check(name, getattr(self, name))

  def _check(self, name: str, split: Split) -> None:
    where = f"data set {self.name!r}, {name} split"
    if len(split.inputs) != len(split.targets):
      raise DataError(
        f"{where}: {len(split.inputs)} inputs but {len(split.targets)} targets"
      )
    for part in ("inputs", "targets"):
      x = np.asarray(getattr(split, part))
      if x.dtype.kind in "fc" and not np.all(np.isfinite(x)):
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise DataError(
          f"{where}: {part}{list(at)} is {x[at]}; leave that example out"
        )
    targets = np.asarray(split.targets)
    if self.num_classes is None or not len(targets):
      return
    bad = np.flatnonzero((targets < 0) | (targets >= self.num_classes))
    if bad.size:
      raise DataError(
        f"{where}: targets[{bad[0]}] is {targets[bad[0]]}, no class in"
        f" [0, {self.num_classes})"
      )

  @property
  def input_shape(self) -> tuple[int, ...]:
    """The shape of one example, without the batch axis."""
    return self.train.inputs.shape[1:]


def identity(inputs: jax.Array, key: jax.Array | None = None) -> jax.Array:
  """Return the inputs [n, ...] as float32, otherwise unchanged."""
  del key  # No augmentation.
  return jnp.asarray(inputs, jnp.float32)
