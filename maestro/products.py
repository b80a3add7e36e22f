"""Finds the products in a traced function: their cost, and of which arguments.

Read off the jaxpr, so that nothing has to be assumed: how often a scan runs
its body, which axis is the batch, whether a kernel is multiplied as it is.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

# What leaves the numbers of an array as they are.
_SAME = frozenset(
  (
    *("broadcast_in_dim", "convert_element_type", "copy"),
    *("dynamic_slice", "expand_dims", "optimization_barrier", "pvary"),
    *("reduce_precision", "reshape", "sharding_constraint", "slice"),
    *("squeeze", "stop_gradient", "transpose"),
  )
)
Origins = frozenset[tuple[int, bool]]  # (argument, whether it was changed)
_NONE: Origins = frozenset()


@dataclasses.dataclass(frozen=True)
class Product:
  """A product of arrays, or a look-up of rows.

  Attributes:
    scope: slash-joined names of `jax.named_scope`s around it.
    macs: multiply-accumulates, over all trips of the loops around it.
    real: those of them that meet no zero put between inputs, as a transposed
      convolution does.
    rows: numbers that are looked up; 0 for a product.
    changed: arguments that were changed before they were multiplied.
    same: arguments that were multiplied, or looked up, as they are.
    moved: arguments whose axes are transposed here; then it is no product.
  """

  scope: str
  macs: int
  real: int
  rows: int
  changed: frozenset[int]
  same: frozenset[int]
  moved: frozenset[int] = frozenset()


def products(
  function: Callable, args: Sequence[Any], tracked: Sequence[bool]
) -> list[Product]:
  """Traces function(*args) and lists its products; computes nothing.

  A loop of unknown length counts once, a branch as the dearest one.

  Args:
    function: of any trees of arrays.
    args: arrays, abstract or not.
    tracked: for each leaf of `args`, whether to follow what becomes of it.
  """
  closed = jax.make_jaxpr(function)(*args)
  origins = [
    frozenset({(i, False)}) if follow else _NONE
    for i, follow in enumerate(tracked)
  ]
  found: list[Product] = []
  _walk(closed.jaxpr, origins, "", 1, found)
  return found


def _walk(
  jaxpr: Any, origins: Sequence[Origins], scope: str, times: int, found: list
) -> list[Origins]:
  """Adds the products of a jaxpr; returns the origins of its results."""
  known = dict(zip(jaxpr.invars, origins, strict=True))

  def origin(atom: Any) -> Origins:
    return _NONE if hasattr(atom, "val") else known.get(atom, _NONE)

  for eqn in jaxpr.eqns:
    inputs = [origin(atom) for atom in eqn.invars]
    name = eqn.primitive.name
    here = f"{scope}/{eqn.source_info.name_stack}"
    outputs = [_NONE] * len(eqn.outvars)
    if (macs := _macs(eqn)) is not None:
      used = _used(inputs)
      found.append(Product(here, times * macs[0], times * macs[1], 0, *used))
    elif name == "gather":
      rows = math.prod(eqn.outvars[0].aval.shape)
      found.append(Product(here, 0, 0, times * rows, *_used(inputs[:1])))
    elif inner := _inner(eqn):
      outputs = _calls(eqn, inner, inputs, here, times, found)
    elif name in _SAME:
      if name == "transpose" and inputs[0]:
        moved = frozenset(i for i, _ in inputs[0])
        found.append(Product(here, 0, 0, 0, frozenset(), frozenset(), moved))
      outputs = (inputs * len(outputs))[: len(outputs)]
    elif any(inputs):
      every = frozenset((i, True) for o in inputs for i, _ in o)
      outputs = [every] * len(outputs)
    known.update(zip(eqn.outvars, outputs, strict=True))
  return [origin(atom) for atom in jaxpr.outvars]


def _used(inputs: Sequence[Origins]) -> tuple[frozenset[int], frozenset[int]]:
  """Arguments that were changed, and that were not."""
  each = [
    frozenset(i for o in inputs for i, new in o if new == changed)
    for changed in (True, False)
  ]
  return each[0], each[1]


def _inner(eqn: Any) -> list[Any]:
  """The jaxprs that an equation runs."""
  params = eqn.params
  if eqn.primitive.name == "cond":
    return [branch.jaxpr for branch in params["branches"]]
  if eqn.primitive.name == "while":
    return [params["body_jaxpr"].jaxpr]
  for value in params.values():
    value = getattr(value, "jaxpr", value)
    if hasattr(value, "eqns"):
      return [value]
  return []


def _calls(
  eqn: Any, inner: list, inputs: list, scope: str, times: int, found: list
) -> list[Origins]:
  name, params = eqn.primitive.name, eqn.params
  if name == "cond":
    inputs = inputs[1:]
  elif name == "while":
    inputs = inputs[params["cond_nconsts"] :]
  elif name == "scan":
    times *= params["length"]
  results = []
  for jaxpr in inner:
    n = len(jaxpr.invars)
    given = inputs if len(inputs) == n else [_NONE] * n
    own: list[Product] = []
    results.append((_walk(jaxpr, given, scope, times, own), own))
  _, dearest = max(results, key=lambda r: sum(p.macs for p in r[1]))
  found += dearest
  outputs = [_NONE] * len(eqn.outvars)
  if all(len(o) == len(outputs) for o, _ in results):
    outputs = [
      frozenset().union(*each)
      for each in zip(*(o for o, _ in results), strict=True)
    ]
  return outputs


def _macs(eqn: Any) -> tuple[int, int] | None:
  """(all, real) MACs of one product; None for other equations."""
  name = eqn.primitive.name
  if name not in ("dot_general", "conv_general_dilated"):
    return None
  left, right = (atom.aval.shape for atom in eqn.invars[:2])
  size = math.prod(eqn.outvars[0].aval.shape)
  if name == "dot_general":
    (axes, _), _ = eqn.params["dimension_numbers"]
    macs = size * math.prod(left[a] for a in axes)
    return macs, macs
  numbers = eqn.params["dimension_numbers"]
  n_in = right[numbers.rhs_spec[1]]
  window = math.prod(right[a] for a in numbers.rhs_spec[2:])
  macs = real = size * window * n_in
  if max(eqn.params["lhs_dilation"], default=1) > 1:  # each input, each weight
    n_out = right[numbers.rhs_spec[0]] // eqn.params["feature_group_count"]
    real = math.prod(left) * window * n_out
  return macs, real
