"""Lays out all sizes of a network in one file, so that each is a prefix of it.

  params/<layer>/u            [R, *lead, *inputs]: the rank axis first
  params/<layer>/v            [R, *lead, *outputs]
  params/<layer>/<leaf>       kernel, bias, ... as they are
  batch_stats/<profile>/...   one set for each profile
  scales/params/<layer>/...   of what is int8 (`maestro.deploy.int8`)

The ranks of the profiles are nested, so the first rows of a factor are that
factor of a smaller profile. Each tensor comes with the sha256 of its blocks:
of a factor, the rows between the ranks of consecutive profiles.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from maestro import lowrank, trees
from maestro.deploy import files as safetensors_io
from maestro.deploy import int8 as int8_lib
from maestro.errors import UserError
from maestro.trees import LayerSpec

_SCALES = "scales/"  # before the name of what they multiply


class PackingError(UserError):
  """Profiles or weights cannot be laid out, or a file does not hold them."""


@dataclasses.dataclass(frozen=True)
class Profile:
  """One size of a network.

  Attributes:
    name: by which it is loaded, e.g. "0.4".
    ranks: {layer path: rank}, a list of ranks if stacked or grouped.
    batch_stats: of the network at these ranks; {} without normalisation.
  """

  name: str
  ranks: Mapping[str, Any]
  batch_stats: Any


@dataclasses.dataclass(frozen=True)
class Block:
  """Bytes of a file that have a digest.

  Attributes:
    name: of the tensor that they are of.
    start: the first row, of a factor.
    stop: the row after the last; None is all of the tensor.
    begin: of the bytes in the file.
    end: of the bytes in the file.
    sha256: of the bytes.
  """

  name: str
  start: int
  stop: int | None
  begin: int
  end: int
  sha256: str

  def altered(self) -> str:
    """Says that the bytes are others."""
    rows = f"its rows {self.start} to {self.stop} are"
    what = "it is" if self.stop is None else rows
    return f"tensor {self.name!r} is altered: {what} not what was written"


def rank_tree(ranks: Mapping[str, Any]) -> dict:
  """Turns {layer path: integer or list} into a tree as `lowrank` takes it."""
  return trees.unflatten_ranks(
    {path: np.asarray(rank, np.int32) for path, rank in ranks.items()}
  )


def _stored(rank: Any) -> int:
  """Rows that a factor needs: the largest rank of a stacked layer."""
  return int(np.max(rank, initial=0))


def _sha256(x: np.ndarray) -> str:
  return hashlib.sha256(safetensors_io.data_of(x)).hexdigest()


def _join(*names: str) -> str:
  return "/".join(filter(None, names))


def pack(
  params: Any,
  profiles: Sequence[Profile],
  layers: Mapping[str, LayerSpec],
  *,
  int8: Collection[str] = (),
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
  """Lays a network out for a file that holds all of its profiles.

  A layer that has one rank in all profiles, at which its dense kernel is
  cheaper, is stored merged. One whose kernel is cheaper in some profiles only
  is stored as factors, and merged by who reads it.

  Args:
    params: of the network, factors at least as long as the largest ranks.
    profiles: the largest first, in every layer at most the one before. They
      name every layer that holds factors.
    layers: {path: LayerSpec}.
    int8: paths of the weights and factors to store as int8, e.g. "fc1/u".

  Returns:
    {name: array}, and {name: {"sha256": of each block, "rows": where the blocks
    of a factor end}}; what is no factor is one block.

  Raises:
    PackingError: profiles are not nested, or a weight is in there twice.
  """
  ends = _ends(params, profiles, layers)
  params = laid_out(params, profiles, layers)
  tensors: dict[str, np.ndarray] = {}
  blocks: dict[str, dict[str, Any]] = {}
  factored = trees.factored(params, layers)
  leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
  for path, x in leaves.items():
    layer, _, leaf = path.rpartition("/")
    name, spec = f"params/{path}", layers.get(layer)
    rows = axes = None
    if layer in factored and leaf in ("u", "v"):
      spec = layers[layer]
      x = np.moveaxis(x, _rank_axis(leaf, x.ndim, spec), 0)
      rows = [end for end in ends[layer] if end]
      axes = int8_lib.factor_axes(spec, x.ndim)
    elif spec and leaf == spec.weight:
      axes = int8_lib.weight_axes(spec)
    if path in int8 and axes is not None:
      x, scales = int8_lib.quantize(x, axes)
      tensors[_SCALES + name] = scales
      blocks[_SCALES + name] = _digests(scales, rows)
    tensors[name] = x
    blocks[name] = _digests(x, rows)
  for profile in profiles:
    flat = traverse_util.flatten_dict(profile.batch_stats, sep="/")
    for path, x in flat.items():
      name = f"batch_stats/{profile.name}/{path}"
      tensors[name] = np.asarray(x)
      blocks[name] = {"sha256": [_sha256(tensors[name])]}
  _check_ties(tensors, blocks, factored)
  return tensors, blocks


def _ends(params, profiles, layers) -> dict[str, list[int]]:
  """Rows of each layer's factors in the profiles, in ascending order."""
  return {
    path: sorted({_stored(p.ranks[path]) for p in profiles})
    for path in trees.factored(params, layers)
  }


