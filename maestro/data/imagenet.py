"""ImageNet: photographs of 1,000 classes, read while a network trains."""

from __future__ import annotations

import functools
import os

import numpy as np

from maestro.data import photos, prepared
from maestro.data.dataset import DataError, Dataset, Split, Stream
from maestro.data.image import standardize
from maestro.schema import Count, Natural

_TRAIN, _TEST, _CLASSES = 1_281_167, 50_000, 1000
_FIRST = (
  "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, of image-net.org,"
  " into {root}/downloads/manual, then\n"
)
_CORES_A_WORKER = 8
_PREPROCESS = functools.partial(
  standardize, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def imagenet2012(
  *,
  data_dir: str | os.PathLike | None = None,
  val_examples: Count = 10_000,
  train_examples: Count | None = None,
  size: Count = 224,
  workers: Natural | None = None,
) -> Dataset:
  """Opens ImageNet (ILSVRC 2012) as tensorflow-datasets prepares it.

  Photographs are decoded as they are needed. In training, a random part of each
  is scaled to a square and mirrored at random (`photos.random_box`); one that
  cannot be decoded is replaced by the next, and counted. Elsewhere it is the
  middle. The validation split is the last of the stored train split, the test
  split is the stored validation split, whose 50,000 the field reports.

  Args:
    data_dir: Directory that holds imagenet2012/<version>/, in array_record
      format. None: the environment variable TFDS_DATA_DIR, else
      ~/tensorflow_datasets.
    val_examples: Size of the validation split.
    train_examples: Train on the first so many of the rest; None is all.
    size: Of the squares.
    workers: Processes that decode, with a thread for each core. None: one for
      each eight cores; with fewer, none, which is threads of this process.

  Returns:
    Inputs [n, size, size, 3] uint8 and targets [n] int32, both
    `dataset.Rows`.

  Raises:
    DataError: If the set is missing, damaged or not in a random-access format,
      or an option is out of range.
  """
  name = "imagenet2012"
  directory = prepared.find(name, data_dir, _FIRST)
  with prepared.reading(name, directory):
    train = prepared.open_split(directory, "train")
    test = prepared.open_split(directory, "validation")
    n = len(train) - val_examples
    count = prepared.train_size(name, n, val_examples, train_examples)
    classes = train.dataset_info.features["label"].num_classes
    fit = photos.Photos(train, "train", 0, count)
    val = photos.Photos(train, "train", n, val_examples)
    shown = photos.Photos(test, "validation", 0, len(test))
    for some in (fit, val, shown):  # damaged files are told before a run
      some.read([0, some.count - 1])
    return Dataset(
      name=name,
      train=_split(fit, size),
      val=_split(val, size),
      test=_split(shown, size),
      num_classes=classes,
      preprocess=_PREPROCESS,
      stream=Stream(photos.Augmented(fit, size), _workers(workers)),
    )


def outline(
  *,
  val_examples: Count = 10_000,
  train_examples: Count | None = None,
  size: Count = 224,
  workers: Natural | None = None,
) -> Dataset:
  """Returns a data set of zeros that has the sizes of `imagenet2012`.

  It takes no files and no memory.

  Raises:
    DataError: If `val_examples` or `train_examples` is out of range.
  """

  def zeros(n: int) -> Split:
    x = np.broadcast_to(np.zeros((), np.uint8), (n, size, size, 3))
    return Split(x, np.broadcast_to(np.zeros((), np.int32), (n,)))

  name, n = "imagenet2012", _TRAIN - val_examples
  return Dataset(
    name=name,
    train=zeros(prepared.train_size(name, n, val_examples, train_examples)),
    val=zeros(val_examples),
    test=zeros(_TEST),
    num_classes=_CLASSES,
    preprocess=_PREPROCESS,
    stream=Stream(_nothing, _workers(workers)),
  )


def _split(found: photos.Photos, size: int) -> Split:
  return Split(photos.Pixels(found, size), photos.Labels(found))


def _workers(asked: int | None) -> int:
  return photos.cores() // _CORES_A_WORKER if asked is None else asked


def _nothing(rows: np.ndarray, draws: np.ndarray, seed: int) -> dict:
  raise DataError("an outline of imagenet2012 has no photographs to read")
