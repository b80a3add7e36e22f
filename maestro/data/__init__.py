"""Data sets by name, in host memory, and the order to read them in.

A data set that fits is loaded whole; batches are gathered and preprocessed on
device. One that does not has `dataset.Rows`, and a `dataset.Stream` to train
on. Nothing here downloads.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from maestro import streams, targets
from maestro.data import (
  digits,
  image,
  imagenet,
  synthetic,
  text_language,
  text_translation,
)
from maestro.data.dataset import (
  DataError,
  Dataset,
  Split,
  Vocabulary,
  epoch_order,
  identity,
)
from maestro.schema import bind

__all__ = [
  "DATASETS",
  "DataError",
  "Dataset",
  "Split",
  "Vocabulary",
  "choice",
  "epoch_order",
  "identity",
  "make",
  "outline",
]
DATASETS = {
  "cifar10": image.cifar10,
  "digits": digits.load,
  "fashion_mnist": image.fashion_mnist,
  "imagenet2012": imagenet.imagenet2012,
  "linear": synthetic.linear,
  "mnist": image.mnist,
  "multi30k": text_translation.multi30k,
  "tinyshakespeare": text_language.tinyshakespeare,
  "wikitext2": text_language.wikitext2,
}
_OUTLINES = {
  **{name: functools.partial(image.outline, name) for name in image.KNOWN},
  "imagenet2012": imagenet.outline,
  "multi30k": text_translation.outline,
  "tinyshakespeare": text_language.outline_tinyshakespeare,
  "wikitext2": text_language.outline_wikitext2,
}


def make(
  name: str | None = None,
  *,
  data_dir: str | os.PathLike | None = None,
  **options,
) -> Dataset:
  """Load a data set by its name, as `make(**config.data)`.

  Args:
    name: A key of `DATASETS`; None with the option `target`, a function of the
      user's own that returns a `Dataset`, see `maestro.targets`.
    data_dir: Where prepared data sets are. None: the environment variable
      TFDS_DATA_DIR, else ~/tensorflow_datasets. Sets without files ignore it.
    **options: The keyword arguments of `DATASETS[name]`; None means default.

  Raises:
    ConfigError: If the name or an option is unknown or out of range.
    DataError: If the data cannot be read, or options do not go together.
  """
  load, given = _bound({"name": name, "data_dir": data_dir, **options})
  dataset = load(**given)
  if not isinstance(dataset, Dataset):
    raise DataError(
      f"config.data.target: {options.get('target')!r} returned a"
      f" {type(dataset).__name__}; it must return a maestro.data.Dataset"
    )
  return dataset


def outline(name: str | None = None, **options) -> Dataset:
  """Returns the sizes, types and preprocessing of a data set, without files.

  The numbers of sets that are read from files are all zero, and take no memory;
  other sets are made as by `make`, whose options these are. Sizes that only a
  text tells are those of the published files; see each set.

  Raises:
    ConfigError: If the name or an option is unknown or out of range.
    DataError: If options do not go together.
  """
  if name not in _OUTLINES:
    return make(name, **options)
  _, given = _bound({"name": name, "data_dir": None, **options})
  given.pop("data_dir", None)
  return _OUTLINES[name](**given)


def _bound(section: dict[str, Any]) -> tuple[Callable[..., Dataset], dict]:
  """Returns how config.data is loaded, and its options, checked."""
  load, options = targets.choose(DATASETS, section, "config.data")
  if "data_dir" not in inspect.signature(load).parameters:
    del options["data_dir"]
  given = {k: v for k, v in options.items() if v is not None}
  return load, bind(load, given, "config.data")


def choice(seed: int, size: int) -> np.ndarray:
  """Returns a permutation [size] to choose examples by, of no epoch's order."""
  key = streams.stream(seed, "choice")
  return np.asarray(jax.random.permutation(key, size))
