"""Sizes over HTTP: what is asked for, and servers that misbehave."""

import contextlib
import http.server
import pathlib
import re
import socket
import threading
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest

import maestro
from maestro import introspect, models
from maestro.deploy import artifact, export, packing, remote, slices, web
from maestro.deploy import files as safetensors_io
from maestro.deploy.artifact import ArtifactError
from maestro.deploy.network import as_run

MODEL = models.MLP(num_classes=10, features=(512, 512))
RANKS = {"1": (40, 160, 10), "0.5": (20, 80, 8), "0.25": (10, 38, 4)}
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """Three sizes of a random network."""
  out = tmp_path_factory.mktemp("remote") / "any"
  rng = np.random.default_rng(0)
  x = jax.ShapeDtypeStruct((1, 8, 8), "float32")
  layers = introspect.layers(MODEL, x)

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32) / 16

  params = {}
  for (name, spec), r in zip(layers.items(), RANKS["1"], strict=True):
    u, v = spec.factor_shapes(r)
    params[name] = {"u": draw(*u), "v": draw(*v), "bias": draw(spec.n_out)}
  sizes = [
    export.Size(name, packing.rank_tree(dict(zip(layers, ranks, strict=True))))
    for name, ranks in RANKS.items()
  ]
  options = export.Options(repeats=0, stablehlo=False)
  run = as_run(MODEL, {"params": params}, x)
  export.export(run, out, sizes, options=options, log=lambda line: None)
  return out


class Server(http.server.ThreadingHTTPServer):
  """Serves a folder by ranges, and counts; `spoil` changes an answer.

  spoil(name, headers, body) -> (status or None, headers, body) or an Exception,
  at which nothing is answered; body bytes, or an iterable of them.
  """

  daemon_threads = True

  def __init__(self, folder):
    super().__init__(("127.0.0.1", 0), Handler)
    self.folder, self.spoil = folder, None
    self.sent, self.asked, self.lock = 0, [], threading.Lock()

  def handle_error(self, request, client_address):
    pass  # a client may leave

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}/any"


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  def do_GET(self):
    server, name = self.server, self.path.rpartition("/")[2]
    data = (server.folder / name).read_bytes()
    status, headers, asked = 200, {}, self.headers.get("Range")
    body = data
    if asked:
      first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
      body, status = data[first : last + 1], 206
      headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    headers["Content-Length"] = str(len(body))
    with server.lock:
      server.asked.append((self.path, asked))
    if server.spoil:
      new, headers, body = server.spoil(self, headers, body)
      status = new or status
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    self.end_headers()
    for part in [body] if isinstance(body, bytes) else body:
      with server.lock:  # before a client that has it all looks
        server.sent += len(part)
      self.wfile.write(part)
    if int(headers.get("Content-Length", -1)) != len(body):
      self.close_connection = True


@pytest.fixture
def server(exported, tmp_path, monkeypatch):
  monkeypatch.setenv("MAESTRO_CACHE", str(tmp_path / "cache"))
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(remote, "BACKOFF", 0.001)
  with _serve(exported) as server:
    yield server


@contextlib.contextmanager
def _serve(folder):
  with Server(folder) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def read(source, profile="0.25"):
  return artifact.read(source, profile=profile, model=MODEL)


def weights(handler):
  return handler.path.endswith(".safetensors")


def test_a_quarter_takes_less_than_a_third_of_the_bytes(
  exported, server, close
):
  _, variables = maestro.load(server.url, budget="macs:0.25", model=MODEL)
  local = read(exported)
  assert local.profile["macs"] <= 0.25 * local.config["dense"]["macs"]
  close(variables, local.variables, 0)
  config = (exported / "config.json").stat().st_size
  # Of the weights, and of all that a server is asked for: with config.json.
  whole = local.file_bytes
  assert server.sent - config <= 0.30 * whole
  assert server.sent <= 0.30 * (whole + config)
  # Nothing twice, and no more than the size needs but small gaps.
  slack = 512 * len(server.asked)
  assert local.bytes_read <= server.sent - config <= local.bytes_read + slack


def test_what_is_received_is_counted(exported, server):
  loaded = read(server.url)
  assert loaded.bytes_received == server.sent
  assert loaded.bytes_read == read(exported).bytes_read
  assert read(exported).bytes_received == 0


