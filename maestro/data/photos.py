"""Photographs of any size, decoded and cropped as they are needed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from maestro.data.dataset import DataError, Rows

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

CENTRE = 224 / 256  # of the shorter side, that an evaluation sees
AREA = (0.08, 1.0)  # of a photograph, that training sees
ASPECT = (3 / 4, 4 / 3)  # width / height of that part

_GREY = 128
_TRIES = 100  # photographs in a row, of which one must be whole
# What Pillow raises of bytes that are no image, or of half of one.
_BROKEN = (
  OSError,
  SyntaxError,
  ValueError,
  Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Photos:
  """Some of the encoded photographs of a prepared split, and their classes.

  Attributes:
    source: `prepared.open_split`'s.
    name: of the split, for messages.
    start: the first of them.
    count: how many.
  """

  source: Any
  name: str
  start: int
  count: int

  def read(self, rows: Iterable[int]) -> list[dict[str, Any]]:
    """Reads [{"image": bytes, "label": int}, ...]."""
    return self.source.__getitems__([self.start + int(i) for i in rows])

  def rows(self, rows: slice | np.ndarray) -> Sequence[int]:
    """The numbers that an index of an array of these stands for."""
    if isinstance(rows, slice):
      return range(*rows.indices(self.count))
    return np.asarray(rows).tolist()

  @property
  def digest(self) -> str:
    """Of the files' names and lengths, and of which photographs these are."""
    info = self.source.dataset_info
    files = [repr(split.shard_lengths) for split in info.splits.values()]
    known = [info.name, str(info.version), self.name, *files]
    text = "\n".join([*known, f"{self.start} {self.count}"])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Pixels(Rows):
  """The middle of each photograph: [n, size, size, 3] uint8.

  One that cannot be decoded is grey, and told of once.
  """

  dtype = np.dtype(np.uint8)

  def __init__(self, photos: Photos, size: int):
    self._photos, self.digest = photos, photos.digest
    self.shape = (photos.count, size, size, 3)
    self.unreadable = set()

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    chosen, size = self._photos.rows(rows), self.shape[1]
    encoded = self._photos.read(chosen)
    images = np.empty((len(chosen), size, size, 3), np.uint8)

    def one(i: int) -> None:
      try:
        images[i] = crop(encoded[i]["image"], centre, size)
      except _BROKEN as error:
        images[i] = _GREY
        if chosen[i] not in self.unreadable:
          self.unreadable.add(chosen[i])
          at = self._photos.start + chosen[i]
          logging.warning(
            "%s: photograph %d of the stored split cannot be decoded (%s); it"
            " counts for nothing. To have it, prepare the data set again",
            *(self._photos.name, at, error),
          )

    list(_threads().map(one, range(len(chosen))))
    return images


class Labels(Rows):
  """The class of each photograph: [n] int32."""

  dtype = np.dtype(np.int32)

  def __init__(self, photos: Photos):
    self._photos, self.digest = photos, photos.digest
    self.shape = (photos.count,)
    self.unreadable = set()

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    read = self._photos.read(self._photos.rows(rows))
    return np.array([example["label"] for example in read], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Augmented:
  """Reads photographs to train on, cropped and mirrored at random.

  One that cannot be decoded is replaced by the next that can, and counted.

  Attributes:
    photos: of the training split.
    size: of the square that is returned.
  """

  photos: Photos
  size: int

  def __call__(
    self, rows: np.ndarray, draws: np.ndarray, seed: int
  ) -> dict[str, np.ndarray]:
    """Reads some; see `dataset.Examples`.

    Raises:
      DataError: none of a hundred in a row can be decoded.
    """
    encoded = self.photos.read(rows)
    images = np.empty((len(rows), self.size, self.size, 3), np.uint8)

    def one(i: int) -> tuple[int, bool]:
      example = encoded[i]
      for skipped in range(1, _TRIES + 1):
        try:
          images[i] = augmented(example["image"], self.size, (seed, draws[i]))
        except _BROKEN:
          row = (int(rows[i]) + skipped) % self.photos.count
          (example,) = self.photos.read([row])
        else:
          return example["label"], skipped > 1
      raise DataError(
        f"none of {_TRIES} photographs of {self.photos.name} can be decoded,"
        f" from the {rows[i]}th on; prepare the data set again"
      )

    labels, replaced = zip(*_threads().map(one, range(len(rows))), strict=True)
    return {
      "inputs": images,
      "targets": np.array(labels, np.int32),
      "replaced": np.array(sum(replaced), np.int64),
    }


def crop(
  encoded: bytes, box_of: Callable[[int, int], Box], size: int
) -> np.ndarray:
  """Decodes a photograph and scales a part of it: [size, size, 3] uint8.

  By bilinear interpolation, over all pixels where it makes them fewer. A JPEG
  is decoded at a half, quarter or eighth of its size where that leaves the part
  at least as large as what is returned.

  Args:
    encoded: JPEG, PNG, or what else Pillow reads; grey and CMYK become RGB.
    box_of: (width, height) of the photograph -> the part.
    size: of the square.

  Raises:
    OSError, SyntaxError, ValueError: it cannot be decoded.
  """
  with Image.open(io.BytesIO(encoded)) as image:
    width, height = image.size
    left, top, right, bottom = box_of(width, height)
    least = size / min(right - left, bottom - top)
    if least < 1:
      image.draft(None, (math.ceil(width * least), math.ceil(height * least)))
    x, y = image.size[0] / width, image.size[1] / height
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    square = rgb.resize(
      (size, size),
      Image.Resampling.BILINEAR,
      box=(left * x, top * y, right * x, bottom * y),
    )
  return np.asarray(square)


def augmented(encoded: bytes, size: int, seed: Sequence[int]) -> np.ndarray:
  """A random part of a photograph, every second one mirrored; see `crop`.

  A function of its arguments: the same seed draws the same part.
  """
  random = np.random.default_rng([int(i) for i in seed])
  mirrored = random.random() < 0.5
  image = crop(encoded, functools.partial(random_box, random), size)
  return image[:, ::-1] if mirrored else image


def random_box(random: np.random.Generator, width: int, height: int) -> Box:
  """Draws a part of a photograph: the crop of Szegedy et al. (2015).

  Its area is uniform over AREA, its aspect ratio log-uniform over ASPECT, both
  drawn until it fits, ten times at most; then it is as much of the middle as
  ASPECT allows.
  """
  low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
  for _ in range(10):
    area = width * height * random.uniform(*AREA)
    aspect = math.exp(random.uniform(low, high))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left = random.integers(width - w + 1)
      top = random.integers(height - h + 1)
      return float(left), float(top), float(left + w), float(top + h)
  w = min(width, height * ASPECT[1])
  h = min(height, width / ASPECT[0])
  return _middle(width, height, w, h)


def centre(width: int, height: int) -> Box:
  """The square in the middle that an evaluation sees."""
  side = CENTRE * min(width, height)
  return _middle(width, height, side, side)


def _middle(width: int, height: int, w: float, h: float) -> Box:
  left, top = (width - w) / 2, (height - h) / 2
  return left, top, left + w, top + h


def cores() -> int:
  """That this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
  """Of this process: Pillow decodes and scales without Python's lock."""
  return concurrent.futures.ThreadPoolExecutor(
    min(cores(), 16), thread_name_prefix="photos"
  )