def laid_out(
  params: Any, profiles: Sequence[Profile], layers: Mapping[str, LayerSpec]
) -> Any:
  """Cuts to the largest profile, and merges what `pack` stores merged.

  Takes what `pack` takes, and returns a tree of host arrays: what is stored, in
  the axes of the layers.

  Raises:
    PackingError: profiles are not nested.
  """
  check_nested(profiles)
  largest = rank_tree(profiles[0].ranks)
  ends = _ends(params, profiles, layers)

  def where(path: str) -> bool:
    spec, sizes = layers[path], ends[path]
    cheap = lowrank.dense_is_cheaper(spec.n_in, spec.n_out, sizes[-1])
    return cheap and len(sizes) == 1

  @jax.jit  # one compilation, where op by op there would be hundreds
  def cut(params):
    return lowrank.merge(lowrank.truncate(params, largest), layers, where=where)

  return jax.device_get(cut(params))


def _digests(x: np.ndarray, rows: Sequence[int] | None) -> dict[str, Any]:
  if rows is None:
    return {"sha256": [_sha256(x)]}
  parts = np.split(x, rows[:-1]) if rows else []
  return {"sha256": [_sha256(part) for part in parts], "rows": rows}


def shapes(
  reader: safetensors_io.Reader,
  blocks: Mapping[str, Mapping[str, Any]],
  profile: Mapping[str, Any],
  layers: Mapping[str, LayerSpec],
) -> dict[str, tuple[int, ...]]:
  """Says what `unpack` will return, by "params/..." and "batch_stats/...".

  Raises:
    PackingError: a factor does not fit the layers.
  """
  statistics, found = f"batch_stats/{profile['name']}/", {}
  for name, block in blocks.items():
    shape = reader.shapes[name]
    if name.startswith(_SCALES):
      continue
    if "rows" in block:
      layer, leaf, rank = _factor(name, block, profile, layers)
      axis = _rank_axis(leaf, len(shape), layers[layer])
      found[name] = (*shape[1 : axis + 1], rank, *shape[axis + 1 :])
    elif name.startswith(statistics):
      found["batch_stats/" + name.removeprefix(statistics)] = shape
    elif name.startswith("params/"):
      found[name] = shape
  return found


def unpack(
  reader: safetensors_io.Reader,
  blocks: Mapping[str, Mapping[str, Any]],
  profile: Mapping[str, Any],
  layers: Mapping[str, LayerSpec],
) -> tuple[dict, dict]:
  """Reads one profile, and no byte of what belongs to larger ones alone.

  Args:
    reader: of the file.
    blocks: as `pack` returned them.
    profile: {"name": ..., "ranks": {layer path: rank}}.
    layers: {path: LayerSpec} of the model.

  Returns:
    Trees of host arrays: params, whose factors are cut but not merged, and
    batch_stats.

  Raises:
    PackingError: a block is not what was written, or does not fit the layers.
  """
  found: dict[str, list[np.ndarray]] = {}
  for block in wanted(reader, blocks, profile, layers):
    x = reader.read(block.name, block.start, block.stop)
    if _sha256(x) != block.sha256:
      raise PackingError(block.altered())
    found.setdefault(block.name, []).append(x)

  def whole(name: str) -> np.ndarray:
    if "rows" not in blocks[name]:
      return found.pop(name)[0]
    first = reader.read(name, 0, 0)  # rank 0 has a shape, too
    return np.concatenate([first, *found.pop(name, ())])

  statistics = f"batch_stats/{profile['name']}/"
  params, batch_stats = {}, {}
  for name, block in blocks.items():
    if name.startswith(statistics):
      batch_stats[name.removeprefix(statistics)] = whole(name)
    if not name.startswith("params/"):
      continue
    x = whole(name)
    if _SCALES + name in blocks:
      x = int8_lib.dequantize(x, whole(_SCALES + name))
    path = name.removeprefix("params/")
    if "rows" in block:
      layer, leaf, _ = _factor(name, block, profile, layers)
      x = np.moveaxis(x, 0, _rank_axis(leaf, x.ndim, layers[layer]))
      path = _join(layer, leaf)
    params[path] = x
  return (
    traverse_util.unflatten_dict(params, sep="/"),
    traverse_util.unflatten_dict(batch_stats, sep="/"),
  )


