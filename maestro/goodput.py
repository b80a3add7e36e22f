"""Tells where a run's wall clock went: python -m maestro.goodput --workdir=DIR.

A row for each attempt, that is each start of the run's command, with the steps
that a later attempt had to make again, and the share of training steps in all.
Reads the workdir's goodput.json and needs no accelerator.

  python -m maestro.goodput --workdir=runs/resnet
  python -m maestro.goodput --workdir=runs/resnet --json
  python -m maestro.goodput --workdir=runs/try --grace

--grace prints the seconds that a scheduler should leave between SIGTERM and
SIGKILL (sbatch --signal=TERM@SECONDS), from the save and the dispatch that took
longest in the workdir: a short run of the same config on the same machines
tells it for a long one.
"""

import json
from collections.abc import Sequence

from absl import flags

import maestro.main  # noqa: F401  (which defines --workdir)
from maestro import cli
from maestro.errors import UserError
from maestro.report.tables import text_table
from maestro.runs import goodput


def define_flags() -> None:
  """Defines the flags of this command."""
  flags.declare_key_flag("workdir")
  flags.DEFINE_bool("json", False, "Print the sums as JSON.")
  flags.DEFINE_bool(
    "grace", False, "Print the seconds from SIGTERM to SIGKILL alone."
  )


def main(argv: list[str]) -> None:
  """Prints what goodput.json says."""
  values = flags.FLAGS
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  if not values.workdir:
    raise UserError("--workdir=DIR is missing; name that of a run")
  attempts = goodput.read(values.workdir)
  total = goodput.summary(attempts)
  if values.grace:
    if total["grace_seconds"] is None:
      raise UserError(f"{values.workdir} has not saved yet; let it do so once")
    print(total["grace_seconds"])
  elif values.json:
    print(json.dumps(total, indent=1))
  else:
    print(f"{table(attempts)}\n\n{goodput.line(attempts)}")


def table(attempts: Sequence[goodput.Attempt]) -> str:
  """Tabulates attempts: their steps, and seconds by section."""
  head = ["began (UTC)", "ended", "steps", "made again", "seconds"]
  rows = [[*head, *goodput.SECTIONS]]
  for a, (steps, _) in zip(attempts, goodput.lost(attempts), strict=True):
    rows.append(
      [
        a.began.partition("+")[0],
        a.ended or "killed",
        f"{a.from_step} to {a.step}",
        str(steps),
        f"{a.wall_seconds:.1f}",
        *(f"{a.seconds.get(name, 0.0):.1f}" for name in goodput.SECTIONS),
      ]
    )
  return text_table(rows)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
