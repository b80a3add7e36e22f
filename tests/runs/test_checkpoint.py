"""Checkpoints return every bit or say what is wrong with them."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from orbax.checkpoint import v1 as ocp

from maestro.runs.checkpoint import CheckpointError, Checkpoints, load_params

# When one array of many is damaged, orbax closes its event loop while reads of
# the others are under way, and each of those complains.
pytestmark = pytest.mark.filterwarnings(
  "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)

EXTRA = {"loss": 0.1 + 0.2, "tiny": 5e-324, "seen": [1, 2**40], "name": "a"}


@struct.dataclass
class State:
  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any
  ranks: Any
  key: Any


def masked(inner):
  return optax.masked(inner, {"fc1": True, "out": False, "conv": False})


OPTIMIZERS = {
  "sgd": optax.sgd(0.1, momentum=0.9),
  "adam": optax.adam(1e-3),
  "masked": optax.chain(masked(optax.adam(1e-3)), optax.sgd(0.1)),
  "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
  "multi": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2),
}


def make_state(optimizer="sgd", rank=5, seed=0, stats=True):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))

  params = {
    "fc1": {"u": normal(400, rank), "v": normal(rank, 300)},
    "out": {"kernel": normal(300, 10), "bias": normal(10)},
    "conv": {"kernel": normal(3, 3, 2, 4).astype(jnp.bfloat16)},
  }
  tx = OPTIMIZERS[optimizer]
  grads = jax.tree.map(lambda p: p * 0.1, params)
  _, opt_state = tx.update(grads, tx.init(params), params)
  return State(
    step=jnp.int32(seed),
    params=params,
    batch_stats={"bn": {"mean": normal(4)}} if stats else {},
    opt_state=opt_state,
    ranks={"fc1": jnp.int32(rank), "stack": jnp.arange(3)},
    key=jax.random.PRNGKey(seed),
  )


def abstract(state):
  return jax.eval_shape(lambda: state)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Two steps of one run, to be copied and damaged."""
  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, make_state(seed=1), EXTRA)
    checkpoints.save(2, make_state(seed=2), EXTRA)
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def errors_of(directory, step, state):
  """Read in every way; each returns the saved bits or a CheckpointError."""
  errors = []
  with Checkpoints(directory) as checkpoints:
    try:
      found, extra = checkpoints.load(step, abstract(state))
      assert_same_bits(found, state)
      assert extra == EXTRA
    except CheckpointError as error:
      errors.append(str(error))
    try:
      checkpoints.shapes(step)
    except CheckpointError as error:
      errors.append(str(error))
  try:
    params, stats, ranks, _ = load_params(directory, step)
    assert_same_bits(params, state.params)
    assert_same_bits(stats, state.batch_stats)
    assert_same_bits(ranks, state.ranks)
  except CheckpointError as error:
    errors.append(str(error))
  return errors


@pytest.mark.quick(1)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_round_trip_keeps_every_bit(tmp_path, optimizer):
  state = make_state(optimizer, stats=optimizer != "adam")
  with Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(7, state, EXTRA)
    shapes, extra = checkpoints.shapes(7)
    assert extra == EXTRA
    for name in ("params", "batch_stats", "ranks"):
      assert shapes[name] == abstract(getattr(state, name))
    found, extra = checkpoints.load(7, abstract(state))
  assert_same_bits(found, state)
  assert extra == EXTRA
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))
  params, stats, ranks, extra = load_params(tmp_path / "c")
  assert_same_bits(params, state.params)
  assert_same_bits(stats, state.batch_stats)
  assert_same_bits(ranks, state.ranks)
  assert extra == EXTRA


def test_shapes_differ_between_steps(tmp_path):
  # Rank 0 too: orbax refuses arrays of size zero, we do not.
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    for step, rank in enumerate((9, 4, 0)):
      checkpoints.save(step, make_state(rank=rank), {})
    for step, rank in enumerate((9, 4, 0)):
      state = make_state(rank=rank)
      assert checkpoints.shapes(step)[0]["params"]["fc1"]["u"].shape[1] == rank
      assert_same_bits(checkpoints.load(step, abstract(state))[0], state)
      assert_same_bits(load_params(tmp_path, step)[0], state.params)


