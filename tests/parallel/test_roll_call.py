"""The line between processes: who is missing, who is lost, who says what."""

import contextlib
import json
import os
import socket
import threading
import time

import pytest

from maestro.errors import LostError, UserError
from maestro.parallel import roll_call
from maestro.parallel.roll_call import Line, Place

WAIT = 20.0  # seconds that nothing here should take


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


class Ended(BaseException):
  """Stands for the end of a process: ends the thread that it runs in."""


@pytest.fixture
def ends(monkeypatch):
  """Exit codes of the processes, here threads, that have ended."""
  codes = []

  def end(code):
    codes.append(code)
    raise Ended

  monkeypatch.setattr(os, "_exit", end)
  monkeypatch.setattr(threading, "excepthook", lambda args: None)
  monkeypatch.setattr(roll_call, "_FAREWELL", 0.4)
  return codes


LINES = []


@pytest.fixture(autouse=True)
def closed():
  """Closes what a test has left open."""
  yield
  for line in LINES:
    line._over = True  # else the end of one would be the loss of another
  while LINES:
    line = LINES.pop()
    peers = list(line._peers.values())
    cut(line)
    line._thread.join(WAIT)
    for peer in peers:
      peer.close()


def join(port, count, index, patience=WAIT, lost=WAIT):
  line = Line(Place("127.0.0.1", port, count, index), patience, lost)
  LINES.append(line)
  return line


