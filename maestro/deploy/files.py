"""Writes safetensors files, and reads any run of rows of a tensor alone.

The format: 8 bytes, the length n of the header (little-endian); n bytes of
JSON, {name: {"dtype", "shape", "data_offsets": [begin, end]}} with text under
"__metadata__"; then the tensors, C-contiguous and little-endian, without gaps.
Its library writes. It reads by mapping the file; the reader here asks for the
header and the rows that are wanted, each byte once, and counts them, as is
needed where a file is not local.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from maestro.errors import UserError

DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "I16": np.dtype(np.int16),
  "U16": np.dtype(np.uint16),
  "I32": np.dtype(np.int32),
  "U32": np.dtype(np.uint32),
  "I64": np.dtype(np.int64),
  "U64": np.dtype(np.uint64),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
}
_METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # the limit of the format's own library


class SafetensorsError(UserError):
  """A file is no safetensors file, is broken, or lacks what is asked for."""


def write(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> bytes:
  """Writes tensors to a new file and returns its header, length included.

  Raises:
    SafetensorsError: a tensor is of a dtype that the format has not, or the
      file cannot be written.
  """
  arrays = {name: np.array(x, order="C") for name, x in tensors.items()}
  for name, x in arrays.items():
    if x.dtype not in DTYPES.values():
      raise SafetensorsError(
        f"{name!r}: dtype {x.dtype} cannot be stored; one of {sorted(DTYPES)}"
      )
  try:
    safetensors.numpy.save_file(arrays, path, dict(metadata or {}))
  except safetensors.SafetensorError as error:
    raise SafetensorsError(
      f"cannot write {path}: {error}; free space or choose another --out"
    ) from error
  with pathlib.Path(path).open("rb") as file:
    os.fsync(file.fileno())
  with Reader(path) as reader:
    return reader.header


def data_of(x: np.ndarray) -> bytes:
  """Returns the bytes of an array as the format stores them."""
  little = x.dtype.newbyteorder("<") if x.dtype.kind in "iuf" else x.dtype
  return np.ascontiguousarray(x, dtype=little).tobytes()


class Reader:
  """Reads rows of the tensors of one file; a context manager.

  Attributes:
    shapes: {name: shape}.
    metadata: {name: text}.
    header: the first bytes of the file, up to the first tensor.
    bytes_read: how many bytes have been read from the file so far.
  """

  def __init__(self, path: str | os.PathLike, file: Any = None):
    """Opens a file.

    Args:
      path: of it.
      file: what to read instead, by `seek`, `read` and `close`, if it is on no
        disk; `path` is then what errors call it.
    """
    self._path, self._file = path, file
    self.bytes_read = 0
    try:
      # Without a buffer, which would read more than it is asked for.
      if file is None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
      raise SafetensorsError(
        f"cannot read {self._path}: {error.strerror}"
      ) from error
    try:
      self._read_header()
    except BaseException:
      self.close()
      raise

  def _read_header(self) -> None:
    start = self._read(0, 8, "its header")
    (n,) = struct.unpack("<Q", start)
    size = self._file.seek(0, os.SEEK_END)
    if not 2 <= n <= min(size - 8, MAX_HEADER):
      raise self._broken(f"no header of {n} bytes can be in it")
    text = self._read(8, n, "its header")
    self.header = start + text
    try:
      header = json.loads(text)
      self.metadata = dict(header.pop(_METADATA, {}))
      self.shapes: dict[str, tuple[int, ...]] = {}
      self._dtypes: dict[str, np.dtype] = {}
      self._begins: dict[str, int] = {}
      tiled = 0
      entries = sorted(header.items(), key=lambda e: e[1]["data_offsets"])
      for name, entry in entries:
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        whole = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
        if not whole or end - begin != math.prod(shape) * dtype.itemsize:
          raise ValueError(f"the offsets of {name!r} do not fit its shape")
        if 8 + n + end > size:
          raise ValueError(f"{name!r} ends beyond the end of the file")
        if begin != tiled:
          raise ValueError(f"{name!r} overlaps another tensor, or leaves a gap")
        tiled = end
        self.shapes[name], self._dtypes[name] = shape, dtype
        self._begins[name] = 8 + n + begin
    except KeyError as error:
      raise self._broken(f"unknown dtype or missing key {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
      raise self._broken(str(error)) from error

  def _broken(self, why: str) -> SafetensorsError:
    return SafetensorsError(f"{self._path} is no valid safetensors file: {why}")

  def _read(self, begin: int, size: int, what: str) -> bytes:
    self._file.seek(begin)
    chunks, missing = [], size
    while missing:  # one read may return less, a very large one always does
      chunk = self._file.read(missing)
      if not chunk:
        raise self._broken(f"it ends within {what}")
      self.bytes_read += len(chunk)
      missing -= len(chunk)
      chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)

  def read(
    self, name: str, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    """Reads rows [start, stop) of a tensor; all by default, or if a scalar."""
    begin, end = self.span(name, start, stop)
    shape, dtype = self.shapes[name], self._dtypes[name]
    if shape:
      stop = shape[0] if stop is None else stop
      shape = (stop - start, *shape[1:])
    data = self._read(begin, end - begin, repr(name))
    little = dtype.newbyteorder("<") if dtype.kind in "iuf" else dtype
    return np.frombuffer(data, little).astype(dtype).reshape(shape)

  def span(
    self, name: str, start: int = 0, stop: int | None = None
  ) -> tuple[int, int]:
    """Where in the file rows [start, stop) of a tensor begin and end."""
    if name not in self.shapes:
      raise SafetensorsError(f"{self._path} holds no tensor {name!r}")
    shape, dtype = self.shapes[name], self._dtypes[name]
    begin = self._begins[name]
    if not shape:
      return begin, begin + dtype.itemsize
    stop = shape[0] if stop is None else stop
    if not 0 <= start <= stop <= shape[0]:
      raise SafetensorsError(
        f"{self._path}: {name!r} has {shape[0]} rows, not {start} to {stop}"
      )
    row = math.prod(shape[1:]) * dtype.itemsize
    return begin + start * row, begin + stop * row

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *_) -> None:
    self.close()
