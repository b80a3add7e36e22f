"""What a compiled program takes: memory, work, and what devices exchange.

A loop's body counts once in FLOPs, bytes and collectives, as it stands once in
the program: of a dispatch of several steps these are one step's.
"""

import collections
import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable
from typing import Any

import jax

KINDS = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
  *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
# What says where in the source an instruction comes from.
_TABLES = re.compile(
  r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d+ .*\n)*", re.M
)
_METADATA = re.compile(r", metadata=\{[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """An array that devices exchange.

  Attributes:
    kind: of KINDS.
    dtype: as XLA writes it, such as "f32".
    shape: of the result on each device.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Size of the result on each device."""
    found = re.search(r"\d+", self.dtype)
    bits = int(found[0]) if found else 8  # pred
    return math.ceil(math.prod(self.shape) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes that a program needs on each device.

  Attributes:
    arguments: what it is given.
    outputs: what it returns.
    aliased: outputs that lie where donated arguments did.
    temporaries: at the peak.
    code: of the program.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int

  @classmethod
  def of(cls, compiled: Any) -> "Memory":
    """Reads it from a compiled program."""
    m = compiled.memory_analysis()
    return cls(
      arguments=m.argument_size_in_bytes,
      outputs=m.output_size_in_bytes,
      aliased=m.alias_size_in_bytes,
      temporaries=m.temp_size_in_bytes,
      code=m.generated_code_size_in_bytes,
    )

  @property
  def peak(self) -> int:
    """All of it at once."""
    beside = self.outputs - self.aliased
    return self.arguments + beside + self.temporaries + self.code


def collectives(text: str) -> list[Collective]:
  """Lists what devices exchange, from a program's optimized HLO.

  A collective that is taken apart, so that work can go on between its start and
  its end, stands in each of the parts: of one kind and channel, one counts.
  """
  found, seen = [], set()
  for shapes, kind, start, rest in _COLLECTIVE.findall(text):
    channel = _CHANNEL.search(rest)
    if channel is not None:
      if (kind, channel[1]) in seen:
        continue
      seen.add((kind, channel[1]))
    arrays = _ARRAY.findall(shapes)
    if start and kind == "all-gather":  # (operands, results)
      arrays = arrays[len(arrays) // 2 :]
    elif start and kind == "collective-permute":  # (operand, result, ...)
      arrays = arrays[1:2]
    for dtype, dims in arrays:
      shape = tuple(map(int, filter(None, dims.split(","))))
      found.append(Collective(kind, dtype, shape))
  return found


def exchanged(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
  """Sums up {kind: {"count": arrays, "bytes": of them}}."""
  sums = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
  for one in found:
    sums[one.kind]["count"] += 1
    sums[one.kind]["bytes"] += one.bytes
  return dict(sums)


def work(compiled: Any) -> dict[str, float | None]:
  """Returns {"flops", "bytes accessed"} of a device, as XLA estimates them.

  None is what it does not say, as for products that a library computes.
  """
  cost = compiled.cost_analysis() or {}
  names = ("flops", "bytes accessed")
  return {name: float(cost.get(name, 0.0)) or None for name in names}


def fingerprint(text: str) -> str:
  """Hashes a program's HLO, but for the lines of source it comes from."""
  text = _METADATA.sub("", _TABLES.sub("", text))
  return hashlib.sha256(text.encode()).hexdigest()


def bytes_of(tree: Any) -> int:
  """Bytes that a tree of abstract arrays has on each device."""

  def size(x) -> int:
    shape = x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))


def shortage(error: Exception) -> tuple[int | None, str] | None:
  """Reads from a compiler's error how much memory it lacked.

  Returns:
    (bytes that the program needs, or None if it says none; the first line), or
    None if the error is about something else.
  """
  text = str(error)
  if "RESOURCE_EXHAUSTED" not in text:
    return None
  found = re.search(r"(?:Used|\() ?([\d.]+)([KMGT])", text)
  needed = None
  if found:
    needed = int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
  return needed, text.strip().partition("\n")[0]
