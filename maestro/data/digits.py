"""Scikit-learn's 8x8 handwritten digits: real data, no files, no network."""

from __future__ import annotations

from typing import Any

import numpy as np

from maestro.data.dataset import Dataset, Split, identity


def load() -> Dataset:
  """Load 1,797 digits of 10 classes, split 60/20/20 and stratified.

  The split is fixed (seed 0): 1,077 train, 360 val, 360 test.

  Returns:
    Inputs [n, 8, 8, 1] float32 in [0, 1], targets [n] int32.
  """
  # Imported here: it takes a second, which other data sets need not spend.
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  bunch: Any = load_digits()
  inputs = (bunch.images[..., None] / 16).astype(np.float32)
  targets = bunch.target.astype(np.int32)

  def split(x, y, test_size) -> Any:
    return train_test_split(
      x, y, test_size=test_size, stratify=y, random_state=0
    )

  x, x_test, y, y_test = split(inputs, targets, 0.2)
  x_train, x_val, y_train, y_val = split(x, y, 0.25)
  return Dataset(
    name="digits",
    train=Split(x_train, y_train),
    val=Split(x_val, y_val),
    test=Split(x_test, y_test),
    num_classes=10,
    preprocess=identity,
  )
