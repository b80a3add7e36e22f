"""Data parallelism: one mesh axis; arrays replicated, batches split."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maestro.errors import UserError


def make_mesh(num_devices: int | None = None) -> Mesh:
  """Returns a one-axis mesh ("data") over the first devices; None is all."""
  devices = jax.devices()
  n = len(devices) if num_devices is None else num_devices
  if not 1 <= n <= len(devices):
    raise UserError(
      f"config.num_devices: {n} asked for, but there are {len(devices)}"
      f" ({devices[0].platform})"
    )
  return jax.make_mesh(
    (n,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:n]
  )


def replicate(tree, mesh: Mesh):
  """Puts every array of a tree onto all devices of the mesh."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(tree, mesh: Mesh):
  """Constrains arrays, within jit, to be split along their first axis."""
  if mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(
    tree, NamedSharding(mesh, PartitionSpec("data"))
  )
