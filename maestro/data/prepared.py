"""Data sets that tensorflow-datasets has prepared: found and opened."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from maestro.data.dataset import DataError


def find(
  name: str, data_dir: str | os.PathLike | None, first: str = ""
) -> pathlib.Path:
  """Returns the directory of the newest prepared version of a data set.

  Args:
    name: of the set in tensorflow-datasets.
    data_dir: that holds `<name>/<version>/`. None: the environment variable
      TFDS_DATA_DIR, else ~/tensorflow_datasets.
    first: what has to be done before it can be prepared, if it has; {root}
      stands for that directory.

  Raises:
    DataError: it is not there; says how to get it.
  """
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
      f"no data set {name!r} in {root}. Point --data_dir, config.data.data_dir"
      " or the environment variable TFDS_DATA_DIR to the directory that holds"
      f" {name}/<version>/, or prepare it there (needs a network and"
      f" TensorFlow, once):\n{first.format(root=root)}{_command(name, root)}"
    )
  return max(versions, key=lambda path: [*map(int, path.name.split("."))])


@contextlib.contextmanager
def reading(name: str, directory: pathlib.Path) -> Iterator[None]:
  """Turns what damaged files raise within into one error with the remedy.

  Raises:
    DataError: as it was raised within, or for another error that is the data's
      fault.
  """
  command = _command(name, directory.parent.parent)
  try:
    yield
  except (DataError, ImportError, MemoryError):
    raise  # Not the data's fault.
  except NotImplementedError as error:
    # What tensorflow-datasets raises for formats without random access.
    raise DataError(
      f"{name!r} in {directory} is not stored in a random-access format (such"
      " as tfrecord, its default). Prepare it as array_record, in another"
      f" directory or after deleting this one:\n{command}"
    ) from error
  except Exception as error:
    # Damage shows as any of a dozen types: JSON, protobuf, reader, PNG, ...
    raise DataError(
      f"cannot read {name!r} from {directory}, it is damaged or incomplete"
      f" ({type(error).__name__}: {error}). Delete that directory, then prepare"
      f" the data set again:\n{command}"
    ) from error


def open_split(directory: pathlib.Path, split: str) -> Any:
  """Returns the random-access source of a split's encoded examples."""
  # Imported here: it takes a second, which sets without files need not spend.
  import tensorflow_datasets as tfds

  _check_features(directory / "features.json")
  builder: Any = tfds.builder_from_directory(directory)
  return builder.as_data_source(
    split, decoders={"image": tfds.decode.SkipDecoding()}
  )


def _check_features(path: pathlib.Path) -> None:
  """Raises unless all classes that a data set names are tfds' own features.

  tensorflow-datasets imports whatever module features.json names.
  """
  keys = ("pythonClassName", "python_class_name", "type")  # all that it reads
  names, nodes = [], [json.loads(path.read_text(encoding="utf-8"))]
  while nodes:
    node = nodes.pop()
    if isinstance(node, dict):
      names += [v for k, v in node.items() if k in keys]
      nodes += node.values()
    elif isinstance(node, list):
      nodes += node
  known = r"tensorflow_datasets\.core\.features\.[a-z_]+\.[A-Za-z]+"
  for name in names:
    if not isinstance(name, str) or not re.fullmatch(known, name):
      raise DataError(
        f"{path} names the class {name!r}, which is none of"
        " tensorflow-datasets' features and is not imported; prepare the data"
        " set anew, or point config.data.data_dir to another directory"
      )


def train_size(
  name: str, n: int, val_examples: int, train_examples: int | None
) -> int:
  """Returns how many to train on, of n examples beside the validation split.

  Raises:
    DataError: an option is out of range.
  """
  if n <= 0:
    raise DataError(
      f"config.data.val_examples={val_examples} leaves nothing to train on:"
      f" {name!r} has {n + val_examples} train examples. Choose a smaller"
      " number."
    )
  if train_examples is None:
    return n
  if train_examples > n:
    raise DataError(
      f"config.data.train_examples={train_examples} is too many: {name!r} has"
      f" {n} left beside config.data.val_examples={val_examples}"
    )
  return train_examples


def _command(name: str, root: pathlib.Path) -> str:
  return (
    "pip install tensorflow-cpu tensorflow-datasets && python -c"
    f' "import tensorflow_datasets as tfds; tfds.builder({name!r},'
    f" file_format='array_record', data_dir={str(root)!r})"
    '.download_and_prepare()"'
  )