def test_shardings_are_followed(tmp_path):
  mesh = jax.make_mesh((1,), ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = make_state()
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    found, _ = checkpoints.load(1, wanted)
  assert_same_bits(found, state)
  assert all(x.sharding == sharding for x in jax.tree.leaves(found))


def test_retention_keeps_the_newest_and_the_named(tmp_path):
  state = {"params": {"w": jnp.ones(3)}}
  with Checkpoints(tmp_path, keep=2, keep_steps=[20]) as checkpoints:
    for step in (10, 20, 30, 40, 50):
      checkpoints.save(step, state, {})
    assert checkpoints.steps() == [20, 40, 50]
  with Checkpoints(tmp_path, keep=1, keep_steps=[20]) as checkpoints:
    checkpoints.save(60, state, {})
    assert checkpoints.steps() == [20, 60]
    assert checkpoints.latest == 60


def test_bad_arguments_are_refused(tmp_path):
  state = {"params": {"w": jnp.ones(3)}}
  with pytest.raises(CheckpointError, match="keep must be at least 1"):
    Checkpoints(tmp_path, keep=0)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="not JSON"):
      checkpoints.save(1, state, {"x": np.float32(1)})
    checkpoints.save(5, state, {})
    for step in (4, 5):
      with pytest.raises(CheckpointError, match="has step 5"):
        checkpoints.save(step, state, {})
    with pytest.raises(CheckpointError, match=r"no step 3 .* \[5\]"):
      checkpoints.load(3, abstract(state))
  with pytest.raises(CheckpointError, match="no checkpoint in"):
    (tmp_path / "empty").mkdir()
    load_params(tmp_path / "empty")
  with pytest.raises(CheckpointError, match="cannot read"):
    load_params(tmp_path / "missing")


def test_other_leaves_are_named(saved):
  state = make_state(seed=2)
  wider = make_state(seed=2, rank=6)
  fewer = state.replace(ranks={"fc1": state.ranks["fc1"]})
  more = state.replace(batch_stats={"bn": {}, "bn2": jnp.ones(2)})
  half = state.replace(step=state.step.astype(jnp.int16))
  with Checkpoints(saved) as checkpoints:
    for other, what in [
      (wider, r"params/fc1/u is saved as float32\[400, 5\] .*\[400, 6\]"),
      (fewer, "ranks/stack is saved but not in the model"),
      (more, "batch_stats/bn"),
      (half, "step is saved as int32"),
      (make_state("adam", seed=2), "leaf opt_state/0/"),
    ]:
      with pytest.raises(CheckpointError, match=what):
        checkpoints.load(2, abstract(other))


def flip(path, at):
  data = bytearray(path.read_bytes())
  at = int(at * (len(data) - 1))
  data[at] ^= 0x55
  path.write_bytes(data)


DAMAGES = {
  "flip_start": lambda path: flip(path, 0.0),
  "flip_early": lambda path: flip(path, 0.2),
  "flip_middle": lambda path: flip(path, 0.5),
  "flip_end": lambda path: flip(path, 1.0),
  "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
  "empty": lambda path: os.truncate(path, 0),
  "delete": lambda path: path.unlink(),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_never_loaded(copy, damage):
  step = copy / "2"
  state = make_state(seed=2)
  caught = set()
  for path in sorted(p for p in step.rglob("*") if p.is_file()):
    original = path.read_bytes()
    DAMAGES[damage](path)
    for error in errors_of(copy, 2, state):
      caught.add(str(path.relative_to(step)))
      remedy = f"delete {step} to resume from the previous step 1"
      assert str(step) in error and remedy in error
    path.write_bytes(original)
  assert "_CHECKPOINT_METADATA" in caught
  # The ends of data files can be superseded indices, which nobody reads.
  if damage not in ("flip_start", "flip_end"):
    files = [p for p in step.rglob("*") if p.is_file()]
    biggest = max(files, key=lambda p: p.stat().st_size)
    assert str(biggest.relative_to(step)) in caught
  assert not errors_of(copy, 2, state)
  assert not errors_of(copy, 1, make_state(seed=1))


def test_digests_see_what_orbax_loads_silently(copy):
  # A whole, valid array file with other numbers in it.
  shutil.rmtree(copy / "2" / "state")
  shutil.copytree(copy / "1" / "state", copy / "2" / "state")
  errors = errors_of(copy, 2, make_state(seed=2))
  assert len(errors) == 2
  assert all("leaf" in e and "digest differs" in e for e in errors)


def test_changed_record_is_seen(copy):
  path = copy / "2" / "_CHECKPOINT_METADATA"
  content = json.loads(path.read_text())
  for change in (
    lambda record: record["extra"].update(loss=0.5),
    lambda record: record["leaves"].pop("params/out/bias"),
    lambda record: record["leaves"]["step"].update(digest="0"),
    lambda record: record.pop("digest"),
  ):
    damaged = json.loads(json.dumps(content))
    change(damaged["custom_metadata"]["maestro"])
    path.write_text(json.dumps(damaged))
    assert len(errors_of(copy, 2, make_state(seed=2))) == 3


def test_foreign_checkpoints_are_refused(copy):
  state = make_state(seed=3)
  tree = {"params": {"w": np.ones(3)}}
  ocp.save(copy / "3", tree, custom_metadata={"digests": {}})
  (copy / "4").mkdir()
  (copy / "5").mkdir()
  (copy / "5" / "notes.txt").write_text("not a checkpoint")
  for name in ("zarr", "007", "-1", "8.tmp"):
    (copy / name).mkdir()
  (copy / "9").write_text("a file")
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.steps() == [1, 2, 3, 4, 5]
  for step in (3, 4, 5):
    errors = errors_of(copy, step, state)
    assert len(errors) == 3
    assert all("no readable maestro record" in error for error in errors)
    assert all(f"the previous step {step - 1}" in error for error in errors)


def test_directory_below_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="cannot open"):
    Checkpoints(tmp_path / "file" / "checkpoints")


