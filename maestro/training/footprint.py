"""What the programs of a run take of a device, and the largest batch that fits.

Nothing runs: programs are compiled for devices that need not be there, see
`maestro.training.abstract`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from maestro.errors import UserError
from maestro.ops.cpu import tracing_for
from maestro.parallel import programs
from maestro.parallel.programs import Memory
from maestro.training.abstract import Form, abstract
from maestro.training.config import Config
from maestro.training.state import variables_of

_TRIES = 6  # compilations that the search for a batch may take


@dataclasses.dataclass(frozen=True)
class Row:
  """What the program of one form takes of each device.

  Attributes:
    form: "dense", or which part of the ranks.
    trained: whether the config's own run has steps in this form.
    batch_size: over all devices.
    steps: that a dispatch makes; FLOPs and collectives are one step's.
    memory: None where the compiler gave up.
    needed: bytes at the peak; None if the compiler gave up and said no number.
    fits: whether that is within the limit.
    parts: {"params": bytes, ...} of the arguments, and of a batch.
    flops: floating-point operations.
    bytes_accessed: to and from memory.
    collectives: {kind: {"count": arrays, "bytes": of them}}.
    program: hash of the optimized HLO, but for the lines of source in it.
    seconds: to compile.
    message: of the compiler, where it gave up.
  """

  form: str
  trained: bool
  batch_size: int
  steps: int
  memory: Memory | None
  needed: int | None
  fits: bool
  parts: dict[str, int]
  flops: float | None = None
  bytes_accessed: float | None = None
  collectives: dict[str, dict[str, int]] = dataclasses.field(
    default_factory=dict
  )
  program: str = ""
  seconds: float = 0.0
  message: str = ""

  @property
  def held(self) -> int:
    """Bytes that do not depend on the batch: the state and the data set."""
    return sum(n for name, n in self.parts.items() if name != "batch")


@dataclasses.dataclass(frozen=True)
class Largest:
  """The largest batch that fits, as far as compilations have shown.

  Attributes:
    batch_size: over all devices; None if none that was tried fits.
    compilations: that the search took, beside the table's.
    why: what it is bounded by.
    tried: {batch size: bytes needed, or None} in order.
  """

  batch_size: int | None
  compilations: int
  why: str
  tried: dict[int, int | None]


def measure(c: Config, form: Form, devices: Sequence[Any], limit: float) -> Row:
  """Compiles the program of a form and reads what it takes.

  Args:
    c: the config.
    form: of `abstract.forms`.
    devices: there or not.
    limit: bytes of memory that a device has.

  Raises:
    UserError: the config does not fit the devices or the data.
  """
  a = abstract(c, form, devices)
  state = a.state
  parts = {
    "params": programs.bytes_of(state.params),
    "optimizer": programs.bytes_of(state.opt_state),
    "data set": programs.bytes_of(a.data),
    "batch": a.batch_bytes,
  }
  rest = programs.bytes_of((state, a.data))
  parts["other state"] = rest - sum(parts[k] for k in list(parts)[:3])
  row = {
    "form": form.name,
    "trained": form.trained,
    "batch_size": c.batch_size,
    "steps": a.steps,
    "parts": parts,
  }
  began = time.monotonic()
  compiled = _compile(a.lower())
  if isinstance(compiled, _Short):
    return Row(
      **row,
      memory=None,
      needed=compiled.needed,
      fits=False,
      seconds=time.monotonic() - began,
      message=compiled.message,
    )
  memory, text = Memory.of(compiled), compiled.as_text()
  # Tiles of an accelerator's layouts are larger than what they hold.
  parts["padding"] = max(memory.arguments - rest, 0)
  work = programs.work(compiled)
  return Row(
    **row,
    memory=memory,
    needed=memory.peak,
    fits=memory.peak <= limit,
    flops=work["flops"],
    bytes_accessed=work["bytes accessed"],
    collectives=programs.exchanged(programs.collectives(text)),
    program=programs.fingerprint(text),
    seconds=time.monotonic() - began,
  )


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What evaluating a form takes of each device, beside what training holds.

  Attributes:
    form: of the network.
    batch_size: examples that run at a time, over all devices.
    needed: bytes at the peak; None if the compiler gave up and said no number.
    fits: whether that is within the limit.
  """

  form: str
  batch_size: int
  needed: int | None
  fits: bool


