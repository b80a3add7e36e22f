"""The training loop: discover ranks, settle at them, report what was kept.

`train(config, workdir)` reads from top to bottom: set up; resume or start; for
each round, enter its phase, run its steps, do what is due; finish. What is
decomposed, sampled, penalised and shrunk, and when, is `maestro.methods`; what
a config describes is built by `maestro.training.build`.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from maestro import data as data_lib
from maestro import introspect as nn
from maestro import lowrank
from maestro.cost.count import count_cost
from maestro.errors import Interrupted
from maestro.parallel import processes
from maestro.parallel.mesh import MeshShape, fits, make_mesh, replicate
from maestro.report import figures
from maestro.report.tables import layer_table, level_table
from maestro.runs import checkpoint, goodput, metrics, stop
from maestro.runs import workdir as workdir_lib
from maestro.runs.profile import Trace
from maestro.training import (
  agreement,
  build,
  chain,
  control,
  levels,
  opened,
  optim,
  race,
)
from maestro.training.build import Training
from maestro.training.config import Config, Truncate, parse
from maestro.training.durations import every
from maestro.training.results import (
  Ledger,
  alarms_of,
  rank_record,
  rank_text,
  results_of,
  write_spectra,
)
from maestro.training.rounds import check_finite, end_of_round, run_round
from maestro.training.state import (
  TrainState,
  added,
  at_ranks,
  averaged,
  begin_average,
  form_of,
  means,
  plain_ranks,
  reset_metrics,
  restore,
  shrink_state,
  truncate_state,
  variables_of,
)


def train(
  config: Mapping[str, Any],
  workdir: str | os.PathLike,
  profile: int | None = None,
) -> dict:
  """Runs, or resumes, the training that a config describes.

  Args:
    config: nested mapping, see `maestro.training.config.Config`.
    workdir: directory of the run. If it holds a checkpoint of the same config,
      the run resumes from it; a finished run is reported and left as it is.
    profile: steps to trace into the workdir's profile/; None is none.

  Returns:
    The content of `results.json`.

  Raises:
    UserError: bad config, data, checkpoint or workdir, or a loss that is not
      finite. Nothing that was saved before is lost.
    Interrupted: SIGTERM came and the state was saved.
  """
  started = time.monotonic()
  c, workdir = parse(config), pathlib.Path(workdir)
  build.check(c)  # before data is read
  agreement.configs(config)
  finished = workdir_lib.finished_results(workdir, config)
  agreement.finished(workdir, finished)
  if finished is not None:
    return _finished(workdir, finished)
  t = build.make_training(c)
  agreement.data(t.dataset)
  opened.check_data(workdir, t.facts)
  with workdir_lib.locked(workdir), goodput.recording(workdir, started):
    workdir_lib.claim(workdir, config, dataclasses.asdict(t.facts))
    agreement.workdir(workdir)
    state, ledger = _train(t, c, workdir, started, profile)
    return _finish(t, state, ledger, config, workdir, started)


def _train(
  t: Training,
  c: Config,
  workdir: pathlib.Path,
  started: float,
  profile: int | None,
) -> tuple[TrainState, Ledger]:
  """Makes the steps that are left; returns the state after the last one."""
  with (
    checkpoint.Checkpoints(
      workdir / "checkpoints", keep=c.checkpoint.keep
    ) as checkpoints,
    stop.polling() as asked,
    Trace(workdir / "profile", profile) as trace,
    contextlib.closing(t.feed()) as feed,
  ):
    t = dataclasses.replace(t, program=trace.of(t.program))
    stop_asked = processes.stop_agreed(asked)

    # --- Resume from the newest checkpoint, or start --------------------------
    state, ledger = _resume(t, checkpoints) or _start(t, workdir)
    started -= ledger.wall_seconds
    if ranks := state.ranks:
      nn.check_ranks(t.model, variables_of(state), ranks, t.facts.example)
    state = t.placement.put(state, state.params)
    step = int(state.step)
    goodput.resumed(step)

    with metrics.writer(
      workdir, total_steps=t.clock.total, resume_step=step
    ) as writer:
      shared = {"writer": writer, "checkpoints": checkpoints}
      shared |= {"stop_asked": stop_asked}
      if step == 0:
        record = rank_record(t.layers, state)
        writer.write(0, 0, record | {"phase": int(not ledger.discover_steps)})
      while step < t.clock.total:
        name, end = ledger.phase(step), end_of_round(t, ledger, step)
        if step == ledger.discover_steps:
          if t.method.race is None:
            state = _enter_settle(t, state, ledger, c.truncate)
          else:  # whose winner has made some steps
            with goodput.spent("ranks"):
              state = race.race(t, t.method.race, state, feed, ledger, **shared)
          agreement.networks(state)
          if step < int(state.step) < t.clock.total:
            _save(checkpoints, state, ledger, started, t)
          step = int(state.step)
          end = end_of_round(t, ledger, step)

        # --- Steps, up to the next one after which something is due -----------
        state, done = run_round(t, state, feed, ledger, end, **shared)
        step = done.step
        if not done.whole:
          _save(checkpoints, state, ledger, started, t)
          raise Interrupted(f"stopped at step {step} of {t.clock.total}; saved")

        # --- Shrink, perhaps cut, perhaps change the phase --------------------
        last, discovered = step == t.clock.total, step == ledger.discover_steps
        whole = every(step, t.clock.steps_per_epoch)
        record, state = _means(t, state, ledger, whole or last or discovered)
        check_finite(record, step, checkpoints)
        schedule, _ = t.optimizer(ledger.discover_steps)
        record["learning_rate"] = float(schedule(step - 1))
        shrinks = t.periods.shrink.get(name)
        if shrinks and (last or discovered or every(step, shrinks)):
          state = _shrink(t, state, ledger, c.truncate)
          agreement.networks(state)
          record |= control.record(state)  # of the steps that were made
          state = control.update(t, state, ledger)
        if name == "discover" and whole and _ends_discover(t, state, ledger):
          writer.message(f"discover ends after {t.clock.text(step)}")
        discovered = step == ledger.discover_steps
        if discovered and state.ranks:
          write_spectra(workdir, "end of discover", state)
        shrunk = discovered and c.discover.shrink and t.method.shrink
        for alarm in alarms_of(t.method, ledger, t.layers, state, bool(shrunk)):
          if alarm not in ledger.alarms:
            ledger.alarms.append(alarm)
            writer.message(f"alarm: {alarm}")
        if last:
          state = _enter_end(t, state, ledger, discovered)

        # --- Evaluate, log, save ----------------------------------------------
        if last or discovered or every(step, t.periods.evaluate):
          (values,) = _evaluate(t, state, ledger, t.dataset.val, by=t.evaluate)
          record |= {f"val/{key}": value for key, value in values.items()}
          with goodput.spent("evaluate"):
            record |= chain.evaluate(t, state, ledger)
          check_finite(record, step, checkpoints)
        record |= rank_record(t.layers, state)
        record |= done.record
        record["phase"] = int(name == "settle")
        writer.write(step, t.clock.epochs(step), record)
        writer.progress(
          step,
          f"{t.clock.text(step)} {name} loss {done.loss:.3f}"
          f"{_scores(record)}{rank_text(jax.device_get(state.ranks))}",
          examples_per_second=done.examples_per_second,
        )
        due, stopping = every(step, t.periods.save), stop_asked()
        if last or discovered or due or stopping:
          _save(checkpoints, state, ledger, started, t)
        if stopping and not last:
          raise Interrupted(f"stopped at step {step} of {t.clock.total}; saved")
  return state, ledger


def _finish(
  t: Training,
  state: TrainState,
  ledger: Ledger,
  config: Mapping[str, Any],
  workdir: pathlib.Path,
  started: float,
) -> dict:
  """Reports the final model: exact ranks, merged where dense is cheaper."""
  state = averaged(state)
  final = lowrank.extract(state.params, state.ranks, t.layers)
  splits, cut = (t.dataset.val, t.dataset.test), state.replace(params=final)
  val, test = _evaluate(t, cut, ledger, *splits, by=t.score)
  write_spectra(workdir, "final", state)
  ledger.wall_seconds = time.monotonic() - started
  scores = {"val": val, "test": test}
  rows = chain.rows(t, state, ledger)
  results = results_of(config, ledger, t.layers, t.dense, final, state, scores)
  results |= {"levels": rows} if rows else {}
  workdir_lib.write_json(workdir / "results.json", results)
  if processes.first():
    with goodput.spent("report"):
      figures.figures(workdir)
  print(f"\n{layer_table(results)}\n{level_table(results)}")
  print(f"{workdir}: finished")
  return results


def evaluate_workdir(
  workdir: str | os.PathLike, data_dir: str | None = None
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a run, cut to its ranks; no training.

  On the run's mesh, or on one device where there are too few for it.

  Returns:
    {"val": {metric: value}, "test": ..., "params": n, "macs": n, "step": n},
    and "levels" as in results.json, of a nested run.

  Raises:
    UserError: there is no run, or its checkpoint is broken.
  """
  run = opened.open_run(workdir, data_dir=data_dir)
  c, dataset = run.config, opened.data_of(run)
  mesh = make_mesh(c.mesh if fits(c.mesh) else MeshShape(data=1))
  variables = {"params": lowrank.extract(run.params, run.ranks, run.layers)}
  size = count_cost(run.layers, variables["params"])
  if run.batch_stats:
    variables["batch_stats"] = run.batch_stats
  variables = replicate(variables, mesh)
  evaluate = build.make_score(c, run.model, dataset, mesh)
  if run.ranks and not run.levels:
    recalibrate = build.make_recalibrator(c, run.model, dataset, mesh)
    variables = recalibrate(variables)

  def score(variables):
    variables = replicate(variables, mesh)
    splits = {"val": dataset.val, "test": dataset.test}
    return {name: evaluate(variables, split) for name, split in splits.items()}

  names = chain.names_of(run)
  rows = levels.rows_of(run.params, run.levels, names, run.layers, score)
  return {
    "step": run.step,
    "params": size.params,
    "macs": size.macs,
    **score(variables),
    **({"levels": rows} if rows else {}),
  }


