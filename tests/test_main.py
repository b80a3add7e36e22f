"""The command line: help, mistakes in one line, exit codes, shipped configs."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest
from absl.testing import flagsaver

from maestro import cli, lowrank, main, trees
from maestro import data as data_lib
from maestro import introspect as nn
from maestro.errors import Interrupted
from maestro.models import MODELS
from maestro.training import build, optim, schedules
from maestro.training import loop as train
from maestro.training.config import clock_of, parse

# ml_collections loads config files by a deprecated method.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "digits_od.py")


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the command line in this process: (exit code, stdout, stderr)."""

  def run(*args):
    monkeypatch.setattr(sys, "argv", ["maestro.main", *args])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
      cli.run(main.main)
    out, err = capsys.readouterr()
    code = stop.value.code
    return (0 if code is None else code), out, err

  return run


@pytest.fixture
def trained(monkeypatch):
  """Replaces training by a record of what it was asked to do."""
  calls = []
  monkeypatch.setattr(train, "train", lambda *args: calls.append(args))
  return calls


def test_help_explains(command, monkeypatch):
  monkeypatch.setitem(sys.modules, "__main__", main)  # as with python -m
  code, out, err = command("--help")
  text = out + err
  assert code == 0
  for word in ("--config", "--workdir", "resumes", "configs/digits_od.py"):
    assert word in text
  assert "Traceback" not in text


