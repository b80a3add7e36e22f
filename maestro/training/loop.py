"""The training loop: discover ranks, settle at them, report what was kept.

What is decomposed, sampled, penalised, shrunk and trained, and when, are the
pieces that config.method chooses: see `maestro.methods`.

`train(config, workdir)` reads from top to bottom; what a reader would skip is
in the helpers below it.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maestro import data as data_lib
from maestro import introspect as nn
from maestro import lowrank, trees
from maestro.cost import count as cost
from maestro.errors import Interrupted
from maestro.parallel.mesh import make_mesh, replicate
from maestro.report import figures
from maestro.report import tables as report
from maestro.runs import checkpoint, metrics
from maestro.runs import workdir as workdir_lib
from maestro.schema import ConfigError
from maestro.training import bind as pieces
from maestro.training import build, optim
from maestro.training import state as state_lib
from maestro.training.config import Config, Phase, parse, parse_rules
from maestro.training.results import (
  Ledger,
  TrainingError,
  alarms_of,
  rank_record,
  rank_text,
  results_of,
  write_spectra,
)
from maestro.training.state import (
  TrainState,
  at_ranks,
  form_of,
  means,
  plain_ranks,
  restore,
  shrink_state,
  truncate_state,
  variables_of,
  zero_metrics,
)
from maestro.training.step import make_dispatch, make_step


def train(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict:
  """Runs, or resumes, the training that a config describes.

  Args:
    config: nested mapping, see `maestro.training.config.Config`.
    workdir: directory of the run. If it holds a checkpoint of the same config,
      the run resumes from it; a finished run is reported and left as it is.

  Returns:
    The content of `results.json`.

  Raises:
    UserError: bad config, data, checkpoint or workdir, or a loss that is not
      finite. Nothing that was saved before is lost.
    Interrupted: SIGTERM came and the state was saved.
  """
  started = time.monotonic()
  c = parse(config)
  workdir = pathlib.Path(workdir)

  # --- Options, so that wrong ones fail before data is read -----------------
  mesh = make_mesh(c.num_devices)
  pieces.check(c)
  parse_rules(c.rules)
  samplers = {p: pieces.make_sampler(c, p) for p in ("discover", "settle")}
  penalty, shrink = pieces.make_penalty(c), pieces.make_shrink(c)
  step_penalty = pieces.make_step_penalty(c)
  _optimizer(c, c.discover.epochs, steps_per_epoch=1000)
  finished = workdir_lib.finished_results(workdir, config)
  if finished is not None:
    print(f"{workdir}: this run is finished. Its results:\n")
    print(report.layer_table(finished))
    return finished

  # --- Data, model, optimizer -----------------------------------------------
  dataset = data_lib.make(**c.data)
  facts = build.Facts.of(dataset)
  model = build.make_model(c, facts)
  steps_per_epoch = _steps_per_epoch(c, len(dataset.train), mesh.size)
  epochs = c.epochs
  total_steps = epochs * steps_per_epoch
  example = facts.example
  layers = nn.layers(model, example)
  dense_cost = cost.count_cost(layers, _dense_params(model, example)["params"])
  initial = functools.partial(_initial, c, model, layers, example)
  method = pieces.Pieces(
    c, model, dataset, layers, dense_cost, lambda: _random(c, model, example)[0]
  )
  optimizer = functools.cache(
    lambda epochs: _optimizer(c, epochs, steps_per_epoch, layers)
  )
  # --- Programs ---------------------------------------------------------------
  evaluate = build.make_evaluator(c, model, dataset, mesh)
  recalibrate = build.make_recalibrator(c, model, dataset, mesh)

  @functools.cache
  def dispatch(phase_name: str, discover_epochs: int, steps: int) -> Callable:
    step = make_step(
      model,
      optimizer(discover_epochs)[1],
      loss=c.loss,
      preprocess=dataset.preprocess,
      sampler=samplers[phase_name],
      batch_size=c.batch_size,
      steps_per_epoch=steps_per_epoch,
      lam=pieces.weight(c, phase_name),
      penalty=penalty,
      full_pass=c.full_pass,
      mesh=mesh,
    )
    return make_dispatch(step, steps)

  steps_per_dispatch = c.steps_per_dispatch or _dispatch_size(steps_per_epoch)
  project_every = method.project_every
  macs_per_example = 3 * (1 if c.full_pass is None else 2)

  with (
    workdir_lib.locked(workdir),
    checkpoint.Checkpoints(
      workdir / "checkpoints",
      keep=c.checkpoint.keep,
    ) as checkpoints,
    _sigterm() as stop_asked,
  ):
    workdir_lib.claim(workdir, config, dataclasses.asdict(facts))

    # --- State: the newest checkpoint, or a new one ---------------------------
    schedule, tx = optimizer(c.discover.epochs)
    new_state = functools.partial(state_lib.new_state, c, tx)

    def decompose(state: TrainState) -> TrainState:
      """Turns kernels into factors, with a fresh optimizer."""
      params, ranks = method.decompose(state.params, state.batch_stats)
      opt_state = optim.restart(tx, params, state.step)
      state = state.replace(params=params, ranks=ranks, opt_state=opt_state)
      ledger.ranks = plain_ranks(ranks)
      write_spectra(workdir, "start", state)
      return state

    first_step = checkpoints.latest or 0
    if checkpoints.latest is None:
      ledger = Ledger(c.discover.epochs)
      state = new_state(*initial(), {})
      if c.pieces.decompose == "start":
        state = decompose(state)
    else:
      state, extra = restore(checkpoints, new_state)
      # A run of before methods could end discover early says no length.
      known = {"discover_epochs": c.discover.epochs}
      ledger = Ledger(**(known | extra["ledger"]))
      schedule, tx = optimizer(ledger.discover_epochs)
      print(f"{workdir}: resuming from step {first_step} of {total_steps}")
    checkpoints.keep_steps = {ledger.discover_epochs * steps_per_epoch}
    if state.ranks:
      nn.check_ranks(model, variables_of(state), state.ranks, example)
    state = replicate(state, mesh)
    arrays = {"inputs": dataset.train.inputs, "targets": dataset.train.targets}
    arrays = replicate(arrays, mesh)

    writer = metrics.Writer(
      workdir, total_steps=total_steps, resume_step=first_step
    )
    with writer:
      wall_before = ledger.wall_seconds

      def save(state: TrainState) -> None:
        ledger.wall_seconds = wall_before + time.monotonic() - started
        extra = {"ledger": dataclasses.asdict(ledger)}
        checkpoints.save(int(state.step), state, extra)

      def recalibrated(state: TrainState) -> dict[str, Any]:
        # Batch statistics belong to a sub-network; a dense one keeps its own.
        variables = variables_of(state)
        if not (state.ranks and state.batch_stats):
          return variables
        ledger.compiles(f"recalibrate, {form_of(state.params)}")
        return recalibrate(variables)

      step = first_step
      if step == 0:
        start = rank_record(layers, state) | {
          "phase": int(not c.discover.epochs)
        }
        writer.write(0, 0, start)
      for epoch in range(first_step // steps_per_epoch, epochs):
        name = "discover" if epoch < ledger.discover_epochs else "settle"
        phase: Phase = getattr(c, name)
        epoch_end = (epoch + 1) * steps_per_epoch

        # --- Entering settle: factors at the ranks that were found ------------
        if step == ledger.discover_epochs * steps_per_epoch:
          if c.pieces.decompose == "settle":
            state = decompose(state)
            nn.check_ranks(model, variables_of(state), state.ranks, example)
          else:
            state = truncate_state(
              c, tx, at_ranks(state, method.fit(state.ranks))
            )
          state = replicate(state, mesh)

        # --- One epoch of steps -----------------------------------------------
        stored_macs = cost.count_cost(layers, state.params).macs
        form = form_of(state.params)
        order = data_lib.epoch_order(c.seed, epoch, len(dataset.train))
        data = arrays | {"order": replicate(order, mesh)}
        ranks = jax.device_get(state.ranks)
        epoch_start, epoch_started = step, time.monotonic()
        previous = window = None
        while step < epoch_end:
          n = min(steps_per_dispatch, epoch_end - step)
          if c.log_every_steps:
            n = min(n, c.log_every_steps - step % c.log_every_steps)
          if project_every:
            n = min(n, project_every - step % project_every)
          ledger.compiles(f"{name}, {n} steps, {form}")
          run = dispatch(name, ledger.discover_epochs, n)
          state, step_losses = run(state, data)
          step += n
          if project_every and step % project_every == 0 and not state.ranks:
            t = project_every * float(schedule(step - 1))
            t *= pieces.step_weight(c, name)
            params = method.project(state.params, t)
            state = state.replace(params=replicate(params, mesh))
          # The host reads one dispatch late, so that the device never waits.
          if previous is not None:
            loss = _finite(previous, step - n, checkpoints)
            speed = (
              (step - epoch_start)
              * c.batch_size
              / (time.monotonic() - epoch_started)
            )
            writer.progress(
              step,
              f"epoch {epoch + 1}/{epochs} {name} loss {loss:.3f}"
              f"{rank_text(ranks)}",
              examples_per_second=speed,
            )
          if window is not None:
            writer.write(*window[:2], means(window[2]) | window[3])
            window = None
          previous = step_losses
          if (
            c.log_every_steps
            and step % c.log_every_steps == 0
            and step < epoch_end
          ):
            rate = {"learning_rate": float(schedule(step - 1))}
            window = step, epoch + 1, state.metrics, rate
            state = state.replace(metrics=replicate(zero_metrics(c.loss), mesh))
          if stop_asked() and step < epoch_end:
            break
        loss = _finite(previous, step, checkpoints)
        if window is not None:
          writer.write(*window[:2], means(window[2]) | window[3])
        seconds = time.monotonic() - epoch_started
        examples = (step - epoch_start) * c.batch_size
        ledger.macs += macs_per_example * examples * stored_macs
        ledger.examples += examples
        ledger.train_seconds += seconds
        if step < epoch_end:
          save(state)
          raise Interrupted(f"stopped at step {step} of {total_steps}")

        # --- Epoch end: shrink, perhaps cut, perhaps change the phase ---------
        record = means(state.metrics)
        if step_penalty is not None:  # no loss has it; at the epoch's end
          value = float(step_penalty(state.params, state.ranks))
          record["train/penalty"] = pieces.weight(c, name) * value
        _check_finite_window(record, step, checkpoints)
        state = state.replace(metrics=replicate(zero_metrics(c.loss), mesh))
        rate = {"learning_rate": float(schedule(step - 1))}
        last = epoch + 1 == epochs
        if state.ranks and phase.shrink and shrink is not None:
          state = shrink_state(state, shrink)
          if _worth_cutting(c, ledger, layers, state, epoch):
            state = replicate(truncate_state(c, tx, state), mesh)
        if name == "discover" and not state.ranks:
          stable = method.stable_ranks(state.params)
          if stable is not None:
            if not last and method.switches(ledger.stable_ranks, stable):
              ledger.discover_epochs = epoch + 1
              schedule, tx = optimizer(ledger.discover_epochs)
              checkpoints.keep_steps = {step}
              writer.message(f"discover ends after epoch {epoch + 1}")
            ledger.stable_ranks = stable
        end_of_discover = epoch + 1 == ledger.discover_epochs
        if end_of_discover and state.ranks:
          write_spectra(workdir, "end of discover", state)
        for alarm in alarms_of(c, ledger, layers, state, end_of_discover):
          if alarm not in ledger.alarms:
            ledger.alarms.append(alarm)
            writer.message(f"alarm: {alarm}")

        if last and c.pieces.decompose == "end":
          state = replicate(decompose(state), mesh)
        elif last and end_of_discover:
          state = at_ranks(state, method.fit(state.ranks))

        # --- Evaluate, log, save ----------------------------------------------
        landmark = last or end_of_discover
        if landmark or (epoch + 1) % c.eval_every_epochs == 0:
          variables = recalibrated(state)
          ledger.compiles(f"evaluate, {form_of(state.params)}")
          values = evaluate(variables, dataset.val)
          record |= {f"val/{key}": value for key, value in values.items()}
          _check_finite_window(record, step, checkpoints)
        record |= rank_record(layers, state) | rate
        record |= {
          "examples_per_second": examples / seconds,
          "phase": int(name == "settle"),
        }
        writer.write(step, epoch + 1, record)
        writer.progress(
          step,
          f"epoch {epoch + 1}/{epochs} {name} loss {loss:.3f}"
          + "".join(
            f" {key} {record[key]:.4f}"
            for key in ("val/loss", "val/accuracy")
            if key in record
          )
          + rank_text(jax.device_get(state.ranks)),
          examples_per_second=examples / seconds,
        )
        every = (epoch + 1) % c.checkpoint.every_epochs == 0
        if landmark or every or stop_asked():
          save(state)
        if stop_asked() and not last:
          raise Interrupted(f"stopped at step {step} of {total_steps}")

    # --- The final model: exact ranks, merged where dense is cheaper ----------
    final = lowrank.extract(state.params, state.ranks, layers)
    variables = recalibrated(state.replace(params=final))
    ledger.compiles(f"evaluate, {form_of(final)}")
    val = evaluate(variables, dataset.val)
    test = evaluate(variables, dataset.test)
    write_spectra(workdir, "final", state)
    ledger.wall_seconds = wall_before + time.monotonic() - started
    results = results_of(
      config, c, ledger, layers, dense_cost, final, state, val, test
    )
    workdir_lib.write_json(workdir / "results.json", results)
    figures.figures(workdir)
    print(f"\n{report.layer_table(results)}\n\n{workdir}: finished")
    return results


def evaluate_workdir(
  workdir: str | os.PathLike, data_dir: str | None = None
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a run, cut to its ranks; no training.

  Returns:
    {"val": {metric: value}, "test": ..., "params": n, "macs": n, "step": n}.

  Raises:
    UserError: there is no run, or its checkpoint is broken.
  """
  run = build.open_run(workdir, data_dir=data_dir)
  c, dataset = run.config, data_lib.make(**run.config.data)
  mesh = make_mesh(c.num_devices)
  variables = {"params": lowrank.extract(run.params, run.ranks, run.layers)}
  size = cost.count_cost(run.layers, variables["params"])
  if run.batch_stats:
    variables["batch_stats"] = run.batch_stats
  variables = replicate(variables, mesh)
  evaluate = build.make_evaluator(c, run.model, dataset, mesh)
  if run.ranks:
    recalibrate = build.make_recalibrator(c, run.model, dataset, mesh)
    variables = recalibrate(variables)
  return {
    "step": run.step,
    "params": size.params,
    "macs": size.macs,
    "val": evaluate(variables, dataset.val),
    "test": evaluate(variables, dataset.test),
  }