# ---------------------------------------------------------------------------
# Resume or start
# ---------------------------------------------------------------------------


def _finished(workdir: pathlib.Path, results: dict) -> dict:
  """Shows a finished run; draws its report, if it was killed before that."""
  print(f"{workdir}: this run is finished. Its results:\n")
  print(f"{layer_table(results)}\n{level_table(results)}")
  if processes.first() and not (workdir / "report").exists():
    figures.figures(workdir)
  return results


def _start(t: Training, workdir: pathlib.Path) -> tuple[TrainState, Ledger]:
  ledger = Ledger(t.clock.discover)
  _, tx = t.optimizer(ledger.discover_steps)
  state = t.new_state(tx, *t.initial(), {})
  race.check(t, state, workdir)
  if t.method.decompose_at == "start":
    state = control.begin(t, _decompose(t, state, ledger))
    write_spectra(workdir, "start", state)
  return state, ledger


@goodput.spent("restore")
def _resume(
  t: Training, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, Ledger] | None:
  """Loads the newest checkpoint that is whole; None if there is none.

  One that is damaged is set aside: training repeats what came after the one
  before it, to the same numbers.
  """
  while (step := agreement.newest(checkpoints)) is not None:
    state = ledger = None
    with agreement.damage() as found:
      _, extra = checkpoints.shapes(step)
      ledger = Ledger.load(extra["ledger"], t.clock)
      _, tx = t.optimizer(ledger.discover_steps)
      new = functools.partial(t.new_state, tx)
      state = restore(checkpoints, step, new, t.placement)
    if state is not None and ledger is not None and not found:
      where = checkpoints.directory.parent
      print(f"{where}: resuming from step {step} of {t.clock.total}")
      return state, ledger
    aside = checkpoints.set_aside(step)
    print(f"{found[0].partition(';')[0]}; set aside as {aside}")
  return None


