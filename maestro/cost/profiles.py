"""Profiles of ranks in files: {"ranks": {layer path: rank}}."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from maestro import trees
from maestro.cost.budget import current
from maestro.errors import UserError
from maestro.trees import LayerSpec, Tree


class ProfileError(UserError):
  """A profile of ranks does not fit a network; names the layer."""


# ---------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------


def read_profile(path: str | pathlib.Path) -> dict:
  """Reads a profile file, {"ranks": {layer path: rank}}.

  Raises:
    ProfileError: it is missing, no JSON, or names a layer twice.
  """

  def once(pairs):
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:  # JSON readers keep the last without a word
      raise ProfileError(
        f"{path}: {twice[0]!r} is there twice; a layer has one rank, also if"
        " its weight is tied and used in two places"
      )
    return dict(pairs)

  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
    return json.loads(text, object_pairs_hook=once)
  except OSError as error:
    raise ProfileError(f"cannot read profile {path}: {error}") from error
  except json.JSONDecodeError as error:
    raise ProfileError(f"{path} is not valid JSON: {error}") from error


def parse_profile(
  profile: Any,
  layers: Mapping[str, LayerSpec],
  params: Tree,
  ranks: Tree | None = None,
) -> dict:
  """Turns {"ranks": {path: rank}} into a rank tree; checks every entry.

  Layers that the profile does not name keep their current ranks. The rank of a
  stacked or grouped layer is one number for all elements, or nested lists.

  Args:
    profile: as read from JSON.
    layers: {path: LayerSpec}, from `maestro.layers`.
    params: parameters that the profile is for.
    ranks: their current ranks; None takes all that is stored.

  Raises:
    ProfileError: no profile, an unknown layer, a dense layer, a bad rank.
  """
  entries = profile.get("ranks") if isinstance(profile, Mapping) else None
  if not isinstance(entries, Mapping):
    raise ProfileError(
      'a profile is {"ranks": {layer path: rank}}; there is no such "ranks"'
    )
  now = current(layers, params, {} if ranks is None else ranks)
  flat = dict(now)
  for path, entry in entries.items():
    if path not in layers:
      raise ProfileError(
        f"profile: there is no layer {path!r}; the layers are {sorted(layers)}"
      )
    if path not in now:
      raise ProfileError(
        f"profile: layer {path!r} is dense (merged, or never decomposed) and"
        " cannot be truncated; leave it out, or use a checkpoint in which it"
        " has factors"
      )
    try:
      rank = np.asarray(entry)
    except ValueError:  # a ragged list
      rank = np.asarray(None)
    if rank.dtype.kind not in "iu" or rank.shape not in ((), now[path].shape):
      raise ProfileError(
        f"profile: layer {path!r}: {entry!r} is no rank of shape"
        f" {now[path].shape}"
      )
    if np.any(rank < 0) or np.any(rank > now[path].max(initial=0)):
      raise ProfileError(
        f"profile: layer {path!r}: rank {entry} is outside"
        f" [0, {now[path].max(initial=0)}], the ranks of this checkpoint"
      )
    flat[path] = np.minimum(now[path], rank)
  return trees.unflatten_ranks(
    {path: np.asarray(rank, np.int32)[()] for path, rank in flat.items()}
  )
