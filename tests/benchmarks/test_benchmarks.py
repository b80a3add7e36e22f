"""Tests that the benchmarks run, and that their peers are the same networks."""

import importlib.util
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
  deployed,
  device,
  end_to_end,
  meeting,
  photographs,
  plain,
  products,
  sharded_save,
  train_step,
)
from benchmarks.train_step import NETWORKS, Form, Options
from experiments import photographs as synthetic
from maestro import introspect as nn
from maestro import lowrank, models, trees
from maestro.errors import Interrupted, UserError
from maestro.lowrank import Rule

COUNTS = {
  "lenet": 44_426,
  "mlp": 3_962_890,
  "resnet18": 11_173_962,
  "vgg19": 20_040_522,
}


def _options(name, width):
  network = NETWORKS[name]
  more = {"width": width} if network.has_width else {}
  return {**network.options, **more}


def _inputs(name, batch=2):
  rng = np.random.default_rng(0)
  return jnp.asarray(
    rng.standard_normal((batch, *NETWORKS[name].shape)), jnp.float32
  )


def _shapes(model, name):
  x = _inputs(name)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), x))


def _random(shapes):
  """Numbers of every leaf's shape: kernels as He, scales and variances near 1.

  Of both signs where that may be, so that no activation goes unnoticed.
  """
  rng = np.random.default_rng(0)

  def leaf(path, x):
    name = path[-1].key
    if name in ("scale", "var"):
      return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
    fan_in = x.size // x.shape[-1]
    std = (2 / fan_in) ** 0.5 if name == "kernel" else 0.2
    return jnp.asarray(std * rng.standard_normal(x.shape), x.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def _factored(name, width):
  """Our network's variables at full rank, abstract."""
  model = models.MODELS[name](num_classes=10, **_options(name, width))
  layers = nn.layers(model, _inputs(name))
  shapes = _shapes(model, name)["params"]
  return jax.eval_shape(
    lambda params: lowrank.decompose(params, [Rule()], layers), shapes
  )


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_plain_peer_has_our_parameters(name):
  options = NETWORKS[name].options
  ours = _shapes(models.MODELS[name](num_classes=10, **options), name)
  theirs = _shapes(plain.NETWORKS[name](num_classes=10, **options), name)
  assert _size(theirs["params"]) == COUNTS[name]
  assert jax.tree.map(lambda x: x.shape, theirs) == jax.tree.map(
    lambda x: x.shape, ours
  )


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_plain_peer_is_our_function(name, close, jit):
  options = _options(name, 4)
  ours = models.MODELS[name](num_classes=10, **options)
  theirs = plain.NETWORKS[name](num_classes=10, **options)
  variables, x = _random(_shapes(ours, name)), _inputs(name)

  def run(model):
    def both(variables, x):
      train = model.apply(variables, x, train=True, mutable=["batch_stats"])
      return train, model.apply(variables, x)

    return jit(both)(variables, x)

  expected, actual = run(ours), run(theirs)
  assert np.ptp(np.asarray(expected[1])) > 1e-3
  close(actual, expected, 1e-4)


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("factored", [False, True])
def test_the_torch_peer_has_our_parameters(name, factored):
  pytest.importorskip("torch", reason="PyTorch is not installed")
  from benchmarks import torch_peer

  model = torch_peer.NETWORKS[name](factored=factored, **_options(name, 16))
  n = sum(p.numel() for p in model.parameters())
  ours = _factored(name, 16)
  if not factored:
    ours = _shapes(
      models.MODELS[name](num_classes=10, **_options(name, 16)), name
    )["params"]
  assert n == _size(ours)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_torch_peer_is_our_function(name, close, jit):
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")
  from benchmarks import torch_peer

  options = _options(name, 4)
  model = models.MODELS[name](num_classes=10, **options)
  variables, x = _random(_shapes(model, name)), _inputs(name)
  expected = jit(model.apply)(variables, x)
  peer = torch_peer.NETWORKS[name](factored=False, **options).eval()
  kinds = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.BatchNorm2d)
  modules = [m for m in peer.modules() if isinstance(m, kinds)]
  paths = [
    path
    for path in _order(name)
    if trees.get(variables["params"], path) is not None
  ]
  assert len(modules) == len(paths)
  for module, path in zip(modules, paths, strict=True):
    node = dict(trees.get(variables["params"], path))
    node |= trees.get(variables.get("batch_stats", {}), path) or {}
    arrays = {k: torch.tensor(np.asarray(v)) for k, v in node.items()}
    with torch.no_grad():
      if isinstance(module, torch.nn.BatchNorm2d):
        module.weight.copy_(arrays["scale"])
        module.running_mean.copy_(arrays["mean"])
        module.running_var.copy_(arrays["var"])
      elif isinstance(module, torch.nn.Conv2d):
        module.weight.copy_(arrays["kernel"].permute(3, 2, 0, 1))
      else:
        kernel = arrays["kernel"]
        if (
          path == "fc1" and name == "lenet"
        ):  # flattened pixels: ours are channels last
          kernel = kernel.reshape(4, 4, 16, -1).permute(2, 0, 1, 3)
        module.weight.copy_(kernel.reshape(module.in_features, -1).T)
      if "bias" in arrays:
        module.bias.copy_(arrays["bias"])
  images = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
  with torch.no_grad():
    actual = peer(images).numpy()
  close(actual, np.asarray(expected), 1e-4)


