"""The directory of a run: one writer, and JSON files that are what they say."""

import json
import multiprocessing
import os
import pathlib

import numpy as np
import pytest

from maestro.runs import checkpoint, workdir
from maestro.runs.workdir import WorkdirError


def _hold(path, ready, done):
  with workdir.locked(pathlib.Path(path)):
    ready.set()
    done.wait(60)


def test_a_workdir_has_one_writer_until_that_dies(tmp_path):
  context = multiprocessing.get_context("spawn")
  ready, done = context.Event(), context.Event()
  other = context.Process(target=_hold, args=(str(tmp_path), ready, done))
  other.start()
  try:
    assert ready.wait(60)
    with (
      pytest.raises(WorkdirError, match=f"process {other.pid} on"),
      workdir.locked(tmp_path),
    ):
      pass
  finally:
    other.kill()  # no clean-up of its own
    other.join()
  with workdir.locked(tmp_path):
    assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{",
    "[]",
    "null",
    '"x"',
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"a": 1, "a": 2}',
    "\xff",
    "{}",
    '{"a": []}',
  ],
  ids=lambda text: text[:12] or "empty",
)
def test_damaged_json_is_told_with_its_remedy(text, tmp_path):
  path = tmp_path / "x.json"
  path.write_bytes(text.encode("latin-1"))
  with pytest.raises(WorkdirError, match=r"x\.json is damaged.*do this"):
    workdir.read_json(path, keys={"a": dict}, remedy="do this")


def test_only_regular_files_are_read(tmp_path):
  os.mkfifo(tmp_path / "pipe.json")
  for name in ("pipe.json", "."):
    with pytest.raises(WorkdirError):
      workdir.read_json(tmp_path / name)


@pytest.mark.parametrize("content", [{}, [], {"final": {}}, {"config": 1}])
def test_damaged_results_never_mean_that_a_run_is_finished(content, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "results.json").write_text(json.dumps(content))
  with pytest.raises(WorkdirError, match=r"results\.json.*delete it and run"):
    workdir.finished_results(tmp_path, {})


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
  state = {"step": np.int32(7), "params": {"w": np.ones(3, np.float32)}}
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(7, state, {})
  assert checkpoint.load_params(tmp_path / "c")[0]["w"].shape == (3,)
  (tmp_path / "c/7").rename(tmp_path / "c/12")
  with pytest.raises(checkpoint.CheckpointError, match="holds step 7"):
    checkpoint.load_params(tmp_path / "c")
