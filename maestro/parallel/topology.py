"""Devices that are not there: what a program can be compiled for without them.

The compilers of TPUs and GPUs run on any host. JAX gives them descriptions of
devices in place of devices, on which a program is compiled and cannot run.
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from maestro.errors import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of device.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    memory: in GiB.
    usable: of it, in GiB, by one program: what libtpu leaves it, or the three
      quarters of a GPU that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION
      says otherwise.
    sides: how many sides a topology of it may have.
    options: what its compiler must be told.
  """

  platform: str
  memory: float
  usable: float
  sides: tuple[int, ...] = (1,)
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)


_TWO_CORES = "megachip_tccontrol"  # as one device, as on a host of them
_H100 = {"name": "H100 80GB HBM3", "size": "84942979072"}
_H100 |= {"bandwidth": "3352320000000"}
_H200 = {"name": "H200 141GB HBM3e", "size": "151397597184"}
_H200 |= {"bandwidth": "4800000000000"}
CHIPS = {
  "v4": Chip("tpu", 32, 30.75, (2, 3), {"chip_config_name": "megacore"}),
  "v5e": Chip("tpu", 16, 15.75, (2,)),
  "v5p": Chip("tpu", 95, 95, (2, 3), {"chip_config_name": _TWO_CORES}),
  "v6e": Chip("tpu", 32, 31.25, (2,), {"chip_config_name": _TWO_CORES}),
  "h100": Chip("gpu", 80, 0.75 * 79.1, (1,), _H100),
  "h200": Chip("gpu", 141, 0.75 * 141, (1,), _H200),
  "cpu": Chip("cpu", math.inf, math.inf),
}
FORMS = "v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, h100:N, h200:N or cpu:N"


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many chips of a kind, such as "v5e:4x4".

  Attributes:
    name: as it was given.
    chip: the kind.
    sides: how many there are along each side.
  """

  name: str
  chip: Chip
  sides: tuple[int, ...]

  @classmethod
  def parse(cls, text: str | None) -> "Topology":
    """Reads "kind:AxB".

    Raises:
      UserError: says which topologies there are.
    """
    kind, _, sides = (text or "").partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
      raise UserError(
        f"--topology={text or ''}: unknown; use {FORMS}, such as v5e:4x4"
      )
    numbers = tuple(map(int, sides.split("x")))
    if len(numbers) not in chip.sides:
      raise UserError(
        f"--topology={text}: {kind} has {' or '.join(map(str, chip.sides))}"
        f" side(s), not {len(numbers)}; use {FORMS}"
      )
    return cls(f"{kind}:{sides}", chip, numbers)

  @property
  def size(self) -> int:
    """How many chips there are."""
    return math.prod(self.sides)

  def prepare(self) -> None:
    """Sets what JAX reads once, before it computes for the first time.

    Raises:
      UserError: the compiler is not installed.
    """
    if self.chip.platform == "tpu":
      _prepare_tpu()
    elif self.chip.platform == "gpu":
      _prepare_gpu()
    else:
      flag = f"--xla_force_host_platform_device_count={self.size}"
      os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    jax.config.update("jax_platforms", "cpu")  # the host computes nothing else

  def devices(self) -> list[Any]:
    """Returns the devices; those of "cpu" are there, if only as threads.

    Raises:
      UserError: no slice has these sides, or JAX was set up for fewer devices.
    """
    chip = self.chip
    if chip.platform == "cpu":
      found = jax.devices("cpu")
      if len(found) < self.size:
        raise UserError(
          f"--topology={self.name}: this process has {len(found)} devices; set"
          f" XLA_FLAGS=--xla_force_host_platform_device_count={self.size}"
        )
      return found[: self.size]
    try:
      return self._described()
    except (RuntimeError, ValueError) as error:
      first = str(error).strip().partition("\n")[0]
      raise UserError(
        f"--topology={self.name}: its compiler has no such devices: {first};"
        " sides are even, as hosts have 2x2 chips"
      ) from error

  def _described(self) -> list[Any]:
    chip = self.chip
    if chip.platform == "gpu":
      host = math.gcd(self.size, 8)
      return topologies.get_topology_desc(
        platform="cuda",
        target_config=_HOPPER.format(**chip.options),
        topology=f"1x{self.size // host}x{host}",
      ).devices
    sides = (*self.sides, 1)[:3]
    host = tuple(min(n, 2) for n in sides[:2])
    return topologies.get_topology_desc(
      platform="tpu",
      topology_name=self.name,
      chips_per_host_bounds=(*host, 1),
      **chip.options,
    ).devices


def _prepare_tpu() -> None:
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "--topology: the compiler for TPUs is not installed; it needs no TPU:"
      " pip install -e '.[fit]'"
    )
  # So that it asks no network which machine this is, and several may compile.
  for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LIBRARY_LOG_LEVEL": "3",
  }.items():
    os.environ.setdefault(name, value)


# ---------------------------------------------------------------------------
# NVIDIA
# ---------------------------------------------------------------------------

# What the compiler must know of a Hopper GPU; H100 and H200 differ in memory.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {size}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA {name}"
  model_str: "sm_9.0"
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "NVIDIA {name}"
"""


def _cuda_directory() -> pathlib.Path | None:
  """Where the wheels of NVIDIA's compiler lie, if they do."""
  if importlib.util.find_spec("jax_plugins") is None:
    return None
  if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    return None
  spec = importlib.util.find_spec("nvidia")
  for root in (spec and spec.submodule_search_locations) or ():
    directory = pathlib.Path(root) / "cu13"
    if (directory / "bin" / "ptxas").exists():
      return directory
  return None


def _prepare_gpu() -> None:
  directory = _cuda_directory()
  if directory is None:
    version = jax.__version__
    raise UserError(
      "--topology: the compiler for GPUs is not installed; it needs no GPU:"
      f" pip install --no-deps jax-cuda13-plugin=={version}"
      f" jax-cuda13-pjrt=={version} nvidia-cuda-nvcc nvidia-nvvm"
      " nvidia-cuda-crt"
    )
  os.environ["CUDA_ROOT"] = str(directory)
  path = os.environ.get("PATH", "")
  os.environ["PATH"] = f"{directory / 'bin'}{os.pathsep}{path}"
  # There is nothing to time kernels on.
  given = f"--xla_gpu_cuda_data_dir={directory} --xla_gpu_autotune_level=0"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {given}"
