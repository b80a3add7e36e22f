"""Optimizers and schedules from optax, and the truncation of their state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maestro import lowrank, trees
from maestro.errors import UserError
from maestro.methods import prox
from maestro.schema import ConfigError, bind, choose


class OptimizerError(UserError):
  """An optimizer's state does not follow its parameters when they shrink."""


# ---------------------------------------------------------------------------
# Schedules: (steps per epoch, epochs of the phase, options) -> optax schedule
# ---------------------------------------------------------------------------


def constant(
  steps_per_epoch: int, epochs: int, *, learning_rate: float
) -> optax.Schedule:
  """Keeps one learning rate."""
  del steps_per_epoch, epochs
  return optax.constant_schedule(learning_rate)


def piecewise(
  steps_per_epoch: int,
  epochs: int,
  *,
  learning_rate: float,
  boundaries: Sequence[float],
  factor: float = 0.1,
) -> optax.Schedule:
  """Multiplies by `factor` at each boundary, a fraction of the phase."""
  for b in boundaries:
    if not 0 < b < 1:
      raise ConfigError(
        f"schedule.boundaries: {b} is no fraction of the phase in (0, 1)"
      )
  total = steps_per_epoch * epochs
  return optax.piecewise_constant_schedule(
    learning_rate, {round(b * total): factor for b in boundaries}
  )


def cosine(
  steps_per_epoch: int,
  epochs: int,
  *,
  learning_rate: float,
  warmup_epochs: float = 0.0,
  final_fraction: float = 0.0,
) -> optax.Schedule:
  """Rises linearly, then falls along a cosine to a fraction of the peak."""
  total = max(steps_per_epoch * epochs, 1)
  warmup = round(warmup_epochs * steps_per_epoch)
  if warmup >= total:
    raise ConfigError(
      f"schedule.warmup_epochs: {warmup_epochs} leaves nothing of a phase of"
      f" {epochs} epochs"
    )
  decay = optax.cosine_decay_schedule(
    learning_rate, total - warmup, final_fraction
  )
  if not warmup:
    return decay
  rise = optax.linear_schedule(0.0, learning_rate, warmup)
  return optax.join_schedules([rise, decay], [warmup])


SCHEDULES = {"constant": constant, "cosine": cosine, "piecewise": piecewise}


def make_schedule(
  phases: Sequence[tuple[str, int, Mapping]], steps_per_epoch: int
) -> optax.Schedule:
  """Joins the schedules of phases: (name, epochs, section) each."""
  schedules, boundaries, start = [], [], 0
  for name, epochs, section in phases:
    if not epochs:
      continue
    where = f"config.{name}.schedule"
    function, options = choose(SCHEDULES, section, where)
    options = bind(function, options, where, ("steps_per_epoch", "epochs"))
    schedules.append(function(steps_per_epoch, epochs, **options))
    start += epochs * steps_per_epoch
    boundaries.append(start)
  return optax.join_schedules(schedules, boundaries[:-1])


# ---------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adam": optax.adam,
  "adamw": optax.adamw,
  "lion": optax.lion,
  "sgd": optax.sgd,
}
_DECOUPLED = ("adamw", "lion")