def wanted(
  reader: Any,
  blocks: Mapping[str, Mapping[str, Any]],
  profile: Mapping[str, Any],
  layers: Mapping[str, LayerSpec],
) -> Iterator[Block]:
  """Yields the blocks that `unpack` reads, with the same arguments.

  Raises:
    PackingError: a factor does not fit the layers.
  """
  statistics = f"batch_stats/{profile['name']}/"
  for name, block in blocks.items():
    if "rows" in block:
      _, _, rank = _factor(name, block, profile, layers)
      start = 0
      for stop, digest in zip(block["rows"], block["sha256"], strict=True):
        if stop <= rank:
          begin, end = reader.span(name, start, stop)
          yield Block(name, start, stop, begin, end, digest)
        start = stop
    elif name.startswith(("params/", f"{_SCALES}params/", statistics)):
      begin, end = reader.span(name)
      yield Block(name, 0, None, begin, end, block["sha256"][0])


def assemble(
  params: Any,
  batch_stats: Any,
  profile: Mapping[str, Any],
  layers: Mapping[str, LayerSpec],
) -> dict[str, Any]:
  """Turns what `unpack` returned into the variables of the small network."""
  extract = extractor(params, profile["ranks"], layers)
  variables = {"params": extract(params)}
  if batch_stats:
    variables["batch_stats"] = batch_stats
  return jax.tree.map(jnp.asarray, variables)


def extractor(
  params: Any, ranks: Mapping[str, Any], layers: Mapping[str, LayerSpec]
) -> Callable[[Any], Any]:
  """Returns extract(params) for trees like params, some layers of it merged."""
  stored = trees.factored(params, layers)
  tree = rank_tree({path: ranks[path] for path in stored})
  # Jitted: one compilation, where op by op there would be hundreds.
  return jax.jit(lambda p: lowrank.extract(p, tree, layers))


def _factor(name, block, profile, layers) -> tuple[str, str, int]:
  """Returns the layer of a stored factor, "u" or "v", and rows to read."""
  path = name.removeprefix(_SCALES).removeprefix("params/")
  layer, _, leaf = path.rpartition("/")
  rank = profile["ranks"][layer]
  if layer not in layers or _stored(rank) not in (0, *block["rows"]):
    raise PackingError(
      f"layer {layer!r} at rank {rank} is not what the file holds, which is"
      f" {block['rows']}; the model's layers are {sorted(layers)}"
    )
  return layer, leaf, _stored(rank)


def _rank_axis(leaf: str, ndim: int, spec: LayerSpec) -> int:
  """The rank axis of u or v where it is not first, as layers hold them."""
  return ndim - 1 if leaf == "u" else len(spec.lead)


def check_nested(profiles: Sequence[Profile]) -> None:
  """Raises unless names differ and no rank rises from one to the next."""
  names = [p.name for p in profiles]
  if len(set(names)) < len(names):
    raise PackingError(f"profiles {names}: a name is in there twice")
  for large, small in itertools.pairwise(profiles):
    for path, rank in large.ranks.items():
      if np.any(np.asarray(small.ranks[path]) > np.asarray(rank)):
        raise PackingError(
          f"profiles are not nested: layer {path!r} has rank {rank} in"
          f" {large.name!r}, but {small.ranks[path]} in {small.name!r} after"
          " it; one file can only hold the largest first"
        )


def _check_ties(tensors, blocks, factored) -> None:
  """Raises if two layers hold the same factor: one weight, factorised twice."""
  seen: dict[Any, str] = {}
  for path in factored:
    for leaf in ("u", "v"):
      name = _join("params", path, leaf)
      if not np.any(tensors[name]):
        continue  # vanished, or of rank 0
      scales = blocks.get(_SCALES + name, {"sha256": ()})["sha256"]
      key = (tensors[name].shape, *blocks[name]["sha256"], *scales)
      other = seen.setdefault(key, path)
      if other != path:
        raise PackingError(
          f"layers {other!r} and {path!r} hold the same factors: a tied weight"
          " that was factorised twice. Use one module in both places, so that"
          " the parameters hold it once, or keep one of them dense by a rule"
        )