def measure_evaluation(
  c: Config, form: Form, devices: Sequence[Any], limit: float
) -> Evaluation:
  """Compiles the evaluation of a form; arguments as those of `measure`."""
  a = abstract(c, form, devices)
  evaluate, variables = a.training.evaluate, variables_of(a.state)
  with tracing_for(a.platform):
    lowered = evaluate.lower(variables, a.training.dataset.val)
  compiled = _compile(lowered)
  if isinstance(compiled, _Short):
    needed = compiled.needed
    return Evaluation(form.name, evaluate.batch_size, needed, False)
  # The optimizer's state and the training set stay where they are.
  needed = programs.bytes_of((a.state, a.data)) + Memory.of(compiled).peak
  needed -= programs.bytes_of(variables)
  return Evaluation(form.name, evaluate.batch_size, needed, needed <= limit)


@dataclasses.dataclass(frozen=True)
class _Short:
  """The compiler gave up for want of memory."""

  needed: int | None
  message: str


def _compile(lowered: Any) -> Any:
  """Returns the compiled program, or a _Short."""
  try:
    return lowered.compile()
  except RuntimeError as error:
    short = programs.shortage(error)
    if short is None:
      raise
    return _Short(*short)


def largest_batch(
  measured: Callable[[int], Row], first: Row, limit: float, unit: int, most: int
) -> Largest:
  """Searches the largest batch: a line through two sizes, then checks.

  Memory is a line in the batch size as long as the compiler does the same; what
  it says of the size that the line gives is what counts.

  Args:
    measured: batch size -> its row; compiles.
    first: a row that is known.
    limit: bytes of memory that a device has.
    unit: a batch is a multiple of it.
    most: examples of the training split.
  """
  most -= most % unit
  rows, stopped = {first.batch_size: first}, ""
  if first.held > limit:
    tried = {first.batch_size: first.needed}
    return Largest(None, 0, "what no batch changes is too large", tried)
  while len(rows) <= _TRIES:
    size = _next(rows, limit, unit, most)
    if size is None:
      break
    try:
      rows[size] = measured(size)
    except UserError as error:  # of a schedule that leaves nothing, perhaps
      stopped = f"the next size is refused: {error}"
      break
  low, high = _bounds(rows, most + unit)
  why = "where a line through these puts the limit"
  if low == most:
    why = "all examples of the training split"
  elif high <= most:
    why = f"{high:,} does not fit"
  tried = {n: row.needed for n, row in rows.items()}
  return Largest(low or None, len(rows) - 1, stopped or why, tried)


def _bounds(rows: dict[int, Row], top: int) -> tuple[int, int]:
  """The largest size that fits, and the smallest that does not."""
  return (
    max((n for n, row in rows.items() if row.fits), default=0),
    min((n for n, row in rows.items() if not row.fits), default=top),
  )


def _next(
  rows: dict[int, Row], limit: float, unit: int, most: int
) -> int | None:
  """The size to compile next; None if nothing would be learnt."""
  low, high = _bounds(rows, most + unit)
  known = sorted((n, r.memory.peak) for n, r in rows.items() if r.memory)
  if len(known) < 2:
    size = min(2 * low, most) if low else high // 2
    if low and size >= high:
      size = (low + high) // 2
  else:
    # Through what is known on both sides, or through the two largest sizes.
    sides = [(n, peak) for n, peak in known if n in (low, high)]
    (n, a), (m, b) = sides if len(sides) == 2 else known[-2:]
    rise = (b - a) / (m - n)
    # Of a program that grows with nothing, all examples are the next guess.
    size = int(min(n + (limit - a) / rise, most)) if rise > 0 else most
    if size >= high:
      size = (low + high) // 2
    if size - low < low / 50:
      return None
  size -= size % unit
  return size if low < size < high and size not in rows else None
