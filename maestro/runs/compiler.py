"""What must be told to XLA before it starts: its cache, and determinism."""

import os
import pathlib

import jax
from jax._src import xla_bridge

from maestro.errors import UserError

_DETERMINISTIC = "--xla_gpu_deterministic_ops"


def use_cache(directory: str) -> None:
  """Keeps compiled programs in a directory, from which later runs take them.

  Raises:
    UserError: it cannot be made.
  """
  try:
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--compilation_cache: cannot make {directory!r} ({error.strerror}); name"
      " a directory that can be written"
    ) from error
  jax.config.update("jax_compilation_cache_dir", directory)


def use_deterministic_ops() -> None:
  """Has GPUs add in a fixed order; on other devices nothing needs it.

  Raises:
    UserError: a GPU has been started without, or XLA_FLAGS ask for the other.
  """
  given = [
    flag.partition("=")[2].lower()
    for flag in os.environ.get("XLA_FLAGS", "").split()
    if flag.partition("=")[0] == _DETERMINISTIC
  ]
  if given:
    if given[-1] in ("false", "0"):
      raise UserError(
        f"config.deterministic: True, but XLA_FLAGS has {_DETERMINISTIC}"
        f"={given[-1]}; leave that out"
      )
    return
  if xla_bridge.backends_are_initialized():
    if jax.default_backend() == "gpu":
      raise UserError(
        "config.deterministic: a GPU is in use already, and reads its flags"
        f' once; set XLA_FLAGS="{_DETERMINISTIC}=true" before this process'
        " starts"
      )
    return
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}=true".strip()
