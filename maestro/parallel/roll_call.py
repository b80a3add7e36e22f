"""A line between the processes of a run: who is there, and who is lost.

Process 0 keeps a connection to every other one, from before they join in JAX to
their end. A killed process closes its connection, so all know within a second;
one that hangs, or whose host has gone, is silent, which is noticed after a
stated time. Either way the rest end at once and say who is missing. JAX's own
service would, too, but by an abort that names nobody.

Messages are JSON objects, a line each. Nothing that comes in is executed.
"""

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from maestro.errors import EXIT_LOST, LostError, UserError

_MOST_BYTES = 1 << 24  # of a message
_FAREWELL = 2.0  # seconds that the first process waits for others to hear it


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands among those of its run.

  Attributes:
    host: of process 0.
    port: at which process 0 calls the roll.
    count: of processes.
    index: of this one.
  """

  host: str
  port: int
  count: int
  index: int


class Line:
  """The connections of this process.

  Args:
    place: of this process.
    join_timeout: seconds until all must be there.
    lost_timeout: seconds of silence after which a process counts as lost.

  Raises:
    UserError: not all came in time; names those that are missing.
  """

  def __init__(self, place: Place, join_timeout: float, lost_timeout: float):
    self._place, self._lost_timeout = place, lost_timeout
    self._names = {place.index: _name(place.index)}
    self._peers: dict[int, _Peer] = {}
    self._said = collections.defaultdict(dict)  # number -> {process: text}
    self._all: dict[int, list[str]] = {}  # number -> the texts of all
    self._number = 0  # of exchanges
    self._changed = threading.Condition()
    self._over = False
    until = time.monotonic() + join_timeout
    if place.index == 0:
      self.port = self._call(until, join_timeout)
    else:
      self.port = self._answer(until, join_timeout)
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()

  # --- The roll -------------------------------------------------------------

  def _call(self, until: float, patience: float) -> int:
    """Waits for all others; returns a free port for JAX's coordinator."""
    place = self._place
    server = listen(place)
    with server:
      while len(self._peers) < place.count - 1:
        server.settimeout(max(until - time.monotonic(), 0.01))
        try:
          connection, address = server.accept()
        except TimeoutError:
          there = {0, *self._peers}
          missing = [i for i in range(place.count) if i not in there]
          text = (
            f"only {len(there)} of {place.count} processes came within"
            f" {patience:g} s: {_listed(missing)} missing; those that came:"
            f" {', '.join(self._names[i] for i in sorted(there))}. Look at the"
            " missing ones' logs; a longer --join_timeout waits for hosts that"
            " start late"
          )
          raise self._refusal(LostError(text)) from None
        self._greet(_Peer(connection), address)
    with socket.socket() as free:
      free.bind(("", 0))
      port = free.getsockname()[1]
    self._tell(self._peers.values(), kind="welcome", port=port)
    return port

  def _greet(self, peer: "_Peer", address: Any) -> None:
    place = self._place
    peer.socket.settimeout(10.0)
    try:
      hello = peer.next()
      index, count = int(hello["index"]), int(hello["count"])
      name = str(hello["name"])
    except (OSError, ValueError, KeyError, TypeError):
      peer.close()  # no process of ours: a port scanner, say
      return
    if count != place.count or not 0 < index < place.count:
      why = f"{name} came as {index} of {count}, here are {place.count}"
    elif index in self._peers:
      why = f"{name} and {self._names[index]} both are process {index}"
    else:
      self._peers[index], self._names[index] = peer, name
      return
    text = f"{why} (from {address[0]}); give each process its own --process_id"
    self._tell([peer], kind="refused", text=text)
    peer.close()
    raise self._refusal(UserError(text))

  def _refusal(self, error: UserError) -> UserError:
    """Sends home all who have come; returns the error."""
    kind = "missing" if isinstance(error, LostError) else "refused"
    self._tell(self._peers.values(), kind=kind, text=str(error))
    for peer in self._peers.values():
      peer.close()
    return error

  def _answer(self, until: float, patience: float) -> int:
    """Reports to process 0; returns the port of JAX's coordinator."""
    place = self._place
    where = f"{place.host}:{place.port}"
    error: OSError | None = None
    while True:
      try:
        connection = socket.create_connection(
          (place.host, place.port), timeout=min(10.0, patience)
        )
        break
      except OSError as failed:
        error = failed
      if time.monotonic() > until:
        raise LostError(
          f"process {place.index} found no process 0 at {where} within"
          f" {patience:g} s ({error}); is it started, and is --coordinator its"
          " address as others see it?"
        ) from error
      time.sleep(0.2)
    peer = _Peer(connection)
    self._peers[0] = peer
    name = self._names[place.index]
    self._tell([peer], index=place.index, count=place.count, name=name)
    # Process 0 tells when time is up; this is in case that it has gone.
    connection.settimeout(max(until - time.monotonic(), 0.0) + 15.0)
    try:
      answer = peer.next()
    except (OSError, ValueError) as failed:
      peer.close()
      raise LostError(
        f"process 0 at {where} has gone while others were joining ({failed});"
        " look at its log"
      ) from failed
    if answer.get("kind") in ("refused", "missing"):
      peer.close()
      kind = LostError if answer["kind"] == "missing" else UserError
      raise kind(str(answer.get("text")))
    self._names[0] = f"process 0 ({place.host})"
    return int(answer["port"])

  # --- What is said ---------------------------------------------------------

  def exchange(self, text: str) -> list[str]:
    """Returns what every process says at this point; all must come to it."""
    with self._changed:
      number = self._number
      self._number += 1
    if self._place.index == 0:
      self._heard(0, number, text)
    else:
      self._tell([self._peers[0]], kind="say", number=number, text=text)
    with self._changed:
      while number not in self._all:
        self._changed.wait()
      return self._all.pop(number)

  def fail(self, text: str, code: int) -> None:
    """Ends the other processes, for a reason of this one's."""
    self._over = True
    text = f"{self._me} has stopped: {text}"
    self._tell(self._peers.values(), kind="end", text=text, code=code)
    until = time.monotonic() + _FAREWELL
    while self._place.index == 0 and self._peers and time.monotonic() < until:
      time.sleep(0.02)  # see `_end`; the listener notices who has gone

  def leave(self) -> None:
    """Says goodbye: that this process ends is no loss."""
    self._over = True
    self._tell(self._peers.values(), kind="bye")

  @property
  def _me(self) -> str:
    return self._names[self._place.index]

  def _heard(self, index: int, number: int, text: str) -> None:
    with self._changed:
      said = self._said[number]
      said[index] = text
      if len(said) < self._place.count:
        return
      texts = [said[i] for i in range(self._place.count)]
      del self._said[number]
      self._all[number] = texts
      self._changed.notify_all()
    # Most often all say the same: each text goes once to each process.
    known = list(dict.fromkeys(texts))
    which = [known.index(text) for text in texts]
    self._tell(
      self._peers.values(), kind="all", number=number, texts=known, which=which
    )

  def _tell(self, peers: Iterable["_Peer"], **message: Any) -> None:
    line = (json.dumps(message) + "\n").encode()
    for peer in list(peers):
      with contextlib.suppress(OSError):  # who is gone is noticed by reading
        peer.send(line)

  # --- Who is there ---------------------------------------------------------

  def _listen(self) -> None:
    beat = min(self._lost_timeout / 6, 5.0)
    selector = selectors.DefaultSelector()
    now = time.monotonic()
    for index, peer in self._peers.items():
      peer.socket.settimeout(10.0)
      peer.heard = now
      selector.register(peer.socket, selectors.EVENT_READ, index)
    last = 0.0
    while self._peers:
      ready = selector.select(beat)
      now = time.monotonic()
      if now - last >= beat:
        # A process that was itself stopped for long hears others first.
        if last and now - last > self._lost_timeout:
          for peer in self._peers.values():
            peer.heard = now
        last = now
        self._tell(self._peers.values(), kind="here")
      for key, _ in ready:
        index = key.data
        peer = self._peers[index]
        peer.heard = now
        try:
          messages = peer.receive()
        except (OSError, ValueError) as error:
          messages = [{"kind": "gone", "text": str(error)}]
        for message in messages:
          if self._gone(index, message):
            selector.unregister(peer.socket)
            del self._peers[index]
            peer.close()
            break
      for index, peer in self._peers.items():
        if now - peer.heard > self._lost_timeout:
          self._lost(index, f"silent for {self._lost_timeout:g} s")
    selector.close()

  def _gone(self, index: int, message: dict[str, Any]) -> bool:
    """Takes a message in; True if nothing more will come from there."""
    match message.get("kind"):
      case "say":
        self._heard(index, int(message["number"]), str(message["text"]))
      case "all":
        with self._changed:
          texts = [message["texts"][i] for i in message["which"]]
          self._all[int(message["number"])] = texts
          self._changed.notify_all()
      case "end":
        # This process may be about to end itself, for the same reason.
        until = time.monotonic() + _FAREWELL / 2
        while not self._over and time.monotonic() < until:
          time.sleep(0.02)
        self._end(str(message["text"]), int(message["code"]))
      case "bye":
        return True
      case "gone":
        self._lost(index, message["text"] or "its connection closed")
        return True
    return False

  def _lost(self, index: int, how: str) -> None:
    who = self._names.get(index, f"process {index}")
    self._end(f"{who} is lost ({how}); see its log", EXIT_LOST)

  def _end(self, text: str, code: int) -> None:
    """Ends this process, and tells those that hang on it."""
    if self._over:
      return
    self._over = True
    self._tell(self._peers.values(), kind="end", text=text, code=code)
    sys.stdout.flush()
    print(f"\nerror: {self._me} ends: {text}", file=sys.stderr, flush=True)
    if self._place.index == 0:
      # JAX aborts the others once its coordinator, which is here, has ended.
      until = time.monotonic() + _FAREWELL
      for peer in list(self._peers.values()):
        with contextlib.suppress(OSError, ValueError):
          while (left := until - time.monotonic()) > 0:
            peer.socket.settimeout(left)
            peer.receive()
    os._exit(code)


