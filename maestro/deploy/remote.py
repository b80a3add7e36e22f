"""Exports over a network: only the bytes that a size needs, checked and cached.

  https://host/folder    http://host/folder    hf://org/name[@revision][/folder]

config.json is asked for at every call. It says the sha256 of the header and of
each block of the weights (`maestro.deploy.packing`); of these, only what a size
needs is asked for, by ranges of bytes, and what is in the cache is not. The
cache holds blocks by their sha256: under $MAESTRO_CACHE, else
$XDG_CACHE_HOME/maestro, else ~/.cache/maestro.

What comes from a server is trusted no more than a file: the header has its
digest before it is parsed, no block is used that has another one, and nothing
longer than config.json and the header say is read. Whether config.json is the
one that was published, only https tells.
"""

import concurrent.futures
import http.client
import json
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from maestro.deploy import files, packing, web
from maestro.deploy.cache import Cache, is_block
from maestro.deploy.directory import CONFIG, WEIGHTS
from maestro.deploy.web import RemoteError

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # of a request, without a byte more
BACKOFF = 0.5  # seconds before the second attempt, twice as many at each next
_AGAIN = (408, 429, 500, 502, 503, 504)  # what may pass
_MOST_CONFIG = 1 << 26  # bytes
_CHUNK = 1 << 20  # bytes
_GAP = 512  # bytes between blocks that cost less than a request's own headers
_WORKERS = 8  # requests at a time
_MOST_RUN = 1 << 23  # bytes of several blocks that one request asks for
_MOST_ATTEMPTS = 100  # of a request, whatever they bring


class Remote:
  """A folder on a server; `str` of it is its URL, `/` gives those of files.

  Attributes:
    received: bytes of all answers so far, without their headers.
    whole: whether the server ignores ranges, so that all must be read.
  """

  def __init__(self, url: str):
    self._url = url.rstrip("/")
    self.received, self.whole = 0, False
    self._cache = Cache.at_home()
    self._lock = threading.Lock()
    self._revision = ""
    try:
      parts = urllib.parse.urlsplit(self._url)
    except ValueError as error:
      raise RemoteError(f"{url} is no URL: {error}") from error
    hub = parts.scheme == "hf"
    if hub:
      self._hub = web.parse_hub(self._url)
    elif parts.scheme not in ("http", "https") or not parts.hostname:
      raise RemoteError(
        f"{url}: only https://, http:// and hf:// are read; give one of them,"
        " or a local directory"
      )
    elif parts.fragment or "@" in parts.netloc:
      raise RemoteError(
        f"{url}: a folder's URL has no #fragment, and no password in it"
      )
    else:
      self._hub = None
    self._opener = web.opener(web.Redirects(anywhere=hub))

  def __str__(self) -> str:
    return self._url

  def __truediv__(self, name: str) -> str:
    """URL of a file in the folder."""
    if self._hub:
      host, repository, revision, folder = self._hub
      path = f"{folder}/{name}".lstrip("/")
      revision = self._revision or revision
      return f"{host}/{repository}/resolve/{revision}/{path}"
    parts = urllib.parse.urlsplit(self._url)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()

  def read_config(self) -> bytes:
    """Returns the bytes of config.json.

    Raises:
      RemoteError: it is not there, or cannot be read.
    """
    data = bytearray()

    def once() -> bool:
      data.clear()
      with self.open(CONFIG) as answer:
        commit = answer.headers.get("X-Repo-Commit", "")
        if self._hub and re.fullmatch("[0-9a-f]{40}", commit):
          self._revision = commit  # of all further files, too
        for chunk in self.chunks(answer, _MOST_CONFIG + 1):
          data.extend(chunk)
      if len(data) > _MOST_CONFIG:
        raise RemoteError(
          f"{self / CONFIG} is longer than {_MOST_CONFIG} bytes, as no export's"
          " is"
        )
      told = answer.headers.get("Content-Length")
      return told in (None, str(len(data)))

    self.repeat(CONFIG, once)
    return bytes(data)

  def weights(self, config: Mapping[str, Any]) -> "RemoteFile":
    """Returns the weights as a file, of which a config.json tells the size."""
    size, digest = config["files"][WEIGHTS]["size"], config["header_sha256"]
    if type(size) is not int or size < 0:
      raise ValueError(f"size {size!r} of {WEIGHTS}")
    return RemoteFile(self, size, digest, self._cache)

  def open(self, name: str, span: tuple[int, int] | None = None) -> Any:
    """Asks for a file, or a range of its bytes, once; a context manager."""
    headers = {"User-Agent": "maestro", "Accept-Encoding": "identity"}
    if span:
      headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    request = urllib.request.Request(self / name, headers=headers)
    return self._opener.open(request, timeout=TIMEOUT)

  def chunks(self, answer: Any, most: int) -> Iterator[bytes]:
    """Yields what an answer holds, up to a number of bytes; counts them."""
    while most:
      chunk = answer.read(min(most, _CHUNK))
      if not chunk:
        return
      most -= len(chunk)
      with self._lock:
        self.received += len(chunk)
      yield chunk

  def repeat(
    self,
    name: str,
    once: Callable[[], bool],
    progress: Callable[[], int] = lambda: 0,
  ) -> None:
    """Calls once() until it returns True, a few times.

    Args:
      name: of the file.
      once: asks for it, and says whether all of it has come.
      progress: bytes that need not be asked for again; where an attempt brings
        some, the next ones are counted anew.

    Raises:
      RemoteError: it never does, or there is no hope that it will.
    """
    why, failed = "", 0
    for _ in range(_MOST_ATTEMPTS):
      if failed:
        time.sleep(BACKOFF * 2 ** (failed - 1))
      before = progress()
      try:
        if once():
          return
        why = "the answer breaks off"
      except urllib.error.HTTPError as error:
        error.close()
        why = f"{error.code} {error.reason}"
        if error.code not in _AGAIN:
          moved = "it redirects to where it is not followed"
          remedy = {
            **dict.fromkeys(range(300, 400), moved),
            404: "give the URL of a folder made by python -m maestro.export",
            416: "the file is shorter than config.json says; restore it",
          }.get(error.code, "only what is public can be read")
          raise RemoteError(
            f"cannot read {self / name}: {why}; {remedy}"
          ) from error
      except (http.client.InvalidURL, UnicodeError) as error:
        raise RemoteError(f"{self / name} is no URL: {error}") from error
      except http.client.HTTPException as error:
        why = f"the answer breaks off ({error!r})"
      except OSError as error:  # that of a URL, a timeout, a reset connection
        why = str(getattr(error, "reason", error) or type(error).__name__)
      failed = 1 if progress() > before else failed + 1
      if failed == ATTEMPTS:
        break
    times = f"{failed} times in a row"
    if failed < ATTEMPTS:
      times = f"{_MOST_ATTEMPTS} times, with some bytes in between"
    kept = name == WEIGHTS and self._cache.works and not self.whole
    raise RemoteError(
      f"cannot read {self / name}: {why}, {times}; check the connection and the"
      " server, then call again"
      + (": blocks that have come whole are kept" if kept else "")
    )