def _order(name):
  """Paths of our layers and norms in the order of the PyTorch peer's."""
  if name == "lenet":
    return ["conv1", "conv2", "fc1", "fc2", "fc3"]
  if name == "mlp":
    return [f"fc{i}" for i in range(1, 6)]
  if name == "resnet18":
    parts = ("conv1", "norm1", "conv2", "norm2", "shortcut", "shortcut_norm")
    blocks = [f"stage{i}_block{j}" for i in range(1, 5) for j in (1, 2)]
    inner = [f"{block}/{part}" for block in blocks for part in parts]
    return ["stem", "stem_norm", *inner, "classifier"]
  pairs = [(i, j) for i in range(1, 6) for j in range(1, 5)]
  inner = [f"{part}{i}_{j}" for i, j in pairs for part in ("conv", "norm")]
  return [*inner, "classifier"]


# ---------------------------------------------------------------------------
# A training step
# ---------------------------------------------------------------------------


@pytest.fixture
def measure(monkeypatch, jit):
  """Measures LeNet once; compiles quickly, to slow code."""
  make_dispatch = train_step.make_dispatch

  def dispatch(step, steps):
    return jit(make_dispatch(step, steps).__wrapped__, donate_argnums=0)

  def measure(forms, **options):
    options = Options(["lenet"], forms, rounds=1, round_seconds=0.0, **options)
    return train_step.measure("lenet", options)

  monkeypatch.setattr(train_step, "make_dispatch", dispatch)
  return measure


