"""ONNX of every size gives what the network gives, at any batch size."""

import sys

import jax
import numpy as np
import pytest

import maestro
from maestro import models
from maestro.deploy import artifact, directory, export, onnx

MODEL = models.MLP(num_classes=5, features=(12,))
EXAMPLE = jax.ShapeDtypeStruct((1, 4, 4), "float32")
RANKS = {"params:0.5": (6, 4), "0.25": (2, 1)}


OPTIONS = export.Options(repeats=0, stablehlo=False, onnx=True)


def test_every_size_runs_in_onnxruntime(tmp_path, random_run, sizes_of):
  for name in ("jax2onnx", "onnxruntime"):
    pytest.importorskip(name, reason=f"{name} is not installed")
  run, out, lines = random_run(MODEL, EXAMPLE), tmp_path / "out", []
  config = export.export(
    run, out, sizes_of(run, RANKS), options=OPTIONS, log=lines.append
  )
  assert [config["onnx"][size]["file"] for size in RANKS] == [
    "model.params-0.5.onnx",
    "model.0.25.onnx",
  ]
  artifact.verify(out)
  for size, record in config["onnx"].items():
    assert record["difference"] <= 1e-4
    assert f"difference {record['file']}" in "\n".join(lines)
    _, variables = maestro.load(out, profile=size, model=MODEL)
    for n in (1, 7):
      x = np.random.default_rng(n).standard_normal((n, 4, 4))
      x = x.astype(np.float32)
      found = onnx.run(out / record["file"], x)
      np.testing.assert_allclose(
        found, MODEL.apply(variables, x), rtol=1e-4, atol=1e-5
      )
  with (out / "model.0.25.onnx").open("ab") as file:
    file.write(b"!")
  with pytest.raises(artifact.ArtifactError, match=r"0\.25\.onnx is altered"):
    maestro.load(out, model=MODEL)


def test_without_its_packages_nothing_is_begun(
  monkeypatch, tmp_path, random_run, sizes_of
):
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  run, lines = random_run(MODEL, EXAMPLE), []
  with pytest.raises(onnx.OnnxError, match=r"--onnx: .*jax2onnx.*pip install"):
    export.export(
      run,
      tmp_path / "out",
      sizes_of(run, RANKS),
      options=OPTIONS,
      log=lines.append,
    )
  assert not lines and not list(tmp_path.iterdir())


def test_files_of_an_export_are_known_by_name():
  for name in ("model.onnx", "../model.0.onnx", "model./x.onnx", "a.onnx"):
    assert not directory.is_ours(name)
  for name in ("model.0.25.onnx", "model.safetensors", "slices.json"):
    assert directory.is_ours(name)
