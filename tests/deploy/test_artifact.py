"""Loading exported directories: what is read, and what is refused."""

import builtins
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro import introspect as nn
from maestro import lowrank, models
from maestro.cost.budget import BudgetError
from maestro.cost.count import count_cost
from maestro.deploy import artifact, packing
from maestro.deploy import files as safetensors_io
from maestro.deploy.artifact import ArtifactError
from maestro.deploy.packing import Profile
from maestro.runs import workdir

MODEL = models.MLP(num_classes=10, features=(256, 128))
EXAMPLE = jax.ShapeDtypeStruct((1, 8, 8), "float32")
# Ranks of fc1 [64, 256], fc2 [256, 128], fc3 [128, 10]; at 0.25 about a quarter
# of the first one's parameters.
RANKS = {"0.8": (48, 64, 8), "0.5": (24, 40, 8), "0.25": (11, 15, 4)}


def write(out):
  """Writes a random network of three profiles: (params, its directory)."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

  params = {
    "fc1": {"u": draw(64, 60), "v": draw(60, 256), "bias": draw(256)},
    "fc2": {"u": draw(256, 70), "v": draw(70, 128), "bias": draw(128)},
    "fc3": {"u": draw(128, 10), "v": draw(10, 10), "bias": draw(10)},
  }
  layers = nn.layers(MODEL, EXAMPLE)
  profiles, records = [], []
  for name, ranks in RANKS.items():
    ranks = dict(zip(params, ranks, strict=True))
    small = lowrank.extract(params, packing.rank_tree(ranks), layers)
    cost = count_cost(layers, small)
    profiles.append(Profile(name, ranks, {}))
    records.append(
      {"name": name, "ranks": ranks, "params": cost.params, "macs": cost.macs}
      | {"bytes": cost.bytes}
      | {"forms": {layer.path: layer.form for layer in cost.layers}}
    )
  dense = count_cost(layers, lowrank.merge(params, layers))
  tensors, blocks = packing.pack(params, profiles, layers)
  with artifact.new_directory(out) as new:
    header = safetensors_io.write(
      new / artifact.WEIGHTS, tensors, {"format": artifact.FORMAT}
    )
    (new / "README.md").write_text("# a card\n")
    artifact.write_config(
      new,
      {
        "format": artifact.FORMAT,
        "format_version": artifact.FORMAT_VERSION,
        "model": {
          "name": "mlp",
          "options": {"num_classes": 10, "features": [256, 128]},
        },
        "input": {"shape": [8, 8], "dtype": "float32"},
        "dense": {k: getattr(dense, k) for k in ("params", "macs", "bytes")},
        "profiles": records,
        "tensors": blocks,
        "header_sha256": artifact.sha256(header),
      },
    )
  return params, layers


@pytest.fixture(scope="module")
def template(tmp_path_factory):
  out = tmp_path_factory.mktemp("artifact") / "any"
  return out, *write(out)


@pytest.fixture
def directory(template, tmp_path):
  """A copy that a test may spoil."""
  for path in template[0].iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def edit(directory, change):
  """Changes config.json by a function of its content, as who writes it does."""
  path = directory / "config.json"
  config = json.loads(path.read_text())
  change(config)
  path.write_text(json.dumps(workdir.sealed(config)))


def flip(path, at):
  data = bytearray(path.read_bytes())
  data[at] ^= 1
  path.write_bytes(data)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", RANKS)
def test_a_profile_is_the_extracted_network(template, close, name):
  out, params, layers = template
  model, variables = maestro.load(out, profile=float(name))
  assert model == MODEL
  ranks = dict(zip(params, RANKS[name], strict=True))
  small = lowrank.extract(params, packing.rank_tree(ranks), layers)
  close(variables, {"params": small})
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(variables))
  assert model.apply(variables, jnp.ones((2, 8, 8))).shape == (2, 10)


@pytest.mark.parametrize(
  ("chosen", "name"),
  [
    ({}, "0.8"),
    ({"profile": 0.5}, "0.5"),
    ({"profile": "0.5"}, "0.5"),
    ({"budget": "params:1"}, "0.8"),
    ({"budget": "params:0.6"}, "0.5"),
    ({"budget": "macs:0.6"}, "0.5"),
    ({"budget": "bytes:0.25"}, "0.25"),
  ],
  ids=str,
)
def test_the_profile_that_is_asked_for_is_read(template, chosen, name):
  loaded = artifact.read(template[0], **chosen)
  assert loaded.profile["name"] == name
  cost = loaded.profile["params"]
  assert cost == sum(x.size for x in jax.tree.leaves(loaded.variables))


@pytest.mark.parametrize(
  ("chosen", "error", "words"),
  [
    ({"profile": 0.4}, ArtifactError, ("'0.4'", "'0.8', '0.5', '0.25'")),
    ({"profile": "own"}, ArtifactError, ("'own'", "'0.8', '0.5', '0.25'")),
    ({"budget": "macs:0.01"}, ArtifactError, ("smallest", "macs:0.1")),
    ({"budget": "macs:1.5"}, BudgetError, ("(0, 1]",)),
    ({"budget": "half"}, BudgetError, ("kind:value",)),
    ({"budget": "latency_ms:4"}, ArtifactError, ("params, macs, bytes",)),
    ({"budget": "macs:0.5", "profile": 0.5}, ArtifactError, ("not both",)),
  ],
  ids=str,
)
def test_a_profile_that_is_not_there_is_told(template, chosen, error, words):
  with pytest.raises(error) as caught:
    maestro.load(template[0], **chosen)
  for word in words:
    assert word in str(caught.value)


class CountingFile:
  """Counts the bytes that leave a file."""

  total = 0

  def __init__(self, *args, **kwargs):
    assert kwargs["buffering"] == 0  # a buffer would read ahead
    self._file = builtins.open(*args, **kwargs)  # noqa: SIM115

  def __getattr__(self, name):
    return getattr(self._file, name)

  def read(self, size):
    data = self._file.read(size)
    CountingFile.total += len(data)
    return data


def test_a_quarter_of_the_parameters_reads_a_quarter_of_the_file(
  template, monkeypatch
):
  monkeypatch.setattr(safetensors_io, "open", CountingFile, raising=False)
  monkeypatch.setattr(CountingFile, "total", 0)
  loaded = artifact.read(template[0], profile=0.25)
  with safetensors_io.Reader(template[0] / artifact.WEIGHTS) as reader:
    header = reader.bytes_read
    stored = sum(int(np.prod(shape)) for shape in reader.shapes.values())
  assert loaded.bytes_read == CountingFile.total - header
  share = loaded.profile["params"] / stored
  assert 0.24 <= share <= 0.25
  size = (template[0] / artifact.WEIGHTS).stat().st_size
  assert loaded.file_bytes == size
  assert loaded.bytes_read <= 0.30 * size
  # No byte of the file but the header, the factors' prefixes and the biases.
  assert loaded.bytes_read == header + 4 * loaded.profile["params"]
  assert artifact.read(template[0]).bytes_read == size


def test_a_missing_file_is_told(directory):
  (directory / "README.md").unlink()
  with pytest.raises(ArtifactError, match=r"README\.md is missing"):
    maestro.load(directory)


def test_a_file_of_another_size_is_told(directory):
  with (directory / artifact.WEIGHTS).open("ab") as file:
    file.write(b"!")
  with pytest.raises(ArtifactError, match=r"model\.safetensors is altered"):
    maestro.load(directory)


def test_an_altered_byte_is_found_by_who_reads_it(directory):
  path = directory / artifact.WEIGHTS
  with safetensors_io.Reader(path) as reader:
    last = reader._begins["params/fc1/u"] + 4 * 64 * 48 - 4
  flip(path, last)  # in the last row
  maestro.load(directory, profile=0.5)
  with pytest.raises(ArtifactError, match="'params/fc1/u' is altered"):
    maestro.load(directory)
  with pytest.raises(ArtifactError, match="sha256"):
    artifact.verify(directory)


def test_an_altered_header_is_found(directory):
  path = directory / artifact.WEIGHTS
  data = path.read_bytes()
  # The same bytes, taken for integers.
  name = b'"params/fc1/bias":{"dtype":"'
  assert name + b"F32" in data
  path.write_bytes(data.replace(name + b"F32", name + b"I32"))
  with pytest.raises(ArtifactError, match="header"):
    maestro.load(directory, profile=0.5)


def test_verify_finds_what_load_does_not_read(directory):
  assert artifact.verify(directory)["format"] == artifact.FORMAT
  flip(directory / "README.md", 0)
  maestro.load(directory)
  with pytest.raises(ArtifactError, match=r"README\.md is altered"):
    artifact.verify(directory)


def test_a_config_without_its_seal_is_told(directory):
  path = directory / "config.json"
  config = json.loads(path.read_text())
  del config["sha256"]
  path.write_text(json.dumps(config))
  with pytest.raises(ArtifactError, match="no 'sha256'"):
    artifact.read(directory)


def test_a_foreign_safetensors_file_is_told(directory):
  path = directory / artifact.WEIGHTS
  size = path.stat().st_size
  path.unlink()
  safetensors_io.write(path, {"weight": np.zeros(size - 512, np.uint8)})
  missing = size - path.stat().st_size
  path.unlink()
  safetensors_io.write(
    path, {"weight": np.zeros(size - 512 + missing, np.uint8)}
  )
  with pytest.raises(ArtifactError, match="foreign safetensors file"):
    maestro.load(directory)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda c: c.pop("format"), "no directory made by"),
    (lambda c: c.update(format_version=4), "format version 4 is unknown"),
    (lambda c: c.pop("profiles"), "broken.*profiles"),
    (lambda c: c.update(files=3), "broken"),
    (lambda c: c["model"].update(name="net"), "'net'.*pass model="),
    (lambda c: c["model"].update(options=None), "'mlp'.*pass model="),
    (lambda c: c["model"]["options"].update(new=1), "does not take.*new"),
    (lambda c: c["model"]["options"].update(features=[9]), "does not|is not"),
    (lambda c: c["input"].update(shape=[8, 9]), "does not fit|is not"),
  ],
)
def test_a_config_that_does_not_fit_is_told(directory, change, words):
  edit(directory, change)
  with pytest.raises(ArtifactError, match=words):
    maestro.load(directory)


def test_what_is_no_export_is_told(directory, tmp_path):
  for path in (
    tmp_path / "absent",
    directory / artifact.WEIGHTS,  # the file instead of its directory
  ):
    with pytest.raises(ArtifactError, match=r"python -m maestro\.export"):
      maestro.load(path)
  (directory / "config.json").write_text("{")
  with pytest.raises(ArtifactError, match="is damaged"):
    maestro.load(directory)


def test_a_model_from_outside(directory):
  edit(directory, lambda c: c["model"].update(name="Mine", options=None))
  model, variables = maestro.load(directory, model=MODEL)
  assert model is MODEL
  assert model.apply(variables, jnp.ones((2, 8, 8))).shape == (2, 10)
  for other in (
    models.MLP(num_classes=10, features=(256, 64)),
    models.MLP(num_classes=10, features=(256,)),
    models.MLP(num_classes=10, features=(256, 128, 5)),
    models.LeNet(num_classes=10),
  ):
    with pytest.raises(ArtifactError, match="model="):
      maestro.load(directory, model=other)


# ---------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------


def test_an_export_is_replaced_and_nothing_else(directory):
  write(directory)  # again
  maestro.load(directory)
  (directory / "notes.txt").write_text("mine")
  with pytest.raises(ArtifactError, match=r"notes\.txt"):
    write(directory)
  assert (directory / "notes.txt").read_text() == "mine"


@pytest.mark.quick(2)
def test_other_directories_are_not_overwritten(tmp_path):
  (tmp_path / "config.json").write_text('{"format": "other", "files": {}}')
  with pytest.raises(ArtifactError, match=r"config\.json"):
    write(tmp_path)
  with pytest.raises(ArtifactError, match="is a file"):
    write(tmp_path / "config.json")
  with pytest.raises(ArtifactError, match="cannot write"):
    write(tmp_path / "config.json" / "out")
  (tmp_path / "empty").mkdir()
  write(tmp_path / "empty")
  maestro.load(tmp_path / "empty")


def test_a_failure_leaves_what_was_there(directory, monkeypatch):
  before = {p.name: p.read_bytes() for p in directory.iterdir()}

  def full(fd):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors_io.os, "fsync", full)
  with pytest.raises(ArtifactError, match=r"No space left.*choose another"):
    write(directory)
  assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
  assert not list(directory.parent.glob(f".{directory.name}*"))
