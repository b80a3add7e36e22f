"""The reader against the format's library, and broken files."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from maestro.deploy import files as safetensors_io
from maestro.deploy.files import DTYPES, Reader, SafetensorsError, write

TENSORS = {
  "b/u": np.arange(12, dtype=np.float32).reshape(4, 3),
  "a": np.asarray([1.5, -2, 3], jnp.bfloat16),
  "scalar": np.asarray(7, np.int32),
  "none": np.zeros((0, 5), np.float32),
  "flags": np.asarray([True, False, True]),
  "wide": np.asarray([[1e-300]], np.float64),
}


@pytest.fixture
def path(tmp_path):
  write(tmp_path / "x.safetensors", TENSORS, {"format": "test"})
  return tmp_path / "x.safetensors"


def test_what_is_written_is_read(path):
  with Reader(path) as reader:
    assert reader.metadata == {"format": "test"}
    assert reader.shapes == {name: x.shape for name, x in TENSORS.items()}
    for name, x in TENSORS.items():
      np.testing.assert_array_equal(reader.read(name), x, strict=True)
    assert reader.bytes_read == path.stat().st_size  # each byte once


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_survives(tmp_path, name):
  x = np.asarray([0, 1, 1], DTYPES[name])
  write(tmp_path / "x", {"x": x})
  with Reader(tmp_path / "x") as reader:
    np.testing.assert_array_equal(reader.read("x"), x, strict=True)


def test_the_library_reads_what_is_written(tmp_path):
  # NumPy has no bfloat16, and what is turned around is not contiguous.
  plain = {k: x.T for k, x in TENSORS.items() if k != "a"}
  write(tmp_path / "plain", plain)
  found = safetensors.numpy.load_file(tmp_path / "plain")
  assert found.keys() == plain.keys()
  for name, x in plain.items():
    np.testing.assert_array_equal(found[name], x, strict=True)


def test_what_the_library_writes_is_read(tmp_path):
  plain = {k: x for k, x in TENSORS.items() if k != "a"}
  safetensors.numpy.save_file(plain, tmp_path / "x", metadata={"by": "it"})
  with Reader(tmp_path / "x") as reader:
    assert reader.metadata == {"by": "it"}
    for name, x in plain.items():
      np.testing.assert_array_equal(reader.read(name), x, strict=True)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (0, 1), (2, 4), (3, 3)])
def test_rows_cost_their_bytes(path, start, stop):
  with Reader(path) as reader:
    before = reader.bytes_read
    rows = reader.read("b/u", start, stop)
    np.testing.assert_array_equal(rows, TENSORS["b/u"][start:stop], strict=True)
    assert reader.bytes_read - before == rows.nbytes


def test_a_short_read_is_continued(path, monkeypatch):
  class Slow:
    def __init__(self, file):
      self.file = file

    def __getattr__(self, name):
      return getattr(self.file, name)

    def read(self, size):
      return self.file.read(min(size, 5))

  real = open
  monkeypatch.setattr(
    safetensors_io, "open", lambda *a, **k: Slow(real(*a, **k)), raising=False
  )
  with Reader(path) as reader:
    np.testing.assert_array_equal(reader.read("b/u"), TENSORS["b/u"])


def test_bad_requests_are_told(path, tmp_path):
  with Reader(path) as reader:
    with pytest.raises(SafetensorsError, match="holds no tensor 'c'"):
      reader.read("c")
    with pytest.raises(SafetensorsError, match="4 rows, not 2 to 5"):
      reader.read("b/u", 2, 5)
  with pytest.raises(SafetensorsError, match=r"'z'.*complex64"):
    write(tmp_path / "z", {"z": np.zeros(2, np.complex64)})
  with pytest.raises(SafetensorsError, match=r"cannot write.*free space"):
    write(tmp_path / "absent" / "x", TENSORS)
  with pytest.raises(SafetensorsError, match="cannot read"):
    Reader(tmp_path / "absent")


def _file(header, data=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
  ("data", "word"),
  [
    (b"", "ends within"),
    (b"PK\x03\x04 some other file", "header of"),
    (_file(b"[1, 2]", b""), "no valid"),
    (_file(b"{not json", b""), "no valid"),
    (_file({"x": F32}, b"1234"), "beyond the end"),
    (_file({"x": F32 | {"shape": [3]}}, bytes(8)), "do not fit"),
    (_file({"x": F32 | {"shape": [-2]}}, bytes(8)), "do not fit"),
    (_file({"x": F32 | {"dtype": "F4"}}, bytes(8)), "F4"),
    (_file({"x": {"dtype": "F32"}}, bytes(8)), "data_offsets"),
    (_file({"x": 3}, bytes(8)), "no valid"),
  ],
)
def test_a_broken_file_is_told(tmp_path, data, word):
  path = tmp_path / "x"
  path.write_bytes(data)
  with pytest.raises(SafetensorsError, match=word):
    Reader(path)
