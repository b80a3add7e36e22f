"""A nested network in the loop: how its chain begins and is evaluated."""

from typing import Any

import jax

from maestro import lowrank
from maestro.methods.nested import Nested, options_of
from maestro.training import levels, optim
from maestro.training.build import Training
from maestro.training.opened import Run
from maestro.training.results import Ledger
from maestro.training.state import TrainState, form_of, plain_ranks


def enter(
  t: Training, nested: Nested, state: TrainState, ledger: Ledger
) -> TrainState:
  """Returns factors in fisher order, and the levels of a nested network."""
  params = t.placement.whole(state.params)
  params, profiles = nested.start(params, state.batch_stats)
  _, tx = t.optimizer(ledger.discover_steps)
  made = levels.stacked(profiles, state.batch_stats, t.layers)
  ranks = jax.tree.map(lambda x: x[0], made["ranks"])
  params = lowrank.truncate(params, jax.device_get(ranks))
  ledger.macs += 3 * nested.options.examples * t.dense.macs
  ledger.ranks = plain_ranks(ranks)
  state = state.replace(
    params=params,
    ranks=ranks,
    opt_state=optim.restart(tx, params, state.step),
    levels=made,
  )
  return t.placement.put(state, params)


def evaluate(
  t: Training, state: TrainState, ledger: Ledger
) -> dict[str, float]:
  """Validation metrics of all levels but the largest, by one program."""
  record = {}
  if not state.levels or t.method.nested is None:
    return {}
  names = t.method.nested.options.names
  for name, (ranks, stats) in zip(
    names[1:], levels.split(state.levels)[1:], strict=True
  ):
    ledger.compiles(f"evaluate levels, {form_of(state.params)}")
    variables = levels.variables(state.params, ranks, stats)
    variables = t.placement.put(variables, state.params)
    values = t.evaluate(variables, t.dataset.val)
    record |= {f"val/{key}@{name}": value for key, value in values.items()}
  return record


def rows(
  t: Training, state: TrainState, ledger: Ledger
) -> list[dict[str, Any]]:
  """Every level's network, cut out and merged, evaluated on val and test."""

  def score(variables):
    ledger.compiles(f"evaluate, {form_of(variables['params'])}")
    variables = t.placement.put(variables, variables["params"])
    return {
      "val": t.score(variables, t.dataset.val),
      "test": t.score(variables, t.dataset.test),
    }

  if t.method.nested is None:
    return []
  names = t.method.nested.options.names
  return levels.rows_of(state.params, state.levels, names, t.layers, score)


def names_of(run: Run) -> tuple[str, ...]:
  """Names of the levels that a run has trained, the largest first."""
  if not run.levels:
    return ()
  return options_of(run.config.method.nested or {}).names
