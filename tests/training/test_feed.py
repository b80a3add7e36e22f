"""Batches that come as they are read train what arrays on the devices do."""

import copy
import dataclasses
import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest
import streamed
from jax.sharding import NamedSharding, PartitionSpec
from streamed import digits, lazy

from maestro import chaos, data
from maestro.errors import Interrupted, UserError
from maestro.parallel.loopback import Command
from maestro.parallel.mesh import BATCH, MeshShape, make_mesh
from maestro.report import figures
from maestro.runs import checkpoint, metrics
from maestro.training import abstract, build, feed, loop
from maestro.training import evaluate as evaluate_lib
from maestro.training.config import parse
from maestro.training.durations import Clock

BASE = {
  "model": {"name": "mlp", "features": [16]},
  "data": {"name": "digits"},
  "batch_size": 128,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "threshold": 0.3,
  "discover": {
    "epochs": 2,
    "schedule": {"name": "constant", "learning_rate": 0.05},
    "lam": 2e-2,
    "sampler": {"name": "one_layer"},
  },
  "settle": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.02},
  },
  "truncate": {"min_saving": 0.1, "max_compilations": 8, "multiple_of": 2},
  "checkpoint": {"every": "steps:3", "keep": 9},
  "mesh": {"data": 1},
}
RACE = {"method": "race", "budget": "macs:0.5"}
NESTED = {"method": {"name": "nested", "nested": {"levels": (1.0, 0.5)}}}
WAYS = {"lasso": {}, "race": RACE, "nested": NESTED}

STREAMED = streamed.load()
JIT = jax.jit


@pytest.fixture(autouse=True)
def quickly(monkeypatch, jit):
  monkeypatch.setattr(jax, "jit", jit)
  monkeypatch.setattr(figures, "figures", lambda workdir: None)


@pytest.fixture
def use(monkeypatch):
  """Makes runs have a data set, whatever their config says."""

  def use(dataset):
    monkeypatch.setattr(build.data_lib, "make", lambda **options: dataset)

  return use


def leaves(workdir):
  directory = workdir / "checkpoints"
  return checkpoint.load_leaves(
    directory, max(checkpoint.list_steps(directory))
  )


def same_network(a, b):
  (a, _), (b, _) = leaves(a), leaves(b)
  return a.keys() == b.keys() and all(
    a[path].tobytes() == b[path].tobytes() for path in a
  )


@pytest.mark.quick(1)
@pytest.mark.parametrize("way", WAYS)
def test_a_streamed_run_is_the_resident_one_to_the_bit(way, use, tmp_path):
  c = copy.deepcopy(BASE) | WAYS[way]
  found = {}
  for name, dataset in (("resident", digits), ("streamed", STREAMED)):
    use(dataset)
    found[name] = loop.train(c, tmp_path / name)
  assert same_network(tmp_path / "resident", tmp_path / "streamed")
  resident, streamed = found["resident"], found["streamed"]
  one, other = resident["final"]["metrics"], streamed["final"]["metrics"]
  assert other == one | {"left_out": 0.0}
  assert resident["train"]["macs_total"] == streamed["train"]["macs_total"]
  # Each epoch reads the third example once, or leaves it out at its end.
  assert streamed["train"].get("replaced", 0) in (1, 2, 3)
  assert "replaced" not in resident["train"]
  records = metrics.read(tmp_path / "streamed")
  waits = [r["input_wait"] for r in records if "input_wait" in r]
  assert waits and all(0 <= wait <= 1 for wait in waits)
  total = sum(r.get("replaced", 0) for r in records)
  assert way == "race" or total == streamed["train"]["replaced"]


def test_a_stop_in_the_midst_of_an_epoch_changes_nothing(
  use, tmp_path, monkeypatch
):
  use(STREAMED)
  c = copy.deepcopy(BASE)
  loop.train(c, tmp_path / "whole")
  asked, polls = False, 0

  def poll():
    nonlocal polls
    polls += 1
    return asked and polls > 5

  monkeypatch.setattr(loop.processes, "stop_agreed", lambda _: poll)
  asked = True
  with pytest.raises(Interrupted):
    loop.train(c, tmp_path / "stopped")
  _, extra = leaves(tmp_path / "stopped")
  assert extra["ledger"]["examples"] % (len(digits.train) // 128 * 128)
  asked = False
  loop.train(c, tmp_path / "stopped")
  assert same_network(tmp_path / "whole", tmp_path / "stopped")
  # Nor what is recorded, but for what a clock measures.
  assert not list(chaos.differences(tmp_path / "stopped", tmp_path / "whole"))


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "model": 4}])
def test_a_batch_is_split_over_the_devices(shape):
  mesh, clock = make_mesh(MeshShape(**shape)), Clock(4, 16, discover=8)
  with_devices = feed.make_feed(STREAMED, 0, clock, mesh)
  one = feed.make_feed(digits, 0, clock, make_mesh(MeshShape(data=1)))
  for step in (0, 1, 5, 2):  # back and forth, as races go
    x, y = (with_devices(step)[k] for k in ("inputs", "targets"))
    assert x.sharding == NamedSharding(mesh, PartitionSpec(BATCH))
    known = one(step)
    rows = np.asarray(known["order"])[step % 4 * 16 :][:16]
    np.testing.assert_array_equal(x, np.asarray(known["inputs"])[rows])
    np.testing.assert_array_equal(y, np.asarray(known["targets"])[rows])
  assert with_devices.waited > 0 and one.waited == 0
  with_devices.close()


