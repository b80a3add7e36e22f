"""Prints the tables of runs: python -m maestro.report RUN [RUN ...]."""

import argparse
import collections
import pathlib
import sys

from maestro.report.figures import figures
from maestro.report.tables import compare, compare_markdown, layer_table, load


def main(argv=None):
  """Print the tables of the runs named on the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m maestro.report",
    description="Print one run's layers, or compare several runs.",
  )
  parser.add_argument(
    "runs", nargs="+", metavar="RUN", help="a run's workdir or its results.json"
  )
  parser.add_argument(
    "--out",
    metavar="DIR",
    type=pathlib.Path,
    help="also draw the figures there (of several runs: in DIR/NAME)",
  )
  parser.add_argument(
    "--markdown", action="store_true", help="print the comparison as Markdown"
  )
  args = parser.parse_args(argv)
  try:
    results = [load(run) for run in args.runs]
    if args.markdown:
      print(compare_markdown(results))
    elif len(results) == 1:
      print(layer_table(results[0]))
    else:
      print(compare(results))
    if args.out:
      for path in _draw_all(args.runs, args.out):
        print(f"wrote {path}")
  except (ValueError, OSError) as error:
    print(f"maestro.report: {error}", file=sys.stderr)
    return 2
  return 0


def _draw_all(runs, out):
  names = collections.Counter()
  for run in runs:
    path = pathlib.Path(run)
    workdir = (path if path.is_dir() else path.parent).resolve()
    names[workdir.name] += 1
    again = names[workdir.name]
    name = workdir.name if again == 1 else f"{workdir.name}-{again}"
    yield from figures(workdir, out=out if len(runs) == 1 else out / name)


if __name__ == "__main__":
  sys.exit(main())
