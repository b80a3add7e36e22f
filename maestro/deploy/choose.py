"""Ranks of a trained run for budgets: losses to measure, rules to apply."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
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
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.training import build, opened
from maestro.training.judge import make_judge

RULES = ("uniform", "threshold", "energy", "greedy", "dp")
# What a search may cost if not told: MACs of the dense network's forward pass.
# About ten minutes on two CPU cores for ResNet-18, whose forty are the least.
_WORK = 4e13
_EVALUATIONS = (40, 1000)  # but at least, and at most
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
# What rules ask
# ---------------------------------------------------------------------------


def _remembered(function: Callable[[Ranks], float]) -> Callable[[Ranks], float]:
  """Calls a function of a profile once for each profile."""
  known = functools.cache(lambda items: function(dict(items)))
  return lambda ranks: known(tuple(sorted(ranks.items())))


@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
  """Answers what rules ask about a run: its costs, losses and latencies.

  Attributes:
    run: from `maestro.training.opened.open_run`.
    dataset: of the run; only losses need it.
    options: see `Options`.
    measure: as `measure_latency`.
    log: called with lines about the progress of what takes long.
  """

  run: opened.Run
  dataset: data_lib.Dataset | None = None
  options: Options = Options()
  measure: Callable[..., float] = measure_latency
  log: Callable[[str], None] | None = None

  @functools.cached_property
  def now(self) -> dict[str, np.ndarray]:
    """{path: current rank}."""
    return budget_lib.current(self.run.layers, self.run.params, self.run.ranks)

  def tree(self, ranks: Ranks) -> dict:
    """The rank tree of a profile."""
    return budget_lib.rank_tree(self.now, ranks)

  def variables(self, ranks: Ranks) -> dict:
    """The network at these ranks, as it would be exported."""
    run = self.run
    small = lowrank.extract(run.params, self.tree(ranks), run.layers)
    norms = {"batch_stats": run.batch_stats} if run.batch_stats else {}
    return {"params": small, **norms}

  def tables(self, kind: str) -> Tables:
    """What each rank of each layer costs."""
    return budget_lib.cost_tables(
      self.run.layers,
      self.run.params,
      self.run.ranks,
      kind,
      multiple_of=self.options.multiple_of,
    )

  @functools.cached_property
  def latency(self) -> Callable[[Ranks], float]:
    """Measures a profile's forward pass, in milliseconds."""

    def latency(ranks: Ranks) -> float:
      found = self.measure(
        self.run.model,
        self.variables(ranks),
        self.run.facts.example,
        batch_size=self.options.latency_batch_size,
        repeats=self.options.latency_repeats,
      )
      if self.log:
        macs = self.tables("macs").total(ranks)
        self.log(f"latency: {found:.4g} ms at {macs:,} MACs")
      return found

    return _remembered(latency)

  def losses(
    self, progress: Callable[[float], None] = lambda share: None
  ) -> tuple[rank_rules.Loss, rank_rules.Loss]:
    """Returns loss(profile) on a batch of training examples; on a quarter.

    Networks are evaluated with all layers merged after the cut: one compilation
    for all profiles, and a whole network at its dense cost instead of twice
    that. Batch norm uses the statistics of the examples at hand (at most 512 at
    a time), which are those of the network that is judged; no augmentation.

    Args:
      progress: told after each evaluation what share of the batch it used.
    """
    if self.dataset is None:
      raise UserError(
        "to measure losses on training examples needs the data set; without it,"
        " use --rule=uniform, threshold or energy"
      )
    run, split = self.run, self.dataset.train
    size = min(self.options.batch, len(split))
    judge = make_judge(
      run.model,
      loss=run.config.loss,
      preprocess=self.dataset.preprocess,
      split=split,
      examples=size,
      seed=self.options.seed,
    )
    params = jax.device_put(run.params)
    norms = {"batch_stats": run.batch_stats} if run.batch_stats else {}

    @jax.jit
    def merge(params, ranks):
      return lowrank.merge(lowrank.mask(params, ranks), run.layers)

    def make(n: int) -> rank_rules.Loss:
      def loss(ranks: Ranks) -> float:
        merged = merge(params, self.tree(ranks))
        found = judge({"params": merged, **norms}, n)
        progress(n / size)
        return found

      return _remembered(loss)

    return make(size), make(max(size // 4, 1))


# ---------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------


def _profiles(
  oracle: Oracle, rule: str, tables: Tables, limits: Sequence[int]
) -> list[Ranks]:
  """Applies a rule to several limits of one kind of cost."""
  run, options = oracle.run, oracle.options
  if rule in ("uniform", "threshold", "energy"):
    if rule == "uniform":
      levels = rank_rules.uniform_levels(tables)
    else:
      make = getattr(rank_rules, f"{rule}_levels")
      levels = make(tables, run.params, oracle.tree(tables.whole))
    return [rank_rules.by_level(tables, levels, limit) for limit in limits]
  layers, evaluations = len(tables.costs), options.evaluations
  if evaluations is None:
    macs = budget_lib.dense_cost(run.layers, run.params).macs
    evaluations = int(_WORK / (max(macs, 1) * options.batch))
    evaluations = min(max(evaluations, _EVALUATIONS[0]), _EVALUATIONS[1])
  loss, quarter = oracle.losses(_progress(evaluations, oracle.log))
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
  oracle: Oracle, rule: str, budgets: Sequence[Budget | str]
) -> list[tuple[Budget, Ranks]]:
  """Returns each budget with its profile."""
  if oracle.run.levels:
    raise UserError(
      f"{oracle.run.workdir} is a nested run: profiles off its chain lose tens"
      " of points. results.json has its levels, and maestro.export serves them"
    )
  if rule not in RULES:
    raise UserError(f"--rule={rule}: unknown; use one of {', '.join(RULES)}")
  wanted = [Budget.parse(b) if isinstance(b, str) else b for b in budgets]
  kinds = {kind: [b for b in wanted if b.kind == kind] for kind in COSTS}
  tables = {kind: oracle.tables(kind) for kind in COSTS if kinds[kind]}
  # Bad budgets show before a search begins.
  limits = {k: [t.limit(b) for b in kinds[k]] for k, t in tables.items()}
  found: dict[Budget, Ranks] = {}
  for kind, table in tables.items():
    chosen = _profiles(oracle, rule, table, limits[kind])
    found |= zip(kinds[kind], chosen, strict=True)
  if slow := [b for b in wanted if b.kind == LATENCY]:
    table = oracle.tables("macs")
    high, low = table.total(table.whole), table.total(table.smallest)
    steps = np.linspace(high, low, _CHAIN).astype(int).tolist()
    chain = _profiles(oracle, rule, table, steps)
    found |= {b: _meet_latency(chain, b, oracle.latency) for b in slow}
  return [(b, found[b]) for b in wanted]


def choose_ranks(
  run: opened.Run, budget: Budget | str, *, rule: str = "greedy", **options: Any
) -> dict:
  """Chooses the ranks of a run for a budget: a rank tree.

  Args:
    run: from `maestro.training.opened.open_run`.
    budget: see `Budget`.
    rule: of `RULES`.
    **options: dataset (only greedy and dp need it), measure and log of
      `Oracle`; fields of `Options`.

  Raises:
    UserError: the budget cannot be met or an option does not fit.
  """
  (tree,) = choose_profiles(run, [budget], rule=rule, **options)
  return tree


def choose_profiles(
  run: opened.Run,
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
  oracle = Oracle(run, dataset, Options(**options), measure, log)
  return [oracle.tree(ranks) for _, ranks in _choose(oracle, rule, budgets)]


def allocate(
  run: opened.Run,
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
    run: from `maestro.training.opened.open_run`.
    budgets: see `Budget`.
    dataset: of the run.
    rule: of `RULES`.
    measure: as `measure_latency`, for latency budgets.
    log: called with lines about the progress.
    **options: see `Options`.

  Raises:
    UserError: a budget cannot be met or an option does not fit.
  """
  oracle = Oracle(run, dataset, Options(**options), measure, log)
  chosen = _choose(oracle, rule, budgets)
  mesh = make_mesh(MeshShape(data=1))
  evaluate = build.make_evaluator(run.config, run.model, dataset, mesh)
  recalibrate = build.make_recalibrator(run.config, run.model, dataset, mesh)
  dense = budget_lib.dense_cost(run.layers, run.params)
  whole = {path: int(np.max(r, initial=0)) for path, r in oracle.now.items()}
  rows = []
  for b, ranks in [(None, whole), *chosen]:
    variables = oracle.variables(ranks)
    cost = count_cost(run.layers, variables["params"])
    tree = trees.flatten_ranks(oracle.tree(ranks))
    row: dict[str, Any] = {
      "budget": None if b is None else str(b),
      "ranks": {path: np.asarray(rank).tolist() for path, rank in tree.items()},
      "cost": {kind: getattr(cost, kind) for kind in COSTS},
      "fraction": {
        kind: getattr(cost, kind) / getattr(dense, kind) for kind in COSTS
      },
    }
    if b is not None and b.kind == LATENCY:
      row["latency_ms"] = oracle.latency(ranks)
    row |= evaluate(recalibrate(variables), dataset.val)
    rows.append(row)
    if log:
      name = "the whole checkpoint" if b is None else str(b)
      log(f"{name}: {row['cost']['macs']:,} MACs, loss {row['loss']:.4f}")
  return rows
