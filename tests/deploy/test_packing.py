"""Every profile of a file is the extracted network, read as a prefix."""

import jax
import numpy as np
import pytest

from maestro import lowrank, trees
from maestro.deploy import files as safetensors_io
from maestro.deploy import packing
from maestro.deploy.packing import PackingError, Profile

CASES = (
  "dense_single",  # a model that is itself one layer
  "conv_grouped",
  "general_batches",
  "embed_tied",  # one table, used in two places
  "scan_remat_grouped",
  "network",
)


def _profiles(case, levels):
  return [
    Profile(
      str(level),
      {
        path: np.asarray(rank).tolist()
        for path, rank in trees.flatten_ranks(case.ranks(level)).items()
      },
      {"norm": {"mean": np.full(3, i, np.float32)}},
    )
    for i, level in enumerate(levels)
  ]


def _write(path, case, profiles):
  tensors, blocks = packing.pack(case.factored, profiles, case.layers)
  safetensors_io.write(path, tensors)
  return blocks


def _extract(params, profile, case):
  """Masks what is stored for the largest element of a stack; merges."""
  stored = trees.factored(params)
  ranks = packing.rank_tree({path: profile.ranks[path] for path in stored})
  return lowrank.extract(params, ranks, case.layers)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", CASES)
def test_each_profile_is_the_extracted_network(cases, close, tmp_path, name):
  case = cases[name]
  profiles = _profiles(case, ("full", 2, 1, 0))
  blocks = _write(tmp_path / "x", case, profiles)
  last = None
  for i, profile in enumerate(profiles):
    ranks = packing.rank_tree(profile.ranks)
    record = {"name": profile.name, "ranks": profile.ranks}
    with safetensors_io.Reader(tmp_path / "x") as reader:
      params, stats = packing.unpack(reader, blocks, record, case.layers)
      read = reader.bytes_read
    expected = lowrank.extract(case.factored, ranks, case.layers)
    close(_extract(params, profile, case), expected)
    assert np.all(stats["norm"]["mean"] == i)
    assert last is None or read <= last
    last = read


def test_elements_of_a_stack_keep_their_own_ranks(cases, close, tmp_path):
  case = cases["scan"]
  profiles = _profiles(case, ("half",))
  (ranks,) = profiles[0].ranks.values()
  assert len(set(ranks)) > 1
  blocks = _write(tmp_path / "x", case, profiles)
  record = {"name": "half", "ranks": profiles[0].ranks}
  with safetensors_io.Reader(tmp_path / "x") as reader:
    params, _ = packing.unpack(reader, blocks, record, case.layers)
  tree = packing.rank_tree(profiles[0].ranks)
  expected = lowrank.extract(case.factored, tree, case.layers)
  close(_extract(params, profiles[0], case), expected)


def test_the_rank_axis_comes_first(cases):
  case = cases["conv_grouped"]
  tensors, blocks = packing.pack(
    case.factored, _profiles(case, (3, 1)), case.layers
  )
  node = case.factored
  assert tensors["params/u"].shape == (3, *node["u"].shape[:-1])
  assert tensors["params/v"].shape[:2] == (3, 2)
  assert blocks["params/u"]["rows"] == [1, 3]
  np.testing.assert_array_equal(tensors["params/v"][1], node["v"][:, 1])


def test_a_layer_of_one_rank_is_stored_merged(cases):
  case = cases["dense_single"]
  full, small = _profiles(case, ("full", 1))
  one, _ = packing.pack(case.factored, [full], case.layers)
  assert "params/kernel" in one
  assert "params/u" not in one
  many, _ = packing.pack(case.factored, [full, small], case.layers)
  assert "params/u" in many
  assert "params/kernel" not in many


def test_profiles_must_be_nested(cases):
  case = cases["dense_single"]
  small, full = _profiles(case, (1, "full"))
  with pytest.raises(PackingError, match="not nested: layer '' has rank 1"):
    packing.pack(case.factored, [small, full], case.layers)
  with pytest.raises(PackingError, match="twice"):
    packing.pack(case.factored, [full, full], case.layers)


def test_a_tied_weight_factorised_twice_is_refused(cases):
  case = cases["dense_single"]
  params = {"head": case.factored, "tail": case.factored}
  layers = {"head": case.layers[""], "tail": case.layers[""]}
  profile = Profile("1", {"head": 1, "tail": 1}, {})
  with pytest.raises(PackingError, match=r"'head' and 'tail'.*tied"):
    packing.pack(params, [profile], layers)
  # What has vanished looks alike, and is no tie.
  zeros = jax.tree.map(np.zeros_like, params)
  packing.pack(zeros, [profile], layers)


def test_an_altered_block_is_found_when_it_is_read(cases, tmp_path):
  case = cases["dense_single"]
  profiles = _profiles(case, (3, 1))
  blocks = _write(tmp_path / "x", case, profiles)
  data = bytearray((tmp_path / "x").read_bytes())
  with safetensors_io.Reader(tmp_path / "x") as reader:
    row = 4 * np.prod(reader.shapes["params/u"][1:])
    begin = reader._begins["params/u"]
  data[begin + 2 * row] ^= 1  # in the third row
  (tmp_path / "x").write_bytes(data)
  large, small = ({"name": p.name, "ranks": p.ranks} for p in profiles)
  with safetensors_io.Reader(tmp_path / "x") as reader:
    packing.unpack(reader, blocks, small, case.layers)
    with pytest.raises(PackingError, match="'params/u' is altered"):
      packing.unpack(reader, blocks, large, case.layers)
