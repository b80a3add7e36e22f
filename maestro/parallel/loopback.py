"""Command lines of a run of several processes on this machine."""

import dataclasses
import pathlib
import socket


@dataclasses.dataclass(frozen=True)
class Command:
  """A training command, but for its --workdir.

  Attributes:
    words: of the command line.
    processes: that run it together.
  """

  words: list[str]
  processes: int = 1

  def lines(self, workdir: pathlib.Path) -> list[list[str]]:
    """The command line of each process, which meet at a port of their own."""
    whole = [*self.words, f"--workdir={workdir}"]
    if self.processes == 1:
      return [whole]
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      where = f"127.0.0.1:{free.getsockname()[1]}"
    whole += [f"--coordinator={where}", f"--num_processes={self.processes}"]
    whole += ["--join_timeout=60"]  # for one that is killed while others join
    return [[*whole, f"--process_id={i}"] for i in range(self.processes)]
