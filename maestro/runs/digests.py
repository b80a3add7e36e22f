"""Digests of the arrays of a checkpoint.

One that a process has whole is digested as bytes, on the host. One whose parts
lie on several processes gets a sum over its numbers of

  h(key(index), bits)   in two lanes of 32 bits, modulo 2^32

with h a bijection in the bits for every index. So it does not matter how the
array is split, nor in which order the parts are added; any change of a single
number changes it, and other changes do but for one in 2^64. It is computed
where the parts are: no process needs more than its own.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def kind(leaf: Mapping[str, Any]) -> str:
  """Name of the digest in a leaf's record: of the bytes, or of parts."""
  return "sum" if "sum" in leaf else "digest"


def of(path: str, x: Any, kind: str) -> str:
  """Digests a leaf in one of these two ways."""
  return of_parts(x) if kind == "sum" else of_host(path, x)


def of_record(record: Mapping[str, Any]) -> str:
  """Digests the record itself: a flipped digit in it is still valid JSON."""
  names = ("format", "leaves", "extra", "step")
  content = [record[name] for name in names if name in record]
  text = json.dumps(content, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def of_host(path: str, x: np.ndarray) -> str:
  """Digests a path, the type, the shape and all bytes of an array."""
  head = f"{path} {x.dtype} {list(x.shape)} ".encode()
  hasher = hashlib.blake2b(head, digest_size=16)
  hasher.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
  return hasher.hexdigest()


def of_parts(x: Any) -> str:
  """Digests an array of at most 4 bytes a number, wherever its parts are."""
  lanes = np.asarray(_lanes(x))
  return "".join(f"{int(lane):08x}" for lane in lanes)


@jax.jit
def _lanes(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(
    x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  ).astype(jnp.uint32)
  return jnp.stack(
    [
      jnp.sum(_mixed(bits ^ _keys(x.shape, seed)), dtype=jnp.uint32)
      for seed in (0x9E3779B9, 0x85EBCA6B)
    ]
  )


def _keys(shape: tuple[int, ...], seed: int) -> jax.Array:
  """A number for every place; of each axis in turn, as the last one wraps."""
  keys = jnp.full(shape, seed, jnp.uint32)
  for axis in range(len(shape)):
    place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    keys = _mixed(keys * jnp.uint32(31) + place)
  return keys


def _mixed(h: jax.Array) -> jax.Array:
  """The last rounds of MurmurHash3 (A. Appleby), a bijection of 32 bits."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