@goodput.spent("save")
def _save(
  checkpoints: checkpoint.Checkpoints,
  state: TrainState,
  ledger: Ledger,
  started: float,
  t: Training,
) -> None:
  ledger.wall_seconds = time.monotonic() - started
  checkpoints.keep_steps = frozenset({ledger.discover_steps})
  extra = {"ledger": dataclasses.asdict(ledger)}
  with stop.saving():
    checkpoints.save(int(state.step), state, extra)
  goodput.saved(int(state.step))


# ---------------------------------------------------------------------------
# From phase to phase
# ---------------------------------------------------------------------------


@goodput.spent("ranks")
def _decompose(t: Training, state: TrainState, ledger: Ledger) -> TrainState:
  """Turns kernels into factors, with a fresh optimizer."""
  _, tx = t.optimizer(ledger.discover_steps)
  params = t.placement.whole(state.params)
  params, ranks = t.method.decompose(params, state.batch_stats)
  opt_state = optim.restart(tx, params, state.step)
  ledger.ranks = plain_ranks(ranks)
  state = state.replace(params=params, ranks=ranks, opt_state=opt_state)
  return t.placement.put(begin_average(state), params)


@goodput.spent("ranks")
def _cut(
  t: Training, state: TrainState, ledger: Ledger, truncate: Truncate
) -> TrainState:
  _, tx = t.optimizer(ledger.discover_steps)
  state = truncate_state(tx, state, truncate.multiple_of)
  return t.placement.put(state, state.params)