class _Peer:
  """A connection, and what has come of a message so far."""

  def __init__(self, connection: socket.socket):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self.socket, self.heard = connection, time.monotonic()
    self._bytes = b""
    self._sending = threading.Lock()

  def send(self, line: bytes) -> None:
    with self._sending:
      self.socket.sendall(line)

  def receive(self) -> list[dict[str, Any]]:
    """Returns the messages that are complete; waits for some bytes."""
    new = self.socket.recv(1 << 16)
    if not new:
      raise OSError("")
    *lines, self._bytes = (self._bytes + new).split(b"\n")
    if len(self._bytes) > _MOST_BYTES:
      raise ValueError("a message is too long")
    messages = [json.loads(line) for line in lines]
    if not all(isinstance(message, dict) for message in messages):
      raise ValueError("a message is no object")
    return messages

  def next(self) -> dict[str, Any]:
    """Returns the one message that comes now."""
    while not (messages := self.receive()):
      pass
    return messages[0]

  def close(self) -> None:
    self.socket.close()


def _name(index: int) -> str:
  return f"process {index} ({socket.gethostname()}, pid {os.getpid()})"


def _listed(indices: list[int]) -> str:
  shown = ", ".join(map(str, indices[:8])) + ", ..." * (len(indices) > 8)
  return f"process {shown} is" if len(indices) == 1 else f"{shown} are"


def listen(place: Place) -> socket.socket:
  """Opens the port at which process 0 calls the roll.

  A loopback address is heard on itself alone, all others on every interface.

  Raises:
    UserError: the port is taken.
  """
  local = place.host == "localhost" or place.host.startswith("127.")
  both = not local and socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      (place.host if local else "", place.port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      backlog=1024,
      dualstack_ipv6=both,
    )
  except OSError as error:
    raise UserError(
      f"--coordinator: process 0 cannot listen on {place.host}:{place.port}"
      f" ({error}); an earlier attempt may still hold it: choose another port"
    ) from error
