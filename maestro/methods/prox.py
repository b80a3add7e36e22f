"""The group lasso as an exact proximal step: ranks are counted by zeros.

`lowrank.group_lasso` in the loss leaves vanished components hovering above
zero, so that a threshold must say what counts as zero. Here the penalty is no
part of the loss: after each optimizer step its proximal operator is applied,
which sets components to exactly zero. docs/prox.md has the derivation.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maestro import lowrank, trees
from maestro.errors import UserError
from maestro.trees import LayerSpec, Tree

KINDS = ("hierarchical", "flat")


class ProxError(UserError):
  """A strength or a kind of the proximal step is impossible; names it."""


class ProximalState(NamedTuple):
  """State of `proximal`.

  Attributes:
    count: updates made so far, int32; the schedule's argument.
  """

  count: jax.typing.ArrayLike


def _check(kind: str, **strengths: Any) -> None:
  if kind not in KINDS:
    raise ProxError(f"lasso kind {kind!r} is unknown; use one of {KINDS}")
  for name, value in strengths.items():
    if trees.is_traced(value) or callable(value):
      continue
    try:
      good = math.isfinite(value) and value >= 0
    except TypeError:
      good = False
    if not good:
      raise ProxError(f"{name}={value!r} is no finite number >= 0")


@functools.partial(jax.jit, static_argnames="kind")
def _scales(n: jax.Array, t: jax.Array, kind: str) -> jax.Array:
  """Scales of components [F, R] from their norms [F, R] and strengths [F]."""

  def loss(s):  # t / s, or 1 where the group vanishes; NaN stays NaN
    each = jnp.broadcast_to(t, s.shape)
    return jnp.where(s <= each, 1.0, each / jnp.where(s == 0, 1.0, s))

  if kind == "flat":
    return 1.0 - loss(n.T).T

  def step(inner, n_b):
    s = jnp.sqrt(n_b * n_b + inner * inner)
    # Not s - t, whose rounding errors have one sign and add up over the scan.
    return s * (1.0 - loss(s)), s

  # Unrolled, as each step is far shorter than the start of a kernel.
  zero = jnp.zeros(n.shape[:1], n.dtype)
  _, s = jax.lax.scan(step, zero, n.T, reverse=True, unroll=8)
  # The product over b <= k, by logarithms: it has up to R factors close to 1,
  # each of which would be rounded. exp(-inf) is an exact zero.
  return jnp.exp(jax.lax.cumsum(jnp.log1p(-loss(s)), axis=0)).T


def prox(
  params: Tree,
  ranks: Tree | None,
  t: jax.typing.ArrayLike,
  kind: str = "hierarchical",
  weights: Mapping[str, float] | None = None,
) -> dict:
  """Applies the proximal operator of the group lasso to all factors, exactly.

    argmin_z  1/2 ||z - params||^2 + t * group_lasso(z, ranks, kind, weights)

  hierarchical: component k is multiplied by prod_{b <= k} c_b, where
    c_b = max(0, 1 - t / s_b) and s_b is the norm of suffix b as the steps of
    the smaller suffixes b + 1 .. r - 1 have left it; with weights, t is that
    of the layer
  flat: component k is multiplied by max(0, 1 - t / n_k), n_k its norm

  Costs O(size of the factors) and one scan over the largest rank for the whole
  tree. Components that vanish are exact zeros, dead ones become or stay zero.
  A NaN spreads over its factor rather than turning into a zero. Can be traced.

  Args:
    params: parameters with factored layers; all else is left untouched.
    ranks: current ranks; None takes every stored component as live, which
      gives the same where dead components are zero.
    t: step size times lambda, >= 0.
    kind: "hierarchical" or "flat".
    weights: {layer path: what its groups count}, as in `group_lasso`.

  Raises:
    ProxError: unknown kind, or `t` negative or not finite.
  """
  _check(kind, t=t)
  ranks = lowrank.full_ranks(params) if ranks is None else ranks
  nodes = trees.factored(lowrank.mask(params, ranks))
  flat = trees.flatten_ranks(ranks)
  norms = {  # [*lead, R]
    (path, name): jnp.sqrt(lowrank.squared_norms(nodes[path][name], name, rank))
    for path, rank in flat.items()
    for name in ("u", "v")
  }
  R = max((n.shape[-1] for n in norms.values()), default=0)
  if R == 0:
    return trees.replace(params, {})
  # One scan serves all factors: components of norm zero at the end of the
  # shorter ones change nothing.
  rows = [
    jnp.pad(
      n.reshape((math.prod(n.shape[:-1]), n.shape[-1])),
      ((0, 0), (0, R - n.shape[-1])),
    )
    for n in norms.values()
  ]
  stacked = jnp.concatenate(rows)
  strengths = np.concatenate(
    [
      np.full(len(row), (weights or {}).get(path, 1.0))
      for (path, _), row in zip(norms, rows, strict=True)
    ]
  )
  t = jnp.asarray(t, stacked.dtype) * jnp.asarray(strengths, stacked.dtype)
  scales = _scales(stacked, t, kind)
  changes = {path: dict(nodes[path]) for path in flat}
  start = 0
  for (path, name), n in norms.items():
    x, stop = nodes[path][name], start + math.prod(n.shape[:-1])
    scale = scales[start:stop, : n.shape[-1]].reshape(n.shape)
    scale = jnp.expand_dims(scale, trees.component_axes(x, name, n.ndim - 1))
    changes[path][name] = (x * scale).astype(x.dtype)
    start = stop
  return trees.replace(params, changes)


def exact_ranks(params: Tree, ranks: Tree | None = None) -> dict:
  """Lowers each rank to the first ones that are not exactly zero: no threshold.

    r = 1 + max{b: u[:, b:] != 0 and v[b:, :] != 0}

  the number of suffixes with a number other than zero in both factors. All
  beyond adds exactly nothing to u @ v, so that `mask(params, exact_ranks)` is
  the same function. A NaN is not zero: it never lowers a rank. A zero between
  others (as the flat lasso leaves them) does not lower it either. Ranks never
  rise. Can be traced.

  Args:
    params: parameters with factored layers.
    ranks: current ranks; None takes every stored component as live.

  Returns:
    A rank tree, int32.
  """
  ranks = lowrank.full_ranks(params) if ranks is None else ranks
  nodes = trees.factored(lowrank.mask(params, ranks))
  flat = {}
  for path, rank in trees.flatten_ranks(ranks).items():
    counts = []
    for name in ("u", "v"):
      x = nodes[path][name]
      axes = trees.component_axes(x, name, jnp.ndim(rank))
      nonzero = jnp.any(x != 0, axis=axes)  # [*lead, R]
      last = jnp.arange(1, nonzero.shape[-1] + 1, dtype=jnp.int32)
      last = jnp.broadcast_to(last, nonzero.shape)
      counts.append(jnp.max(jnp.where(nonzero, last, 0), axis=-1, initial=0))
    flat[path] = jnp.minimum(*counts)
  return trees.unflatten_ranks(flat)


def proximal(
  learning_rate: optax.ScalarOrSchedule,
  lam: optax.ScalarOrSchedule,
  *,
  kind: str = "hierarchical",
  layers: Mapping[str, LayerSpec] | None = None,
  weights: Mapping[str, float] | None = None,
  momentum: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """Replaces an update d by prox(params + d) - params; the last in a chain.

    optax.chain(optax.sgd(schedule), prox.proximal(schedule, lam))

  with t = learning rate * lam in `prox`. The loss must not hold the lasso as
  well. Exact zeros survive `optax.apply_updates`: there the update is -params.
  Behind plain SGD this is the proximal gradient method; behind momentum mu the
  penalty counts (1 - mu) lam; behind Adam it is a heuristic: see docs/prox.md.
  Needs no ranks: dead components are zero, change nothing and stay zero.

  An update may be given its weight as one in the loss, which behind momentum mu
  is x / (1 - mu) here: tx.update(grads, state, params, lam=x).

  Args:
    learning_rate: the number or schedule that the optimizer before it uses.
    lam: weight of the lasso, >= 0, or its schedule.
    kind: "hierarchical" or "flat".
    layers: from `maestro.layers`; needed only where shapes do not tell the
      leading axes of factors apart.
    weights: {layer path: what its groups count}, as in `group_lasso`.
    momentum: of the optimizer before it, for a weight that an update is given.

  Raises:
    ProxError: unknown kind, a constant `lam` or learning rate out of range.
  """
  _check(kind, learning_rate=learning_rate, lam=lam)

  def init(params):
    del params
    return ProximalState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None, **given):
    if params is None:
      raise ProxError(
        "a proximal step starts from the parameters: call"
        " tx.update(grads, state, params)"
      )
    rate, strength = (
      x(state.count) if callable(x) else x for x in (learning_rate, lam)
    )
    if "lam" in given:
      strength = given["lam"] / (1 - momentum)
    ranks = lowrank.full_ranks(params, layers)
    moved = cast(Tree, optax.apply_updates(params, updates))
    aim = prox(moved, ranks, rate * strength, kind, weights)
    changes = {}
    for path in trees.flatten_ranks(ranks):
      node, to = trees.get(params, path), trees.get(aim, path)
      changes[path] = dict(trees.get(updates, path)) | {
        name: to[name] - node[name] for name in ("u", "v")
      }
    updates = trees.replace(updates, changes)
    return updates, ProximalState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)
