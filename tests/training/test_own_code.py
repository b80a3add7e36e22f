"""Runs of a user's own model and data: trained, evaluated, exported."""

import importlib
import json
import subprocess
import sys
import textwrap

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from configs import digits_od
from maestro import targets
from maestro.deploy import export
from maestro.errors import UserError
from maestro.runs import workdir as workdir_lib
from maestro.training import build, loop, opened
from maestro.training.config import parse

CODE = '''
from os import system
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from maestro.data import Dataset, Split, identity


class Net(nn.Module):
  """Knows nothing of factors, and is told the mode in its own way."""

  num_classes: int
  width: int = 16
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x, deterministic=True):
    x = nn.Conv(8, (3, 3), strides=2)(x)
    x = nn.BatchNorm(use_running_average=deterministic)(x)
    x = nn.relu(x).reshape((x.shape[0], -1))
    x = nn.relu(nn.Dense(self.width)(x))
    x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
    return nn.Dense(self.num_classes)(x)


def net(num_classes, features: int):
  return Net(num_classes, width=features)


def stripes(n: int = 96, val: int = 32):
  """Images of which the brighter half tells the class."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n + 2 * val, 8, 8, 1)).astype(np.float32)
  y = rng.integers(0, 2, len(x)).astype(np.int32)
  x[y == 1, :4] += 1
  x[y == 0, 4:] += 1
  split = lambda a, b: Split(x[a:b], y[a:b])
  return Dataset(
    name="stripes",
    train=split(0, n), val=split(n, n + val), test=split(n + val, None),
    num_classes=2,
    preprocess=identity,
  )


def nothing():
  return None


class Cached(nn.Module):
  @nn.compact
  def __call__(self, x):
    seen = self.variable("seen", "n", jnp.zeros, ())
    return nn.Dense(2)(x.reshape((x.shape[0], -1))) + seen.value


class Noisy(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dropout(0.5, rng_collection="noise")(x, deterministic=not train)
    return nn.Dense(2)(x.reshape((x.shape[0], -1)))


class Plain:
  pass


class Graph(nnx.Module):
  def __init__(self, num_classes, width, rngs):
    self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.fc = nnx.Linear(128, width, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    self.head = nnx.Linear(width, num_classes, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x))).reshape((x.shape[0], -1))
    return self.head(self.drop(nnx.relu(self.fc(x))))


def graph(num_classes, width: int = 16):
  return Graph(num_classes, width, nnx.Rngs(0))
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
  """A module of a user, and how configs name it."""
  monkeypatch.setattr(targets, "_allowed", set())
  folder = tmp_path / "code"
  folder.mkdir()
  (folder / "own_nets.py").write_text(CODE)
  (folder / "own_broken.py").write_text("1 / 0\n")
  monkeypatch.syspath_prepend(folder)
  importlib.invalidate_caches()
  yield folder
  for name in ("own_nets", "own_broken"):
    sys.modules.pop(name, None)


def config(**changes):
  c = digits_od.get_config("smoke,maestro").to_dict()
  c["model"] = {"target": "own_nets:Net", "width": 12}
  c["data"] = {"target": "own_nets:stripes", "n": 64}
  c["batch_size"] = 16
  return c | changes


@pytest.mark.quick(0)
def test_a_run_trains_evaluates_and_ships(own, tmp_path, monkeypatch):
  targets.allow(["own_nets"])
  workdir = tmp_path / "run"
  loop.train(config(), workdir)
  results = workdir_lib.read_json(workdir / "results.json")
  run = opened.open_run(workdir)
  assert {"Conv_0", "Dense_0", "Dense_1"} == set(run.layers)
  assert {"u", "v"} <= set(run.params["Dense_0"])
  found = loop.evaluate_workdir(workdir)
  test = results["final"]["metrics"]["accuracy"]
  assert test == pytest.approx(found["test"]["accuracy"])

  # Its ranks are read: one of 0 leaves its layer's bias alone.
  x = np.ones((3, 8, 8, 1), np.float32)
  variables = {"params": run.params, "batch_stats": run.batch_stats}
  zero = jax.tree.map(np.zeros_like, run.ranks)
  y = run.model.apply(variables | {"ranks": zero}, x)
  bias = run.params["Dense_1"]["bias"]
  np.testing.assert_allclose(y, np.tile(bias, (3, 1)), atol=1e-6)

  # An export is loaded with the class itself, which need not be allowed.
  data, options = opened.data_of(run), export.Options(repeats=0)
  export.export(run, tmp_path / "out", dataset=data, options=options)
  import own_nets

  plain = own_nets.Net(2, width=12)
  for model in (plain, maestro.factored(plain)):
    loaded, small = maestro.load(tmp_path / "out", model=model)
    whole = {"params": run.params, "batch_stats": small["batch_stats"]}
    want = run.model.apply(whole | {"ranks": run.ranks}, x)
    np.testing.assert_allclose(loaded.apply(small, x), want, atol=1e-5)

  # Whoever opens a workdir has not allowed what its config names.
  monkeypatch.setattr(targets, "_allowed", set())
  for call in (loop.evaluate_workdir, opened.open_run):
    with pytest.raises(UserError, match=r"model\.target: .*--allow_import=own"):
      call(workdir)


@pytest.mark.quick(0)
def test_a_model_of_nnx_trains_and_ships(own, tmp_path):
  targets.allow(["own_nets"])
  model = {"target": "own_nets:graph", "width": 12}
  loop.train(config(model=model), tmp_path / "run")
  run = opened.open_run(tmp_path / "run")
  assert {"conv", "fc", "head"} == {*run.layers}
  assert {"u", "v"} <= {*run.params["fc"]}
  results = workdir_lib.read_json(tmp_path / "run" / "results.json")
  test = results["final"]["metrics"]["accuracy"]
  found = loop.evaluate_workdir(tmp_path / "run")
  assert test == pytest.approx(found["test"]["accuracy"]) and test > 0.6
  data, options = opened.data_of(run), export.Options(repeats=0)
  export.export(run, tmp_path / "out", dataset=data, options=options)
  import own_nets

  model = maestro.factored(own_nets.graph(2, 12))
  loaded, small = maestro.load(tmp_path / "out", model=model)
  x = np.ones((3, 8, 8, 1), np.float32)
  whole = {"params": run.params, "batch_stats": small["batch_stats"]}
  ranks = jax.tree.map(jnp.asarray, run.ranks)
  want = run.model.apply(whole | {"ranks": ranks}, x, train=False)
  found = loaded.apply(small, x, train=False)
  np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize(
  ("section", "value", "why"),
  [
    ("model", {"target": "own_nets:Nett"}, r"no class 'Nett'; .* 'Net'"),
    ("model", {"target": "own_nets:Net", "widht": 3}, r"widht: .* 'width'"),
    ("model", {"target": "own_nets:Net", "width": "3"}, r"width: '3' is a str"),
    ("model", {"target": "own_nets"}, r"must be 'package\.module:name'"),
    ("model", {"target": "own_nets:"}, r"must be 'package\.module:name'"),
    ("model", {"target": "../own:Net"}, r"must be 'package\.module:name'"),
    ("model", {"target": 3}, r"must be 'package\.module:name'"),
    ("model", {"target": "own_missing:Net"}, r"ModuleNotFound.*PYTHONPATH"),
    ("model", {"target": "own_broken:Net"}, r"ZeroDivisionError"),
    (
      "model",
      {"target": "own_nets:Plain"},
      r"Linen module or.*Plain",
    ),
    (
      "model",
      {"target": "own_nets:Net", "name": "mlp"},
      r"model\.target: unknown key",
    ),
    ("model", {"target": "own_nets:Cached"}, r"own_nets:Cached.*seen"),
    ("model", {"target": "own_nets:Noisy"}, r"own_nets:Noisy.*noise"),
    ("model", {"target": "own_nets:system"}, r"not of 'own_nets' but of"),
    ("model", {"target": "own_nets:net"}, r"model\.features: missing key"),
    (
      "model",
      {"target": "own_other.nets:Net"},
      r"import=own_other\.nets",
    ),
    ("data", {"target": "own_nets:nothing"}, r"NoneType; it must return"),
    ("data", {"target": "own_nets:stripes", "m": 3}, r"data\.m: unknown key"),
    (
      "data",
      {"target": "own_nets:stripes", "n": 8},
      r"split of.*examples",
    ),
  ],
)
def test_what_is_wrong_with_a_target_is_told(own, section, value, why):
  targets.allow(["own_nets", "own_missing", "own_broken"])
  with pytest.raises(UserError, match=why):
    build.make_training(parse(config(**{section: value})))


@pytest.mark.quick(0)
def test_why_a_batch_of_any_size_cannot_be_lowered(own, tmp_path):
  file = own / "own_nets.py"
  file.write_text(file.read_text().replace("x.shape[0]", "len(x)"))
  targets.allow(["own_nets"])
  loop.train(config(), tmp_path / "run")
  with pytest.raises(UserError, match=r"x\.shape\[0\] is known, .* len\(x\)"):
    run = opened.open_run(tmp_path / "run")
    export.export(run, tmp_path / "out", dataset=opened.data_of(run))


def test_nothing_is_imported_unless_it_was_allowed(own):
  targets.allow(["own", "nets", "own_nets_2", "own_nets.Net"])
  with pytest.raises(UserError, match=r"--allow_import=own_nets"):
    build.make_training(parse(config()))
  assert "own_nets" not in sys.modules
  targets.allow(["own_nets"])
  assert build.make_training(parse(config())).layers["Dense_0"].n_out == 12


@pytest.mark.parametrize("module", ["own_nets:Net", "own/nets.py", "", "."])
def test_only_modules_can_be_allowed(own, module):
  with pytest.raises(UserError, match=r"--allow_import: .* no name of a"):
    targets.allow([module])


def test_a_function_may_make_the_model(own):
  targets.allow(["own_nets"])
  model = {"target": "own_nets:net", "features": 5}
  t = build.make_training(parse(config(model=model)))
  assert t.layers["Dense_0"].n_out == 5
  assert isinstance(t.model, linen.Module)


@pytest.mark.quick(0)
def test_the_flag_allows_it(own, tmp_path):
  file = tmp_path / "own_config.py"
  code = """
    from configs import digits_od
    from ml_collections import ConfigDict

    def get_config(arg=""):
      c = digits_od.get_config("smoke,maestro").unlock()
      c.model = ConfigDict({"target": "own_nets:Net", "width": 12})
      return c.lock()
  """
  file.write_text(textwrap.dedent(code))
  command = [sys.executable, "-m", "maestro.main", f"--config={file}"]
  command += [f"--workdir={tmp_path / 'run'}", "--config.model.width=8"]
  path = f"{own}:{tmp_path}:."

  def run(*more):
    return subprocess.run(
      ["env", f"PYTHONPATH={path}", *command, *more],
      capture_output=True,
      text=True,
    )

  refused = run()
  assert refused.returncode == 2 and "--allow_import=own_nets" in refused.stderr
  done = run("--allow_import=own_nets")
  assert done.returncode == 0, done.stderr
  saved = json.loads((tmp_path / "run" / "config.json").read_text())
  assert saved["model"] == {"target": "own_nets:Net", "width": 8}
  assert (tmp_path / "run" / "report" / "ranks.png").is_file()
