"""Will it fit? Compiles a config's steps for hardware that is not there.

Says what the step needs of each device's memory and by what, its FLOPs, and
what devices exchange; how the dense network and factors at parts of the ranks
compare; and the largest batch that fits. Needs no data and no such device:

  python -m maestro.fit --config=configs/resnet_od.py --topology=v5e:4x4
  python -m maestro.fit --config=configs/resnet_od.py --topology=v5p:2x2x2 \
      --config.mesh.fsdp=8 --config.batch_size=8192 --json=fit.json
  python -m maestro.fit --config=configs/digits_od.py --topology=cpu:8

Topologies: v4:AxBxC, v5e:AxB, v5p:AxBxC and v6e:AxB (pip install -e '.[fit]'),
h100:N and h200:N (the message says what to install), and cpu:N, which is always
there, but compiles other programs than an accelerator has. The program is the
one that training dispatches, of the same shapes, at the ranks of the start;
so is the evaluation of its largest form. The candidates of a race, checkpoints
and the host's memory are not looked at. Exit codes: 0 it fits, 1 it does not
(the message says what to change), 2 bad input.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags

import maestro.main  # noqa: F401  (which defines --config)
from maestro import cli, targets
from maestro import data as data_lib
from maestro.errors import UserError
from maestro.parallel.mesh import Mesh, batch_devices, make_mesh
from maestro.parallel.topology import GIB, Topology
from maestro.report.tables import text_table
from maestro.runs import provenance
from maestro.runs import workdir as workdir_lib
from maestro.training.abstract import Form, forms
from maestro.training.config import Config, parse
from maestro.training.footprint import (
  Evaluation,
  Largest,
  Row,
  largest_batch,
  measure,
  measure_evaluation,
)

EXIT_TOO_LARGE = 1


flags.declare_key_flag("config")
flags.DEFINE_string("topology", None, "What to compile for, e.g. v5e:4x4.")
flags.DEFINE_float(
  "memory_gib",
  None,
  "Memory of a device in GiB; the default is what the chip leaves a program.",
  lower_bound=0.0,
)
flags.DEFINE_bool("search", True, "Search for the largest batch that fits.")
flags.DEFINE_bool(
  "compare", True, "Compile forms that the run does not train as well."
)
flags.DEFINE_string("json", None, "File that gets everything as JSON.")


def main(argv: list[str]) -> None:
  """Compiles, prints the table and the verdict."""
  values = flags.FLAGS
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  if values.config is None:
    raise UserError("--config=FILE is missing, e.g. configs/digits_od.py")
  topology = Topology.parse(values.topology)
  out = values.json and pathlib.Path(values.json)
  if out and not out.parent.is_dir():
    raise UserError(f"--json={out}: there is no directory {out.parent}")
  c = parse(cli.config_of(values.config))
  topology.prepare()
  found = [form for form in forms(c) if form.trained or values.compare]
  record = fit(c, topology, found, values.memory_gib, values.search)
  if out:
    workdir_lib.write_json(out, record)
    print(out)
  if not record["fits"]:
    sys.exit(EXIT_TOO_LARGE)


def fit(
  c: Config,
  topology: Topology,
  compared: Sequence[Form],
  memory_gib: float | None = None,
  search: bool = True,
) -> dict:
  """Compiles a config's steps for a topology; prints what they take.

  Args:
    c: the config.
    topology: prepared.
    compared: the forms that the config's run trains, and others.
    memory_gib: of a device; None is what the chip leaves a program.
    search: whether to search the largest batch.

  Returns:
    The record that --json writes: sizes are in bytes on each device.

  Raises:
    UserError: the config does not fit the devices or the data set.
  """
  gib = topology.chip.usable if memory_gib is None else memory_gib
  limit, devices = gib * GIB, topology.devices()
  mesh = make_mesh(c.mesh, devices)
  shape = " x ".join(f"{k}={n}" for k, n in mesh.shape.items() if n > 1)
  print(
    f"{topology.name}: a mesh of {shape or 1}, {_gib(gib)} each; batch"
    f" {c.batch_size:,}; {targets.chosen(c.model)} on"
    f" {targets.chosen(c.data)}, method"
    f" {c.method.name}",
    flush=True,
  )
  rows = []
  for form in compared:
    rows.append(measure(c, form, devices, limit))
    print(f"{form.name}: {rows[-1].seconds:.0f} s", flush=True)
  print(f"\n{table(rows)}\n")
  own = [row for row in rows if row.trained]
  # What the compiler gave up takes most.
  worst = max(own, key=lambda row: (not row.fits, row.needed or math.inf))
  form = next(f for f in compared if f.name == worst.form)
  evaluation = measure_evaluation(c, form, devices, limit)
  largest = None
  if search and gib < math.inf:
    largest = largest_batch(
      lambda n: measure(
        dataclasses.replace(c, batch_size=n), form, devices, limit
      ),
      worst,
      limit,
      unit=batch_devices(mesh),
      most=len(data_lib.outline(**c.data).train),
    )
    _tell_largest(largest, worst.form)
  _tell(c, worst, limit, mesh, largest)
  _tell_evaluation(evaluation, limit)
  print(f"program {worst.program or 'none'} ({worst.form})")
  return {
    "topology": topology.name,
    "devices": topology.size,
    "mesh": dict(mesh.shape),
    "memory": None if math.isinf(limit) else int(limit),
    "batch_size": c.batch_size,
    "config": workdir_lib.plain(dataclasses.asdict(c)),
    "rows": [
      dataclasses.asdict(row)
      | {"memory": row.memory and dataclasses.asdict(row.memory)}
      for row in rows
    ],
    "evaluation": dataclasses.asdict(evaluation),
    "fits": evaluation.fits and all(row.fits for row in own),
    "largest_batch": largest and dataclasses.asdict(largest),
    "jax": jax.__version__,
    "git": provenance.git_commit(),
  }


# ---------------------------------------------------------------------------
# What is told
# ---------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
  """Lays out what the forms take, one a column."""
  lines = [["per device", *(row.form.split(" of ")[0] for row in rows)]]

  def line(name, of) -> None:
    cells = [of(row) for row in rows]
    lines.append([name, *("?" if x is None else x for x in cells)])

  for part in ("params", "optimizer", "other state", "data set", "padding"):
    line(part, lambda row, p=part: _size(row.parts.get(p)))
  line("temporaries", lambda row: _size(row.memory and row.memory.temporaries))
  line("  the batch, of these", lambda row: _size(row.parts["batch"]))
  line(
    "outputs, not in place",
    lambda row: _size(row.memory and row.memory.outputs - row.memory.aliased),
  )
  line("code", lambda row: _size(row.memory and row.memory.code))
  line("peak", lambda row: _size(row.needed))
  line("fits", lambda row: "yes" if row.fits else "NO")
  line("the run trains it", lambda row: "yes" if row.trained else "no")
  line("GFLOP a step", lambda row: _giga(row.flops))
  line("accessed a step", lambda row: _size(row.bytes_accessed))
  for kind in sorted({kind for row in rows for kind in row.collectives}):
    line(f"{kind} a step", lambda row, k=kind: _moved(row, k))
  line("steps a dispatch", lambda row: str(row.steps))
  line("compiled in s", lambda row: f"{row.seconds:.1f}")
  return text_table(lines)


def _moved(row: Row, kind: str) -> str | None:
  if row.memory is None:
    return None
  found = row.collectives.get(kind, {"count": 0, "bytes": 0})
  return f"{found['count']}: {_size(found['bytes'])}"


def _tell_largest(found: Largest, form: str) -> None:
  tried = ", ".join(f"{n:,}: {_size(x)}" for n, x in found.tried.items())
  size = "none" if found.batch_size is None else f"{found.batch_size:,}"
  print(
    f"largest batch that fits ({form}): {size} ({found.why};"
    f" {found.compilations} more compilations; {tried})"
  )


def _tell(
  c: Config, row: Row, limit: float, mesh: Mesh, largest: Largest | None
) -> None:
  """Prints the verdict; where it does not fit, which knobs to turn."""
  if row.fits:
    print(f"fits: {_size(row.needed)} of {_size(limit)} ({row.form})")
    return
  needed = "more" if row.needed is None else _size(row.needed)
  print(
    f"does NOT fit: {row.form} needs {needed}, and a device has {_size(limit)}."
    f"{' ' + row.message if row.message else ''}\nWhat to change:"
  )
  for text in remedies(c, row, mesh, largest):
    print(f"  {text}")


def _tell_evaluation(found: Evaluation, limit: float) -> None:
  needed = "more" if found.needed is None else _size(found.needed)
  what = f"evaluation, {found.batch_size:,} examples at a time ({found.form})"
  if found.fits:
    print(f"{what}: {needed} at the peak, with what training holds")
    return
  print(
    f"{what} does NOT fit: it needs {needed}, and a device has {_size(limit)}."
    " Raise config.mesh.data, fsdp or model: it takes a batch of training, or"
    " 500 examples if that is more, over all devices"
  )


def remedies(
  c: Config, row: Row, mesh: Mesh, largest: Largest | None
) -> list[str]:
  """Names the keys that lower what a program needs, the largest part first."""
  parts, memory = row.parts, row.memory
  held = parts["params"] + parts["optimizer"]
  temporaries = (row.needed or 0) - row.held
  if memory is not None:
    temporaries = memory.temporaries
  batch = "lower it"
  if largest is not None:
    batch = f"{largest.batch_size} fits"
    if largest.batch_size is None:
      batch = "none that was tried fits, so change what follows, too"
  size = f"config.batch_size (now {c.batch_size}): {batch}"
  more = [
    f"config.remat (now {c.remat}): recompute activations instead of keeping"
    " them",
    f"config.accumulate (now {c.accumulate}): take the batch in more parts",
  ]
  fsdp, model = mesh.shape["fsdp"], mesh.shape["model"]
  split = (
    f"config.mesh.fsdp (now {fsdp}) or config.mesh.model (now {model}): raise"
    " it, so that each device holds a part of params and optimizer"
    f" ({_size(held)} of them now)"
  )
  share = "config.rules: lower ranks to start from, e.g. rank=..."
  data = (
    "config.data: fewer examples; the training split lies on every device"
    f" ({_size(parts['data set'])})"
  )
  wide = "--topology: more chips, or chips of more memory"
  knobs = {
    "temporaries": (temporaries, [size, *more]),
    "held": (held, [split] + ([share] if row.form != "dense" else [])),
    "data": (parts["data set"], [data]),
  }
  ordered = sorted(knobs.values(), key=lambda knob: -knob[0])
  return [text for _, texts in ordered for text in texts] + [wide]


def _giga(n: float | None) -> str | None:
  return None if n is None else f"{n / 1e9:,.3f}"


def _gib(x: float) -> str:
  return "unbounded memory" if math.isinf(x) else f"{x:g} GiB"


def _size(n: float | None) -> str | None:
  """Bytes for people."""
  if n is None:
    return None
  if math.isinf(n):
    return "unbounded memory"
  for unit in ("B", "KiB", "MiB", "GiB"):
    if abs(n) < 1024 or unit == "GiB":
      break
    n /= 1024
  return f"{n:.0f} B" if unit == "B" else f"{n:,.2f} {unit}"


if __name__ == "__main__":
  cli.run(main)
