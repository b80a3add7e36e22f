"""Image sets prepared by tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from maestro.data import augment, prepared
from maestro.data.dataset import Dataset, Split
from maestro.schema import Count


def cifar10(
  *,
  data_dir: str | os.PathLike | None = None,
  val_examples: Count = 5000,
  train_examples: Count | None = None,
) -> Dataset:
  """Load CIFAR-10: 32x32x3 uint8, 10 classes; see `_load`.

  Training images are padded by 4 black pixels, cropped back at random and
  mirrored at random, before they are standardized (the paper's recipe).
  """
  return _load("cifar10", data_dir, val_examples, train_examples)


def fashion_mnist(
  *,
  data_dir: str | os.PathLike | None = None,
  val_examples: Count = 5000,
  train_examples: Count | None = None,
) -> Dataset:
  """Load Fashion-MNIST: 28x28x1 uint8, 10 classes; see `_load`."""
  return _load("fashion_mnist", data_dir, val_examples, train_examples)


def mnist(
  *,
  data_dir: str | os.PathLike | None = None,
  val_examples: Count = 5000,
  train_examples: Count | None = None,
) -> Dataset:
  """Load MNIST: 28x28x1 uint8, 10 classes; see `_load`."""
  return _load("mnist", data_dir, val_examples, train_examples)


def standardize(
  inputs: jax.Array,
  key: jax.Array | None = None,
  *,
  mean: float | Sequence[float],
  std: float | Sequence[float],
  augmentation: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Map uint8 pixels x [n, ..., c] to float32 (x / 255 - mean) / std.

  Args:
    inputs: raw pixels.
    key: JAX key, in training only: asks for augmentation.
    mean: one number, or one for each of the c channels.
    std: likewise.
    augmentation: `(raw pixels, key) -> raw pixels`; None is none.
  """
  if augmentation is not None and key is not None:
    inputs = augmentation(inputs, key)
  channels = (1,) * (inputs.ndim - 1) + (-1,)
  m, s = (np.reshape(np.asarray(x, np.float32), channels) for x in (mean, std))
  return (jnp.asarray(inputs, jnp.float32) / 255 - m) / s


@dataclasses.dataclass(frozen=True)
class Known:
  """What is known of an image set without its files; all have ten classes.

  Attributes:
    shape: of an image.
    train: images of the stored train split.
    test: images of the test split.
    preprocess: see `Dataset`.
  """

  shape: tuple[int, int, int]
  train: int
  test: int
  preprocess: Callable[..., jax.Array]


KNOWN = {
  "cifar10": Known(
    (32, 32, 3),
    50_000,
    10_000,
    functools.partial(
      standardize,
      mean=(0.4914, 0.4822, 0.4465),
      std=(0.2023, 0.1994, 0.2010),
      augmentation=augment.pad_crop_flip,
    ),
  ),
  "fashion_mnist": Known(
    (28, 28, 1),
    60_000,
    10_000,
    functools.partial(standardize, mean=0.2860, std=0.3530),
  ),
  "mnist": Known(
    (28, 28, 1),
    60_000,
    10_000,
    functools.partial(standardize, mean=0.1307, std=0.3081),
  ),
}


def outline(
  name: str,
  *,
  val_examples: Count = 5000,
  train_examples: Count | None = None,
) -> Dataset:
  """Return a data set of zeros that has the sizes of a known one.

  It takes no memory and no files; the arrays are read-only.

  Args:
    name: A key of `KNOWN`.
    val_examples: As in loading it.
    train_examples: As in loading it.

  Raises:
    DataError: If `val_examples` or `train_examples` is out of range.
  """
  known = KNOWN[name]

  def zeros(n):
    x = np.broadcast_to(np.zeros((), np.uint8), (n, *known.shape))
    return Split(x, np.broadcast_to(np.zeros((), np.int32), (n,)))

  n = known.train - val_examples
  return Dataset(
    name=name,
    train=zeros(prepared.train_size(name, n, val_examples, train_examples)),
    val=zeros(val_examples),
    test=zeros(known.test),
    num_classes=10,
    preprocess=known.preprocess,
  )


def _load(name, data_dir, val_examples, train_examples) -> Dataset:
  """Read a prepared image set into host memory; never download.

  The validation split is the *last* `val_examples` of the stored train split.
  The stored order is tensorflow-datasets' fixed pseudo-random order, so the
  rule is the same on every machine and the classes come out near balance.

  Args:
    name: Name of the set in tensorflow-datasets.
    data_dir: Directory that holds `<name>/<version>/`. None: the environment
      variable TFDS_DATA_DIR, else ~/tensorflow_datasets.
    val_examples: Size of the validation split, in (0, n) for n train examples.
    train_examples: Train on the first so many of the rest, for short runs;
      None is all of them.

  Returns:
    Inputs [n, h, w, c] uint8, targets [n] int32.

  Raises:
    DataError: If the set is missing, damaged or not in a random-access format,
      or `val_examples` or `train_examples` is out of range.
  """
  directory = prepared.find(name, data_dir)
  with prepared.reading(name, directory):
    train = prepared.open_split(directory, "train")
    test = prepared.open_split(directory, "test")
    n = len(train) - val_examples
    size = prepared.train_size(name, n, val_examples, train_examples)
    # A short run also decodes only what it uses.
    return Dataset(
      name=name,
      train=_read(train, range(size)),
      val=_read(train, range(n, len(train))),
      test=_read(test, range(len(test))),
      num_classes=train.dataset_info.features["label"].num_classes,
      preprocess=KNOWN[name].preprocess,
    )


def _read(source, indices) -> Split:
  """Return images [n, h, w, c] uint8 and labels [n] int32 at some indices."""
  # One batched read, and Pillow called directly: a third of the time of
  # `source[i]`, which reads one record and walks the feature tree each time.
  examples = source.__getitems__(indices)
  shape = source.dataset_info.features["image"].shape
  images = np.empty((len(examples), *shape), np.uint8)
  for i, example in enumerate(examples):
    pixels = np.asarray(Image.open(io.BytesIO(example["image"])))
    images[i] = pixels.reshape(shape)
  labels = np.array([example["label"] for example in examples], np.int32)
  return Split(images, labels)