@pytest.mark.quick(0)
def test_a_step_is_measured_in_every_form(measure, tmp_path):
  forms = [form for form in train_step.FORMS if form not in train_step.TORCH]
  rows = measure(forms, batch_size=4)
  by_form = {row["form"]: row for row in rows}
  assert by_form.keys() == {*forms, "importance"}
  assert all(row["ms"] > 0 and row["cpu_ms"] > 0 for row in rows)
  for form in ("plain", "dense"):
    assert by_form[form]["params"] == COUNTS["lenet"]
  assert by_form["factored"]["params"] == _size(_factored("lenet", None))
  # Parameters and momentum, in float32.
  assert by_form["dense"]["state_bytes"] == 8 * COUNTS["lenet"]
  states = [by_form[f]["state_bytes"] for f in ("truncated25", "truncated50")]
  assert states[0] < states[1] < by_form["factored"]["state_bytes"]
  assert by_form["dense"]["ratio_to_dense"] == 1.0
  assert by_form["dense"]["ratio_to_torch_dense"] is None
  plain_row = by_form["plain"]
  assert plain_row["ratio_to_dense"] == pytest.approx(
    plain_row["ms"] / by_form["dense"]["ms"]
  )
  assert all(
    by_form[form]["peak_bytes"] > by_form[form]["state_bytes"]
    for form in ("plain", *train_step.OURS)
  )

  text = train_step.table(rows)
  tables = [line for line in text.splitlines() if " - " in line]
  assert len({len(line) for line in tables}) == 1  # aligned
  assert "alone: lasso" in text and "a step with the lasso" in text
  train_step.append(rows[:2], tmp_path / "new" / "out.jsonl")
  train_step.append(rows[2:], tmp_path / "new" / "out.jsonl")
  lines = (tmp_path / "new" / "out.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == rows
  train_step.figure(rows, tmp_path / "bars.png")
  assert (tmp_path / "bars.png").stat().st_size > 1000
  lone = [row | {"ratio_to_dense": None} for row in rows]
  with pytest.raises(UserError, match="dense"):
    train_step.figure(lone, tmp_path / "none.png")


@pytest.mark.quick(0)
def test_several_steps_per_dispatch_in_half_precision(measure):
  rows = measure(
    ["plain", "factored"],
    batch_size=2,
    steps_per_dispatch=3,
    dtype="bfloat16",
  )
  assert [row["steps_per_round"] for row in rows] == [3, 3]
  assert {row["dtype"] for row in rows} == {"bfloat16"}


@pytest.mark.quick(0)
def test_the_torch_peer_answers(measure):
  pytest.importorskip("torch", reason="PyTorch is not installed")
  dense, peer = measure(["dense", "torch_factored"], batch_size=2)
  assert peer["params"] == _size(_factored("lenet", None))
  assert peer["state_bytes"] == 8 * peer["params"]
  assert peer["ms"] > 0 and peer["torch"]
  assert dense["ratio_to_torch_factored"] == pytest.approx(
    dense["ms"] / peer["ms"]
  )


def test_forms_are_timed_round_by_round():
  calls = []

  def form(name, seconds):
    def run(n):
      calls.append(name)
      drift = 1 + max(0, (len(calls) - 6) // 3)  # slower in each round
      return n * seconds * drift, 7.0 * n

    return Form(run, steps=2)

  forms = {"a": form("a", 0.1), "b": form("b", 0.2), "c": form("c", 0.3)}
  times, cpu, steps = train_step.interleave(forms, rounds=4, round_seconds=0.25)
  assert calls[:5] == ["a", "a", "b", "b", "c"]  # how many calls to a round
  assert steps == {"a": 6, "b": 4, "c": 2}
  rounds = [calls[i : i + 3] for i in range(5, 17, 3)]
  assert [sorted(names) for names in rounds] == [["a", "b", "c"]] * 4
  assert len({tuple(names) for names in rounds}) > 1  # not always in one order
  np.testing.assert_allclose(times["a"], [50, 100, 150, 200])
  np.testing.assert_allclose(times["c"], [150, 300, 450, 600])
  np.testing.assert_allclose(cpu["b"], [3500] * 4)


def test_ratios_are_taken_within_rounds():
  times = {"a": np.array([1, 10, 100]), "b": np.array([2, 10, 400])}
  assert train_step.ratio(times, "b", "a") == 2
  assert train_step.ratio(times, "b", "c") is None


@pytest.mark.parametrize(
  ("options", "word"),
  [
    ({"networks": ["lenet5"]}, "--networks: lenet5"),
    ({"forms": ["dens"]}, "--forms: dens"),
    ({"forms": []}, "--forms"),
    ({"rounds": 0}, "--rounds"),
    ({"batch_size": 0}, "--batch_size"),
    ({"dtype": "float64"}, "--dtype"),
  ],
)
def test_unfit_options_are_named(options, word):
  with pytest.raises(UserError, match=word):
    Options(**options)


def _command(name, out, *flags):
  """Runs a benchmark's --smoke; returns what it prints and its JSON lines."""
  command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", *flags]
  done = subprocess.run(
    [*command, f"--out={out}"],
    capture_output=True,
    text=True,
    cwd=train_step.ROOT,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, [
    json.loads(line) for line in out.read_text().splitlines()
  ]


@pytest.mark.slow
def test_steps_from_the_command_line(tmp_path):
  flags = "--networks=lenet,resnet18", "--forms=dense,penalty"
  text, rows = _command("train_step", tmp_path / "out.jsonl", *flags)
  assert "LeNet, batch 8" in text and "ResNet-18, batch 8" in text
  assert [(row["network"], row["form"]) for row in rows] == [
    (network, form)
    for network in ("lenet", "resnet18")
    for form in ("dense", "penalty", "importance")
  ]


# ---------------------------------------------------------------------------
# A whole run
# ---------------------------------------------------------------------------


def _fake_run(calls):
  def run(config, workdir, overrides=()):
    method = overrides[-1].rpartition("=")[2]
    calls.append((config, method, tuple(overrides[:-1])))
    results = {
      "config": {"batch_size": 10},
      "steps": 6,
      "wall_seconds": (4.0 if method == "dense" else 6.0) * len(calls),
      "train": {
        "examples_per_second": 30.0,
        "compilations": 3 if method == "dense" else 6,
        "macs_total": 8 if method == "dense" else 2,
      },
      "final": {"params": 5, "macs": 7, "metrics": {"accuracy": 0.5}},
    }
    workdir.mkdir()
    (workdir / "results.json").write_text(json.dumps(results))

  return run


def test_methods_alternate_and_ratios_are_paired(monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(end_to_end.runs, "run", _fake_run(calls))
  more = ["--config.seed=1"]
  rows = end_to_end.measure("c.py:x", tmp_path, repeat=3, overrides=more)
  order = [method for _, method, _ in calls]
  assert order == ["dense", "maestro", "maestro", "dense", "dense", "maestro"]
  assert {call[0] for call in calls} == {"c.py:x"}
  assert {call[2] for call in calls} == {("--config.seed=1",)}
  assert [row["method"] for row in rows] == order
  assert {row["train_seconds"] for row in rows} == {2.0}
  # 6 * 2 / (4 * 1), 6 * 3 / (4 * 4), 6 * 6 / (4 * 5)
  assert end_to_end.ratio(rows, "wall_seconds") == pytest.approx(1.8)
  assert end_to_end.ratio(rows, "macs_total") == 0.25
  lines = end_to_end.table(rows).splitlines()
  assert "median of 3" in lines[0]
  assert len({len(line) for line in lines[1:]}) == 1
  assert "1.800" in lines[-1] and "0.250" in lines[-1]


def test_smoke_is_added_to_the_variants():
  assert end_to_end.smoke_variant("a/b.py") == "a/b.py:smoke"
  assert end_to_end.smoke_variant("a/b.py:gpu") == "a/b.py:gpu,smoke"


@pytest.mark.slow
def test_a_whole_run_from_the_command_line(tmp_path):
  flags = "--config=configs/linear_od.py", "--config.batch_size=32"
  text, rows = _command("end_to_end", tmp_path / "out.jsonl", *flags)
  assert "ratio" in text
  assert [row["method"] for row in rows] == ["dense", "maestro"]
  for row in rows:
    assert row["overrides"] == ["--config.batch_size=32"]
    seconds = [f"{part}_seconds" for part in ("train", "wall", "process")]
    assert row[seconds[0]] < row[seconds[1]] < row[seconds[2]]


@pytest.mark.quick(0)
def test_deployed_measures_what_its_rows_say():
  rows = deployed.measure("lenet", [0.5], repeats=1, latency=0.9, multiple_of=1)
  by_form = {row["form"]: row for row in rows}
  dense = by_form["dense"]
  assert (dense["params"], dense["macs"]) == (44_426, 281_640)
  half = by_form["extracted, macs:0.5"]
  assert half["macs"] <= 0.5 * dense["macs"] < 0.55 * dense["macs"]
  for row in rows:
    for batch, ms in row["latency_ms"].items():
      ratio = ms / dense["latency_ms"][batch]
      assert row["ratio_to_dense"][batch] == pytest.approx(ratio)
  assert "extracted, macs:0.5" in deployed.table(rows)


# ---------------------------------------------------------------------------
# A lent device
# ---------------------------------------------------------------------------


def test_floors_count_what_a_layer_must_do_and_move():
  slow_copies = {"flops": 1e30, "bandwidth": 1e3}  # bytes: a number is a ms
  slow_products = {"flops": 1e3, "bandwidth": 1e30}
  for training, times in ((False, 1), (True, 3)):
    dense = products.floor_ms(6, 4, None, 2, training, slow_products)
    assert dense == pytest.approx(times * 2 * 6 * 4 * 4)
    rank2 = products.floor_ms(6, 4, 2, 2, training, slow_products)
    assert rank2 == pytest.approx(times * 2 * 6 * (4 * 2 + 2 * 4))
  rank1 = products.floor_ms(6, 4, 1, 2, False, slow_copies)
  assert rank1 == pytest.approx(2 * (2 * 6 * 4 + 8))


@pytest.mark.quick(0)
def test_products_measures_forms_that_are_what_they_say():
  limits = products.ceilings("float32", 16, 1024)
  assert min(limits.values()) > 0
  rows = products.measure(
    4,
    16,
    depth=2,
    shares=[2, 8],
    stored=4,
    dtype="float32",
    rounds=1,
    limits=limits,
    seconds=0.0,
  )
  forms = [(row["pass"], row["form"], row["rank"]) for row in rows]
  names = ("dense", None), ("static d/2", 8), ("static d/8", 2)
  names = (*names, ("mask d/4 of d/4", 4))
  names = (*names, ("switch d/8 of d/4", 2), ("switch d/4 of d/4", 4))
  assert forms == [(p, *n) for p in ("forward", "training") for n in names]
  assert all(row["us"] > 0 and row["over_floor"] > 0 for row in rows)
  assert "switch d/8 of d/4" in products.table(rows)


@pytest.mark.quick(2)
@pytest.mark.parametrize("implementation", ["xla", "switch"])
def test_a_rank_known_late_is_that_of_the_cut_layer(implementation):
  x = jax.random.normal(jax.random.key(0), (5, 8))
  factors = products._weights(8, 4, 3, "float32")
  cut = [(u[:, :2], v[:2]) for u, v in factors]
  np.testing.assert_allclose(
    products._runtime(implementation)(x, factors, jnp.int32(2)),
    products._static(x, cut),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.fixture
def parts(monkeypatch):
  """Stands in for the parts' commands; returns what is run, and exit codes."""
  ran, codes = [], {}

  def commands(out, smoke, minutes):
    return {name: [name] for name in ("one", "two", "three")}

  def run(command, seconds, more):
    assert seconds > 0 and not more
    ran.append(command[0])
    return codes.get(command[0], 0)

  monkeypatch.setattr(device, "commands", commands)
  monkeypatch.setattr(device, "run", run)
  return ran, codes


def _device(tmp_path, monkeypatch, **values):
  given = {"parts": ["one", "two", "three"], "minutes": 1.0, "smoke": False}
  given |= {"out": str(tmp_path)} | values
  monkeypatch.setattr(
    device.flags, "FLAGS", types.SimpleNamespace(**given), raising=True
  )
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
  device.main(["device"])


def test_parts_of_a_lent_device_go_on_where_they_were(
  parts, tmp_path, monkeypatch
):
  ran, codes = parts
  codes["two"] = None  # its time was over
  with pytest.raises(Interrupted, match="two is not finished"):
    _device(tmp_path, monkeypatch)
  assert ran == ["one", "two"]
  del ran[:], codes["two"]
  _device(tmp_path, monkeypatch)
  assert ran == ["two", "three"]
  del ran[:]
  _device(tmp_path, monkeypatch)
  assert ran == []


def test_a_part_that_fails_does_not_stop_the_next(parts, tmp_path, monkeypatch):
  ran, codes = parts
  codes["one"] = 1
  with pytest.raises(UserError, match="failed, see above: one"):
    _device(tmp_path, monkeypatch)
  assert ran == ["one", "two", "three"]
  assert device.finished(tmp_path) == {"two", "three"}


def test_unknown_parts_and_no_time_are_refused(parts, tmp_path, monkeypatch):
  with pytest.raises(
    UserError, match=r"--parts: \['four'\] unknown; known: one"
  ):
    _device(tmp_path, monkeypatch, parts=["four"])
  with pytest.raises(UserError, match="--minutes: must be above 0"):
    _device(tmp_path, monkeypatch, minutes=0.0)
  with pytest.raises(Interrupted, match="no time is left for one"):
    _device(tmp_path, monkeypatch, minutes=0.1)


def test_a_part_is_stopped_at_its_time():
  sleep = ["-c", "import time; time.sleep(60)"]
  assert device.run(sleep, 0.1, {}) is None
  code = "import os; raise SystemExit(int(os.environ['CODE']))"
  assert device.run(["-c", code], 60.0, {"CODE": "3"}) == 3


def test_a_part_ends_with_the_command_that_is_stopped(tmp_path, monkeypatch):
  started = []
  popen = subprocess.Popen

  def wait(*_, **__):
    del started[0].wait  # from now on it is the process's own
    raise Interrupted("stopped by SIGTERM")

  def start(*args, **options):
    started.append(popen(*args, **options))
    started[0].wait = wait
    return started[0]

  monkeypatch.setattr(device.subprocess, "Popen", start)
  with pytest.raises(Interrupted):
    device.run(["-c", "import time; time.sleep(60)"], 60.0, {})
  assert started[0].poll() is not None


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  "name",
  [
    *("device", "meeting", "photographs", "products"),
    *("sharded_save", "train_step"),
    "experiments.cifar10",
  ],
)
def test_what_cannot_be_written_is_told_before_anything_is_measured(
  name, tmp_path
):
  file = tmp_path / "file"
  file.touch()
  module = name if "." in name else f"benchmarks.{name}"
  command = [sys.executable, "-m", module, f"--out={file}/more"]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=120, cwd=train_step.ROOT
  )
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert "error: --out: cannot" in done.stderr


def test_the_parts_are_commands_that_exist(tmp_path):
  for smoke in (False, True):
    for name, command in device.commands(tmp_path, smoke, 1.0).items():
      if command[0] == "-m":
        assert importlib.util.find_spec(command[1]) is not None
        assert ("--smoke" in command) == smoke, name


def test_processes_meet_and_agree():
  row = meeting.measure(3, 1)
  assert min(row["meet"], row["agree"], row["differ"]) > 0
  lines = meeting.table([row]).splitlines()
  assert "agree / differ" in lines[0] and f"{row['agree']:.3f}" in lines[2]


@pytest.mark.quick(0)
def test_photographs_are_counted(tmp_path):
  synthetic.write(tmp_path, 90, 10)
  rows = photographs.measure(tmp_path, 32, count=1, rounds=1)
  assert [row["way"] for row in rows][:2] == ["bare loop", "threads"]
  assert all(row["photographs_per_second"] > 0 for row in rows)
  assert rows[0]["ratio"] == 1
  lines = photographs.table(rows).splitlines()
  assert (
    "of the bare loop" in lines[0] and f"{rows[1]['ratio']:.2f}" in lines[3]
  )


@pytest.mark.quick(0)
def test_a_state_is_saved_in_parts_by_real_processes():
  row = sharded_save.measure("parts", 16, 2)
  assert row["way"] == "parts" and row["processes"] == 2
  assert row["own_mib"] == pytest.approx(8)
  lines = sharded_save.table([row]).splitlines()
  assert "own MiB" in lines[0] and f"{row['extra']:.2f}" in lines[2]