@goodput.spent("ranks")
def _shrink(
  t: Training, state: TrainState, ledger: Ledger, truncate: Truncate
) -> TrainState:
  """Lowers ranks, if the method does so; cuts if it is worth it."""
  if not (state.ranks and t.method.shrink):
    return state
  state = shrink_state(state, t.method.shrink)
  state = t.placement.put(state, state.params)
  if _worth_cutting(t, ledger, state, truncate):
    return _cut(t, state, ledger, truncate)
  return state


@goodput.spent("ranks")
def _enter_settle(
  t: Training, state: TrainState, ledger: Ledger, truncate: Truncate
) -> TrainState:
  """Returns factors at the ranks that were found, or their first factors."""
  if t.method.nested is not None:
    return chain.enter(t, t.method.nested, state, ledger)
  if t.method.decompose_at != "settle":
    state = at_ranks(state, t.method.fit(state.ranks)).replace(controls={})
    return _cut(t, state, ledger, truncate)
  state = _decompose(t, state, ledger)
  variables = variables_of(state)
  nn.check_ranks(t.model, variables, state.ranks, t.facts.example)
  return state


def _enter_end(
  t: Training, state: TrainState, ledger: Ledger, discovered: bool
) -> TrainState:
  """Returns the state at its final ranks, after the last step."""
  if t.method.decompose_at == "end":
    return _decompose(t, averaged(state), ledger)
  if discovered:  # there was no settle phase that would have set them
    return at_ranks(state, t.method.fit(state.ranks))
  return state


def _ends_discover(t: Training, state: TrainState, ledger: Ledger) -> bool:
  """Compares stable ranks with the last epoch's; may end discover here."""
  if t.method.stable_ranks is None or state.ranks:
    return False
  now = t.method.stable_ranks(t.placement.whole(state.params))
  step = int(state.step)
  ends = step < t.clock.total and t.method.switches(ledger.stable_ranks, now)
  ledger.stable_ranks = now
  if ends:
    ledger.discover_steps = step
  return ends


def _worth_cutting(
  t: Training, ledger: Ledger, state: TrainState, truncate: Truncate
) -> bool:
  """True if a cut now saves enough MACs and its compilations are allowed."""
  step = int(state.step)
  if step in (ledger.discover_steps, t.clock.total):
    return False  # settling cuts anyway, and after the end nothing runs
  # A step and an evaluation now, again when settling, and the final model;
  # with batch norm, a recalibration before each evaluation.
  evaluation = 2 if state.batch_stats else 1
  needed = 1 + evaluation
  settles = step < ledger.discover_steps < t.clock.total
  needed += 1 + evaluation if settles else 0
  needed += evaluation
  if len(ledger.programs) + needed > truncate.max_compilations:
    return False
  ranks = jax.device_get(state.ranks)
  small = jax.eval_shape(
    lambda p: lowrank.truncate(p, ranks, truncate.multiple_of), state.params
  )
  stored = count_cost(t.layers, state.params).macs
  left = count_cost(t.layers, small).macs
  return stored - left >= truncate.min_saving * stored


# ---------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------


def _means(
  t: Training, state: TrainState, ledger: Ledger, whole: bool
) -> tuple[dict[str, float], TrainState]:
  """Training metrics since the last record, or of a whole epoch at its end."""
  step, sums = int(state.step), added(ledger.sums, state.metrics)
  record = means(sums if whole else added({}, state.metrics))
  ledger.sums = {} if whole else sums
  if t.method.step_penalty is not None:  # no loss has it; at the epoch's end
    value = float(t.method.step_penalty(state.params, state.ranks))
    lam = t.method.lams[ledger.phase(step - 1)]
    lam = float(state.controls.get("lam", lam))
    record["train/penalty"] = lam * value
  return record, reset_metrics(state)


def _scores(record: Mapping[str, float]) -> str:
  """What a progress line says of an evaluation, if there was one."""
  names = [key for key in ("val/loss", "val/accuracy") if key in record]
  return "".join(f" {key} {record[key]:.4f}" for key in names)


@goodput.spent("evaluate")
def _evaluate(
  t: Training, state: TrainState, ledger: Ledger, *splits: data_lib.Split, by
) -> list[dict[str, float]]:
  """Evaluates on whole splits, with batch statistics of the network's own."""
  state = averaged(state)
  variables, form = variables_of(state), form_of(state.params)
  # Those of a dense network, and of a level, are its own.
  if state.ranks and state.batch_stats and not state.levels:
    ledger.compiles(f"recalibrate, {form}")
    variables = t.recalibrate(variables)
  ledger.compiles(f"evaluate, {form}")
  return [by(variables, split) for split in splits]
