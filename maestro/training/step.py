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

    def objective(params):
      full = placement.gathered(params)
      part, used = params, full
      if level is not None:
        part, used = (lowrank.truncate(tree, live) for tree in (part, used))
      out, stats = apply(used, sampled, own, x, key_dropout)
      whole = stats
      task = jnp.mean(example_loss(out, y))
      if full_pass is not None:
        # The full network owns the statistics and teaches the sampled one; a
        # level has its own, too.
        ranks = state.ranks if level is None else {}
        teacher, whole = apply(full, ranks, state.batch_stats, x, key_dropout)
        soft = 0.0
        if full_pass.distill:
          soft = jnp.mean(
            losses.distillation(out, teacher, full_pass.temperature)
          )
        task = (1 - full_pass.distill) * task + full_pass.distill * soft
        task += jnp.mean(example_loss(teacher, y))
      added = jnp.zeros((), jnp.float32)
      if lam and penalty is not None:
        added = lam * penalty(part, live)
      sums = {name: jnp.mean(f(out, y)) for name, f in metrics.items()}
      sums |= {"loss": task, "penalty": added}
      return task + added, (stats, whole, sums)

    grad = jax.value_and_grad(objective, has_aux=True)
    (total, (stats, whole, sums)), grads = grad(state.params)
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

  On CPUs use one step per call: there, the gradient of a convolution inside a
  loop is many times slower than outside of it.
  """

  def scan(state: TrainState, data: Data):
    return jax.lax.scan(lambda s, _: step(s, data), state, length=steps)

  def single(state: TrainState, data: Data):
    state, loss = step(state, data)
    return state, loss[None]

  return jax.jit(single if steps == 1 else scan, donate_argnums=0)
