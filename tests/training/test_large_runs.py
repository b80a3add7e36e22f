"""What large runs expect of the loop: micro-batches, averages, less memory."""

import contextlib
import copy
import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro.errors import UserError
from maestro.parallel.mesh import replicate
from maestro.report import figures
from maestro.runs import checkpoint, compiler, metrics
from maestro.runs import workdir as workdir_lib
from maestro.runs.profile import Trace
from maestro.training import build, loop, opened
from maestro.training import state as state_lib
from maestro.training.config import parse

ROOT = pathlib.Path(__file__).parents[2]

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
    "shrink": True,
  },
  "settle": {
    "epochs": 1,
    "schedule": {"name": "cosine", "learning_rate": 0.05},
  },
  "truncate": {"min_saving": 0.1, "max_compilations": 8, "multiple_of": 2},
  "checkpoint": {"every_epochs": 1, "keep": 9},
  "mesh": {"data": 1},
}


def config(**changes):
  """BASE with some sections replaced."""
  return copy.deepcopy(BASE) | changes


@pytest.fixture(autouse=True)
def quickly(monkeypatch, jit):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)
  monkeypatch.setattr(jax, "jit", jit)


# ---------------------------------------------------------------------------
# Micro-batches
# ---------------------------------------------------------------------------


def test_micro_batches_that_devices_cannot_share_are_refused():
  given = config(accumulate=32, mesh={"data": 8})
  with pytest.raises(UserError, match=r"config\.accumulate.*of 4.*=256"):
    build.make_training(parse(given))


# ---------------------------------------------------------------------------
# A moving average of the weights
# ---------------------------------------------------------------------------


class Killed(BaseException):
  """Ends a run as a kill would, after a checkpoint."""


JIT = jax.jit
AVERAGED = config(ema=0.8, accumulate=2)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
  """The results and the workdir of a run with an average, shrunk and cut."""
  workdir = tmp_path_factory.mktemp("averaged") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "figures", lambda workdir: None)
    return loop.train(AVERAGED, workdir), workdir


def leaves(workdir, step=None):
  directory = workdir / "checkpoints"
  step = step or max(checkpoint.list_steps(directory))
  return checkpoint.load_leaves(directory, step)[0]


def same_bits(a, b):
  return a.keys() == b.keys() and all(
    a[path].tobytes() == b[path].tobytes() for path in a
  )


@pytest.fixture
def begun(tmp_path):
  """Makes a run, its state at the start, and data of its first epoch."""

  def begin(**changes):
    t = build.make_training(parse(config(**changes)))
    state, _ = loop._start(t, tmp_path)
    return t, state, t.feed()(0)

  return begin


def steps(t, state, data, n):
  """Returns the states after each of n steps."""
  program = t.program("discover", t.clock.discover, 1)
  found = []
  for _ in range(n):
    state, _ = program(state, data)
    found.append(jax.tree.map(jnp.copy, state))
  return found


NORMED = {"name": "resnet20", "width": 2, "stage_sizes": [1]}


@pytest.mark.quick(1)
@pytest.mark.parametrize("model", [BASE["model"], NORMED])
def test_the_average_follows_its_equation_and_changes_nothing_else(
  model, begun, close
):
  decay = 0.8
  t, state, data = begun(model=model, ema=decay, method="dense")
  wanted = {"params": state.params, "batch_stats": state.batch_stats}
  wanted = jax.tree.map(np.asarray, wanted)
  found = steps(t, state, data, 3)
  for state in found:
    now = {"params": state.params, "batch_stats": state.batch_stats}
    wanted = jax.tree.map(
      lambda a, x: decay * a + (1 - decay) * np.asarray(x), wanted, now
    )
    close(state.ema, wanted, 1e-5)
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {
      jnp.dtype("float32")
    }
  t, state, data = begun(model=model, method="dense")
  plain = steps(t, state, data, 3)[-1]
  assert plain.ema == {}
  # Up to rounding: another program may fuse its operations otherwise.
  close(found[-1].replace(ema={}), plain, 1e-5)