class RemoteFile:
  """A file on a server, read by ranges; as `safetensors_io.Reader` needs it."""

  def __init__(
    self, folder: Remote, size: int, header_sha256: str, cache: Cache
  ):
    self._folder, self._size, self._cache = folder, size, cache
    self._position = 0
    self._held: dict[int, memoryview] = {}  # by where they begin
    self._copy: IO[bytes] | None = None  # all of it, if ranges are ignored
    self._copying = threading.Lock()
    self._header_sha256 = header_sha256
    self._header = b""
    if header := cache.get(header_sha256):
      self._take_header(header)

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    """Moves to an offset from the start or from the end."""
    self._position = offset + (self._size if whence == os.SEEK_END else 0)
    return self._position

  def read(self, size: int) -> bytes | bytearray | memoryview:
    """Reads on; what was not asked for by `prefetch` is asked for now."""
    begin, end = self._position, min(self._position + size, self._size)
    self._position = max(begin, end)
    if begin >= end:
      return b""
    if not self._header:
      self._read_header()
    if end <= len(self._header):
      return self._header[begin:end]
    held = self._held.pop(begin, None)
    if held is not None and len(held) == end - begin:
      return held
    return self._fetch(begin, end)

  def close(self) -> None:
    """Forgets what is held."""
    self._held.clear()
    if self._copy:
      self._copy.close()

  def prefetch(self, blocks: Sequence[packing.Block]) -> None:
    """Gets blocks from the cache or the server, many at a time.

    Raises:
      PackingError: one is not what was written.
      RemoteError: the server does not send it.
    """
    missing = []
    for block in sorted(blocks, key=lambda b: b.begin):
      if block.begin == block.end:
        continue
      data = self._cache.get(block.sha256, block.end - block.begin)
      if data is None:
        missing.append(block)
      else:
        self._held[block.begin] = memoryview(data)
    runs: list[list[packing.Block]] = []
    for block in missing:
      near = bool(runs) and block.begin - runs[-1][-1].end <= _GAP
      if near and block.end - runs[-1][0].begin <= _MOST_RUN:
        runs[-1].append(block)
      else:
        runs.append([block])
    if not runs:
      return
    self._get(runs[0])  # alone: it tells whether the server knows ranges
    pool = concurrent.futures.ThreadPoolExecutor(_WORKERS)
    try:
      for done in [pool.submit(self._get, run) for run in runs[1:]]:
        done.result()
    finally:
      pool.shutdown(cancel_futures=True)

  def _read_header(self) -> None:
    start = bytes(self._fetch(0, 8))
    if not self._header:  # as it is, once all was read
      end = self._header_end(start)
      self._take_header(start + self._fetch(8, end))

  def _header_end(self, start: bytes) -> int:
    """Where the header ends, by the first 8 bytes."""
    n = int.from_bytes(start, "little")
    if not 2 <= n <= min(self._size - 8, files.MAX_HEADER):
      raise self._altered(f"a header of {n} bytes cannot be in it")
    return 8 + n

  def _take_header(self, header: bytes) -> None:
    """Keeps a header; raises unless it is config.json's, and so is the size."""
    if not is_block(header, self._header_sha256):
      raise self._altered(f"its header is not the one that {CONFIG} describes")
    try:
      tensors = json.loads(header[8:])
      tensors.pop("__metadata__", None)
      ends = [int(x["data_offsets"][1]) for x in tensors.values()]
    except (
      ArithmeticError,
      AttributeError,
      LookupError,
      RecursionError,
      TypeError,
      ValueError,
    ) as error:
      raise self._altered(f"its header is broken ({error})") from error
    size = len(header) + max(ends, default=0)
    if size != self._size:
      raise self._altered(f"{self._size} bytes, and {size} by its header")
    if not self._header:
      self._cache.put(self._header_sha256, header)
    self._header = header

  def _get(self, run: Sequence[packing.Block]) -> None:
    first, data = run[0].begin, bytearray()
    try:
      self._fetch(first, run[-1].end, data)
    finally:  # what has come is kept, even if the rest does not
      came = memoryview(data)
      for block in run:
        self._keep(block, came[block.begin - first : block.end - first])
    for block in run:
      if block.begin not in self._held:
        again = memoryview(self._fetch(block.begin, block.end))
        if not self._keep(block, again):
          raise packing.PackingError(block.altered())

  def _keep(self, block: packing.Block, data: memoryview) -> bool:
    """Holds and caches a block, if it is what was written."""
    right = is_block(data, block.sha256)
    if right:
      self._cache.put(block.sha256, data)
      self._held[block.begin] = data
    return right

  def _fetch(
    self, begin: int, end: int, data: bytearray | None = None
  ) -> bytearray:
    """Gets a range of bytes, which goes on where it broke off.

    Args:
      begin: of the range.
      end: of the range.
      data: is filled with it, as far as it comes; returned.
    """
    data = bytearray() if data is None else data
    if begin == end:  # no range can ask for nothing
      return data

    def once() -> bool:
      if self._copy:
        with self._copying:
          self._copy.seek(begin)
          data[:] = self._copy.read(end - begin)
        return True
      start = begin + len(data)
      with self._folder.open(WEIGHTS, (start, end)) as answer:
        if answer.status != 206:
          self._folder.whole = True
          return self._fetch_all(answer) and once()
        self._check_range(answer.headers.get("Content-Range", ""), start, end)
        for chunk in self._folder.chunks(answer, end - start):
          data.extend(chunk)
      return len(data) == end - begin

    self._folder.repeat(WEIGHTS, once, lambda: len(data))
    return data

  def _check_range(self, told: str, begin: int, end: int) -> None:
    """Raises unless an answer is of the bytes that were asked for."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", told.strip())
    first, last, total = found.groups() if found else ("", "", "")
    if found and total not in ("*", str(self._size)):
      raise self._resized(total)
    if (first, last) != (str(begin), str(end - 1)):
      raise RemoteError(
        f"{self._folder / WEIGHTS}: asked for bytes {begin} to {end - 1}, the"
        f" server sends {told or 'no Content-Range'!r}; use another server"
      )

  def _resized(self, size: Any) -> RemoteError:
    return self._altered(f"{size} bytes, {self._size} when it was written")

  def _altered(self, why: str) -> RemoteError:
    return RemoteError(
      f"{self._folder / WEIGHTS} is altered: {why}; restore it, or export again"
    )

  def _fetch_all(self, answer: Any) -> bool:
    """Copies a whole file, of a server that ignores ranges; once.

    Nothing is written before the header is found to be the one that config.json
    describes, the file as long as it says, and the disk to have room.
    """

    def take(size: int) -> bytes:
      return b"".join(self._folder.chunks(answer, size))

    with self._copying:
      if self._copy:
        return True
      length = answer.headers.get("Content-Length")
      if length is not None and length != str(self._size):
        raise self._resized(length)
      header = take(8)
      if len(header) < 8:
        return False
      end = self._header_end(header)
      header += take(end - 8)
      if len(header) < end:
        return False
      self._take_header(header)
      free = shutil.disk_usage(tempfile.gettempdir()).free
      if self._size > free:
        raise RemoteError(
          f"{self._folder / WEIGHTS}: the server ignores ranges of bytes, and"
          f" all of the {self._size} do not fit into {tempfile.gettempdir()},"
          f" where {free} are free; use a server that knows ranges, or set"
          " TMPDIR"
        )
      copy = tempfile.TemporaryFile()  # noqa: SIM115
      try:
        copy.write(header)
        for chunk in self._folder.chunks(answer, self._size + 1 - end):
          copy.write(chunk)
        size = copy.tell()
        if size > self._size:
          raise self._resized(f"more than {self._size}")
        if size < self._size:
          copy.close()
          return False  # it broke off
      except BaseException:
        copy.close()
        raise
      self._copy = copy
      warnings.warn(
        f"{self._folder / WEIGHTS}: the server ignores ranges of bytes, so all"
        f" of the {size} were read",
        stacklevel=2,
      )
      return True
