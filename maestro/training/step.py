"""The training state and one step of training, as pure functions."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maestro import lowrank
from maestro.introspect import mode
from maestro.parallel.mesh import split_batch
from maestro.parallel.rules import Placement
from maestro.training import average, losses
from maestro.training.accumulate import mean_gradient, unrolls
from maestro.training.config import FullPass
from maestro.training.levels import Level
from maestro.training.state import TrainState

# What of a forward pass is kept for the backward one; the rest is computed
# again. "dots" keeps products, convolutions too.
POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,
  "all": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_with_no_batch_dims": (
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}

# inputs [n, ...], targets [n, ...] and order [n]; or those of a batch alone
Data = Mapping[str, jax.Array]


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
  remat: str = "none",
  ema: float | None = None,
  label_smoothing: float = 0.0,
  lengths: Sequence[int] | None = None,
) -> Callable[[TrainState, Data], tuple[TrainState, jax.Array]]:
  """Returns step(state, data) -> (state, loss of this step).

    ranks_t = sampler(key_t, ranks)
    loss = task(network at ranks_t) + lam * penalty(params, ranks)

  The batch is the next `batch_size` entries of data["order"], gathered and
  preprocessed on the device; without an order, data is the batch. The returned
  loss includes the penalty. Layers that `ranks_t` does not name run as they are
  stored.

  At a level of a nested network, the network is the one cut to its ranks, which
  are shapes: what lies beyond costs nothing and has no gradient. The statistics
  are the level's own; those of the whole network are the largest level's. With
  a full pass that one is trained in every step, and teaches the level.

  Parameters, and what the optimizer holds of them, stay where `placement` has
  them; the batch is split over its mesh. Where a controller moves the weight of
  the optimizer's proximal step, the state holds it.

  With `accumulate` = k, a batch runs as k micro-batches, see
  `training.accumulate`; their gradients are averaged in float32. Images are
  preprocessed and ranks sampled once a step, so only dropout and the statistics
  of batch norm, which are those of the micro-batches in order, are not the
  plain step's.

  Texts are cut, on their last axis, to the least of `lengths` that leaves out
  nothing but padding (tokens 0): one program holds a branch for each. Means are
  over their tokens, of micro-batches too.

  `remat`, a key of POLICIES, says what is kept for the backward pass. Moving
  averages, if the state has any, follow with the decay `ema`.
  """
  example_loss: Callable = losses.LOSSES[loss]
  if label_smoothing:
    example_loss = functools.partial(example_loss, smoothing=label_smoothing)
  task = _make_task(model, example_loss, full_pass, placement, level, remat)
  gradient = _make_gradient(task, loss, placement, accumulate)

  def step(state: TrainState, data: Data) -> tuple[TrainState, jax.Array]:
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = jax.random.fold_in(key, state.step)
    key_rank, key_image, key_dropout = jax.random.split(key, 3)
    x, y = data["inputs"], data["targets"]
    if "order" in data:
      start = (state.step % steps_per_epoch) * batch_size
      batch = jax.lax.dynamic_slice_in_dim(data["order"], start, batch_size)
      x, y = x[batch], y[batch]
    x, y = split_batch((x, y), placement.mesh)
    x = preprocess(x, key_image)
    ranks = (sampler(key_rank, state.ranks), state.ranks)

    live, own = state.ranks, state.batch_stats
    if level is not None:
      live = level.ranks
      own = level.statistics(state) if own else own

    def penalty_of(params):
      if not lam or penalty is None:
        return jnp.zeros((), jnp.float32)
      part = params if level is None else lowrank.truncate(params, live)
      return lam * penalty(part, live)

    total, carried, sums, added, grads = _at_length(
      functools.partial(
        gradient,
        state.params,
        ranks,
        (own, state.batch_stats),
        penalty_of,
        key_dropout,
        losses.weight(y),  # of the whole batch: its parts add up to it
      ),
      *(x, y, lengths),
    )
    grads = placement.constrain(grads, state.params)
    force = {"lam": state.controls["lam"]} if state.controls else {}
    updates, opt_state = optax.with_extra_args_support(tx).update(
      grads, state.opt_state, state.params, **force
    )
    sums |= {"penalty": added}
    sums |= {"steps": 1.0, "grad_norm": optax.tree.norm(grads)}
    new = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      metrics={k: state.metrics[k] + sums[k] for k in state.metrics},
    )
    new = _with_statistics(new, carried, level, full_pass is not None)
    if ema is not None:
      new = new.replace(
        ema=average.follow(state.ema, new.params, new.batch_stats, ema)
      )
    return placement.constrain(new, new.params), total

  return step


def _make_gradient(
  task: Callable, loss: str, placement: Placement, accumulate: int
) -> Callable[..., Any]:
  """Returns gradient(params, ranks, before, penalty_of, key, weight, x, y).

    -> (task + penalty, carried, sums for metrics, penalty, gradient for params)

  `before` is what is carried into the batch, in one or more micro-batches.
  """

  def whole(params, ranks, before, penalty_of, key, weight, x, y):
    def objective(params):
      value, (out, carried) = task(params, ranks, before, x, y, key, weight)
      added = penalty_of(params)
      sums = _sums(loss, value, out, y, weight)
      return value + added, (carried, sums, added)

    grad = jax.value_and_grad(objective, has_aux=True)
    (total, (carried, sums, added)), grads = grad(params)
    return total, carried, sums, added, grads

  def in_parts(params, ranks, before, penalty_of, key, weight, x, y):
    def of_part(params, carried, part, i):
      x, y = split_batch(part, placement.mesh)
      own = jax.random.fold_in(key, i)
      grad = jax.value_and_grad(task, has_aux=True)
      (value, (out, carried)), grads = grad(
        params, ranks, carried, x, y, own, weight
      )
      sums = _sums(loss, value, out, y, weight)
      return (sums, carried), placement.constrain(grads, params)

    unroll = unrolls(placement.mesh)
    sums, grads, carried = mean_gradient(
      of_part, params, before, (x, y), accumulate, unroll=unroll
    )
    added, more = jax.value_and_grad(penalty_of)(params)
    grads = jax.tree.map(jnp.add, grads, more)
    return sums["loss"] + added, carried, sums, added, grads

  return whole if accumulate == 1 else in_parts


def _at_length(
  f: Callable, x: jax.Array, y: jax.Array, lengths: Sequence[int] | None
) -> Any:
  """f(x, y) of what is left of tokens [b, ..., t] and labels [b, t]."""
  if lengths is None or len(lengths) == 1:
    return f(x, y)
  used = jnp.any(x != 0, axis=tuple(range(x.ndim - 1)))
  used |= jnp.any(y >= 0, axis=0)
  longest = jnp.max(jnp.where(used, jnp.arange(1, len(used) + 1), 0))
  at = jnp.searchsorted(jnp.asarray(lengths), longest)
  branches = [lambda x, y, n=n: f(x[..., :n], y[..., :n]) for n in lengths]
  return jax.lax.switch(at, branches, x, y)


def _make_task(
  model: Any,
  example_loss: Callable,
  full_pass: FullPass | None,
  placement: Placement,
  level: Level | None,
  remat: str,
) -> Callable[..., tuple[jax.Array, Any]]:
  """Returns task(params, ranks, carried, x, y, key, weight).

    -> (weight * mean of example_loss(y', y), (y', carried))

  `ranks` are those sampled and those that are live; `carried` the statistics of
  the network that runs at the first ones, and of the whole one.
  """
  told = mode(model, train=True)

  def apply(params, ranks, stats, x, key):
    variables = {"params": params}
    if ranks:
      variables["ranks"] = ranks
    if not stats:
      y = model.apply(variables, x, **told, rngs={"dropout": key})
      return y, stats
    y, updates = model.apply(
      variables | {"batch_stats": stats},
      x,
      **told,
      rngs={"dropout": key},
      mutable=["batch_stats"],
    )
    return y, updates["batch_stats"]

  if remat != "none":
    apply = jax.checkpoint(apply, policy=POLICIES[remat])

  def task(params, ranks, carried, x, y, key, weight):
    (sampled, live), (own, whole) = ranks, carried
    full = used = placement.gathered(params)
    if level is not None:
      used = lowrank.truncate(full, level.ranks)
    out, stats = apply(used, sampled, own, x, key)
    value = jnp.mean(example_loss(out, y)) * weight
    if full_pass is None:
      whole = stats
    else:
      # The full network owns the statistics and teaches the sampled one; a
      # level has its own, too.
      live = live if level is None else {}
      teacher, whole = apply(full, live, whole, x, key)
      soft = 0.0
      if full_pass.distill:
        soft = jnp.mean(
          losses.distillation(out, teacher, full_pass.temperature, y)
        )
        soft *= weight
      value = (1 - full_pass.distill) * value + full_pass.distill * soft
      value += jnp.mean(example_loss(teacher, y)) * weight
    return value, (out, (stats, whole))

  return task


def _sums(
  loss: str, value: jax.Array, out: Any, y: Any, weight: Any
) -> dict[str, Any]:
  """What a batch adds to the training metrics, but for the penalty."""
  metrics = losses.METRICS[loss]
  sums = {name: jnp.mean(f(out, y)) * weight for name, f in metrics.items()}
  return sums | {"loss": value}


def _with_statistics(
  state: TrainState, carried: Any, level: Level | None, taught: bool
) -> TrainState:
  """Sets the statistics of what has run: a level's, the whole network's."""
  stats, whole = carried
  if level is None or not state.batch_stats:
    return state.replace(batch_stats=whole)
  if taught:
    state = Level(0, {}).with_statistics(state, whole)
  return level.with_statistics(state, stats)


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