def test_save_into_a_vanished_directory_is_an_error(tmp_path):
  state = {"params": {"w": jnp.ones(3)}}
  with Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(1, state, {})
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError):
      checkpoints.save(2, state, {})


def run(script, *arguments):
  done = subprocess.run(
    [sys.executable, "-c", script, *map(str, arguments)],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


DISK_FULL = """
import resource, sys
import numpy as np
from maestro.runs.checkpoint import Checkpoints, CheckpointError

def state(step, size):
  normal = np.random.default_rng(step).normal(size=size)
  return {"params": {"w": normal.astype(np.float32)}}

with Checkpoints(sys.argv[1], keep=1) as checkpoints:
  checkpoints.save(1, state(1, 1000), {})
  for step, limit in ((2, 1 << 16), (3, 300), (4, 10)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
      checkpoints.save(step, state(step, 100000), {})
      print("saved")
    except CheckpointError as error:
      print(error)
  assert checkpoints.steps() == [1]
  if sys.argv[2] == "recover":
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    checkpoints.save(5, state(5, 1000), {})
"""


@pytest.mark.quick(1)
@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("then, step", [("stop", 1), ("recover", 5)])
def test_full_disk_leaves_the_newest_step(tmp_path, then, step):
  lines = run(DISK_FULL, tmp_path, then).splitlines()
  assert len(lines) == 3
  for line in lines:
    assert "File too large" in line
    assert "resume from the previous step 1" in line
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.steps() == [step]
  want = np.random.default_rng(step).normal(size=1000).astype(np.float32)
  assert_same_bits(load_params(tmp_path)[0], {"w": want})


# Forks before JAX starts, so that many kills cost one import.
KILL = """
import os, signal, sys, time
import numpy as np
from maestro.runs.checkpoint import Checkpoints

def state(step):
  normal = np.random.default_rng(step).normal(size=(4, 50000))
  return {"params": {"w": normal.astype(np.float32)}}

for moment in range(8):
  read, write = os.pipe()
  child = os.fork()
  if child == 0:
    with Checkpoints(f"{sys.argv[1]}/{moment}") as checkpoints:
      for step in range(1, 1000):
        checkpoints.save(step, state(step), {"step": step})
        os.write(write, b"%d " % step)
  os.close(write)
  seen = b""
  while seen.count(b" ") < 3:
    chunk = os.read(read, 100)
    assert chunk, "the child died"
    seen += chunk
  time.sleep(moment * 0.011)
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
  while chunk := os.read(read, 100):
    seen += chunk
  print(seen.split()[-1].decode())
"""


@pytest.mark.quick(0)
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_kill_leaves_the_newest_step_loadable(tmp_path):
  reported = [int(line) for line in run(KILL, tmp_path).split()]
  assert len(reported) == 8
  for moment, last in enumerate(reported):
    with Checkpoints(tmp_path / str(moment)) as checkpoints:
      step = checkpoints.latest
      assert step in (last, last + 1)
      normal = np.random.default_rng(step).normal(size=(4, 50000))
      state = {"params": {"w": normal.astype(np.float32)}}
      found, extra = checkpoints.load(step, abstract(state))
      assert_same_bits(found, jax.tree.map(jnp.asarray, state))
      assert extra == {"step": step}
      checkpoints.save(step + 1, state, {})
      left = [p.name for p in (tmp_path / str(moment)).iterdir()]
      assert not [name for name in left if "tmp" in name]
