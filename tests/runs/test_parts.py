"""Checkpoints whose arrays are written in parts, and read on other meshes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maestro.parallel import mesh
from maestro.runs.checkpoint import CheckpointError, Checkpoints, load_params

# Orbax closes its event loop while reads of other arrays are under way.
pytestmark = [
  pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
  ),
  pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <coroutine"
    ":pytest.PytestUnraisableExceptionWarning"
  ),
]

EXTRA = {"seen": 3}
SPECS = {
  "params/fc1/u": ("a",),
  "params/fc1/v": (None, "a"),
  "params/fc2/kernel": (),
  "opt_state/fc1/u": ("a",),
}


@pytest.fixture(autouse=True)
def parts(monkeypatch):
  """Treats the devices of this process as those of many."""

  def is_split(sharding):
    return not (sharding is None or sharding.is_fully_replicated)

  monkeypatch.setattr(mesh, "is_split", is_split)


def placed(values, devices):
  """A state on the first devices."""
  mesh = jax.make_mesh((devices,), ("a",), devices=jax.devices()[:devices])
  return {
    path: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*SPECS[path])))
    for path, x in values.items()
  }


def nested(flat):
  tree = {}
  for path, x in flat.items():
    node, *rest = tree, *path.split("/")
    for name in rest[:-1]:
      node = node.setdefault(name, {})
    node[rest[-1]] = x
  return tree


@pytest.fixture(scope="module")
def values():
  rng = np.random.default_rng(0)
  shapes = {
    "params/fc1/u": (64, 6),
    "params/fc1/v": (6, 32),
    "params/fc2/kernel": (5, 3),
    "opt_state/fc1/u": (64, 6),
  }
  found = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  found["params/fc1/v"] = np.asarray(
    jnp.asarray(found["params/fc1/v"], jnp.bfloat16)
  )
  return found


@pytest.fixture
def saved(values, tmp_path):
  """Two steps, written from eight devices."""
  with Checkpoints(tmp_path / "run", keep=5) as checkpoints:
    for step in (1, 2):
      state = nested(placed({k: x * step for k, x in values.items()}, 8))
      checkpoints.save(step, state, EXTRA)
  return tmp_path / "run"


def abstract(values, devices):
  return nested(
    {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      for path, x in placed(values, devices).items()
    }
  )


def record_of(saved, step):
  text = (saved / str(step) / "_CHECKPOINT_METADATA").read_text()
  return json.loads(text)["custom_metadata"]["maestro"]


@pytest.mark.parametrize("devices", [8, 4, 2, 1])
def test_what_eight_devices_wrote_others_read(devices, saved, values):
  record = record_of(saved, 2)
  assert record["format"] == 2
  assert {p for p, leaf in record["leaves"].items() if "sum" in leaf} == {
    path for path, spec in SPECS.items() if spec
  }
  with Checkpoints(saved) as checkpoints:
    state, extra = checkpoints.load(2, abstract(values, devices))
  assert extra == EXTRA
  want = nested(placed({k: x * 2 for k, x in values.items()}, devices))

  def equal(a, b):
    assert a.sharding == b.sharding and a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

  jax.tree.map(equal, state, want)


def test_one_host_reads_all_parts(saved, values):
  params, _, _, extra = load_params(saved)
  assert extra == EXTRA
  for name in ("u", "v"):
    found, want = params["fc1"][name], values[f"params/fc1/{name}"] * 2
    assert np.array_equal(found, want)


def test_what_one_process_wrote_whole_is_read_in_parts(values, tmp_path):
  with Checkpoints(tmp_path / "old") as checkpoints:
    checkpoints.save(1, nested(values), EXTRA)
    assert record_of(tmp_path / "old", 1)["format"] == 1
    state, _ = checkpoints.load(1, abstract(values, 4))
  assert len(state["params"]["fc1"]["u"].sharding.device_set) == 4
  assert np.array_equal(state["params"]["fc1"]["u"], values["params/fc1/u"])


@pytest.mark.quick(1)
@pytest.mark.parametrize("devices", [8, 1])
def test_flipped_bytes_of_parts_are_never_loaded(
  devices, saved, values, tmp_path
):
  """Of every file of a step, at several places."""
  want = nested(placed({k: x * 2 for k, x in values.items()}, devices))
  files = sorted(p for p in (saved / "2").rglob("*") if p.is_file())
  files = [p.relative_to(saved) for p in files if p.stat().st_size]
  seen = 0
  for name in files:
    for at in (0.3, 0.7):
      copy = tmp_path / "copy"
      shutil.copytree(saved, copy)
      content = bytearray((copy / name).read_bytes())
      content[int(at * (len(content) - 1))] ^= 4
      (copy / name).write_bytes(content)
      with Checkpoints(copy) as checkpoints:
        try:
          state, extra = checkpoints.load(2, abstract(values, devices))
        except CheckpointError as error:
          assert str(copy / "2") in str(error)
          seen += 1
        else:  # a byte that means nothing
          assert extra == EXTRA
          jax.tree.map(np.testing.assert_array_equal, state, want)
      shutil.rmtree(copy)
  assert seen


def test_a_missing_or_other_kind_of_digest_is_damage(saved, values):
  path = saved / "2" / "_CHECKPOINT_METADATA"
  content = json.loads(path.read_text())
  leaf = content["custom_metadata"]["maestro"]["leaves"]["params/fc1/u"]
  leaf["digest"] = leaf.pop("sum")
  path.write_text(json.dumps(content))
  damaged = pytest.raises(CheckpointError, match="damaged record")
  with Checkpoints(saved) as checkpoints, damaged:
    checkpoints.load(2, abstract(values, 8))
