"""What moves the weight of the group lasso, so that ranks come to a budget.

A component's groups count by what it costs (`component_weights`). Every so many
steps of discover the controller compares the cost of the ranks that are left
with an aim that falls to the budget, t in [0, 1] of discover:

  aim(t) = whole * (budget / whole)^min(t / reach, 1)
  cost > aim:  force <- force * rise,  lam = force
  otherwise:   force <- force / sqrt(rise),  lam = 0

so that ranks fall as slowly as the time allows, and no further than asked for.
Costs here are those of factors, which fall with every component; a network,
whose layers are merged where that is cheaper, costs no more. Once they meet the
budget, lam stays 0: ranks that are lost do not come back.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from maestro import schema
from maestro.cost.budget import WHERE, parse_budget, weight_cost
from maestro.cost.count import Cost, layer_macs
from maestro.methods.table import Method
from maestro.schema import ConfigError
from maestro.trees import Layers, LayerSpec


@dataclasses.dataclass(frozen=True)
class Options:
  """How the weight of the lasso follows the cost.

  Attributes:
    updates: in discover.
    reach: the part of discover after which the budget is aimed at.
    force: the first one.
    rise: the factor by which it rises.
  """

  updates: schema.Count = 100
  reach: schema.Ratio = 0.8
  force: schema.Positive = 1e-4
  rise: Annotated[float, schema.Range("(1, inf)")] = 1.3


CONTROLLERS = {"follow": Options}
_MOST = 1e6  # a force that leaves nothing; without a bound it would overflow


@dataclasses.dataclass(frozen=True, eq=False)
class Controller:
  """The controller of a method in a run.

  Attributes:
    options: see `Options`.
    limit: the most that the network may cost.
    costs: {path: cost of a component}.
    fixed: cost of what is not factored.
    whole: cost of all factors at full rank, and of the rest.
  """

  options: Options
  limit: int
  costs: Mapping[str, int]
  fixed: int
  whole: int

  def cost(self, ranks: Mapping[str, Any]) -> int:
    """Cost of factors at {path: rank}, and of the rest."""
    return self.fixed + sum(
      cost * int(np.sum(ranks[path])) for path, cost in self.costs.items()
    )

  def update(
    self, force: float, ranks: Mapping[str, Any], done: float
  ) -> tuple[float, float]:
    """Returns the next (lam, force).

    Args:
      force: the last one.
      ranks: {path: rank} that are left.
      done: the part of discover.
    """
    cost = self.cost(ranks)
    if cost <= self.limit:
      return 0.0, force
    part = min(done / self.options.reach, 1.0)
    aim = self.whole * (self.limit / self.whole) ** part
    if cost > aim:
      force = min(force * self.options.rise, _MOST)
      return force, force
    return 0.0, force / math.sqrt(self.options.rise)


def options_of(section: Mapping) -> Options:
  return schema.make(CONTROLLERS, section, "config.method.controller")()


def bind(
  m: Method, layers: Layers, limits: Mapping[str, int], dense: Cost
) -> Controller:
  """Binds a method's controller to a network.

  Args:
    m: the method.
    layers: of the model.
    limits: {path: full rank} of the layers that are factored.
    dense: cost of the dense network.

  Raises:
    ConfigError: names the key.
  """
  options = options_of(m.controller or {})
  budget = parse_budget(m.budget or "")
  costs = {path: component_cost(layers[path], budget.kind) for path in limits}
  total = getattr(dense, budget.kind)
  fixed = total - sum(
    weight_cost(layers[path], None, budget.kind) for path in limits
  )
  whole = fixed + sum(
    costs[path] * rank * math.prod(layers[path].lead)
    for path, rank in limits.items()
  )
  return Controller(options, budget.limit(total), costs, fixed, whole)


def check(m: Method) -> None:
  """Refuses a controller without a budget, or of what it cannot move.

  Raises:
    ConfigError: names the key.
  """
  options_of(m.controller or {})
  if m.budget is None:
    raise ConfigError(
      f'{WHERE}: missing, as in "macs:0.5": it is what the controller comes to'
    )
  parse_budget(m.budget)
  if not m.proximal or m.shrink is None or not m.fits_later:
    raise ConfigError(
      "config.method.controller: moves the weight of a proximal step under"
      ' which ranks fall from the start; set proximal=True, shrink="zeros"'
      ' and decompose="start", or remove it (in the loss, a weight that grows'
      " until ranks fall would make training diverge)"
    )


def component_cost(spec: LayerSpec, kind: str) -> int:
  """MACs or parameters of one component of one element of a layer."""
  if kind == "macs":
    return layer_macs(spec, 1) // math.prod(spec.lead)
  return spec.n_in + spec.n_out


def component_weights(
  layers: Layers, limits: Mapping[str, int], kind: str
) -> dict[str, float]:
  """{path: weight of its groups}, by what a component costs.

    w_l = sqrt(c_l), times a number that makes the mean over all components 1

  The square root, as the penalty counts norms, and costs count components: with
  curvature h, the component of size s that is worth its cost has h s^2 / 2 = mu
  c; a soft threshold lam w / h meets it, s = sqrt(2 mu c / h), at w in
  proportion to sqrt(c).
  """
  if not limits:
    return {}
  roots = {p: math.sqrt(component_cost(layers[p], kind)) for p in limits}
  counts = {p: r * math.prod(layers[p].lead) for p, r in limits.items()}
  mean = sum(roots[p] * n for p, n in counts.items()) / sum(counts.values())
  return {path: root / mean for path, root in roots.items()}
