"""Tests of shapes of meshes: what they ask for, and what is refused."""

import jax
import pytest

from maestro.errors import UserError
from maestro.parallel.mesh import MeshShape, batch_devices, make_mesh


@pytest.mark.parametrize(
  ("shape", "wanted", "batch"),
  [
    (MeshShape(), (8, 1, 1), 8),
    (MeshShape(data=1), (1, 1, 1), 1),
    (MeshShape(data=3), (3, 1, 1), 3),
    (MeshShape(fsdp=4), (2, 4, 1), 8),
    (MeshShape(data=2, model=-1), (2, 1, 4), 2),
    (MeshShape(data=1, fsdp=2, model=3), (1, 2, 3), 2),
  ],
  ids=str,
)
def test_one_axis_takes_the_devices_that_are_left(shape, wanted, batch):
  mesh = make_mesh(shape)
  assert mesh.axis_names == ("data", "fsdp", "model")
  assert mesh.devices.shape == wanted
  assert list(mesh.devices.flat) == jax.devices()[: mesh.size]
  assert batch_devices(mesh) == batch


@pytest.mark.parametrize(
  ("shape", "told"),
  [
    (MeshShape(data=9), r"data=9 asks for 9 devices, but there are 8 \(cpu\)"),
    (MeshShape(data=4, model=4), r"data=4 x model=4 asks for 16 devices"),
    (MeshShape(fsdp=16), r"fsdp=16 asks for 16 devices"),
    (MeshShape(model=3), r"model=3 does not divide .* nearest that does is 2"),
    (MeshShape(data=-1, model=-1), r"'data', 'model'.*only one"),
    (MeshShape(data=0), r"config.mesh: .*'data': 0"),
    (MeshShape(model=-2), r"config.mesh: .*'model': -2"),
  ],
  ids=str,
)
def test_what_devices_cannot_be_is_refused(shape, told):
  with pytest.raises(UserError, match=told):
    make_mesh(shape)
