"""Meshes of devices, and batches split over them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maestro.errors import UserError

BATCH = ("data", "fsdp")  # the axes over which a batch is split


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """How many devices each axis has; one may be -1, all that are left.

  Attributes:
    data: each has a part of the batch, and all parameters.
    fsdp: each has a part of the batch, and of every large parameter.
    model: each has a part of every layer's features, and the whole batch.
  """

  data: int = -1
  fsdp: int = 1
  model: int = 1


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh over the first devices that a shape asks for.

  Args:
    shape: of the mesh.
    devices: to choose from; None is all that are there.

  Raises:
    UserError: there are too few devices, or they cannot be divided so.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dataclasses.asdict(shape)
  there = f"there are {len(devices)} ({devices[0].platform})"
  if bad := {k: n for k, n in sizes.items() if n < 1 and n != -1}:
    raise UserError(f"config.mesh: {bad}; use -1 or a number of devices")
  free = [name for name, n in sizes.items() if n == -1]
  if len(free) > 1:
    raise UserError(f"config.mesh: {free} are both -1, which only one may be")
  given = math.prod(n for n in sizes.values() if n != -1)
  fixed = " x ".join(f"{k}={n}" for k, n in sizes.items() if n > 1) or "1"
  if given > len(devices):
    raise UserError(
      f"config.mesh: {fixed} asks for {given} devices, but {there}"
    )
  if free:
    if len(devices) % given:
      fits = max(n for n in range(1, given) if len(devices) % n == 0)
      raise UserError(
        f"config.mesh: {fixed} does not divide the devices, {there}; the"
        f" nearest that does is {fits}, or set {free[0]} to a number"
      )
    sizes[free[0]] = len(devices) // given
  if jax.process_count() > 1 and math.prod(sizes.values()) < len(devices):
    raise UserError(
      f"config.mesh: {sizes} leaves devices out, {there}; with several"
      " processes all must be used: set one axis to -1"
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices[: math.prod(sizes.values())],
  )


def fits(shape: MeshShape) -> bool:
  """Whether the devices that are there can be divided so."""
  try:
    make_mesh(shape)
  except UserError:
    return False
  return True


def batch_devices(mesh: Mesh) -> int:
  """Among how many devices a batch is divided."""
  return math.prod(mesh.shape[name] for name in BATCH)


def put(tree: Any, shardings: Any) -> Any:
  """Puts arrays where their shardings, a tree or one for all, want them.

  Of host arrays, which are the same on all processes, each process puts its
  own part; nothing is sent between them to compare.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def one(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(
      host.shape, sharding, lambda part: host[part]
    )

  if isinstance(shardings, NamedSharding):
    return jax.tree.map(lambda x: one(x, shardings), tree)
  return jax.tree.map(one, tree, shardings)


def is_split(sharding: Any) -> bool:
  """Whether no process has all of an array that lies so; None is a host's."""
  return not (
    sharding is None
    or sharding.is_fully_addressable
    or sharding.is_fully_replicated
  )


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts every array of a tree onto all devices of the mesh."""
  return put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(tree: Any, mesh: Mesh) -> Any:
  """Constrains arrays, within jit, to be split along their first axis."""
  if mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(
    tree, NamedSharding(mesh, PartitionSpec(BATCH))
  )
