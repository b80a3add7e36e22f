"""Files of text: where they are, and how they are read; nothing downloads."""

from __future__ import annotations

import gzip
import os
import pathlib
import zlib
from collections.abc import Sequence

from maestro.data.dataset import DataError


def find(
  folder: str,
  files: Sequence[str],
  *,
  data_dir: str | os.PathLike | None,
  source: str,
) -> pathlib.Path:
  """Returns the folder of a text set.

  It lies in the directory of the data sets, or beside that directory: in
  <data_dir>/<folder>, or else in <data_dir>/../<folder>.

  Args:
    folder: the set's folder.
    files: which it has to hold.
    data_dir: None: the environment variable TFDS_DATA_DIR, else
      ~/tensorflow_datasets.
    source: how to get the files, for the error; {folder} stands for where.

  Raises:
    DataError: If a file is missing: which, where, and how to get it.
  """
  root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  root = pathlib.Path(root).expanduser()
  places = (root / folder, root.absolute().parent / folder)
  place = next((p for p in places if p.is_dir()), places[0])
  missing = [name for name in files if not (place / name).is_file()]
  if missing:
    raise DataError(
      f"no {', '.join(missing)} in {place}"
      + ("" if place.is_dir() else f" nor in {places[1]}")
      + ". Point --data_dir, config.data.data_dir or the environment variable"
      f" TFDS_DATA_DIR to the directory that holds {folder}/, or get them once:"
      f"\n{source.format(folder=place)}"
    )
  return place


def read(path: pathlib.Path) -> str:
  r"""Returns the text of a UTF-8 file, or of a .gz of one; lines end with \n.

  Raises:
    DataError: If the file is damaged.
  """
  try:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise DataError(
      f"cannot read {path}, it is damaged or incomplete"
      f" ({type(error).__name__}: {error}); get it again"
    ) from error
  return text.removeprefix("\ufeff").replace("\r\n", "\n")


def lines(path: pathlib.Path) -> list[str]:
  r"""Returns the lines of a file of `read`, which only \n ends."""
  # str.splitlines would also divide at separators that a line may hold.
  return read(path).removesuffix("\n").split("\n")
