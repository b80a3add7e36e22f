"""slices.json is enough to cut every size; what it says wrongly is told."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

import maestro
from maestro import data as data_lib
from maestro import models
from maestro.deploy import artifact, export, slices
from maestro.deploy.artifact import ArtifactError
from maestro.runs import workdir

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "export.md"
MODEL = models.MLP(num_classes=10, features=(24, 16))
# fc1 [64, 24], fc2 [24, 16], fc3 [16, 10]: stored as factors, the last in full.
RANKS = {"large": (16, 9, 10), "middle": (9, 5, 6), "small": (3, 0, 2)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, random_run, sizes_of):
  out = tmp_path_factory.mktemp("slices") / "any"
  run = random_run(MODEL)
  export.export(
    run,
    out,
    sizes_of(run, RANKS),
    dataset=data_lib.make("digits"),
    options=export.Options(repeats=5, stablehlo=False),
    log=lambda line: None,
  )
  return out


@pytest.fixture
def copy(exported, tmp_path):
  return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture(scope="module")
def docs():
  """The readers of the documentation: its code, and the names it makes."""
  text = DOCS.read_text().split("## Any size without maestro")[1]
  code = re.findall(r"```python\n(.*?)```", text, re.S)[:2]
  names = {}
  exec(compile(code[0], str(DOCS), "exec"), names)
  return code, names


X = np.random.default_rng(1).standard_normal((5, 8, 8, 1)).astype(np.float32)


def reference(directory, name):
  model, variables = maestro.load(directory, profile=name, model=MODEL)
  return np.asarray(model.apply(variables, X))


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", RANKS)
def test_the_numpy_reader_runs_every_size(exported, docs, close, name):
  code, names = docs
  w = names["load"](exported, name)
  assert w["params/fc1/u"].shape == (RANKS[name][0], 64)
  y = names["mlp"](w, X.reshape(5, -1), 3)
  close(y, reference(exported, name))
  lines = [line for line in code[0].splitlines() if line.strip()]
  assert len(lines) - 3 <= 15  # but for the imports


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # rank 0
@pytest.mark.parametrize("name", RANKS)
def test_the_torch_reader_runs_every_size(exported, docs, close, name):
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")
  code, names = docs
  exec(compile(code[1], str(DOCS), "exec"), names)
  module = names["torch_mlp"](names["load"](exported, name, "pt"), 3)
  with torch.no_grad():
    close(module(torch.from_numpy(X)).numpy(), reference(exported, name))
  assert len([line for line in code[1].splitlines() if line.strip()]) - 1 <= 20


def test_each_size_has_what_was_measured_and_no_more(exported):
  value = slices.read(exported)
  config = artifact.read_config(exported)
  device = config["source"]["device"]
  assert [size["name"] for size in value["sizes"]] == list(RANKS)
  for size, profile in zip(value["sizes"], config["profiles"], strict=True):
    _, variables = maestro.load(exported, profile=size["name"], model=MODEL)
    assert size["params"] == sum(
      x.size for x in jax.tree.leaves(variables["params"])
    )
    for key in ("ranks", "macs", "bytes", "forms", "read_bytes", "metrics"):
      assert size[key] == profile[key]
    assert set(size["metrics"]) == {"val", "test"}
    assert 0 <= size["metrics"]["test"]["accuracy"] <= 1
    assert size["latency_ms"] == {device: profile["latency_ms"]}
    assert size["statistics"] is None
  assert value["layers"]["fc1"] == {
    **{"kind": "dense", "lead": [], "inputs": [64], "outputs": [24]}
  }


def test_nothing_is_invented(tmp_path, random_run):
  run = random_run(MODEL)
  options = export.Options(repeats=0, stablehlo=False)
  export.export(run, tmp_path / "one", options=options, log=lambda line: None)
  value = slices.read(tmp_path / "one")
  (size,) = value["sizes"]  # one size has a file as well
  assert size["latency_ms"] == {} == size["metrics"]
  assert value["dense"]["latency_ms"] == {}
  header = (tmp_path / "one" / "model.safetensors").read_bytes()
  length = 8 + int.from_bytes(header[:8], "little")
  assert value["header_sha256"] == artifact.sha256(header[:length])


def rewrite(directory, change, config_too=True):
  """Changes slices.json, and the digest of it in config.json."""
  path = directory / "slices.json"
  value = workdir.read_json(path)
  change(value)
  workdir.write_json(path, value)
  if config_too:
    config = workdir.read_json(directory / "config.json")
    (directory / "config.json").unlink()
    artifact.write_config(directory, config)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda v: v["sizes"].pop(), "lists other sizes"),
    (lambda v: v["sizes"].reverse(), "not nested: 'params/fc1/u' has 9 rows"),
    (lambda v: v["sizes"][0]["ranks"].update(fc1=15), "lists other sizes"),
    (lambda v: v["sizes"][0]["ranks"].update(fc9=1), "not listed"),
    (lambda v: v["sizes"][2].update(macs=-1), "'small': macs is -1"),
    (lambda v: v["sizes"][2].update(params=True), "params is True"),
    (lambda v: v["sizes"][1].update(name="large"), "there twice"),
    (lambda v: v["sizes"][1].pop("rows"), "broken.*rows"),
    (lambda v: v["sizes"][1]["rows"].pop("params/fc1/u"), "other tensors"),
    (lambda v: v["sizes"][0].update(latency_ms={"cpu": {"1": 0}}), "0 ms"),
    (lambda v: v.update(header_sha256=""), "other sizes or weights"),
    (lambda v: v.update(sizes=3), "broken"),
    (lambda v: v.update(format="other"), 'no "maestro-slices"'),
    (lambda v: v.update(format_version=2), "of version 1"),
  ],
)
def test_what_it_says_wrongly_is_told(copy, change, words):
  rewrite(copy, change)
  with pytest.raises(ArtifactError, match=words):
    maestro.load(copy, model=MODEL)


def test_a_damaged_or_missing_file_is_told(copy):
  path = copy / "slices.json"
  rewrite(copy, lambda v: v["sizes"][0].update(macs=1), config_too=False)
  with pytest.raises(ArtifactError, match=r"slices\.json is altered"):
    maestro.load(copy, model=MODEL)
  data = path.read_bytes()
  path.write_bytes(data.replace(b"macs", b"cams", 1))
  with pytest.raises(ArtifactError, match=r"slices\.json is damaged"):
    slices.read(copy)
  path.unlink()
  with pytest.raises(ArtifactError, match=r"slices\.json is missing"):
    maestro.load(copy, model=MODEL)
  with pytest.raises(ArtifactError, match=r"slices\.json"):
    slices.read(copy)


def test_an_export_without_it_loads(copy, close):
  wanted = reference(copy, "small")
  (copy / "slices.json").unlink()
  config = workdir.read_json(copy / "config.json")
  config["format_version"] = 2
  (copy / "config.json").unlink()
  artifact.write_config(copy, config)
  assert "slices.json" not in json.loads((copy / "config.json").read_text())
  close(reference(copy, "small"), wanted)