def test_what_is_cached_is_not_asked_for_again(exported, server, close):
  read(server.url)
  before, config = server.sent, (exported / "config.json").stat().st_size
  again = read(server.url)
  assert server.sent == before + config == before + again.bytes_received
  larger = read(server.url, "0.5")
  new = read(exported, "0.5").bytes_read - again.bytes_read
  assert new <= larger.bytes_received - config <= new + 512 * 8
  close(larger.variables, read(exported, "0.5").variables, 0)


@pytest.mark.quick(4)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder"])
def test_a_damaged_cache_is_filled_again(
  exported, server, close, tmp_path, damage
):
  read(server.url)
  entries = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
  assert len(entries) >= 9  # of each layer u, v, bias
  for path in entries:
    data = bytearray(path.read_bytes())
    if damage == "folder":
      path.unlink()
      path.mkdir()
      continue
    data[len(data) // 2] ^= 1
    cut = {"flip": len(data), "cut": len(data) - 1, "empty": 0}[damage]
    path.write_bytes(data[:cut])
  warned = pytest.warns(UserWarning, match="cannot be written")
  with warned if damage == "folder" else contextlib.nullcontext():
    loaded = read(server.url)
  close(loaded.variables, read(exported).variables, 0)
  assert loaded.bytes_received > loaded.bytes_read
  if damage != "folder":
    assert read(server.url).bytes_received < loaded.bytes_received


def test_without_a_cache_it_says_so_and_goes_on(server, monkeypatch):
  monkeypatch.setenv("MAESTRO_CACHE", "/dev/null/cache")
  with pytest.warns(UserWarning, match="MAESTRO_CACHE"):
    read(server.url)


def test_the_cache_is_where_the_environment_says(monkeypatch, server, tmp_path):
  monkeypatch.delenv("MAESTRO_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  read(server.url)
  names = {p.name for p in (tmp_path / "xdg/maestro").rglob("*") if p.is_file()}
  assert names and all(re.fullmatch("[0-9a-f]{64}", name) for name in names)


# ---------------------------------------------------------------------------
# Servers that misbehave
# ---------------------------------------------------------------------------


def some(times, spoil):
  """Spoils a number of answers, then none."""
  left = [times]

  def maybe(handler, headers, body):
    left[0] -= 1
    return (
      spoil(handler, headers, body) if left[0] >= 0 else (None, headers, body)
    )

  return maybe


def fails(status):
  return lambda handler, headers, body: (status, {"Content-Length": "0"}, b"")


def breaks_off(handler, headers, body):
  return None, headers, body[: len(body) // 2]


@pytest.mark.parametrize(
  "spoil",
  [fails(503), fails(429), breaks_off],
  ids=["503", "429", "breaks off"],
)
def test_what_passes_is_tried_again(exported, server, close, spoil):
  server.spoil = some(4, spoil)
  loaded = read(server.url)
  close(loaded.variables, read(exported).variables, 0)
  assert loaded.bytes_received == server.sent  # what broke off is counted
  if spoil is breaks_off:  # and not asked for again
    assert sum(name.endswith("config.json") for name, _ in server.asked) <= 5


@pytest.mark.parametrize(
  ("spoil", "words", "requests"),
  [
    (fails(500), "config.json: 500 .*, 5 times in a row", 5),
    (fails(404), "404 .*; give the URL of a folder made by", 1),
    (fails(403), "403 .*; only what is public", 1),
    (breaks_off, "the answer breaks off, 5 times", 5),
  ],
  ids=["500", "404", "403", "breaks off"],
)
def test_what_does_not_pass_is_told(server, spoil, words, requests):
  server.spoil = spoil
  with pytest.raises(ArtifactError, match=words):
    read(server.url)
  assert len(server.asked) == requests


def test_weights_that_break_off_are_told(server):
  server.spoil = lambda handler, headers, body: (
    None,
    headers,
    b"" if weights(handler) else body,
  )
  with pytest.raises(ArtifactError, match=r"model\.safetensors: .*breaks off"):
    read(server.url)


def a_third(handler, headers, body):
  """Cuts each answer to a third, at the least one byte."""
  short = body[: max(1, len(body) // 3)]
  return None, headers, short if weights(handler) else body


def test_a_connection_that_always_breaks_comes_to_an_end(
  exported, server, close, monkeypatch
):
  monkeypatch.setattr(remote, "BACKOFF", 0.0)
  server.spoil = a_third
  loaded = read(server.url)
  close(loaded.variables, read(exported).variables, 0)
  ranges = [asked for _, asked in server.asked if asked]
  assert len(ranges) > remote.ATTEMPTS and len(set(ranges)) == len(ranges)
  again = read(server.url)
  assert again.bytes_received == (exported / "config.json").stat().st_size
  # Not for ever, whatever it brings.
  monkeypatch.setattr(remote, "_MOST_ATTEMPTS", 7)
  with pytest.raises(ArtifactError, match="7 times, with some bytes in bet"):
    read(server.url, "0.5")


def test_a_request_is_for_a_few_blocks_which_are_kept(
  exported, server, close, monkeypatch
):
  monkeypatch.setattr(remote, "_MOST_RUN", 4096)
  monkeypatch.setattr(remote, "ATTEMPTS", 2)
  config, left = (exported / "config.json").stat().st_size, [6]

  def ends(handler, headers, body):
    left[0] -= weights(handler)
    return None, headers, body if left[0] >= 0 else b""

  server.spoil = ends
  with pytest.raises(ArtifactError, match="blocks that have come whole are"):
    read(server.url, "1")
  came = server.sent - config
  assert came > 4096
  server.spoil = None
  server.asked.clear()
  loaded = read(server.url, "1")
  close(loaded.variables, read(exported, "1").variables, 0)
  assert loaded.bytes_received - config <= loaded.bytes_read - came + 4096
  with safetensors_io.Reader(exported / "model.safetensors") as reader:
    blocks = packing.wanted(
      reader,
      loaded.config["tensors"],
      loaded.profile,
      introspect.layers(MODEL, jax.ShapeDtypeStruct((1, 8, 8), "float32")),
    )
    most = max(block.end - block.begin for block in blocks)
  spans = [re.findall(r"\d+", asked) for _, asked in server.asked if asked]
  assert spans
  assert all(int(b) - int(a) < max(4096, most) for a, b in spans)


def test_without_a_home_nothing_is_kept(exported, server, close, monkeypatch):
  monkeypatch.delenv("MAESTRO_CACHE")
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

  def unknown(path):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
  with pytest.warns(UserWarning, match="no home directory"):
    loaded = read(server.url)
  close(loaded.variables, read(exported).variables, 0)
  server.spoil = lambda handler, headers, body: (
    None,
    headers,
    b"" if weights(handler) else body,
  )
  with (
    pytest.warns(UserWarning, match="no home directory"),
    pytest.raises(ArtifactError, match=r"then call again$"),
  ):
    read(server.url)


def test_a_server_that_is_silent_or_absent_is_told(server, monkeypatch):
  monkeypatch.setattr(remote, "TIMEOUT", 0.2)
  monkeypatch.setattr(remote, "ATTEMPTS", 2)
  done = threading.Event()

  def silent(handler, headers, body):
    done.wait(5)
    return None, headers, body

  server.spoil = silent
  with pytest.raises(ArtifactError, match="timed out, 2 times"):
    read(server.url)
  done.set()
  with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    port = closed.getsockname()[1]
  with pytest.raises(ArtifactError, match="refused, 2 times"):
    read(f"http://127.0.0.1:{port}/any")


def whole(exported, change=lambda headers: headers, body=None):
  """Ignores ranges: 200 with all of the weights."""
  data = (exported / "model.safetensors").read_bytes()

  def spoil(handler, headers, asked):
    if not weights(handler):
      return None, headers, asked
    headers = change({"Content-Length": str(len(data))})
    return 200, headers, data if body is None else body(data)

  return spoil


def test_a_server_that_ignores_ranges_is_read_whole_once(
  exported, server, close
):
  server.spoil = whole(exported)
  with pytest.warns(UserWarning, match="ignores ranges"):
    loaded = read(server.url)
  close(loaded.variables, read(exported).variables, 0)
  config = (exported / "config.json").stat().st_size
  assert loaded.bytes_received == server.sent == loaded.file_bytes + config


def test_no_more_than_announced_is_read(exported, server):
  size = (exported / "model.safetensors").stat().st_size
  longer = whole(exported, lambda h: {"Content-Length": str(size + 9)})
  endless = whole(
    exported,
    lambda h: {"Connection": "close"},
    lambda data: (data for _ in range(1000)),
  )
  shorter = whole(exported, lambda h: h, lambda data: data[:-1])
  for spoil, words in (
    (longer, f"is altered: {size + 9} bytes, {size} when"),
    (endless, f"is altered: more than {size} bytes"),
    (shorter, "breaks off"),
  ):
    server.spoil = spoil
    with pytest.raises(ArtifactError, match=words):
      read(server.url)
  # Of the endless one, not much more than what sockets hold.
  assert server.sent <= 100 * size


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda told: told.partition("/")[0] + "/99999999", "altered: 99999999"),
    (lambda told: told.replace("bytes ", "bytes 1"), "the server sends 'bytes"),
    (lambda told: "", "no Content-Range"),
  ],
)
def test_another_range_or_size_is_told(server, change, words):
  def spoil(handler, headers, body):
    if weights(handler):
      headers["Content-Range"] = change(headers["Content-Range"])
    return None, headers, body

  server.spoil = spoil
  with pytest.raises(ArtifactError, match=words):
    read(server.url)


def test_a_file_that_is_not_the_configs_is_not_written(
  exported, server, monkeypatch
):
  written = []
  monkeypatch.setattr(
    remote.tempfile, "TemporaryFile", lambda: written.append(1)
  )
  other = whole(exported, body=lambda data: data.replace(b'"F32"', b'"I32"'))
  server.spoil = other
  with pytest.raises(ArtifactError, match="its header is not the one that"):
    read(server.url)
  server.spoil = whole(exported)
  usage = remote.shutil.disk_usage("/")
  monkeypatch.setattr(
    remote.shutil, "disk_usage", lambda path: usage._replace(free=1000)
  )
  with pytest.raises(ArtifactError, match=r"do not fit into .* 1000 are free"):
    read(server.url)
  assert not written


def test_a_size_that_the_header_does_not_fill_is_told(
  exported, server, monkeypatch
):
  """By a config of the server's own, as an answer may be endless."""
  read_config = artifact.read_config

  def larger(place):
    config = read_config(place)
    config["files"]["model.safetensors"]["size"] *= 1000
    return config

  monkeypatch.setattr(artifact, "read_config", larger)
  size = (exported / "model.safetensors").stat().st_size
  server.spoil = whole(exported, lambda h: {"Connection": "close"})
  with pytest.raises(ArtifactError, match=f"and {size} by its header"):
    read(server.url)


def altered(exported, name, row):
  """Alters a byte of one row, wherever it is sent."""
  with safetensors_io.Reader(exported / "model.safetensors") as reader:
    at = reader.span(name, row, row + 1)[0]

  def spoil(handler, headers, body):
    asked = handler.headers.get("Range")
    if weights(handler) and asked:
      first, last = map(int, re.findall(r"\d+", asked))
      if first <= at <= last:
        body = bytearray(body)
        body[at - first] ^= 1
    return None, headers, bytes(body)

  return spoil


def test_altered_bytes_are_told_by_block_and_file(exported, server, tmp_path):
  server.spoil = altered(exported, "params/fc2/v", 5)
  with pytest.raises(ArtifactError) as caught:
    read(server.url)
  for word in ("model.safetensors", "'params/fc2/v'", "rows 0 to 38"):
    assert word in str(caught.value)
  # Nothing of it was kept, and a size without these bytes is none the worse.
  for path in (tmp_path / "cache").rglob("*"):
    if path.is_file():
      assert artifact.sha256(path.read_bytes()) == path.name
  server.spoil = altered(exported, "params/fc2/v", 50)
  read(server.url)
  with pytest.raises(ArtifactError, match="its rows 38 to 80 are not"):
    read(server.url, "0.5")


def test_a_byte_altered_once_is_asked_for_again(exported, server, close):
  spoil = altered(exported, "params/fc2/v", 5)
  seen = []

  def once(handler, headers, body):
    new = spoil(handler, headers, body)
    if new[2] != body and not seen:
      seen.append(1)
      return new
    return None, headers, body

  server.spoil = once
  close(read(server.url).variables, read(exported).variables, 0)
  assert seen


def test_an_altered_header_or_config_is_told(exported, server):
  def spoil(handler, headers, body):
    return None, headers, body.replace(b'"F32"', b'"I32"')

  server.spoil = spoil
  with pytest.raises(ArtifactError, match="header"):
    read(server.url)
  server.spoil = lambda h, headers, body: (
    None,
    headers,
    body.replace(b'"macs": 1', b'"macs": 2'),
  )
  with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
    read(server.url)


# ---------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------


def redirect(to, only=lambda handler: True):
  def spoil(handler, headers, body):
    if "/moved/" in handler.path or not only(handler):
      return None, headers, body
    name = handler.path.rpartition("/")[2]
    headers = {"Location": f"{to}/moved/{name}", "Content-Length": "0"}
    return 302, headers | {"X-Repo-Commit": COMMIT}, b""

  return spoil


def test_another_host_is_not_followed(exported, server, close):
  server.spoil = redirect(f"http://127.0.0.1:{server.server_port}")
  close(read(server.url).variables, read(exported).variables, 0)
  server.spoil = redirect(f"http://localhost:{server.server_port}")
  with pytest.raises(ArtifactError, match="to another host, localhost"):
    read(server.url)
  server.spoil = redirect("file:///etc")
  with pytest.raises(ArtifactError, match="redirects to where"):
    read(server.url)


def test_https_is_not_left(monkeypatch):
  opened = []
  monkeypatch.setattr(web, "opener", opened.append)
  for url in ("https://example.org/any", "hf://org/name"):
    remote.Remote(url)
    policy = opened.pop()
    asked = urllib.request.Request("https://example.org/config.json")
    for other in ("http", "ftp"):
      with pytest.raises(web.RemoteError, match=f"from https to {other}"):
        policy.redirect_request(
          asked, None, 302, "", {}, f"{other}://example.org/"
        )


def test_a_hub_may_send_to_its_store(exported, server, close, monkeypatch):
  endpoint = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setenv("HF_ENDPOINT", endpoint)
  store = redirect(f"http://localhost:{server.server_port}", weights)

  def hub(handler, headers, body):
    return store(handler, headers | {"X-Repo-Commit": COMMIT}, body)

  server.spoil = hub
  loaded = read("hf://org/name@v1.0/sub")
  close(loaded.variables, read(exported).variables, 0)
  assert server.asked[0][0] == "/org/name/resolve/v1.0/sub/config.json"
  # The commit that config.json is of, even if the revision moves on meanwhile.
  first = next(path for path, _ in server.asked if "safetensors" in path)
  assert first == f"/org/name/resolve/{COMMIT}/sub/model.safetensors"
  assert any("/moved/" in path for path, asked in server.asked if asked)
  server.spoil = None
  server.asked.clear()
  read("hf://org/name")
  assert server.asked[0][0] == "/org/name/resolve/main/config.json"


def test_what_no_url_is_for_says_so(server):
  for call in (artifact.verify, artifact.load_stablehlo, slices.read):
    with pytest.raises(ArtifactError, match=r"of a URL, http.* not supported"):
      call(server.url)
  assert not server.asked


@pytest.mark.parametrize(
  "endpoint", ["hub.example.org", "file:///etc", "https://", "http://[::1"]
)
def test_an_endpoint_that_is_no_url_of_the_web_is_told(monkeypatch, endpoint):
  monkeypatch.setenv("HF_ENDPOINT", endpoint)
  with pytest.raises(ArtifactError, match=r"HF_ENDPOINT is .*; set it to"):
    maestro.load("hf://org/name")


def test_nothing_but_the_web_is_opened(tmp_path):
  opener = web.opener(web.Redirects(anywhere=True))
  for url in (tmp_path.as_uri(), "ftp://127.0.0.1/x", "data:,x"):
    with pytest.raises(urllib.error.URLError, match="unknown url type"):
      opener.open(url)


@pytest.mark.parametrize(
  ("url", "words"),
  [
    ("s3://bucket/any", "only https://, http:// and hf://"),
    ("https:///any", "only https://"),
    ("https://host/any#part", "no #fragment"),
    ("https://me:secret@host/any", "no password"),
    ("http://[::1/any", "is no URL"),
    ("http://127.0.0.1:port/any", "is no URL"),
    ("http://127.0.0.1/any of them", "is no URL"),
    ("hf://org/name@..", "no hf://"),
    ("hf://name", r"no hf://org/name\[@revision\]"),
    ("hf://org/name@", "no hf://"),
    ("hf://org/../name", "no hf://"),
  ],
)
def test_other_addresses_are_told(url, words):
  with pytest.raises(ArtifactError, match=words):
    maestro.load(url)
