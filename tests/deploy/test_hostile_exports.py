"""Exports that were damaged: an error in one line, or nothing has changed."""

import json
import os
import pathlib
import shutil
import time
import tracemalloc

import jax
import numpy as np
import pytest

import maestro
from maestro.deploy import artifact, export, files
from maestro.errors import UserError
from maestro.runs import workdir
from maestro.training import loop, opened

MLP = {
  "model": {"name": "mlp", "features": [12]},
  "data": {"name": "digits"},
  "discover": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "settle": {
    "epochs": 0,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "optimizer": {"name": "sgd"},
  "batch_size": 128,
}
INPUTS = np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  root = tmp_path_factory.mktemp("hostile")
  loop.train(MLP, root / "run")
  run = opened.open_run(root / "run")
  ranks = {"fc1": {"rank": 5}, "fc2": {"rank": 4}}
  options = export.Options(repeats=0)
  sizes = [export.Size("own", run.ranks), export.Size("small", ranks)]
  export.export(
    run, root / "out", sizes, options=options, log=lambda line: None
  )
  return root / "out"


def runs(directory):
  return [jax.device_get(maestro.load_stablehlo(directory)(INPUTS))]


def loads(directory):
  found = []
  for profile in ("own", "small"):
    model, variables = maestro.load(directory, profile=profile)
    found.append(model.apply(variables, INPUTS))
  return jax.device_get(found)


def changed(directory, wanted, read):
  """True if a damaged directory is read, and gives another result."""
  try:
    found = read(directory)
  except UserError as error:
    assert "\n" not in str(error)
    return False
  return not all(map(np.array_equal, found, wanted))


def flips(directory, copy, n, seed):
  rng = np.random.default_rng(seed)
  names = sorted(path.name for path in directory.iterdir())
  shutil.copytree(directory, copy)
  for i in range(n):
    path = copy / names[i % len(names)]
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    yield path.name
    shutil.copy(directory / path.name, path)


@pytest.mark.quick(0)
def test_flipped_bits_change_no_result(exported, tmp_path):
  wanted = loads(exported)
  for name in flips(exported, tmp_path / "copy", 40, seed=0):
    assert not changed(tmp_path / "copy", wanted, loads), name


@pytest.mark.slow
def test_flipped_bits_change_no_result_in_any_file(exported, tmp_path):
  wanted = [loads(exported), runs(exported)]
  for name in flips(exported, tmp_path / "copy", 600, seed=1):
    for read, want in zip((loads, runs), wanted, strict=True):
      assert not changed(tmp_path / "copy", want, read), name


def test_a_flipped_bit_is_found_by_verify_wherever_it_is(exported, tmp_path):
  for name in flips(exported, tmp_path / "copy", 80, seed=2):
    with pytest.raises(UserError):
      artifact.verify(tmp_path / "copy")
    assert name


def _places(value, path=()):
  yield path
  if isinstance(value, dict):
    for key, inner in value.items():
      yield from _places(inner, (*path, key))
  elif isinstance(value, list):
    for i, inner in enumerate(value):
      yield from _places(inner, (*path, i))


@pytest.mark.quick(1)
@pytest.mark.parametrize("version", [1, 2])
def test_other_values_in_the_config_change_no_result(
  version, exported, tmp_path
):
  wanted = loads(exported)
  copy = tmp_path / "copy"
  shutil.copytree(exported, copy)
  config = json.loads((copy / artifact.CONFIG).read_text())
  if version == 1:  # as written before there was a digest
    config |= {"format_version": 1}
    del config["sha256"]
  text = json.dumps(config)
  rng = np.random.default_rng(version)
  places = [p for p in _places(config) if p]
  for i in rng.permutation(len(places))[:8]:
    for value in (None, [], {}, "x", -1, 0, 1e308, True):
      damaged = json.loads(text)
      node = damaged
      for key in places[i][:-1]:
        node = node[key]
      node[places[i][-1]] = value
      (copy / artifact.CONFIG).write_text(json.dumps(damaged))
      assert not changed(copy, wanted, loads), (places[i], value)
      if damaged != json.loads(text) and version == 2:
        with pytest.raises(UserError):
          artifact.read_config(copy)


def test_only_an_exports_own_regular_files_are_touched(exported, tmp_path):
  secret = tmp_path / "secret"
  secret.write_text("not yours")
  for name in ("model.safetensors", "README.md", "config.json"):
    for kind in ("link", "pipe", "directory"):
      copy = tmp_path / f"{name}.{kind}"
      shutil.copytree(exported, copy)
      os.remove(copy / name)
      if kind == "link":
        (copy / name).symlink_to(exported / name)
      elif kind == "pipe":
        os.mkfifo(copy / name)
      else:
        (copy / name).mkdir()
      with pytest.raises(UserError, match="no regular file"):
        maestro.load(copy)
  copy = tmp_path / "copy"
  shutil.copytree(exported, copy)
  config = json.loads((copy / "config.json").read_text())
  config["files"]["../secret"] = {"size": 9, "sha256": ""}
  config["format_version"] = 1
  del config["sha256"]
  (copy / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="no file of an export"):
    maestro.load(copy)
  (copy / "notes.txt").write_text("mine")
  config["files"]["notes.txt"] = {"size": 4, "sha256": ""}
  (copy / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=r"notes\.txt"):
    artifact.check_target(copy)
  assert pathlib.Path(secret).read_text() == "not yours"


def _ask_for_layers(directory):
  config = workdir.read_json(directory / artifact.CONFIG)
  config["model"]["options"]["features"] = [12] * 20_000
  workdir.write_json(directory / artifact.CONFIG, config)


def _fill_header(directory):
  """Lists thousands of tensors that the model has not, in both files."""
  config = workdir.read_json(directory / artifact.CONFIG)
  weights = directory / artifact.WEIGHTS
  with files.Reader(weights) as reader:
    tensors = {name: reader.read(name) for name in reader.shapes}
    metadata = reader.metadata
  more = {f"params/fc{i}/bias": np.zeros(8, np.float32) for i in range(5, 9999)}
  digest = artifact.sha256(bytes(32))
  weights.unlink()
  header = files.write(weights, tensors | more, metadata)
  config["tensors"] |= {name: {"sha256": [digest]} for name in more}
  config["header_sha256"] = artifact.sha256(header)
  (directory / artifact.CONFIG).unlink()
  (directory / "slices.json").unlink()  # older exports have none
  artifact.write_config(directory, config)


@pytest.mark.quick(0)
@pytest.mark.parametrize("spoil", [_ask_for_layers, _fill_header])
def test_more_than_the_model_has_is_refused_quickly(
  spoil, exported, tmp_path, monkeypatch
):
  copy = shutil.copytree(exported, tmp_path / "copy")
  spoil(copy)
  monkeypatch.setattr(files.Reader, "read", None)  # no tensor is
  tracemalloc.start()
  began = time.monotonic()
  try:
    with pytest.raises(UserError, match=r"more than|does not fit"):
      maestro.load(copy)
    size = sum(path.stat().st_size for path in copy.iterdir())
    assert tracemalloc.get_traced_memory()[1] < 20e6 + 10 * size
  finally:
    tracemalloc.stop()
  assert time.monotonic() - began < 20


def test_another_stablehlo_is_not_run(exported, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(exported, copy)
  data = bytearray((copy / "model.stablehlo").read_bytes())
  data[len(data) // 2] ^= 1
  (copy / "model.stablehlo").write_bytes(data)
  with pytest.raises(UserError, match="is altered"):
    maestro.load_stablehlo(copy)
