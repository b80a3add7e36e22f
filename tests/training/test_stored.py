"""Training starts from a file: an export's, or PyTorch's weights."""

import copy
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from maestro import data as data_lib
from maestro import introspect, lowrank, pytorch, trees
from maestro.deploy import packing
from maestro.errors import UserError
from maestro.report import figures
from maestro.training import build, loop
from maestro.training.config import parse

BASE = {
  "model": {"name": "resnet18", "width": 2, "stage_sizes": [1]},
  "data": {"name": "digits"},
  "batch_size": 512,
  "method": "dense",
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "discover": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.0},
  },
  "settle": {
    "epochs": 0,
    "schedule": {"name": "constant", "learning_rate": 0.0},
  },
  "mesh": {"data": 1},
}


def config(path, **changes):
  return copy.deepcopy(BASE) | {"init_from": str(path)} | changes


@pytest.fixture(scope="module")
def network():
  """(training without a start, layers, random variables of factors)."""
  t = build.make_training(parse(config("none.safetensors")))
  layers = introspect.layers(t.model, t.facts.example)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(t.model.init, jax.random.key(0), t.facts.example)
  variables = jax.tree.map(
    lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), shapes
  )
  changes = {}
  for path, spec in layers.items():
    if path != "classifier":  # stays dense
      u, v = spec.factor_shapes(max(spec.full_rank // 2, 1))
      changes[path] = {"u": rng.uniform(0.5, 1, u), "v": rng.uniform(0.5, 1, v)}
  changes = jax.tree.map(np.float32, changes)
  params = trees.replace(variables["params"], changes)
  return t, layers, variables | {"params": params}


def _exported(network, sizes=("own",)):
  """The tensors of an export, the first of several sizes being all of it."""
  _, layers, variables = network
  ranks = lowrank.full_ranks(variables["params"], layers)
  flat = {p: int(r) for p, r in trees.flatten_ranks(ranks).items()}
  profiles = [
    packing.Profile(
      name,
      {path: r - i if r > 1 else r for path, r in flat.items()},
      jax.tree.map(lambda x, i=i: x + i, variables["batch_stats"]),
    )
    for i, name in enumerate(sizes)
  ]
  return packing.pack(variables["params"], profiles, layers)[0]


@pytest.mark.parametrize("names", ["an export's", "PyTorch's"])
def test_a_file_gives_params_and_statistics(names, network, tmp_path, close):
  t, layers, variables = network
  tensors = _exported(network)
  if names == "PyTorch's":
    tensors = pytorch.to_state_dict(t.model, variables, t.facts.example)
  path = tmp_path / "start.safetensors"
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(x) for name, x in tensors.items()}, path
  )
  found = build.make_training(parse(config(path))).initial()
  merged = lowrank.merge(variables["params"], layers)
  assert not trees.factored(found[0])
  close(found, (merged, variables["batch_stats"]), 1e-6)


def test_a_run_starts_there_and_keeps_where(tmp_path, monkeypatch, jit):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)
  monkeypatch.setattr(jax, "jit", jit)
  path, rng = tmp_path / "start.safetensors", np.random.default_rng(0)
  mlp = {"model": {"name": "mlp", "features": [6]}}
  shapes = {"fc1": (6, 64), "fc2": (10, 6)}
  state = {
    f"{layer}.{leaf}": rng.normal(size=size).astype(np.float32)
    for layer, shape in shapes.items()
    for leaf, size in (("weight", shape), ("bias", shape[:1]))
  }
  safetensors.numpy.save_file(state, path)
  results = loop.train(config(path, **mlp), tmp_path / "run")
  split = data_lib.make("digits").test
  x = split.inputs.reshape((len(split), -1))
  x = np.maximum(x @ state["fc1.weight"].T + state["fc1.bias"], 0)
  x = x @ state["fc2.weight"].T + state["fc2.bias"]
  # Nothing was learnt: the learning rate is 0.
  accuracy = np.mean(np.argmax(x, -1) == split.targets)
  assert results["final"]["metrics"]["accuracy"] == pytest.approx(accuracy)
  assert results["config"]["init_from"] == str(path)
  written = json.loads((tmp_path / "run" / "config.json").read_text())
  assert written["init_from"] == str(path)


def test_the_largest_size_is_taken_where_there_is_no_doubt(network, tmp_path):
  path = tmp_path / "two.safetensors"
  tensors = _exported(network, ("1.0", "0.5"))
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError, match=r"init_from.*several sizes.*'0\.5'"):
    build.make_training(parse(config(path))).initial()
  one = {
    k: x for k, x in tensors.items() if not k.startswith("batch_stats/0.5")
  }
  safetensors.numpy.save_file(one, path)
  params, stats = build.make_training(parse(config(path))).initial()
  assert params.keys() and stats["stem_norm"]["mean"].shape == (2,)


def test_all_that_does_not_fit_is_named(network, tmp_path):
  path = tmp_path / "wrong.safetensors"
  tensors = _exported(network)
  tensors["params/head/kernel"] = np.ones((2, 2), np.float32)
  tensors["params/stem/v"] = tensors["params/stem/v"][:, :1].copy()
  del tensors["params/stem_norm/scale"]
  del tensors["batch_stats/own/stem_norm/var"]
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError) as caught:
    build.make_training(parse(config(path))).initial()
  for part in (
    f"config.init_from: {path}: ",
    "missing: batch_stats/stem_norm/var [2], params/stem_norm/scale [2];",
    "unknown: params/head/kernel;",
    "params/stem/v is [1, 1] and must be [1, 2]",
  ):
    assert part in str(caught.value)


def test_int8_weights_are_refused_as_such(network, tmp_path):
  path = tmp_path / "int8.safetensors"
  tensors = _exported(network)
  tensors["scales/params/stem/v"] = np.ones((1, 1), np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError, match=r"weights are int8.*without --int8"):
    build.make_training(parse(config(path))).initial()


def test_a_name_that_is_no_statistic_is_unknown(network, tmp_path):
  path = tmp_path / "odd.safetensors"
  tensors = _exported(network) | {"batch_stats/b": np.ones(2, np.float32)}
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError, match="unknown: batch_stats/b"):
    build.make_training(parse(config(path))).initial()


def test_pytorchs_weights_of_another_network_are_refused(network, tmp_path):
  path = tmp_path / "wide.safetensors"
  t, _, variables = network
  state = pytorch.to_state_dict(t.model, variables, t.facts.example)
  safetensors.numpy.save_file(state, path)
  wide = config(path, model=BASE["model"] | {"width": 4})
  with pytest.raises(UserError, match=r"init_from.*does not fit ResNet18"):
    build.make_training(parse(wide)).initial()
  absent = config(tmp_path / "absent.safetensors")
  with pytest.raises(UserError, match=r"init_from.*cannot read.*No such file"):
    build.make_training(parse(absent)).initial()