class Half:
  """A sharding whose places lie in part on devices of this process."""

  is_fully_addressable = False

  def __init__(self, *slices):
    self.slices = slices

  def addressable_devices_indices_map(self, shape):
    return {i: (part,) for i, part in enumerate(self.slices)}


def test_a_process_reads_what_its_devices_need():
  several = Half(slice(8, 12), slice(0, 4), slice(8, 12))
  assert feed.part_of(several, 16).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
  assert feed.part_of(Half(slice(None)), 4).tolist() == [0, 1, 2, 3]


def test_steps_of_a_stream_go_one_by_one(use):
  use(STREAMED)
  with pytest.raises(UserError, match=r"config\.steps_per_dispatch: 4 "):
    build.make_training(parse(BASE | {"steps_per_dispatch": 4}))


def test_what_cannot_be_read_counts_for_nothing():
  c = parse(copy.deepcopy(BASE))
  t = build.make_training(c, dataset=STREAMED)
  params, _ = t.initial()
  split = lazy(digits.val)
  lost = {1, 2, 250}
  split.inputs.unreadable.update(lost)
  kept = [i for i in range(len(split)) if i not in lost]
  least = data.Split(digits.val.inputs[kept], digits.val.targets[kept])
  evaluate = dataclasses.replace(t.evaluate)
  found, known = (evaluate({"params": params}, s) for s in (split, least))
  assert found.pop("left_out") == 3
  for name, value in known.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5)
  split.inputs.unreadable.update(range(len(split)))
  with pytest.raises(evaluate_lib.DataError, match="none of the examples"):
    evaluate({"params": params}, split)


def test_the_program_of_a_stream_is_known_without_files(monkeypatch):
  """What `maestro.fit` compiles is what the loop runs."""
  monkeypatch.setattr(jax, "jit", JIT)
  small = {"val_examples": 8, "train_examples": 64, "size": 32, "workers": 0}
  c = parse(
    BASE
    | {
      "model": {"name": "resnet18", "width": 4, "stem": "imagenet"},
      "data": {"name": "imagenet2012", **small},
      "batch_size": 16,
      "method": "dense",
      "mesh": {"data": 8},
    }
  )
  form = abstract.forms(c)[0]
  outline = abstract.abstract(c, form, jax.devices())
  t = outline.training
  _, tx = t.optimizer(t.clock.discover)
  state = t.new_state(tx, *t.initial(), {})
  state = t.placement.put(state, state.params)
  x, y = np.zeros((16, 32, 32, 3), np.uint8), np.zeros(16, np.int32)
  parts = NamedSharding(t.mesh, PartitionSpec(BATCH))
  batch = jax.device_put({"inputs": x, "targets": y}, parts)
  program = t.program("discover", t.clock.discover, outline.steps)
  real = program.lower(state, batch).as_text()
  assert real == outline.lower().as_text()


@pytest.mark.quick(0)
def test_two_processes_read_halves_and_train_what_one_does(
  tmp_path, monkeypatch
):
  here = str(pathlib.Path(__file__).parent)
  path = [here, *filter(None, sys.path)]
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
  monkeypatch.setenv("XLA_FLAGS", "")
  found = []
  for processes in (1, 2):
    c = copy.deepcopy(BASE) | {
      "data": {"target": "streamed:load"},
      "mesh": {"data": processes},
    }
    config = tmp_path / f"config{processes}.py"
    config.write_text(
      "import json\n"
      "from ml_collections import ConfigDict\n"
      "def get_config(arg=''):\n"
      f"  return ConfigDict(json.loads({json.dumps(c)!r})).lock()\n"
    )
    words = [sys.executable, "-m", "maestro.main", f"--config={config}"]
    words += ["--allow_import=streamed"]
    run = chaos.Attempt(Command(words, processes), tmp_path / str(processes))
    assert run.wait(300) == 0, run.output
    results = (tmp_path / str(processes) / "results.json").read_text()
    found.append(json.loads(results))
  one, two = found
  assert [row["rank"] for row in one["layers"]] == [
    row["rank"] for row in two["layers"]
  ]
  assert one["final"]["metrics"]["loss"] == pytest.approx(
    two["final"]["metrics"]["loss"], rel=1e-3
  )
  assert one["train"]["replaced"] == two["train"]["replaced"]