# ---------------------------------------------------------------------------
# Set-up
# ---------------------------------------------------------------------------


def _steps_per_epoch(c: Config, n: int, devices: int) -> int:
  if c.batch_size > n:
    raise ConfigError(
      f"config.batch_size: {c.batch_size} is larger than the training split of"
      f" {c.data['name']!r}, {n} examples"
    )
  if c.batch_size % devices:
    raise ConfigError(
      f"config.batch_size: {c.batch_size} cannot be split over {devices}"
      " devices; change it or config.num_devices"
    )
  return n // c.batch_size


def _dispatch_size(steps_per_epoch: int) -> int:
  """1 on CPUs, see `make_dispatch`; else a divisor, for one program a phase."""
  if jax.default_backend() == "cpu":
    return 1
  return max(k for k in range(1, 17) if steps_per_epoch % k == 0)


def _dense_params(model: Any, example: jax.ShapeDtypeStruct) -> Any:
  return jax.eval_shape(model.init, jax.random.key(0), example)


def _optimizer(c: Config, discover_epochs: int, steps_per_epoch: int, *layers):
  """Returns (schedule, optimizer) for a length of the discover phase."""
  lengths = {
    "discover": discover_epochs,
    "settle": c.epochs - discover_epochs,
  }
  phases = [(p, n, getattr(c, p).schedule) for p, n in lengths.items()]
  schedule = optim.make_schedule(phases, steps_per_epoch)
  end = discover_epochs * steps_per_epoch
  return schedule, pieces.make_optimizer(c, schedule, end, *layers)