def make(
  section: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Builds config.optimizer: a name in OPTIMIZERS and its optax options.

  Two more options hold for all: `clip_norm` (None is off) bounds the global
  norm of the gradients; `weight_decay` (0) is added to the gradients of all
  parameters (L2), but is the optimizer's own, decoupled one for adamw, lion.

  Raises:
    ConfigError: unknown name or option.
  """
  where = "config.optimizer"
  if section.get("name") in ("adafactor", "muon"):
    raise ConfigError(
      f"{where}.name: the state of {section['name']!r} does not mirror the"
      " parameters, so it cannot be truncated with them; use one of"
      f" {sorted(OPTIMIZERS)}"
    )
  function, options = choose(OPTIMIZERS, section, where)
  clip_norm = options.pop("clip_norm", None)
  decay = 0.0
  if section["name"] not in _DECOUPLED:
    decay = options.pop("weight_decay", 0.0)
  options = bind(function, options, where, ("learning_rate",))
  if not _is_number(decay) or decay < 0:
    raise ConfigError(f"{where}.weight_decay: {decay!r} is no number >= 0")
  momentum = options.get("momentum")
  if momentum is not None and not (_is_number(momentum) and 0 <= momentum < 1):
    raise ConfigError(f"{where}.momentum: {momentum!r} is no number in [0, 1)")
  parts = []
  if clip_norm is not None:
    if not _is_number(clip_norm) or not clip_norm > 0:
      raise ConfigError(f"{where}.clip_norm: {clip_norm!r} is no number > 0")
    parts.append(optax.clip_by_global_norm(clip_norm))
  if decay:
    parts.append(optax.add_decayed_weights(decay))
  return optax.chain(*parts, function(schedule, **options))


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


# State classes with a count that a schedule reads.
_SCHEDULED = (optax.ScaleByScheduleState, prox.ProximalState)


def restart(
  tx: optax.GradientTransformation, params: trees.Tree, step: jax.Array
) -> Any:
  """Returns a new state for `params` whose schedules go on at `step`."""

  def go_on(node):
    if not isinstance(node, _SCHEDULED):
      return node
    return node._replace(count=jnp.asarray(step, node.count.dtype).copy())

  return jax.tree.map(
    go_on, tx.init(params), is_leaf=lambda node: isinstance(node, _SCHEDULED)
  )


# ---------------------------------------------------------------------------
# Optimizer state under shrinking ranks
# ---------------------------------------------------------------------------

# State classes whose leaves are no component-wise function of the gradients,
# even where a leaf happens to have a parameter's shape.
_REFUSED = {
  "FactoredState": "Adafactor",
  "MuonState": "Muon",
  "ScaleByShampooState": "Shampoo",
  "SM3State": "SM3",
  "ScaleBySM3State": "SM3",
}


def _names(path) -> tuple[str, ...]:
  """Turns a key path into names; fields and dictionary keys alike."""
  return tuple(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    for k in path
  )


def _refuse(state: Any) -> None:
  def visit(node):
    name = type(node).__name__
    if name in _REFUSED:
      raise OptimizerError(
        f"the state of {_REFUSED[name]} ({name}) does not mirror the"
        " parameters component by component, so it cannot be truncated with"
        " them; use an optimizer such as sgd, adam, adamw or lion, or keep"
        " config.truncate from cutting"
      )
    if isinstance(node, Mapping):
      children = list(node.values())
    elif isinstance(node, list | tuple):
      children = list(node)
    else:
      children = list(vars(node).values()) if hasattr(node, "__dict__") else []
    for child in children:
      if not isinstance(child, jax.Array):
        visit(child)

  visit(state)


def _map_factors(state: Any, params: trees.Tree, ranks: trees.Tree, edit):
  """Applies edit(leaf, "u" or "v", rank) where a leaf mirrors a factor.

  A leaf mirrors a parameter if its path ends in the parameter's path and it
  has its shape; of several such parameters the one with the longest path.
  """
  shapes = {
    _names(path): jnp.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  factors = {
    (*(layer.split("/") if layer else ()), name): rank
    for layer, rank in trees.flatten_ranks(ranks).items()
    for name in ("u", "v")
  }

  def visit(path, leaf):
    names = _names(path)
    for start in range(len(names)):
      suffix = names[start:]
      if shapes.get(suffix) == jnp.shape(leaf):
        if suffix in factors:
          return edit(leaf, suffix[-1], factors[suffix])
        return leaf
    return leaf

  return jax.tree_util.tree_map_with_path(visit, state)


def mask(state: Any, params: trees.Tree, ranks: trees.Tree) -> Any:
  """Zeroes what an optimizer remembers of dead components; shapes stay."""
  _refuse(state)
  return _map_factors(state, params, ranks, trees.mask_factor)


def truncate(
  tx: optax.GradientTransformation,
  state: Any,
  params: trees.Tree,
  ranks: trees.Tree,
  multiple_of: int = 1,
) -> Any:
  """Cuts an optimizer's state as `lowrank.truncate` cuts its parameters.

  Exact for every optimizer whose state mirrors the parameters leaf by leaf
  (sgd, adam, lion, schedule-free, and masked, partition, inject_hyperparams,
  MultiSteps around them): the next update of a surviving component is the one
  it would have had.

  Args:
    tx: the optimizer.
    state: its state for `params`.
    params: parameters *before* truncation.
    ranks: concrete ranks.
    multiple_of: as in `lowrank.truncate`.

  Raises:
    OptimizerError: the result is not a state that `tx` would make for the
      truncated parameters; names the leaf.
  """
  _refuse(state)
  small = jax.eval_shape(
    lambda p: lowrank.truncate(p, ranks, multiple_of), params
  )
  cut = _map_factors(
    state,
    params,
    ranks,
    lambda x, name, rank: lowrank.cut_factor(x, name, rank, multiple_of),
  )
  found = jax.tree_util.tree_leaves_with_path(cut)
  wanted = jax.tree.leaves(jax.eval_shape(tx.init, small))
  if len(found) != len(wanted):
    raise OptimizerError(
      f"the optimizer's state has {len(found)} leaves, but {len(wanted)} after"
      " truncation: it cannot be truncated; use sgd, adam, adamw or lion"
    )
  for (path, leaf), want in zip(found, wanted, strict=True):
    if jnp.shape(leaf) != want.shape:
      raise OptimizerError(
        f"optimizer state {'/'.join(_names(path))!r} has shape"
        f" {jnp.shape(leaf)}, but {want.shape} fits the truncated parameters:"
        " this optimizer's state does not mirror them; use sgd, adam, adamw or"
        " lion"
      )
  return cut
