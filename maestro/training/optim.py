"""Optimizers from optax, and the truncation of their state."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from maestro import lowrank, schema, trees
from maestro.errors import UserError
from maestro.methods import prox
from maestro.schema import ConfigError, Positive, Range, Weight
from maestro.training import muon as muon_lib
from maestro.trees import LayerSpec


class OptimizerError(UserError):
  """An optimizer's state does not follow its parameters when they shrink."""


# ---------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------


Beta = Annotated[float, Range("[0, 1)")]
Mask = Callable[[Any], Any]  # params -> a tree of bools, which are decayed
Parts = tuple[optax.GradientTransformation, ...]  # to be chained


def sgd(
  schedule: optax.Schedule,
  decayed: Mask,
  *,
  momentum: Beta | None = None,
  nesterov: bool = False,
  weight_decay: Weight = 0.0,
) -> Parts:
  """Descends along the gradient; decay is added to that (L2)."""
  step = optax.sgd(schedule, momentum=momentum, nesterov=nesterov)
  return (*_l2(weight_decay, decayed), step)


def adam(
  schedule: optax.Schedule,
  decayed: Mask,
  *,
  b1: Beta = 0.9,
  b2: Beta = 0.999,
  eps: Weight = 1e-8,
  nesterov: bool = False,
  weight_decay: Weight = 0.0,
) -> Parts:
  """Adam; decay is added to the gradient (L2)."""
  step = optax.adam(schedule, b1=b1, b2=b2, eps=eps, nesterov=nesterov)
  return (*_l2(weight_decay, decayed), step)


def adamw(
  schedule: optax.Schedule,
  decayed: Mask,
  *,
  b1: Beta = 0.9,
  b2: Beta = 0.999,
  eps: Weight = 1e-8,
  nesterov: bool = False,
  weight_decay: Weight = 0.0,
) -> Parts:
  """Adam with decay beside it, learning rate * weight_decay a step."""
  decay = {"weight_decay": weight_decay, "mask": decayed}
  betas = {"b1": b1, "b2": b2, "eps": eps, "nesterov": nesterov}
  return (optax.adamw(schedule, **betas, **decay),)


def lion(
  schedule: optax.Schedule,
  decayed: Mask,
  *,
  b1: Beta = 0.9,
  b2: Beta = 0.99,
  weight_decay: Weight = 0.0,
) -> Parts:
  """Lion, with decay beside it."""
  decay = {"weight_decay": weight_decay, "mask": decayed}
  return (optax.lion(schedule, b1=b1, b2=b2, **decay),)


def muon(
  schedule: optax.Schedule,
  decayed: Mask,
  layers: Mapping[str, LayerSpec],
  *,
  beta: Beta = 0.95,
  nesterov: bool = True,
  adam_rate: Weight = 1.0,
  b1: Beta = 0.9,
  b2: Beta = 0.95,
  eps: Weight = 1e-8,
  weight_decay: Weight = 0.0,
) -> Parts:
  """Muon for kernels and factors, Adam for all else; decay is beside both.

  `beta` is Muon's momentum, see `maestro.training.muon`. The rest, with tables,
  biases and norms, has Adam's steps, at `adam_rate` of the learning rate.
  """
  matrices = optax.chain(
    optax.trace(beta, nesterov=nesterov), muon_lib.orthogonalize(layers)
  )
  rest = optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps), optax.scale(adam_rate)
  )
  split = functools.partial(muon_lib.split, layers=layers)
  return (
    optax.partition({"matrices": matrices, "rest": rest}, split),
    *_l2(weight_decay, decayed),
    optax.scale_by_learning_rate(schedule),
  )


def _l2(weight_decay: float, decayed: Mask) -> Parts:
  decay = optax.add_decayed_weights(weight_decay, decayed)
  return (decay,) if weight_decay else ()


OPTIMIZERS: dict[str, Callable[..., Parts]] = {
  "adam": adam,
  "adamw": adamw,
  "lion": lion,
  "muon": muon,
  "sgd": sgd,
}