def _random(c: Config, model: Any, example):
  """Returns random dense params, and batch_stats, of the run's seed."""
  key, _ = jax.random.split(jax.random.key(c.seed))
  inputs = jnp.zeros(example.shape, example.dtype)
  variables = jax.jit(model.init)(key, inputs)
  return variables["params"], variables.get("batch_stats", {})


def _initial(c: Config, model: Any, layers, example):
  """Returns dense params, and batch_stats, to start from."""
  if c.init_from is None:
    params, stats = _random(c, model, example)
  else:
    source = pathlib.Path(c.init_from)
    if not (source / "checkpoints").is_dir():
      raise ConfigError(
        f"config.init_from: {source} is no workdir of a run (it has no"
        " checkpoints/)"
      )
    params, stats, ranks, _ = checkpoint.load_params(source / "checkpoints")
    params = jax.tree.map(jnp.asarray, params)
    _check_same_factors(params, ranks, layers, source)
    # The function that the other run learnt, at its ranks, as dense kernels.
    params = lowrank.merge(lowrank.truncate(params, ranks), layers)
    _check_same_shapes(params, _dense_params(model, example)["params"], source)
  return params, stats


def _check_same_factors(params, ranks, layers, source: pathlib.Path) -> None:
  for path, (node, _) in trees.paired(params, ranks).items():
    found, spec = (node["u"].shape, node["v"].shape), layers.get(path)
    wanted = "absent" if spec is None else spec.factor_shapes(found[0][-1])
    if found != wanted:
      raise ConfigError(
        f"config.init_from: {source} does not fit this model: layer {path!r}"
        f" has factors {found} there and {wanted} here"
      )


