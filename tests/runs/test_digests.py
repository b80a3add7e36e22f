"""Digests of arrays: equal however split, another for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maestro.runs import digests

TYPES = ("float32", "bfloat16", "int32", "uint8", "bool", "float16")


def numbers(shape, dtype):
  x = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
  return jnp.asarray(x).astype(dtype)


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 4), ("a", "b"))


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", TYPES)
def test_how_an_array_is_split_does_not_matter(dtype, mesh):
  x = numbers((8, 4, 12), dtype)
  whole = digests.of_parts(np.asarray(x))
  assert len(whole) == 16
  for spec in ((), ("a",), (None, "b"), ("a", None, "b"), (("a", "b"),)):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    assert digests.of_parts(jax.device_put(x, sharding)) == whole


@pytest.mark.parametrize("dtype", TYPES[:4])
def test_every_bit_of_every_number_matters(dtype):
  x = np.array(numbers((3, 5), dtype))
  found = {digests.of_parts(x)}
  raw = x.view(np.uint8).reshape(-1)
  for bit in range(0, 8 * raw.size, 7):
    raw[bit // 8] ^= 1 << bit % 8
    found.add(digests.of_parts(x))
    raw[bit // 8] ^= 1 << bit % 8
  assert len(found) == 1 + len(range(0, 8 * raw.size, 7))


def test_nan_and_zero_are_known_by_their_bits():
  x = np.array([0.0, np.nan], np.float32)
  other = np.array([-0.0, np.nan], np.float32)
  assert digests.of_parts(x) != digests.of_parts(other)
  assert digests.of_parts(x) == digests.of_parts(x.copy())


def test_the_place_of_a_number_matters():
  x = np.arange(24, dtype=np.float32).reshape(4, 6)
  found = {digests.of_parts(x)}
  for i in range(4):
    for j in range(5):
      y = x.copy()
      y[i, [j, j + 1]] = y[i, [j + 1, j]]
      found.add(digests.of_parts(y))
  assert len(found) == 21
  assert digests.of_parts(np.zeros((2, 3), np.float32)) != digests.of_parts(
    np.zeros((3, 2), np.float32)
  )


def test_bytes_on_the_host_have_a_path():
  x = np.arange(3.0)
  assert digests.of_host("a", x) == digests.of_host("a", x.copy())
  assert digests.of_host("a", x) != digests.of_host("b", x)
