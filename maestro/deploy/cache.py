"""Blocks of weights on this disk, by their sha256, for exports on servers."""

import contextlib
import hashlib
import os
import pathlib
import re
import tempfile
import threading
import warnings


def is_block(data: bytes | memoryview, sha256: str) -> bool:
  """Whether bytes have a digest."""
  return hashlib.sha256(data).hexdigest() == sha256


class Cache:
  """Blocks by their sha256; without a folder that can be written, nothing."""

  def __init__(self, root: pathlib.Path | None):
    self._root, self._lock = root, threading.Lock()

  @property
  def works(self) -> bool:
    """Whether what is put into it is kept."""
    return self._root is not None

  @classmethod
  def at_home(cls) -> "Cache":
    """That of the environment: see `maestro.deploy.remote`."""
    own = os.environ.get("MAESTRO_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
      root = pathlib.Path(own or f"{home}/maestro").expanduser()
    except RuntimeError:  # no home directory
      warnings.warn(
        "no home directory is known, so nothing is cached; set MAESTRO_CACHE"
        " to a folder that can be written",
        stacklevel=2,
      )
      return cls(None)
    return cls(root / "blocks")

  def _path(self, digest: str) -> pathlib.Path | None:
    root = self._root  # once, as another thread may give it up
    named = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    return root / digest[:2] / digest if root and named else None

  def get(self, digest: str, size: int | None = None) -> bytes | None:
    """A block, unless it is not there, or damaged and thus deleted."""
    path = self._path(digest)
    if path is None:
      return None
    try:
      fits = size is None or path.stat().st_size == size
      data = path.read_bytes() if fits else b""
    except OSError:
      return None
    if fits and is_block(data, digest):
      return data
    with contextlib.suppress(OSError):
      path.unlink()
    return None

  def put(self, digest: str, data: bytes | memoryview) -> None:
    """Writes a block whole or not at all; a full disk is said, once."""
    path = self._path(digest)
    if path is None:
      return
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
          file.write(data)
          file.flush()
          os.replace(file.name, path)
        except BaseException:
          os.unlink(file.name)
          raise
    except OSError as error:
      with self._lock:
        known, self._root = self._root is None, None
      if known:  # another thread has said it
        return
      warnings.warn(
        f"the cache {path.parents[1]} cannot be written ({error.strerror}), and"
        " is not used; set MAESTRO_CACHE to a folder that can",
        stacklevel=2,
      )