@pytest.mark.quick(0)
def test_cutting_the_average_is_the_average_of_what_is_cut(begun, close):
  t, state, data = begun(ema=0.8)
  tx = t.optimizer(t.clock.discover)[1]
  state = steps(t, state, data, 2)[-1]
  half = jax.tree.map(lambda r: r // 2, state.ranks)
  masked = state_lib.at_ranks(state, half)
  dead = np.asarray(masked.ema["params"]["fc1"]["u"])[
    :, int(half["fc1"]["rank"]) :
  ]
  assert not dead.any()
  late = state_lib.truncate_state(
    tx, steps(t, jax.tree.map(jnp.copy, masked), data, 2)[-1], 1
  )
  early = steps(t, state_lib.truncate_state(tx, masked, 1), data, 2)[-1]
  assert late.ema["params"]["fc1"]["u"].shape == early.params["fc1"]["u"].shape
  close(late.ema, early.ema, 1e-4)


@pytest.mark.quick(0)
def test_the_average_lies_where_the_parameters_do(begun):
  t, state, data = begun(ema=0.8, mesh={"data": 2, "fsdp": 4})
  placement = dataclasses.replace(t.placement, smallest=1)
  state = placement.put(state, state.params)

  def places(tree):
    return [x.sharding for x in jax.tree.leaves(tree)]

  assert any(not s.is_fully_replicated for s in places(state.params))
  assert places(state.ema["params"]) == places(state.params)
  state = steps(t, state, replicate(data, t.mesh), 1)[-1]
  assert np.isfinite(np.asarray(state.ema["params"]["fc1"]["u"])).all()


@pytest.mark.quick(0)
@pytest.mark.parametrize("saves", [1, 2])
def test_a_killed_run_resumes_with_its_average(
  saves, averaged, tmp_path, monkeypatch
):
  results, workdir = averaged
  save, count = checkpoint.Checkpoints.save, 0

  def hooked(*args):
    nonlocal count
    save(*args)
    count += 1
    if count == saves:
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(jax, "jit", JIT)  # as the other run was compiled
    patch.setattr(checkpoint.Checkpoints, "save", hooked)
    with pytest.raises(Killed):
      loop.train(AVERAGED, tmp_path / "run")
    patch.setattr(checkpoint.Checkpoints, "save", save)
    again = loop.train(AVERAGED, tmp_path / "run")
  assert again["final"] == results["final"]
  assert same_bits(leaves(tmp_path / "run"), leaves(workdir))


def test_the_average_is_what_a_run_leaves_behind(averaged):
  results, workdir = averaged
  saved = leaves(workdir)
  assert saved["ema/params/fc1/u"].shape == saved["params/fc1/u"].shape
  assert not np.array_equal(saved["ema/params/fc1/u"], saved["params/fc1/u"])
  run = opened.open_run(workdir)
  assert np.array_equal(run.params["fc1"]["u"], saved["ema/params/fc1/u"])
  found = loop.evaluate_workdir(workdir)
  assert found["val"] == pytest.approx(results["final"]["val_metrics"])
  last = metrics.read(workdir)[-1]
  assert last["val/loss"] == pytest.approx(found["val"]["loss"], rel=1e-5)
  discover = opened.open_run(workdir, "discover")
  at = leaves(workdir, discover.step)
  assert np.array_equal(discover.params["fc1"]["u"], at["ema/params/fc1/u"])


def test_another_run_starts_from_the_average(averaged, close):
  _, workdir = averaged
  t = build.make_training(parse(config(init_from=str(workdir))))
  saved = leaves(workdir)
  u, v = (saved[f"ema/params/fc1/{name}"] for name in "uv")
  close(t.initial()[0]["fc1"]["kernel"], u @ v, 1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", ["svd", "pufferfish", "race"])
def test_the_average_of_a_network_that_becomes_factors(method, tmp_path, close):
  phase = BASE["settle"] | {"epochs": 2}
  given = config(
    ema=0.8,
    method=method,
    discover=BASE["settle"] | {"epochs": 1},
    settle=phase,
    budget="macs:0.5" if method == "race" else None,
  )
  loop.train(given, tmp_path)
  first, *_, last = (
    leaves(tmp_path, s) for s in checkpoint.list_steps(tmp_path / "checkpoints")
  )
  names = {p.removeprefix("ema/") for p in last if p.startswith("ema/")}
  assert names == {p for p in last if p.startswith("params/")}
  assert "ema/params/fc1/kernel" in first and "ema/params/fc1/u" in last
  same = np.array_equal(last["ema/params/fc1/u"], last["params/fc1/u"])
  assert same == (method == "svd")  # the average is what was decomposed
  results = workdir_lib.read_json(tmp_path / "results.json")
  found = loop.evaluate_workdir(tmp_path)
  assert found["test"] == pytest.approx(results["final"]["metrics"])


# ---------------------------------------------------------------------------
# Half precision
# ---------------------------------------------------------------------------


def test_bfloat16_trains_as_float32_does_with_float32_masters(tmp_path, begun):
  half = BASE["model"] | {"dtype": "bfloat16"}
  phase = BASE["settle"]
  given = {"discover": phase, "settle": phase, "method": "dense", "ema": 0.5}
  t, state, data = begun(model=half, **given)
  out = jax.eval_shape(
    lambda p: t.model.apply({"params": p}, data["inputs"][:2]), state.params
  )
  assert out.dtype == jnp.bfloat16
  program = t.program("discover", t.clock.discover, 1)
  state, losses = program(state, data)
  kept = (state.params, state.opt_state, state.ema, state.metrics, losses)
  kinds = {x.dtype for x in jax.tree.leaves(kept)}
  assert {k for k in kinds if jnp.issubdtype(k, jnp.inexact)} == {
    np.dtype("float32")
  }
  found = [
    loop.train(config(model=model, **given), tmp_path / str(i))["final"]
    for i, model in enumerate((BASE["model"], half))
  ]
  whole, rough = (r["metrics"]["loss"] for r in found)
  assert rough == pytest.approx(whole, rel=0.03)
  run = opened.open_run(tmp_path / "1")
  assert {x.dtype for x in jax.tree.leaves(run.params)} == {np.dtype("float32")}
  saved = leaves(tmp_path / "1")
  rounded = saved["params/fc1/kernel"].astype(jnp.bfloat16).astype(np.float32)
  assert not np.array_equal(saved["params/fc1/kernel"], rounded)


# ---------------------------------------------------------------------------
# Traces, determinism, compiled programs that are kept
# ---------------------------------------------------------------------------


def traced(directory):
  return sorted(directory.rglob("*.xplane.pb"))


@pytest.mark.parametrize(
  ("steps", "made", "calls"), [(2, 5, [2, 3]), (9, 4, [2, 3, 4]), (2, 1, [])]
)
def test_a_trace_is_of_so_many_steps_from_the_second_dispatch_on(
  steps, made, calls, tmp_path, monkeypatch, capsys
):
  on, seen = [], []
  monkeypatch.setattr(jax.profiler, "start_trace", on.append)
  monkeypatch.setattr(jax.profiler, "stop_trace", on.clear)
  trace = Trace(tmp_path, steps)

  def program(phase, discover, n, level=None):
    return lambda state, data: (seen.append(bool(on)), state)[1]

  with trace, contextlib.suppress(Killed):
    for _ in range(made):
      trace.of(program)("discover", 8, 1)(0, {})
    raise Killed
  assert [i for i, x in enumerate(seen, 1) if x] == calls and not on
  said = capsys.readouterr().out
  assert ("xprof --logdir=" if calls else "nothing to trace") in said


def test_a_run_writes_its_trace(tmp_path):
  phase = BASE["settle"] | {"epochs": 0}
  given = config(method="dense", discover=BASE["settle"], settle=phase)
  loop.train(given, tmp_path, profile=3)
  assert len(traced(tmp_path / "profile")) == 1


@pytest.mark.parametrize(
  ("flags", "backend", "wanted"),
  [
    ("", None, "--xla_gpu_deterministic_ops=true"),
    ("--a=1", None, "--a=1 --xla_gpu_deterministic_ops=true"),
    ("--xla_gpu_deterministic_ops=true", "gpu", None),
    ("--a=1", "cpu", None),
    ("--a=1", "gpu", UserError),
    ("--xla_gpu_deterministic_ops=false", None, UserError),
  ],
)
def test_determinism_is_asked_for_before_a_gpu_starts(
  flags, backend, wanted, monkeypatch
):
  monkeypatch.setenv("XLA_FLAGS", flags)
  monkeypatch.setattr(
    compiler.xla_bridge, "backends_are_initialized", lambda: backend is not None
  )
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  if wanted is UserError:
    with pytest.raises(UserError, match=r"config\.deterministic.*XLA_FLAGS"):
      compiler.use_deterministic_ops()
    return
  compiler.use_deterministic_ops()
  assert os.environ["XLA_FLAGS"] == (wanted or flags)


def test_a_cache_is_a_directory_that_can_be_made(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  try:
    compiler.use_cache(str(tmp_path / "new" / "cache"))
    assert (tmp_path / "new" / "cache").is_dir()
    assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--compilation_cache"):
      compiler.use_cache(str(tmp_path / "file" / "cache"))
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.quick(0)
def test_flags_and_keys_start_a_run_in_a_new_process(tmp_path):
  """The flag is set while no device is in use yet, and programs are kept."""
  code = (
    "import maestro.training.loop; from jax._src import xla_bridge;"
    "assert not xla_bridge.backends_are_initialized();"
    "from maestro import cli, main; cli.run(main.main)"
  )
  command = (
    *(sys.executable, "-c", code),
    f"--config={ROOT / 'configs' / 'digits_od.py'}:smoke",
    f"--workdir={tmp_path / 'run'}",
    f"--compilation_cache={tmp_path / 'cache'}",
    *("--profile=2", "--config.deterministic=true", "--config.ema=0.9"),
    *("--config.accumulate=2", "--config.remat=dots", "--config.method=dense"),
  )
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert list((tmp_path / "cache").iterdir())
  assert len(traced(tmp_path / "run" / "profile")) == 1
