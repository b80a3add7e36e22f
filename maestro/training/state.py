"""The training state, and its surgery: set to ranks, cut, restart."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from maestro import lowrank, streams, trees
from maestro.training import average, losses, optim


class TrainState(struct.PyTreeNode):
  """Everything that a run needs to go on; no functions in it.

  Attributes:
    step: int32, steps done.
    params: parameters; dead components (at or beyond `ranks`) are zero.
    batch_stats: moving statistics of normalisation layers, if any.
    opt_state: the optimizer's state, zero for dead components too.
    ranks: current rank of every factored layer.
    key: uint32 data of the key from which each step derives its own.
    metrics: float32 sums over the steps since training metrics were written.
    levels: of a nested network, {"ranks": a rank tree with a leading axis of
      levels, "batch_stats": their statistics, likewise}; {} for one size.
    controls: {"lam": float32 weight of the proximal step, "force": the one that
      it has when it has any} while a controller moves it; {} where it is the
      config's.
    ema: {"params": ..., "batch_stats": ...}, their moving averages; {} where
      none is kept, see `training.average`.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ranks: Any
  key: jax.Array
  metrics: dict[str, jax.Array]
  levels: Any = struct.field(default_factory=dict)
  controls: Any = struct.field(default_factory=dict)
  ema: Any = struct.field(default_factory=dict)


def zero_metrics(loss: str) -> dict[str, jax.Array]:
  """Returns the sums that `make_step` adds to, at zero."""
  names = ("steps", "loss", "penalty", "grad_norm", *losses.METRICS[loss])
  return {name: jnp.zeros((), jnp.float32) for name in names}


def new_state(
  seed: int,
  loss: str,
  tx: optax.GradientTransformation,
  params: trees.Tree,
  batch_stats: trees.Tree,
  ranks: trees.Tree,
  levels: trees.Tree | None = None,
  controls: trees.Tree | None = None,
  *,
  averages: bool = False,
) -> TrainState:
  """Returns the state at step 0; with moving averages, if it is to keep any."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=tx.init(params),
    ranks=ranks,
    key=jax.random.key_data(streams.stream(seed, "steps")),
    metrics=zero_metrics(loss),
    levels=levels or {},
    controls=controls or {},
    ema=average.begin(params, batch_stats) if averages else {},
  )


def restore(checkpoints, step, new_state, placement) -> TrainState:
  """Loads a checkpoint to its place; its metadata tells the factors' shapes."""
  shapes, _ = checkpoints.shapes(step)
  parts = ("params", "batch_stats", "ranks")
  given = [shapes[part] for part in parts]
  given += [shapes.get(part, {}) for part in ("levels", "controls")]
  abstract = jax.eval_shape(new_state, *given)
  abstract = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    abstract,
    placement.shardings(abstract, abstract.params),
  )
  return checkpoints.load(step, abstract)[0]


# ---------------------------------------------------------------------------
# Shrinking and cutting
# ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="rule", donate_argnums=0)
def shrink_state(state: TrainState, rule: Callable) -> TrainState:
  """Lowers ranks to rule(params, ranks)."""
  return at_ranks(state, rule(state.params, state.ranks))


def at_ranks(state: TrainState, ranks: Any) -> TrainState:
  """Sets lower ranks and zeroes what falls beyond them, momentum included.

  Zeroes stay zero: their gradients, penalty and decay are zero. So a component
  that is given up cannot come back, and cutting it off changes nothing.
  """
  if ranks is state.ranks:
    return state
  return state.replace(
    ranks=ranks,
    params=lowrank.mask(state.params, ranks),
    opt_state=optim.mask(state.opt_state, state.params, ranks),
    ema=_edited(state.ema, lambda params: lowrank.mask(params, ranks)),
  )


def truncate_state(
  tx: optax.GradientTransformation, state: TrainState, multiple_of: int
) -> TrainState:
  """Cuts parameters and optimizer state to the current ranks."""
  if not state.ranks:
    return state
  return cut_to(tx, state, jax.device_get(state.ranks), multiple_of)


def cut_to(
  tx: optax.GradientTransformation,
  state: TrainState,
  ranks: Any,
  multiple_of: int = 1,
) -> TrainState:
  """Cuts parameters and what mirrors them to ranks, on the host."""

  def cut(params):
    return lowrank.truncate(params, ranks, multiple_of)

  return state.replace(
    params=cut(state.params),
    opt_state=optim.truncate(
      tx, state.opt_state, state.params, ranks, multiple_of
    ),
    ema=_edited(state.ema, cut),
  )


def _edited(ema: Any, edit: Callable[[Any], Any]) -> Any:
  return ema | {"params": edit(ema["params"])} if ema else ema


def begin_average(state: TrainState) -> TrainState:
  """Starts the moving average anew at the weights, if the state has one."""
  if not state.ema:
    return state
  return state.replace(ema=average.begin(state.params, state.batch_stats))


def averaged(state: TrainState) -> TrainState:
  """Returns the network that a run stands for: its average, if it has one."""
  return state.replace(**state.ema) if state.ema else state


def form_of(params: Any) -> str:
  """Names the shapes of a parameter tree by its stored ranks."""
  paths = trees.factored(params)
  return "ranks " + ",".join(
    f"{path}:{node['u'].shape[-1]}" for path, node in paths.items()
  )


# ---------------------------------------------------------------------------
# What is told
# ---------------------------------------------------------------------------


def variables_of(state: TrainState) -> dict[str, Any]:
  variables = {"params": state.params}
  if state.batch_stats:
    variables["batch_stats"] = state.batch_stats
  return variables


def reset_metrics(state: TrainState) -> TrainState:
  """Begins a new window of training metrics."""
  zeros = {
    name: jax.device_put(np.zeros((), np.float32), x.sharding)
    for name, x in state.metrics.items()
  }
  return state.replace(metrics=zeros)


def added(
  sums: Mapping[str, float], window: Mapping[str, Any]
) -> dict[str, float]:
  """Adds the sums of a window of steps, read from the devices, to others."""
  host = jax.device_get(dict(window))
  return {name: sums.get(name, 0.0) + float(x) for name, x in host.items()}


def means(sums: Mapping[str, float]) -> dict[str, float]:
  """Turns sums over steps into means per step."""
  rest = {name: value for name, value in sums.items() if name != "steps"}
  return {f"train/{k}": v / max(sums["steps"], 1.0) for k, v in rest.items()}


def plain_ranks(ranks: Any) -> dict[str, Any]:
  """Returns {layer: rank} as JSON has it."""
  flat = trees.flatten_ranks(jax.device_get(ranks))
  return {path: np.asarray(rank).tolist() for path, rank in flat.items()}
