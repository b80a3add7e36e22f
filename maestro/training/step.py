"""The training state and one step of training, as pure functions."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maestro import lowrank
from maestro.parallel.mesh import split_batch
from maestro.parallel.rules import Placement
from maestro.training import losses
from maestro.training.accumulate import mean_gradient
from maestro.training.config import FullPass
from maestro.training.levels import Level
from maestro.training.state import TrainState

Data = Mapping[str, jax.Array]  # inputs [n, ...], targets [n, ...], order [n]


def make_step(
  model: Any,
  tx: optax.GradientTransformation,
  *,
  loss: str,
  preprocess: Callable,
  sampler: Callable,
  batch_size: int,
  steps_per_epoch: int,
  lam: float,
  penalty: Callable[[Any, Any], jax.Array] | None,
  full_pass: FullPass | None,
  placement: Placement,
  level: Level | None = None,
  accumulate: int = 1,
) -> Callable[[TrainState, Data], tuple[TrainState, jax.Array]]:
  """Returns step(state, data) -> (state, loss of this step).

    ranks_t = sampler(key_t, ranks)
    loss = task(network at ranks_t) + lam * penalty(params, ranks)

  The batch is the next `batch_size` entries of data["order"], gathered and
  preprocessed on the device. The returned loss includes the penalty. Layers
  that `ranks_t` does not name run as they are stored.

  At a level of a nested network, the network is the one cut to its ranks, which
  are shapes: what lies beyond costs nothing and has no gradient. The statistics
  are the level's own; those of the whole network are the largest level's. With
  a full pass that one is trained in every step, and teaches the level.

  Parameters, and what the optimizer holds of them, stay where `placement` has
  them; the batch is split over its mesh.

  Where a controller moves the weight of the optimizer's proximal step, the
  state holds it.

  With `accumulate` = k, a batch runs as k micro-batches, see
  `training.accumulate`; their gradients are averaged in float32. Images are
  preprocessed and ranks sampled once a step, so only dropout and the statistics
  of batch norm, which are those of the micro-batches in order, are not the
  plain step's.
  """
  example_loss = losses.LOSSES[loss]
  metrics = losses.METRICS[loss]

  def apply(params, ranks, stats, x, key):
    variables = {"params": params}
    if ranks:
      variables["ranks"] = ranks
    if not stats:
      y = model.apply(variables, x, train=True, rngs={"dropout": key})
      return y, stats
    y, updates = model.apply(
      variables | {"batch_stats": stats},
      x,
      train=True,
      rngs={"dropout": key},
      mutable=["batch_stats"],
    )
    return y, updates["batch_stats"]

  def step(state: TrainState, data: Data) -> tuple[TrainState, jax.Array]:
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = jax.random.fold_in(key, state.step)
    key_rank, key_image, key_dropout = jax.random.split(key, 3)
    start = (state.step % steps_per_epoch) * batch_size
    batch = jax.lax.dynamic_slice_in_dim(data["order"], start, batch_size)
    x, y = data["inputs"][batch], data["targets"][batch]
    x, y = split_batch((x, y), placement.mesh)
    x = preprocess(x, key_image)
    sampled = sampler(key_rank, state.ranks)

    live, own = state.ranks, state.batch_stats
    if level is not None:
      live = level.ranks
      own = level.statistics(state) if own else own

    def task_of(params, carried, x, y, key):
      own, whole = carried
      full = placement.gathered(params)
      used = full if level is None else lowrank.truncate(full, live)
      out, stats = apply(used, sampled, own, x, key)
      task = jnp.mean(example_loss(out, y))
      if full_pass is None:
        whole = stats
      else:
        # The full network owns the statistics and teaches the sampled one; a
        # level has its own, too.
        ranks = state.ranks if level is None else {}
        teacher, whole = apply(full, ranks, whole, x, key)
        soft = 0.0
        if full_pass.distill:
          soft = jnp.mean(
            losses.distillation(out, teacher, full_pass.temperature)
          )
        task = (1 - full_pass.distill) * task + full_pass.distill * soft
        task += jnp.mean(example_loss(teacher, y))
      sums = {name: jnp.mean(f(out, y)) for name, f in metrics.items()}
      return task, (sums | {"loss": task}, (stats, whole))

    def penalty_of(params):
      if not lam or penalty is None:
        return jnp.zeros((), jnp.float32)
      part = params if level is None else lowrank.truncate(params, live)
      return lam * penalty(part, live)

    def objective(params):
      task, aux = task_of(params, carried, x, y, key_dropout)
      added = penalty_of(params)
      return task + added, (*aux, added)

    def of_part(params, carried, part, i):
      part = split_batch(part, placement.mesh)
      key = jax.random.fold_in(key_dropout, i)
      grad = jax.value_and_grad(task_of, has_aux=True)
      (_, aux), grads = grad(params, carried, *part, key)
      return aux, placement.constrain(grads, params)

    carried = (own, state.batch_stats)
    if accumulate == 1:
      grad = jax.value_and_grad(objective, has_aux=True)
      (total, (sums, (stats, whole), added)), grads = grad(state.params)
    else:
      sums, grads, (stats, whole) = mean_gradient(
        of_part, state.params, carried, (x, y), accumulate
      )
      added, more = jax.value_and_grad(penalty_of)(state.params)
      grads = jax.tree.map(jnp.add, grads, more)
      total = sums["loss"] + added
    sums |= {"penalty": added}
    grads = placement.constrain(grads, state.params)
    weight = {"lam": state.controls["lam"]} if state.controls else {}
    updates, opt_state = optax.with_extra_args_support(tx).update(
      grads, state.opt_state, state.params, **weight
    )
    sums |= {"steps": 1.0, "grad_norm": optax.tree.norm(grads)}
    new = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      metrics={k: state.metrics[k] + sums[k] for k in state.metrics},
    )
    if level is None or not state.batch_stats:
      new = new.replace(batch_stats=whole)
    else:
      if full_pass is not None:
        new = Level(0, {}).with_statistics(new, whole)
      new = level.with_statistics(new, stats)
    return placement.constrain(new, new.params), total

  return step


def make_dispatch(
  step: Callable, steps: int
) -> Callable[[TrainState, Data], tuple[TrainState, jax.Array]]:
  """Compiles several steps as one call: (state, data) -> (state, losses).

  On CPUs use one step per call, see `accumulate.unrolls`.
  """

  def scan(state: TrainState, data: Data):
    return jax.lax.scan(lambda s, _: step(s, data), state, length=steps)

  def single(state: TrainState, data: Data):
    state, loss = step(state, data)
    return state, loss[None]

  return jax.jit(single if steps == 1 else scan, donate_argnums=0)
