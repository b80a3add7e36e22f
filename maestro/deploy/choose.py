"""Ranks of a trained run for budgets: losses to measure, rules to apply."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np

from maestro import data as data_lib
from maestro import lowrank, trees
from maestro.cost import allocation as rank_rules
from maestro.cost import budget as budget_lib
from maestro.cost.budget import (
  COSTS,
  LATENCY,
  Budget,
  BudgetError,
  Ranks,
  Tables,
)
from maestro.cost.count import count_cost
from maestro.cost.latency import measure_latency
from maestro.errors import UserError
from maestro.parallel.mesh import make_mesh
from maestro.report import style
from maestro.report import tables as report
from maestro.training import build
from maestro.training import losses as losses_lib

RULES = ("uniform", "threshold", "energy", "greedy", "dp")
_MEASURING = ("greedy", "dp")
# What a search may cost if not told: MACs of the dense network's forward pass.
# About ten minutes on two CPU cores for ResNet-18, whose forty are the least.
_WORK = 4e13
_EVALUATIONS = (40, 1000)  # but at least, and at most
_CHUNK = 512  # examples of one forward pass
_CHAIN = 25  # profiles among which a latency budget chooses


@dataclasses.dataclass(frozen=True)
class Options:
  """How ranks are chosen.

  Attributes:
    batch: training examples, at most, on which greedy and dp measure losses.
    evaluations: passes of that batch that a search may cost, roughly; None is
      as many as fit 4e13 dense MACs, between 40 and 1000.
    multiple_of: ranks are multiples of it, or those of whole layers.
    seed: of the choice of the batch.
    latency_batch_size: examples of a forward pass for latency_ms.
    latency_repeats: passes of which the median is taken.
  """

  batch: int = 2048
  evaluations: int | None = None
  multiple_of: int = 1
  seed: int = 0
  latency_batch_size: int = 1
  latency_repeats: int = 30

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      least = 0 if name == "seed" else 1
      if value is not None and value < least:
        raise UserError(f"--{name}={value} is below {least}")


# ---------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------


def make_losses(
  run: build.Run,
  dataset: data_lib.Dataset,
  options: Options,
  progress: Callable[[float], None] = lambda share: None,
) -> tuple[rank_rules.Loss, rank_rules.Loss]:
  """Returns loss(profile) on a batch of training examples, and on a quarter.

  Networks are evaluated with all layers merged after the cut: one compilation
  for all profiles, and a whole network at its dense cost instead of twice that.
  Batch norm uses the statistics of the examples at hand (at most 512 at a
  time), which are those of the network that is judged; no augmentation.

  Args:
    run: a trained network.
    dataset: of the run.
    options: batch and seed are read.
    progress: told after each evaluation what share of the batch it used.
  """
  split = dataset.train
  size = min(options.batch, len(split))
  now = budget_lib.current(run.layers, run.params, run.ranks)
  chosen = data_lib.choice(options.seed, len(split))[:size]
  inputs, targets = split.inputs[chosen], split.targets[chosen]
  function = losses_lib.LOSSES[run.config.loss]
  params = jax.device_put(run.params)

  @jax.jit
  def merge(params, ranks):
    return lowrank.merge(lowrank.mask(params, ranks), run.layers)

  @jax.jit
  def total(params, x, y):
    x, variables = dataset.preprocess(x), {"params": params}
    if not run.batch_stats:
      return jnp.sum(function(run.model.apply(variables, x, train=False), y))
    outputs, _ = run.model.apply(
      variables | {"batch_stats": run.batch_stats},
      x,
      train=True,
      rngs={"dropout": jax.random.key(0)},  # the same for all networks
      mutable=["batch_stats"],
    )
    return jnp.sum(function(outputs, y))

  def make(n: int) -> rank_rules.Loss:
    known: dict[tuple[int, ...], float] = {}

    def loss(ranks: Ranks) -> float:
      key = tuple(ranks.values())
      if key not in known:
        merged = merge(params, budget_lib.rank_tree(now, ranks))
        # Of equal size, or the statistics of a last, small one would be poor.
        chunks = np.array_split(np.arange(n), -(-n // _CHUNK))
        sums = [total(merged, inputs[i], targets[i]) for i in chunks]
        known[key] = float(sum(sums)) / n
        progress(n / size)
      return known[key]

    # The order of a profile's layers is the key of what is known.
    return lambda ranks: loss({path: ranks[path] for path in now})

  return make(size), make(max(size // 4, 1))


# ---------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------


def _profiles(
  run: build.Run,
  tables: Tables,
  limits: Sequence[int],
  rule: str,
  dataset: data_lib.Dataset | None,
  options: Options,
  log: Callable[[str], None] | None,
) -> list[Ranks]:
  """Applies a rule to several limits of one kind of cost."""
  ranks = budget_lib.rank_tree(
    budget_lib.current(run.layers, run.params, run.ranks), tables.whole
  )
  if rule not in _MEASURING:
    levels = {
      "uniform": lambda: rank_rules.uniform_levels(tables),
      "threshold": lambda: rank_rules.threshold_levels(
        tables, run.params, ranks
      ),
      "energy": lambda: rank_rules.energy_levels(tables, run.params, ranks),
    }[rule]()
    return [rank_rules.by_level(tables, levels, limit) for limit in limits]
  if dataset is None:
    raise UserError(
      f"--rule={rule} measures losses on training examples: it needs the data"
      " set; without it, use uniform, threshold or energy"
    )
  layers, evaluations = len(tables.costs), options.evaluations
  if evaluations is None:
    macs = budget_lib.dense_cost(run.layers, run.params).macs
    evaluations = int(_WORK / (max(macs, 1) * options.batch))
    evaluations = min(max(evaluations, _EVALUATIONS[0]), _EVALUATIONS[1])
  loss, quarter = make_losses(
    run, dataset, options, _progress(evaluations, log)
  )
  # Enough ranks of each layer are worth more than enough examples.
  if rule == "greedy":
    half = evaluations // 2
    grid = half // layers
    screen = loss if grid >= 4 else quarter
    grid = max(grid if screen is loss else 4 * half // layers, 2)
    return rank_rules.greedy(
      tables, limits, loss, grid=grid, refresh=half, screen=screen
    )
  grid = evaluations // (layers * len(set(limits)))
  again = grid >= 4
  grid = grid if again else evaluations // layers
  screen = loss if grid >= 4 else quarter
  grid = max(grid if screen is loss else 4 * evaluations // layers, 2)
  return rank_rules.dp(tables, limits, screen, grid=grid, again=again)


def _progress(
  evaluations: int, log: Callable[[str], None] | None
) -> Callable[[float], None]:
  """Returns a function that logs how far a search is, every ten seconds."""
  start = said = time.monotonic()
  done = 0.0

  def progress(share: float) -> None:
    nonlocal done, said
    done, now = done + share, time.monotonic()
    if log and now - said >= 10:
      left = (now - start) / done * max(evaluations - done, 0)
      log(
        f"search: {done:.0f} of at most {evaluations} passes of the batch,"
        f" {now - start:.0f} s, at most {left:.0f} s left"
      )
      said = now

  return progress


def _meet_latency(
  chain: Sequence[Ranks], budget: Budget, measure: Callable[[Ranks], float]
) -> Ranks:
  """Returns the largest profile of a chain found to meet a latency budget.

  Bisects, from the whole network (first) to the smallest (last); what is
  returned has been measured at or below the budget.
  """
  low, high = -1, len(chain) - 1  # high meets the budget, low does not
  if measure(chain[high]) > budget.value:
    raise BudgetError(
      f"budget {budget} cannot be reached: the smallest network measured takes"
      f" {measure(chain[high]):.4g} ms on this device"
    )
  while high - low > 1:
    middle = (low + high) // 2
    if measure(chain[middle]) <= budget.value:
      high = middle
    else:
      low = middle
  return chain[high]


def _choose(
  run: build.Run,
  budgets: Sequence[Budget],
  rule: str,
  dataset: data_lib.Dataset | None,
  options: Options,
  measure: Callable[..., float],
  log: Callable[[str], None] | None,
) -> list[tuple[Ranks, float | None]]:
  """Returns (profile, measured latency) for each budget."""
  if rule not in RULES:
    raise UserError(f"--rule={rule}: unknown; use one of {', '.join(RULES)}")
  now = budget_lib.current(run.layers, run.params, run.ranks)

  def tabulate(kind: str) -> Tables:
    return budget_lib.cost_tables(
      run.layers, run.params, run.ranks, kind, multiple_of=options.multiple_of
    )

  found: dict[Budget, tuple[Ranks, float | None]] = {}
  kinds = {kind: [b for b in budgets if b.kind == kind] for kind in COSTS}
  tables = {kind: tabulate(kind) for kind in COSTS if kinds[kind]}
  # Bad budgets show before a search begins.
  limits = {k: [t.limit(b) for b in kinds[k]] for k, t in tables.items()}
  for kind, table in tables.items():
    chosen = _profiles(run, table, limits[kind], rule, dataset, options, log)
    found |= {b: (r, None) for b, r in zip(kinds[kind], chosen, strict=True)}
  if slow := [b for b in budgets if b.kind == LATENCY]:
    table = tabulate("macs")
    high, low = table.total(table.whole), table.total(table.smallest)
    steps = np.linspace(high, low, _CHAIN).astype(int).tolist()
    chain = _profiles(run, table, steps, rule, dataset, options, log)
    known: dict[tuple[int, ...], float] = {}

    def latency(ranks: Ranks) -> float:
      key = tuple(ranks[path] for path in now)
      if key not in known:
        tree = budget_lib.rank_tree(now, ranks)
        small = lowrank.extract(run.params, tree, run.layers)
        variables = {"params": small}
        if run.batch_stats:
          variables["batch_stats"] = run.batch_stats
        known[key] = measure(
          run.model,
          variables,
          run.facts.example,
          batch_size=options.latency_batch_size,
          repeats=options.latency_repeats,
        )
        if log:
          log(f"latency: {known[key]:.4g} ms at {table.total(ranks):,} MACs")
      return known[key]

    for b in slow:
      ranks = _meet_latency(chain, b, latency)
      found[b] = ranks, latency(ranks)
  return [found[b] for b in budgets]


def choose_ranks(
  run: build.Run,
  budget: Budget | str,
  *,
  rule: str = "greedy",
  dataset: data_lib.Dataset | None = None,
  measure: Callable[..., float] = measure_latency,
  log: Callable[[str], None] | None = None,
  **options: Any,
) -> dict:
  """Chooses the ranks of a run for a budget: a rank tree.

  Args:
    run: from `maestro.training.build.open_run`.
    budget: see `Budget`.
    rule: of `RULES`.
    dataset: of the run; only greedy and dp need it.
    measure: as `measure_latency`, for a latency budget.
    log: called with lines about the progress of a long search.
    **options: see `Options`.

  Raises:
    UserError: the budget cannot be met or an option does not fit.
  """
  (tree,) = choose_profiles(
    run,
    [budget],
    rule=rule,
    dataset=dataset,
    measure=measure,
    log=log,
    **options,
  )
  return tree


def choose_profiles(
  run: build.Run,
  budgets: Sequence[Budget | str],
  *,
  rule: str = "dp",
  dataset: data_lib.Dataset | None = None,
  measure: Callable[..., float] = measure_latency,
  log: Callable[[str], None] | None = None,
  **options: Any,
) -> list[dict]:
  """Chooses ranks for several budgets at once, as `choose_ranks` does.

  Budgets of one kind give nested profiles, by every rule; chosen one by one,
  those of greedy and dp need not be.
  """
  parsed = [Budget.parse(b) if isinstance(b, str) else b for b in budgets]
  settings = Options(**options)
  chosen = _choose(run, parsed, rule, dataset, settings, measure, log)
  now = budget_lib.current(run.layers, run.params, run.ranks)
  return [budget_lib.rank_tree(now, ranks) for ranks, _ in chosen]


def allocate(
  run: build.Run,
  budgets: Sequence[Budget | str],
  dataset: data_lib.Dataset,
  *,
  rule: str = "greedy",
  measure: Callable[..., float] = measure_latency,
  log: Callable[[str], None] | None = None,
  **options: Any,
) -> list[dict]:
  """Chooses ranks for each budget and evaluates the networks: rows of a table.

    {"budget": "macs:0.5", "ranks": {path: rank}, "latency_ms": ...,
     "cost": {"params": ..., "macs": ..., "bytes": ...}, "fraction": {...},
     "loss": ..., "accuracy": ...}

  loss and accuracy are of the validation split, after batch-norm statistics
  were recomputed for each network; latency_ms is there for such a budget. The
  first row, budget None, is the whole checkpoint. Greedy's and dp's profiles
  are nested among budgets of one kind.

  Args:
    run: from `maestro.training.build.open_run`.
    budgets: see `Budget`.
    dataset: of the run.
    rule: of `RULES`.
    measure: as `measure_latency`, for latency budgets.
    log: called with lines about the progress.
    **options: see `Options`.

  Raises:
    UserError: a budget cannot be met or an option does not fit.
  """
  parsed = [Budget.parse(b) if isinstance(b, str) else b for b in budgets]
  settings = Options(**options)
  chosen = _choose(run, parsed, rule, dataset, settings, measure, log)
  mesh = make_mesh(1)
  evaluate = build.make_evaluator(run.config, run.model, dataset, mesh)
  recalibrate = build.make_recalibrator(run.config, run.model, dataset, mesh)
  now = budget_lib.current(run.layers, run.params, run.ranks)
  dense = budget_lib.dense_cost(run.layers, run.params)
  whole = {path: int(np.max(rank, initial=0)) for path, rank in now.items()}
  rows = []
  for b, (ranks, latency) in zip(
    [None, *parsed], [(whole, None), *chosen], strict=True
  ):
    tree = budget_lib.rank_tree(now, ranks)
    small = lowrank.extract(run.params, tree, run.layers)
    variables = {"params": small}
    if run.batch_stats:
      variables["batch_stats"] = run.batch_stats
    cost = count_cost(run.layers, small)
    row: dict[str, Any] = {
      "budget": None if b is None else str(b),
      "ranks": {
        path: np.asarray(rank).tolist()
        for path, rank in trees.flatten_ranks(tree).items()
      },
      "cost": {kind: getattr(cost, kind) for kind in COSTS},
      "fraction": {
        kind: getattr(cost, kind) / getattr(dense, kind) for kind in COSTS
      },
    }
    if latency is not None:
      row["latency_ms"] = latency
    row |= evaluate(recalibrate(variables), dataset.val)
    rows.append(row)
    if log:
      name = "the whole checkpoint" if b is None else str(b)
      log(f"{name}: {row['cost']['macs']:,} MACs, loss {row['loss']:.4f}")
  return rows


# ---------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Lays rows of `allocate` out as text."""
  scores = [s for s in ("accuracy", "loss") if s in rows[0]]
  timed = any("latency_ms" in row for row in rows)
  head = ["budget", "params", "% of dense", "MACs", "% of dense"]
  head += ["ms"] * timed + [f"val {s}{' %' * (s != 'loss')}" for s in scores]
  cells = [head]
  for row in rows:
    line = [row["budget"] or "(whole)"]
    for kind in ("params", "macs"):
      line += [f"{row['cost'][kind]:,}", f"{100 * row['fraction'][kind]:.1f}"]
    if timed:
      line.append(f"{row['latency_ms']:.4g}" if "latency_ms" in row else "")
    line += [
      f"{row[s]:.4f}" if s == "loss" else f"{100 * row[s]:.2f}" for s in scores
    ]
    cells.append(line)
  return "\n".join(report.align(cells, left=(0,)))


