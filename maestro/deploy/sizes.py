"""Which sizes an export holds: a run's own, or what a command line asks for."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maestro import data as data_lib
from maestro import trees
from maestro.cost import budget as budget_lib
from maestro.cost import profiles as profiles_lib
from maestro.deploy import choose as allocate
from maestro.deploy import levels
from maestro.errors import UserError
from maestro.training import opened


class ExportError(UserError):
  """A network cannot be exported, or is not equal to what it was cut from."""


@dataclasses.dataclass(frozen=True)
class Size:
  """A network to cut out of a run.

  Attributes:
    name: by which it is loaded.
    ranks: rank tree.
    budget: that the ranks were chosen for, None if there was none.
    batch_stats: its own, of a level that was trained; None: to be computed.
  """

  name: str
  ranks: Any
  budget: str | None = None
  batch_stats: Any = None


def own_sizes(run: opened.Run) -> tuple[Size, ...]:
  """The levels of a nested run, or the ranks of another."""
  found = levels.trained(run)
  if not found:
    return (Size("own", run.ranks),)
  return tuple(_level(b, tree, stats) for b, tree, stats in found)


def _level(budget: budget_lib.Budget, tree: Any, stats: Any) -> Size:
  return Size(str(budget).removeprefix("macs:"), tree, str(budget), stats)


def choose_sizes(
  run: opened.Run,
  *,
  budget: str | None = None,
  ranks: str | None = None,
  profiles: Sequence[str] = (),
  rule: str | None = None,
  dataset: data_lib.Dataset | None = None,
  log: Callable[[str], None] | None = None,
) -> tuple[Size, ...]:
  """Turns what a command line asks for into sizes; () is the run's own ranks.

  Args:
    run: from `maestro.training.opened.open_run`.
    budget: "kind:value", see `maestro.cost.budget`.
    ranks: path of a profile file, {"ranks": {layer path: rank}}.
    profiles: fractions of the dense network's MACs.
    rule: of `maestro.allocate`; None is greedy, and dp for profiles.
    dataset: of the run, for the rules that measure.
    log: called with lines about the progress of a long search.

  Raises:
    UserError: more than one is given, or one does not fit the run.
  """
  if sum(map(bool, (budget, ranks, profiles))) > 1:
    raise ExportError("give one of --budget, --ranks and --profiles")
  if ranks:
    profile = profiles_lib.read_profile(ranks)
    tree = profiles_lib.parse_profile(
      profile, run.layers, run.params, run.ranks
    )
    if log and levels.off_chain(run, tree):
      log(f"{ranks}: {levels.warning(run, tree, dataset)}")
    return (Size(pathlib.Path(ranks).stem, tree),)
  if not (budget or profiles):
    return ()
  wanted = [budget_lib.Budget.parse(budget)] if budget else []
  wanted += {budget_lib.Budget.parse(f"macs:{text}") for text in profiles}
  wanted.sort(key=lambda b: -b.value)
  if run.levels:
    if rule is not None:
      raise ExportError(
        f"--rule={rule}: a nested network has the ranks of its levels; leave it"
        " out"
      )
    pairs = levels.choose(run, wanted, log)
    return tuple(
      _level(b, *found) for b, found in zip(wanted, pairs, strict=True)
    )
  found = allocate.choose_profiles(  # nested
    run,
    wanted,
    rule=rule or ("greedy" if budget else "dp"),
    dataset=dataset,
    log=log,
  )
  sizes = []
  for b, tree in zip(wanted, found, strict=True):
    if not any(map(np.any, trees.flatten_ranks(tree).values())):
      kind = "macs" if b.kind == budget_lib.LATENCY else b.kind
      table = budget_lib.cost_tables(run.layers, run.params, run.ranks, kind)
      raise ExportError(
        f"budget {b}: rank 0 in every layer leaves a network of biases; with a"
        f" component in each, it is {kind}:{table.least_useful:.4f}"
      )
    sizes.append(Size(str(b).removeprefix("macs:"), tree, str(b)))
  return tuple(sizes)