@pytest.mark.parametrize(
  ("args", "word"),
  [
    (["--confg=x.py"], "confg"),
    ([f"--config={CONFIG}", "--wrkdir=x"], "wrkdir"),
    ([f"--config={CONFIG}", "--config.modle=1"], "modle"),
    ([f"--config={CONFIG}", "--config.discover.lamb=1"], "lamb"),
    ([f"--config={CONFIG}", "--config.discover.epochs=many"], "many"),
    ([f"--config={CONFIG}", "--config.discover.shrink=maybe"], "maybe"),
    ([f"--config={CONFIG}:smokey"], "smokey"),
    (["--config=no/such/config.py"], "no/such/config.py"),
    ([f"--config={CONFIG}", "more"], "more"),
    ([], "--config"),
    (["--evaluate"], "--config"),
    (["--evaluate", "--workdir=no/such/run"], "no/such/run"),
    ([f"--config={CONFIG}", "--config.model.name=mpl"], "mpl"),
    ([f"--config={CONFIG}", "--config.method={race"], "no JSON"),
    ([f"--config={CONFIG}", '--config.method={"name": "rase"}'], "rase"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_named_without_a_traceback(
  args, word, command, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  code, out, err = command(*args)
  assert code in (1, 2)
  assert (
    word in err.splitlines()[0]
    or word in err.splitlines()[-1]
    or (word in err and "USAGE" in err)
  )
  assert "Traceback" not in out + err
  assert len(err.strip().splitlines()) == 1 or "help" in err or "USAGE" in err
  assert not list(tmp_path.iterdir())


def test_flags_reach_the_run(command, trained, tmp_path):
  code, _, _ = command(
    f"--config={CONFIG}:smoke",
    "--config.discover.lam=1e-3",
    "--config.optimizer.clip_norm=2.0",
    f"--workdir={tmp_path / 'run'}",
  )
  assert code == 0
  ((config, workdir),) = trained
  assert pathlib.Path(workdir) == tmp_path / "run"
  assert config["discover"]["lam"] == 1e-3
  assert config["discover"]["epochs"] == 1
  assert config["optimizer"]["clip_norm"] == 2.0
  # A config is its JSON.
  plain = json.loads(json.dumps(config))
  assert parse(plain).discover == parse(config).discover


def test_a_method_may_have_options_on_the_command_line(command, trained):
  method = '--config.method={"name": "race", "race": {"share": 0.05}}'
  assert command(f"--config={CONFIG}:smoke", method)[0] == 0
  ((config, _),) = trained
  assert config["method"] == {"name": "race", "race": {"share": 0.05}}
  assert parse(config).method.race == {"share": 0.05}


def test_the_workdir_is_named_after_the_config_and_its_variants(
  command, trained
):
  assert command(f"--config={CONFIG}:smoke")[0] == 0
  assert pathlib.Path(trained[0][1]) == pathlib.Path("runs/digits_od_smoke")


@pytest.mark.parametrize(
  ("config", "workdir"),
  [
    ("configs/lenet_od.py", "runs/lenet_od"),
    ("configs/lenet_od.py:", "runs/lenet_od"),
    ("configs/lenet_od.py:smoke", "runs/lenet_od_smoke"),
    ("lenet_od.py:paper,smoke", "runs/lenet_od_paper_smoke"),
  ],
)
def test_default_workdir(config, workdir):
  found = main.default_workdir(config)
  assert re.sub(",", "_", str(found)) == workdir


CONFIG_FILES = {
  "raises": ("def get_config(arg=''):\n  return 1 / 0", "ZeroDivisionError"),
  "returns_a_dict": ("def get_config(arg=''):\n  return {}", "returned a dict"),
  "no_python": ("def get_config(:", "SyntaxError"),
  "imports": ("import nothing_there", "nothing_there"),
  "no_function": ("x = 1", "get_config"),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_config_file_that_cannot_be_used_is_told_in_one_line(
  name, command, tmp_path
):
  text, word = CONFIG_FILES[name]
  path = tmp_path / "config.py"
  path.write_text(text)
  code, _, err = command(f"--config={path}", f"--workdir={tmp_path / 'run'}")
  assert code == 2 and word in err and "--config" in err
  assert len(err.strip().splitlines()) == 1
  assert not (tmp_path / "run").exists()


RANGES = {
  "truncate.min_saving": "-5",
  "optimizer.weight_decay": "nan",
  "optimizer.momentum": "1.0",
  "discover.schedule.learning_rate": "-1",
  "model.features": "(0,)",
  "seed": str(2**70),
  "threshold": "inf",
  "batch_size": "0",
}


@pytest.mark.parametrize("key", RANGES)
def test_a_value_out_of_range_is_told_before_anything_is_written(
  key, command, tmp_path
):
  code, _, err = command(
    f"--config={CONFIG}",
    f"--config.{key}={RANGES[key]}",
    f"--workdir={tmp_path / 'run'}",
  )
  assert code == 2 and f"config.{key}" in err
  assert len(err.strip().splitlines()) == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workdir", ["", "a" * 300])
def test_a_workdir_that_cannot_be_is_told_in_one_line(
  workdir, command, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  code, _, err = command(f"--config={CONFIG}", f"--workdir={workdir}")
  assert code == 2 and "workdir" in err
  assert len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_interrupted_run_exits_with_75(command, monkeypatch, tmp_path):
  def stopped(*_):
    raise Interrupted("stopped at step 3 of 9")

  monkeypatch.setattr(train, "train", stopped)
  code, out, _ = command(f"--config={CONFIG}", f"--workdir={tmp_path}")
  assert code == 75
  assert "step 3 of 9" in out and "same command" in out


def test_who_waits_for_others_in_vain_exits_with_69(command, trained):
  code, _, err = command(
    *(f"--config={CONFIG}", "--num_processes=2", "--process_id=1"),
    *("--coordinator=127.0.0.1:1", "--join_timeout=1"),
  )
  assert code == 69 and not trained
  assert "no process 0 at 127.0.0.1:1" in err
  assert len(err.strip().splitlines()) == 1


def test_a_full_disk_is_told_in_one_line(command, monkeypatch, tmp_path):
  def full(*_):
    raise OSError(28, "No space left on device", "runs/x/metrics.jsonl")

  monkeypatch.setattr(train, "train", full)
  code, _, err = command(f"--config={CONFIG}", f"--workdir={tmp_path}")
  assert code == 2
  assert "runs/x/metrics.jsonl" in err and "space" in err
  assert len(err.strip().splitlines()) == 1


# ---------------------------------------------------------------------------
# Shipped configs
# ---------------------------------------------------------------------------


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def variants(path):
  """The variants that a config's own error message lists."""
  try:
    load(path).get_config("no_such_variant")
  except ValueError as error:
    known = str(error).partition("known: ")[2]
    return ["", *re.findall(r"\w+", known)]
  return [""]


CONFIGS = [
  (path, variant)
  for path in sorted((ROOT / "configs").glob("*_od.py"))
  for variant in variants(path)
]
# One example of data sets that need files: shape and number of classes.
SHAPES = {
  "cifar10": (32, 32, 3),
  "fashion_mnist": (28, 28, 1),
  "mnist": (28, 28, 1),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("path", "variant"), CONFIGS, ids=[f"{p.stem}:{v}" for p, v in CONFIGS]
)
@pytest.mark.parametrize("method", ["maestro", "dense"])
def test_every_shipped_config_builds(path, variant, method):
  config = load(path).get_config(variant)
  assert config.is_locked
  config.method = method
  c = parse(json.loads(json.dumps(config.to_dict())))
  cls, options = MODELS[c.model["name"]], dict(c.model)
  del options["name"]
  steps = 10
  if c.data["name"] in SHAPES:
    shape = (1, *SHAPES[c.data["name"]])
    model = cls(num_classes=10, **options)
    x = jax.ShapeDtypeStruct(shape, "float32")
  else:
    dataset = data_lib.outline(**c.data)
    steps = len(dataset.train) // c.batch_size
    facts = build.Facts.of(dataset)
    model, x = build.make_model(c, facts), facts.example
  layers = nn.layers(model, x)
  sections = {p: getattr(c, p).schedule for p in ("discover", "settle")}
  schedule = schedules.make(sections, clock_of(c, steps))
  tx = optim.make(c.optimizer, schedule, layers)

  def initial(key):
    params = model.init(key, jax.numpy.zeros(x.shape, x.dtype))["params"]
    rules = c.rules if c.method.name == "maestro" else []
    params = lowrank.decompose(params, rules, layers)
    return params, tx.init(params)

  params, _ = jax.eval_shape(initial, jax.random.key(0))
  assert bool(trees.factored(params)) == (method == "maestro")
  build.check(c)


@pytest.mark.parametrize(
  "path", sorted({p for p, _ in CONFIGS}), ids=lambda p: p.stem
)
def test_every_shipped_config_tells_its_command(path):
  doc = load(path).__doc__
  assert f"--config=configs/{path.name}" in doc
  for variant in variants(path)[1:]:
    assert variant in doc


@pytest.mark.parametrize("path", ["my_config.py", "sub/../my_config.py"])
def test_a_copy_of_a_config_works_beside_common(
  path, command, trained, tmp_path, monkeypatch
):
  (tmp_path / "sub").mkdir()
  shutil.copy(CONFIG, tmp_path / "my_config.py")
  monkeypatch.chdir(tmp_path)
  code, _, err = command(f"--config={path}", "--workdir=run")
  assert code == 2 and "common.py" in err and not trained
  assert len(err.strip().splitlines()) == 1
  shutil.copy(ROOT / "configs" / "common.py", tmp_path)
  assert command(f"--config={path}", "--workdir=run")[0] == 0
  assert trained[0][0] == load(pathlib.Path(CONFIG)).get_config().to_dict()


def test_a_file_that_is_no_config_is_told():
  # In a process of its own: here, another config's functions are still there.
  done = subprocess.run(
    [sys.executable, "-m", "maestro.main", "--config=configs/common.py"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 2 and "no function get_config" in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.quick(0)
@pytest.mark.parametrize("name", SHAPES)
def test_prepared_data_has_the_shape_that_configs_are_tested_with(name):
  if not (pathlib.Path(os.environ.get("TFDS_DATA_DIR", "")) / name).is_dir():
    pytest.skip(f"TFDS_DATA_DIR has no {name}")
  inputs = data_lib.make(name).train.inputs
  assert inputs.shape[1:] == SHAPES[name]
