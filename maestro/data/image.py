"""Image sets prepared by tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

import functools
import io
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from maestro.data.dataset import DataError, Dataset, Split


def mnist(*, data_dir=None, val_examples: int = 5000) -> Dataset:
  """Load MNIST: 28x28x1 uint8, 10 classes; see `_load`."""
  return _load("mnist", data_dir, val_examples, mean=0.1307, std=0.3081)


def fashion_mnist(*, data_dir=None, val_examples: int = 5000) -> Dataset:
  """Load Fashion-MNIST: 28x28x1 uint8, 10 classes; see `_load`."""
  return _load("fashion_mnist", data_dir, val_examples, mean=0.2860, std=0.3530)


def standardize(
  inputs: jax.Array,
  key: jax.Array | None = None,
  *,
  mean: float,
  std: float,
) -> jax.Array:
  """Map uint8 pixels x [n, ...] to float32 (x / 255 - mean) / std."""
  del key  # No augmentation.
  return (jnp.asarray(inputs, jnp.float32) / 255 - mean) / std


def _load(name, data_dir, val_examples, *, mean, std) -> Dataset:
  """Read a prepared image set into host memory; never download.

  The validation split is the *last* `val_examples` of the stored train split.
  The stored order is tensorflow-datasets' fixed pseudo-random order, so the
  rule is the same on every machine and the classes come out near balance.

  Args:
    name: Name of the set in tensorflow-datasets.
    data_dir: Directory that holds `<name>/<version>/`. None: the environment
      variable TFDS_DATA_DIR, else ~/tensorflow_datasets.
    val_examples: Size of the validation split, in (0, n) for n train examples.
    mean: Mean of all train pixels, in [0, 1].
    std: Standard deviation of all train pixels, in [0, 1].

  Returns:
    Inputs [n, h, w, c] uint8, targets [n] int32.

  Raises:
    DataError: If the set is missing, damaged or not in a random-access format,
      or `val_examples` is out of range.
  """
  if not isinstance(val_examples, int) or val_examples <= 0:
    raise DataError(
      f"config.data.val_examples={val_examples!r} must be a positive integer"
    )
  directory = _find(name, data_dir)
  try:
    inputs, targets, num_classes = _read(directory, "train")
    test_inputs, test_targets, _ = _read(directory, "test")
  except NotImplementedError as error:
    # What tensorflow-datasets raises for formats without random access.
    raise DataError(
      f"{name!r} in {directory} is not stored in a random-access format (such"
      " as tfrecord, its default). Prepare it as array_record, in another"
      " directory or after deleting this one:\n"
      f"{_prepare_command(name, directory.parent.parent)}"
    ) from error
  except (ImportError, MemoryError):
    raise  # The machine's fault, not the data's.
  except Exception as error:
    # Damage shows as any of a dozen types: JSON, protobuf, reader, PNG, ...
    raise DataError(
      f"cannot read {name!r} from {directory}, it is damaged or incomplete"
      f" ({type(error).__name__}: {error}). Delete that directory, then prepare"
      f" the data set again:\n{_prepare_command(name, directory.parent.parent)}"
    ) from error
  n = len(inputs) - val_examples
  if n <= 0:
    raise DataError(
      f"config.data.val_examples={val_examples} leaves nothing to train on:"
      f" {name!r} has {len(inputs)} train examples. Choose a smaller number."
    )
  return Dataset(
    name=name,
    train=Split(inputs[:n], targets[:n]),
    val=Split(inputs[n:], targets[n:]),
    test=Split(test_inputs, test_targets),
    num_classes=num_classes,
    preprocess=functools.partial(standardize, mean=mean, std=std),
  )


def _find(name, data_dir) -> pathlib.Path:
  """Return the directory of the newest prepared version of a data set."""
  root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  root = pathlib.Path(root).expanduser()
  # Looked up here and not by `tfds.data_source(name)`, which for a missing set
  # asks the network; unfinished ones are `<version>.incomplete...`, no match.
  versions = [
    path
    for path in root.glob(f"{name}/*")
    if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
  ]
  if not versions:
    raise DataError(
      f"no data set {name!r} in {root}. Point config.data.data_dir or the"
      " environment variable TFDS_DATA_DIR to the directory that holds"
      f" {name}/<version>/, or prepare it there (needs a network and"
      f" TensorFlow, once):\n{_prepare_command(name, root)}"
    )
  return max(versions, key=lambda path: [*map(int, path.name.split("."))])


def _prepare_command(name, root) -> str:
  return (
    "pip install tensorflow-cpu tensorflow-datasets && python -c"
    f' "import tensorflow_datasets as tfds; tfds.builder({name!r},'
    f" file_format='array_record', data_dir={str(root)!r})"
    '.download_and_prepare()"'
  )


def _read(directory, split):
  """Return images [n, h, w, c] uint8, labels [n] int32, number of classes."""
  # Imported here: it takes a second, which sets without files need not spend.
  import tensorflow_datasets as tfds

  builder: Any = tfds.builder_from_directory(directory)
  # One batched read, and Pillow called directly: a third of the time of
  # `source[i]`, which reads one record and walks the feature tree each time.
  source = builder.as_data_source(
    split, decoders={"image": tfds.decode.SkipDecoding()}
  )
  examples = source.__getitems__(range(len(source)))
  shape = builder.info.features["image"].shape
  images = np.empty((len(examples), *shape), np.uint8)
  for i, example in enumerate(examples):
    pixels = np.asarray(Image.open(io.BytesIO(example["image"])))
    images[i] = pixels.reshape(shape)
  labels = np.array([example["label"] for example in examples], np.int32)
  return images, labels, builder.info.features["label"].num_classes
