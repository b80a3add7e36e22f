"""Workdirs that were damaged: an error in one line, or nothing has changed."""

import shutil

import jax
import numpy as np
import pytest

from maestro.errors import UserError
from maestro.report import figures, tables
from maestro.runs import metrics
from maestro.runs import workdir as workdir_lib
from maestro.training import loop, opened

PHASE = {
  "epochs": 1,
  "schedule": {"name": "constant", "learning_rate": 0.05},
}
CONFIG = {
  "model": {"name": "mlp", "features": [12]},
  "data": {"name": "digits"},
  "discover": PHASE,
  "settle": PHASE,
  "optimizer": {"name": "sgd"},
  "batch_size": 128,
  "mesh": {"data": 1},
}
CLOCK = ("wall_seconds", "examples_per_second", "git")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  root = tmp_path_factory.mktemp("hostile")
  loop.train(CONFIG, root / "run")
  return root / "run"


def read_runs(workdir):
  found = []
  for which in opened.CHECKPOINTS:
    run = opened.open_run(workdir, which)
    leaves = jax.tree_util.tree_leaves_with_path(
      (run.params, run.batch_stats, run.ranks)
    )
    arrays = [(str(path), np.asarray(x).tolist()) for path, x in leaves]
    found.append((run.config, run.facts, run.step, arrays))
  return found


def reported(workdir):
  results = tables.load(workdir)
  return results, tables.layer_table(results)


def drawn(workdir):
  return [p.read_bytes() for p in figures.figures(workdir)]


def trained(workdir):
  return loop.train(CONFIG, workdir)


def timeless(value):
  if isinstance(value, dict):
    return {k: timeless(v) for k, v in value.items() if k not in CLOCK}
  return [timeless(v) for v in value] if isinstance(value, list) else value


def resumed(workdir):
  copy = workdir.with_name("resumed")
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(workdir, copy)
  (copy / "results.json").unlink()
  results = loop.train(CONFIG, copy)
  spectra = workdir_lib.read_json(copy / "importance.json")
  return timeless([results, metrics.read(copy), spectra])


def flipped(data, rng):
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)


def truncated(data, rng):
  del data[rng.integers(len(data)) :]


def damaged(workdir, copy, damage, n, seed):
  """Damages one file after another, yielding each one's name."""
  rng = np.random.default_rng(seed)
  paths = sorted(p for p in workdir.rglob("*") if p.is_file())
  paths = [p.relative_to(workdir) for p in paths]
  shutil.copytree(workdir, copy)
  order = np.concatenate([rng.permutation(len(paths)) for _ in range(n)])[:n]
  for i in order:
    data = bytearray((workdir / paths[i]).read_bytes())
    damage(data, rng)
    (copy / paths[i]).write_bytes(data)
    yield str(paths[i])
    shutil.copy(workdir / paths[i], copy / paths[i])


def check(workdir, copy, reads, damage, n, seed, capfd):
  wanted = [read(workdir) for read in reads]
  for name in damaged(workdir, copy, damage, n, seed):
    for read, want in zip(reads, wanted, strict=True):
      capfd.readouterr()
      try:
        found = read(copy)
      except UserError as error:
        assert "\n" not in str(error) and str(copy.parent) in str(error)
        continue
      if (damage, read) == (truncated, metrics.read):
        want = want[: len(found)]  # as after a kill: only figures can tell
      text = capfd.readouterr()
      told = name in text.out or "set aside" in text.out
      assert found == want or told, (name, read.__name__)
      assert "Traceback" not in text.err, (name, read.__name__)


@pytest.mark.quick(0)
@pytest.mark.parametrize("damage", [flipped, truncated])
def test_damage_changes_no_result(damage, finished, tmp_path, capfd):
  reads = (read_runs, metrics.read, reported, trained)
  check(finished, tmp_path / "copy", reads, damage, 15, 0, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flipped, truncated])
def test_damage_changes_no_result_in_any_use(damage, finished, tmp_path, capfd):
  reads = (read_runs, metrics.read, reported, trained, drawn)
  reads += (loop.evaluate_workdir, resumed)
  check(finished, tmp_path / "copy", reads, damage, 500, 1, capfd)


@pytest.mark.parametrize(
  "name", ["config.json", "facts.json", "results.json", "importance.json"]
)
def test_bits_of_a_json_file_count(name, finished, tmp_path):
  data = (finished / name).read_bytes()
  want = workdir_lib.read_json(finished / name)
  for i in range(0, len(data), 5):
    altered = bytearray(data)
    altered[i] ^= 1 << i % 8
    (tmp_path / name).write_bytes(altered)
    try:
      found = workdir_lib.read_json(tmp_path / name)
    except UserError:
      continue
    assert found == want, i


def test_bits_of_a_record_count(finished, tmp_path):
  data = (finished / metrics.FILE).read_bytes()
  want = metrics.read(finished)
  for i in range(0, len(data), 5):
    altered = bytearray(data)
    altered[i] ^= 1 << i % 8
    (tmp_path / metrics.FILE).write_bytes(altered)
    try:
      found = metrics.read(tmp_path)
    except UserError:
      continue
    assert found == want, i


def test_figures_of_a_file_cut_short_say_so(finished, tmp_path, capsys):
  copy = shutil.copytree(finished, tmp_path / "copy")
  data = (copy / metrics.FILE).read_bytes()
  (copy / metrics.FILE).write_bytes(data[: len(data) // 2])
  figures.figures(copy)
  assert "metrics.jsonl ends at step" in capsys.readouterr().out