def make(
  section: Mapping[str, Any],
  schedule: optax.Schedule,
  layers: Mapping[str, LayerSpec],
) -> optax.GradientTransformation:
  """Builds config.optimizer: a name in OPTIMIZERS and its options.

  What a config does not say is the default that stands there, whatever that of
  the library is. Two more options hold for all: `clip_norm` (None is off)
  bounds the global norm of the gradients; `decay_paths` is a regular expression
  of the parameters that weight_decay acts on, matched in full against their
  slash-joined paths (".*", all of them; r".*(kernel|u|v)" leaves out biases and
  norms). `layers` tells Muon what is a matrix.

  Raises:
    ConfigError: unknown name or option, or one out of range.
  """
  where = "config.optimizer"
  if section.get("name") == "adafactor":
    raise ConfigError(
      f"{where}.name: the state of 'adafactor' does not mirror the"
      " parameters, so it cannot be truncated with them; use one of"
      f" {sorted(OPTIMIZERS)}"
    )
  common = {
    key: section[key] for key in ("clip_norm", "decay_paths") if key in section
  }
  own = {key: value for key, value in section.items() if key not in common}
  options = _Common(**schema.bind(_Common, common, where))
  given = ("schedule", "decayed", "layers")
  function = schema.make(OPTIMIZERS, own, where, given)
  try:
    pattern = re.compile(options.decay_paths)
  except re.error as error:
    raise ConfigError(
      f"{where}.decay_paths: {options.decay_paths!r} is no regular expression:"
      f" {error}"
    ) from error
  if "layers" in inspect.signature(function).parameters:
    function = functools.partial(function, layers=layers)
  parts = function(schedule, functools.partial(_decayed, pattern))
  if options.clip_norm is not None:
    parts = (optax.clip_by_global_norm(options.clip_norm), *parts)
  return optax.chain(*parts)


@dataclasses.dataclass(frozen=True)
class _Common:
  clip_norm: Positive | None = None
  decay_paths: str = ".*"


def _decayed(pattern: re.Pattern, params: trees.Tree) -> Any:
  """Tells for each parameter whether it decays."""
  found = jax.tree_util.tree_map_with_path(
    lambda path, _: bool(pattern.fullmatch("/".join(trees.names_of(path)))),
    params,
  )
  if not any(jax.tree.leaves(found)):
    raise ConfigError(
      f"config.optimizer.decay_paths: {pattern.pattern!r} matches none of the"
      f" parameters, such as {'/'.join(trees.names_of(_first_path(params)))!r}"
    )
  return found


def _first_path(tree: trees.Tree) -> Any:
  return jax.tree_util.tree_leaves_with_path(tree)[0][0]


# State classes with a count that a schedule reads.
_SCHEDULED = (optax.ScaleByScheduleState, prox.ProximalState)


def restart(
  tx: optax.GradientTransformation, params: trees.Tree, step: jax.Array
) -> Any:
  """Returns a new state for `params` whose schedules go on at `step`."""

  def go_on(node):
    if not isinstance(node, _SCHEDULED):
      return node
    return node._replace(
      count=jnp.asarray(step, jnp.result_type(node.count)).copy()
    )

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
  """Applies edit(leaf, "u" or "v", rank) where a leaf mirrors a factor."""
  factors = {
    f"{layer}/{name}" if layer else name: (name, rank)
    for layer, rank in trees.flatten_ranks(ranks).items()
    for name in ("u", "v")
  }
  return trees.map_mirrored(
    state,
    params,
    lambda leaf, path: edit(leaf, *factors[path]) if path in factors else leaf,
  )


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
        f"optimizer state {'/'.join(trees.names_of(path))!r} has shape"
        f" {jnp.shape(leaf)}, but {want.shape} fits the truncated parameters:"
        " this optimizer's state does not mirror them; use sgd, adam, adamw or"
        " lion"
      )
  return cut