def _check_same_shapes(params: Any, wanted: Any, source: pathlib.Path) -> None:
  def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): jnp.shape(leaf) for path, leaf in leaves}

  found, wanted = shapes(params), shapes(wanted)
  for path in sorted(found.keys() | wanted.keys()):
    if found.get(path) != wanted.get(path):
      raise ConfigError(
        f"config.init_from: {source} does not fit this model: parameter"
        f" {path!r} is {found.get(path, 'absent')} there and"
        f" {wanted.get(path, 'absent')} here"
      )


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
  """Yields a function that tells whether SIGTERM has come."""
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield asked.is_set
    return
  before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  try:
    yield asked.is_set
  finally:
    signal.signal(signal.SIGTERM, before)


def _worth_cutting(
  c: Config, ledger: Ledger, layers, state: TrainState, epoch: int
) -> bool:
  """True if a cut now saves enough MACs and its compilations are allowed."""
  discovering = epoch < ledger.discover_epochs
  phase_end = ledger.discover_epochs if discovering else c.epochs
  if epoch + 1 >= phase_end:
    return False  # settling cuts anyway, and after the end nothing runs
  # A step and an evaluation now, again when settling, and the final model;
  # with batch norm, a recalibration before each evaluation.
  evaluation = 2 if state.batch_stats else 1
  needed = 1 + evaluation
  settles = ledger.discover_epochs < c.epochs
  needed += 1 + evaluation if discovering and settles else 0
  needed += evaluation
  if len(ledger.programs) + needed > c.truncate.max_compilations:
    return False
  ranks = jax.device_get(state.ranks)
  small = jax.eval_shape(
    lambda p: lowrank.truncate(p, ranks, c.truncate.multiple_of), state.params
  )
  stored = cost.count_cost(layers, state.params).macs
  left = cost.count_cost(layers, small).macs
  return stored - left >= c.truncate.min_saving * stored


def _last_good(checkpoints) -> str:
  if checkpoints.latest is None:
    return "there is no checkpoint yet"
  return (
    f"the last good checkpoint is step {checkpoints.latest} in"
    f" {checkpoints.directory}"
  )


_NAN_REMEDY = (
  "lower the learning rate (config.discover.schedule.learning_rate) or lambda"
  " (config.discover.lam), or set config.optimizer.clip_norm, in a new workdir"
)


def _finite(step_losses: jax.Array, step: int, checkpoints) -> float:
  """Returns the last of a dispatch's losses; `step` is the step after it."""
  values = np.asarray(step_losses)
  bad = np.flatnonzero(~np.isfinite(values))
  if bad.size:
    at = step - len(values) + int(bad[0])
    raise TrainingError(
      f"loss is {values[bad[0]]} at step {at}; stopped."
      f" {_last_good(checkpoints)}; {_NAN_REMEDY}"
    )
  return float(values[-1])


def _check_finite_window(
  record: Mapping[str, float], step: int, checkpoints
) -> None:
  for key, value in record.items():
    if not np.isfinite(value):
      raise TrainingError(
        f"{key} is {value} at step {step}; stopped."
        f" {_last_good(checkpoints)}; {_NAN_REMEDY}"
      )