def in_threads(*calls):
  """What each call returns, or the error that it raises."""
  results = [None] * len(calls)

  def run(i, call):
    try:
      results[i] = call()
    except Exception as error:
      results[i] = error

  threads = [
    threading.Thread(target=run, args=pair) for pair in enumerate(calls)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(2 * WAIT)
  return results


def all_of(count, **options):
  port = free_port()
  lines = in_threads(
    *(lambda i=i: join(port, count, i, **options) for i in range(count))
  )
  assert all(isinstance(line, Line) for line in lines), lines
  return lines


def until(condition):
  end = time.monotonic() + WAIT
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_all_hear_what_each_says_in_order():
  lines = all_of(3)
  assert len({line.port for line in lines}) == 1  # of JAX's coordinator
  for word in ("a", "b"):
    heard = in_threads(
      *(lambda t=f"{word}{i}", i=i: lines[i].exchange(t) for i in range(3))
    )
    assert heard == [[f"{word}0", f"{word}1", f"{word}2"]] * 3
  for line in lines:
    line.leave()


def test_what_many_say_alike_is_sent_to_each_once(monkeypatch):
  send, sent = roll_call._Peer.send, []
  lines = all_of(4)
  monkeypatch.setattr(
    roll_call._Peer,
    "send",
    lambda peer, line: sent.append(len(line)) or send(peer, line),
  )
  said = ["x" * 100_000, "y" * 100_000, "x" * 100_000, "x" * 100_000]
  heard = in_threads(
    *(lambda i=i: lines[i].exchange(said[i]) for i in range(4))
  )
  assert heard == [said] * 4
  # One from each of three, and both texts to each of three.
  assert 900_000 <= sum(sent) < 920_000
  for line in lines:
    line.leave()


@pytest.mark.skipif(
  not socket.has_dualstack_ipv6(), reason="this host has no IPv6"
)
@pytest.mark.parametrize("host", ["::1", "localhost", "127.0.0.1"])
def test_processes_meet_at_addresses_of_both_kinds(host):
  port = free_port()
  lines = in_threads(
    *(lambda i=i: Line(Place(host, port, 2, i), WAIT, WAIT) for i in range(2))
  )
  if host == "::1" and not all(isinstance(line, Line) for line in lines):
    pytest.skip("the loopback interface has no IPv6 address")
  LINES.extend(lines)
  assert (
    in_threads(*(lambda x=x: x.exchange("a") for x in lines))
    == [["a", "a"]] * 2
  )
  for line in lines:
    line.leave()


def test_long_texts_arrive_whole():
  texts = ["x" * 3_000_000, "é" * 1_000_000]
  lines = all_of(2)
  heard = in_threads(*(lambda i=i: lines[i].exchange(texts[i]) for i in (0, 1)))
  assert heard == [texts] * 2
  for line in lines:
    line.leave()


def test_a_process_that_never_comes_is_named_to_all():
  port = free_port()
  found = in_threads(
    lambda: join(port, 4, 0, patience=1.0),
    lambda: join(port, 4, 2, patience=1.0),
  )
  for error in found:
    assert isinstance(error, LostError)
    assert "2 of 4 processes" in str(error) and "1, 3 are" in str(error)
    assert "--join_timeout" in str(error)


def test_a_process_without_a_first_one_says_where_it_looked():
  port = free_port()
  with pytest.raises(LostError, match=f"no process 0 at 127.0.0.1:{port}"):
    join(port, 2, 1, patience=0.5)


@pytest.mark.parametrize(
  ("others", "text"),
  [
    ([(3, 1), (3, 1)], "both are process 1"),
    ([(2, 1)], "came as 1 of 2, here are 3"),
  ],
)
def test_processes_that_do_not_fit_are_refused(others, text):
  port = free_port()
  found = in_threads(
    lambda: join(port, 3, 0),
    *(lambda o=o: join(port, *o) for o in others),
  )
  for error in found:
    assert isinstance(error, UserError)
    assert not isinstance(error, LostError)  # to run again would not help
    assert text in str(error)


@pytest.mark.parametrize(
  "said", [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"index": "x"}\n', b""]
)
def test_what_is_no_process_is_sent_away(said):
  port = free_port()

  def scan():
    with socket.create_connection(("127.0.0.1", port)) as stranger:
      stranger.sendall(said)
      stranger.shutdown(socket.SHUT_WR)
      with contextlib.suppress(OSError):
        stranger.recv(100)

  def late():
    time.sleep(0.3)
    return join(port, 2, 1)

  def scan_soon():
    time.sleep(0.1)
    scan()

  first, second, _ = in_threads(lambda: join(port, 2, 0), late, scan_soon)
  assert isinstance(first, Line) and isinstance(second, Line)
  first.leave(), second.leave()


def cut(line):
  """What the kernel does with the connections of a killed process."""
  line._over = True
  for peer in list(line._peers.values()):
    with contextlib.suppress(OSError):
      peer.socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_all_end_and_name_the_one_that_is_lost(lost, ends, capsys):
  lines = all_of(3)
  cut(lines[lost])
  until(lambda: len(ends) == 2)
  assert ends == [69, 69]
  assert capsys.readouterr().err.count(f"process {lost} (") >= 2


def test_one_that_is_silent_is_lost(ends, capsys, monkeypatch):
  lines = all_of(2, lost=0.6)
  lines[1]._tell = lambda peers, **message: None  # it is stopped
  until(lambda: ends == [69, 69])
  assert "silent for 0.6 s" in capsys.readouterr().err


def test_all_are_heard_while_they_say_nothing(ends):
  lines = all_of(3, lost=0.6)
  time.sleep(1.5)
  assert not ends
  for line in lines:
    line.leave()


def test_goodbye_is_no_loss(ends):
  lines = all_of(3)
  lines[1].leave()
  cut(lines[1])
  time.sleep(0.3)
  assert not ends
  lines[2].leave()
  lines[0].leave()


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_ends_the_others_with_its_code(failing, ends, capsys):
  lines = all_of(3)
  lines[failing].fail("the disk is full", 2)
  until(lambda: len(ends) == 2)
  assert ends == [2, 2]
  text = capsys.readouterr().err
  assert text.count("has stopped: the disk is full") == 2
  assert f"process {failing} (" in text


def test_a_port_in_use_is_said():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match="choose another port"):
      join(port, 2, 0)


def test_messages_are_json_lines():
  ours, theirs = socket.socketpair()
  with ours, theirs:
    peer = roll_call._Peer.__new__(roll_call._Peer)
    peer.socket, peer._bytes = ours, b""
    theirs.sendall(b'{"kind": "here"}\n{"kind"')
    assert peer.receive() == [{"kind": "here"}]
    theirs.sendall(b': "bye"}\n')
    assert peer.receive() == [{"kind": "bye"}]
    theirs.sendall(json.dumps([1]).encode() + b"\n")
    with pytest.raises(ValueError, match="no object"):
      peer.receive()