def draw(record: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws validation loss against cost, one line for each kind of cost."""
  rows = record["rows"]
  whole, cut = rows[0], rows[1:]
  kinds = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}
  shown = [k for k in kinds if any(r["budget"].startswith(k) for r in cut)]
  shown = shown or ["macs"]
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(0.6 + 5.4 * len(shown), 3.8), layout="constrained"
    )
    figure.suptitle(
      f"{record['run']}, {record['checkpoint']}, {record['rule']}", fontsize=9
    )
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, shown, strict=True):
      own = [
        row
        for row in cut
        if row["budget"].startswith((kind, LATENCY) if kind == "macs" else kind)
      ]
      points = sorted(
        (100 * r["fraction"][kind], r["loss"]) for r in [whole, *own]
      )
      axes.plot(*zip(*points, strict=True), color=style.COLOURS[0])
      names: dict[tuple[float, float], list[str]] = {}
      for row in [whole, *own]:
        point = 100 * row["fraction"][kind], row["loss"]
        name = (row["budget"] or "whole").removeprefix(f"{kind}:")
        names.setdefault(point, []).append(name)
      for row in [*own, whole]:
        point = 100 * row["fraction"][kind], row["loss"]
        colour = style.COLOURS[0 if row["budget"] else 1]
        axes.plot(*point, "o", color=colour)
        if point not in names:  # equal networks share a label
          continue
        name = ", ".join(names.pop(point))
        if "accuracy" in row:
          name += f": {100 * row['accuracy']:.2f} %"
        below = name.startswith("whole")  # at the right end, so to the left
        axes.annotate(
          name,
          point,
          (5, -13 if below else 5),
          textcoords="offset points",
          ha="right" if below else "left",
          fontsize=7,
        )
      axes.set(xlabel=f"{kinds[kind]} (% of dense)", xlim=(0, 110))
      axes.margins(y=0.15)
    panels[0].set_ylabel("validation loss")
    figure.savefig(path)
