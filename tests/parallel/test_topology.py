"""Devices that are not there: what is asked for, refused and found."""

import importlib.util

import pytest

from maestro.errors import UserError
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.parallel.topology import CHIPS, Topology


@pytest.mark.parametrize(
  ("text", "size"),
  [("v5e:4x4", 16), ("v5p:4x4x4", 64), ("v4:2x2", 4), ("h200:8", 8)],
)
def test_a_topology_says_how_many_chips_there_are(text, size):
  assert Topology.parse(text).size == size


@pytest.mark.parametrize(
  "text",
  [None, "", "v5e", "v9:2x2", "v5e:0x4", "v5e:4", "v5e:2x2x2", "h100:2x4"],
)
def test_an_unknown_topology_is_refused_with_those_there_are(text):
  with pytest.raises(UserError, match="--topology=") as refused:
    Topology.parse(text)
  for kind in CHIPS:
    assert f"{kind}:" in str(refused.value)


def test_more_cpu_devices_than_the_process_has_are_refused():
  assert len(Topology.parse("cpu:8").devices()) == 8
  with pytest.raises(UserError, match="host_platform_device_count=9"):
    Topology.parse("cpu:9").devices()


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("v5e:2x2", r"pip install -e '\.\[fit\]'"),
    ("h200:8", r"pip install --no-deps jax-cuda13-plugin==.* nvidia-cuda-nvcc"),
  ],
)
def test_a_compiler_that_is_missing_is_named(text, line, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=line):
    Topology.parse(text).prepare()


def test_a_mesh_is_over_the_devices_that_are_given():
  devices = Topology.parse("cpu:8").devices()[4:]
  mesh = make_mesh(MeshShape(data=2, model=-1), devices)
  assert list(mesh.devices.flat) == devices
  with pytest.raises(UserError, match="there are 4"):
    make_mesh(MeshShape(data=8), devices)
