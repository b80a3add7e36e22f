"""Workdirs, checkpoints and exports made at commit e65e267 stay readable."""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

import maestro
from maestro.deploy import artifact, export
from maestro.report import tables
from maestro.training import loop, opened

FILES = pathlib.Path(__file__).parent / "files_of_e65e267.tar.gz"


@pytest.fixture
def old(tmp_path):
  with tarfile.open(FILES) as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


def test_an_old_run_evaluates_reports_and_is_finished(old, capsys):
  expected = json.loads((old / "expected.json").read_text())["evaluate"]
  found = loop.evaluate_workdir(old / "run")
  for split in ("val", "test"):
    for name, value in expected.pop(split).items():
      assert found[split][name] == pytest.approx(value, rel=1e-5)
    del found[split]
  assert found == expected
  results = tables.load(old / "run")
  assert loop.train(results["config"], old / "run") == results
  assert "this run is finished" in capsys.readouterr().out


def test_an_old_run_goes_on_from_its_checkpoint(old, capsys):
  before = json.loads((old / "run/results.json").read_text())
  (old / "run/results.json").unlink()
  after = loop.train(before["config"], old / "run")
  assert "resuming from step" in capsys.readouterr().out
  for key in ("params", "macs", "bytes"):
    assert after["final"][key] == before["final"][key]


def test_an_old_run_exports(old):
  options = export.Options(repeats=0, stablehlo=False)
  for which in opened.CHECKPOINTS:
    run = opened.open_run(old / "run", which)
    export.export(run, old / which, options=options, log=lambda line: None)
    maestro.load(old / which)


def test_an_old_export_loads(old):
  directory = old / "export"
  x = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 8, 8, 1)
  expected = json.loads((old / "expected.json").read_text())
  assert artifact.verify(directory)["format_version"] == 1
  for profile in ("own", "small"):
    model, variables = maestro.load(directory, profile=profile)
    found = model.apply(variables, x)
    np.testing.assert_allclose(found, expected[profile], rtol=1e-5, atol=1e-6)
  found = maestro.load_stablehlo(directory)(x)
  np.testing.assert_allclose(
    jax.device_get(found), expected["own"], rtol=1e-5, atol=1e-6
  )
