"""The command that says whether a config fits: verdicts, exit codes, JSON."""

import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl.testing import flagsaver

from maestro import cli, fit
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.parallel.programs import Memory
from maestro.parallel.topology import Topology
from maestro.training.config import parse
from maestro.training.footprint import Evaluation, Largest, Row

# ml_collections loads config files by a deprecated method.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "linear_od.py"


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the command line in this process: (exit code, stdout, stderr)."""

  def run(*args):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setattr(sys, "argv", ["maestro.fit", *args])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
      cli.run(fit.main)
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err

  return run


@pytest.mark.quick(1)
def test_what_does_not_fit_exits_with_1_and_names_the_knob(command, tmp_path):
  code, out, _ = command(
    f"--config={CONFIG}",
    *("--topology=cpu:8", "--memory_gib=1e-5", "--nosearch"),
    *(f"--json={tmp_path / 'fit.json'}", "--config.method=dense"),
  )
  assert code == fit.EXIT_TOO_LARGE
  assert "does NOT fit" in out and "config.batch_size (now 64)" in out
  assert "config.mesh.fsdp (now 1)" in out
  record = json.loads((tmp_path / "fit.json").read_text())
  assert (record["fits"], record["devices"], record["memory"]) == (
    False,
    8,
    int(1e-5 * 2**30),
  )
  assert [row["trained"] for row in record["rows"]] == [True, *[False] * 3]
  params = [row["parts"]["params"] for row in record["rows"]]
  # A map [9, 6] and factors of ranks 6, 3 and 2.
  assert params == [4 * 54, 4 * 6 * 15, 4 * 3 * 15, 4 * 2 * 15]
  program = record["rows"][0]["program"]
  assert f"program {program} (dense)" in out


def test_what_fits_exits_with_0(command, monkeypatch):
  rows = []

  def measured(c, form, devices, limit):
    needed = 1000 * c.batch_size
    memory = Memory(needed, 0, 0, 0, 0)
    parts = dict.fromkeys(("params", "optimizer", "data set", "batch"), 8)
    rows.append(
      Row(
        *(form.name, form.trained, c.batch_size, 1, memory, needed),
        fits=needed <= limit,
        parts=parts,
      )
    )
    return rows[-1]

  def evaluated(c, form, devices, limit):
    return Evaluation(form.name, 500, needed, needed <= limit)

  monkeypatch.setattr(fit, "measure", measured)
  monkeypatch.setattr(fit, "measure_evaluation", evaluated)
  args = f"--config={CONFIG}", "--topology=cpu:8", "--memory_gib=1e-4"
  needed = 1 << 20
  code, out, _ = command(*args, "--nosearch")
  assert code == fit.EXIT_TOO_LARGE and "fits: 62.50 KiB" in out
  assert "evaluation, 500 examples at a time" in out and "does NOT" in out
  assert len(rows) == 4
  rows.clear()
  command(*args, "--nosearch", "--nocompare")
  assert [row.form for row in rows] == ["factored, 1 of the ranks"]
  rows.clear()
  needed = 1 << 10
  code, out, _ = command(*args)
  assert code == 0 and "fits: 62.50 KiB" in out and "does NOT" not in out
  # 104 is 13 for each of 8 devices; 107 would fit.
  assert "(factored, 1 of the ranks): 104 (" in out
  assert {row.form for row in rows[4:]} == {"factored, 1 of the ranks"}


@pytest.mark.parametrize(
  ("args", "told"),
  [
    ([f"--config={CONFIG}"], "use v4:AxBxC"),
    ([f"--config={CONFIG}", "--topology=v9:4x4"], "v5e:AxB"),
    (["--topology=cpu:8"], "--config=FILE is missing"),
    (
      [f"--config={CONFIG}", "--topology=cpu:8", "--config.mesh.data=16"],
      "data=16 asks for 16 devices, but there are 8",
    ),
    (
      [f"--config={CONFIG}", "--topology=cpu:8", "--config.batch_size=65"],
      "config.batch_size: 65 cannot be split over 8",
    ),
    (
      [f"--config={CONFIG}", "--topology=cpu:8", "--json=/no/such/fit.json"],
      "--json=/no/such/fit.json",
    ),
    ([f"--config={CONFIG}", "--topology=cpu:8", "more"], "more"),
  ],
)
def test_mistakes_exit_with_2_and_one_line(command, args, told):
  code, _, err = command(*args)
  assert code == 2 and told in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  "config", sorted(path.stem for path in CONFIG.parent.glob("*_od.py"))
)
def test_every_config_fits_one_small_chip(config, tmp_path):
  """Minutes of compiling each; for a v5e, which has the least memory."""
  pytest.importorskip("libtpu", reason="pip install -e '.[fit]'")
  out = tmp_path / "fit.json"
  done = subprocess.run(
    [
      *(sys.executable, "-m", "maestro.fit", "--topology=v5e:1x1"),
      *(f"--config={CONFIG.parent / config}.py", "--nosearch", "--nocompare"),
      f"--json={out}",
    ],
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert json.loads(out.read_text())["fits"]


def test_remedies_begin_with_the_largest_part():
  c = parse(
    {
      "model": {"name": "mlp"},
      "data": {"name": "digits"},
      "discover": {"epochs": 1, "schedule": {"name": "constant"}},
      "settle": {"epochs": 0, "schedule": {"name": "constant"}},
      "optimizer": {"name": "sgd"},
      "batch_size": 512,
    }
  )
  mesh = make_mesh(MeshShape(data=4, fsdp=2), jax.devices())
  parts = {"params": 5, "optimizer": 5, "data set": 1, "batch": 2}
  row = Row(
    *("factored", True, 512, 1, Memory(11, 0, 0, 20, 0), 31, False, parts)
  )

  def first(row, largest=None):
    return fit.remedies(c, row, mesh, largest)[0]

  assert first(row).startswith("config.batch_size (now 512): lower it")
  largest = Largest(256, 2, "", {})
  assert first(row, largest) == "config.batch_size (now 512): 256 fits"
  held = dataclasses.replace(row, memory=Memory(11, 0, 0, 3, 0))
  assert first(held).startswith("config.mesh.fsdp (now 2)")
  data = dataclasses.replace(held, parts=copy.copy(parts) | {"data set": 99})
  assert first(data).startswith("config.data: fewer examples")


def test_cpu_devices_are_asked_for_before_jax_begins(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--some=flag")
  Topology.parse("cpu:32").prepare()
  flag = "--xla_force_host_platform_device_count=32"
  assert os.environ["XLA_FLAGS"].split() == ["--some=flag", flag]
