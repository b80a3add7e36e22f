"""Prints one run's layers, or compares several runs.

  python -m maestro.report runs/lenet_od
  python -m maestro.report runs/lenet_od runs/lenet_dense --markdown
  python -m maestro.report runs/lenet_od --out=figures

A run is its workdir or its results.json; runs that differ by seed alone are one
row. --out also draws the figures there (of several runs: in OUT/NAME).
"""

import collections
import pathlib
from collections.abc import Iterator, Sequence

from absl import flags

from maestro import cli
from maestro.errors import UserError
from maestro.report.figures import figures
from maestro.report.tables import compare, compare_markdown, layer_table, load


def _define_flags() -> None:
  flags.DEFINE_string("out", None, "Also draws the figures in this directory.")
  flags.DEFINE_bool("markdown", False, "Prints the comparison as Markdown.")


def main(argv: list[str]) -> None:
  """Reports on the runs named on the command line."""
  report(argv[1:], markdown=flags.FLAGS.markdown, out=flags.FLAGS.out)


def report(
  runs: Sequence[str], *, markdown: bool = False, out: str | None = None
) -> None:
  """Prints the table of a run, or of several; draws them in `out`.

  Raises:
    UserError: none is named, or one is missing or damaged.
  """
  if not runs:
    raise UserError("no run is named: python -m maestro.report RUN [RUN ...]")
  results = [load(run) for run in runs]
  if markdown:
    print(compare_markdown(results))
  elif len(results) == 1:
    print(layer_table(results[0]))
  else:
    print(compare(results))
  if out:
    for path in _draw_all(runs, pathlib.Path(out)):
      print(f"wrote {path}")


def _draw_all(runs: Sequence[str], out: pathlib.Path) -> Iterator[pathlib.Path]:
  names = collections.Counter()
  for run in runs:
    path = pathlib.Path(run)
    workdir = (path if path.is_dir() else path.parent).resolve()
    names[workdir.name] += 1
    again = names[workdir.name]
    name = workdir.name if again == 1 else f"{workdir.name}-{again}"
    yield from figures(workdir, out=out if len(runs) == 1 else out / name)


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
