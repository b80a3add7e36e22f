"""From a method's names to what the training loop calls: functions, numbers.

To add a method, add a function to the pieces if it needs a new one, and name
the pieces in `maestro.methods.table.METHODS`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maestro import lowrank, schema, trees
from maestro.cost.budget import (
  LATENCY,
  WHERE,
  Tables,
  fit_budget,
  parse_budget,
)
from maestro.cost.layer_latency import Measure, latency_tables
from maestro.lowrank import Rule
from maestro.methods import (
  controllers,
  freeze,
  nested,
  prox,
  race,
)
from maestro.methods.decomposers import DECOMPOSERS, SUPPLIED
from maestro.methods.penalties import PENALTIES, SHRINKERS
from maestro.methods.project import project, spectra
from maestro.methods.rank_rules import (
  RANK_RULES,
  SWITCHES,
  Spectra,
  stable_ranks,
)
from maestro.methods.subject import Seen, Subject
from maestro.methods.table import Method
from maestro.sampling import SAMPLERS
from maestro.schema import ConfigError
from maestro.trees import Layers, Tree

Penalty = Callable[[Tree, Tree], jax.Array]  # (params, ranks) -> scalar
Profile = Mapping[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
  """A method in one run; the loop calls these fields and knows no names.

  Attributes:
    decompose_at: "start", "settle", "end" or None.
    decompose: (params, batch_stats) -> (params with factors, their ranks).
    choose_ranks: dense params -> {path: rank}, what `decompose` takes.
    samplers: {phase: (key, ranks) -> ranks of a step}.
    lams: {phase: weight of the penalty}.
    lam_key: where lam is set, and what it is, for messages.
    penalty: in the loss; None without one there.
    step_penalty: of the proximal step, which no loss has; None without one.
    optimizer: (optax optimizer, schedule, discover steps) -> optax optimizer
      with the proximal step and what is frozen.
    shrink: (params, ranks) -> ranks after an epoch; None if ranks stay.
    threshold: below which `shrink` removes components; None if it has none.
    fit: discovered ranks -> ranks within the budget.
    project: (dense params, step along the nuclear norm) -> params; None.
    project_every: steps from one projection to the next; None.
    project_lams: {phase: weight of the nuclear norm in a projection}.
    stable_ranks: dense params -> {path: stable rank}; None without a switch.
    switches: (stable ranks of the last epoch, of this one) -> bool, whether
      they end discover.
    race: how profiles are proposed and raced at the start of settle; None if
      ranks are chosen by a rule.
    nested: the chain of levels that settle trains; None if there is one size.
    controller: of the penalty's weight in discover; None if it stays.
  """

  decompose_at: str | None
  decompose: Callable[[Tree, Tree], tuple[dict, dict]]
  choose_ranks: Callable[[Tree], Profile]
  samplers: Mapping[str, Callable]
  lams: Mapping[str, float]
  lam_key: str
  penalty: Penalty | None
  step_penalty: Penalty | None
  optimizer: Callable[..., optax.GradientTransformation]
  shrink: Callable[[Tree, Tree], Tree] | None
  threshold: float | None
  fit: Callable[[Tree], Tree]
  project: Callable[[Tree, float], Tree] | None
  project_every: int | None
  project_lams: Mapping[str, float]
  stable_ranks: Callable[[Tree], dict[str, float]] | None
  switches: Callable[[Mapping, Mapping], bool]
  race: race.Race | None
  nested: nested.Nested | None
  controller: controllers.Controller | None


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the rest of a config says to a method.

  Attributes:
    rules: which layers are decomposed.
    samplers: {phase: section of its sampler}.
    lams: {phase: weight of the penalty}, unless the method has its own.
    lasso: "hierarchical" or "flat".
    lasso_cost: what its groups count, unless the method has its own.
    threshold: below which components are removed.
    momentum: of the optimizer.
  """

  rules: Sequence[Rule]
  samplers: Mapping[str, Mapping]
  lams: Mapping[str, float]
  lasso: str
  lasso_cost: str | None
  threshold: float
  momentum: float


# ---------------------------------------------------------------------------
# Pieces by name
# ---------------------------------------------------------------------------


def _decomposer(m: Method) -> Callable:
  return schema.make(
    DECOMPOSERS, m.decomposer, "config.method.decomposer", SUPPLIED
  )


def _rank_rule(m: Method) -> Callable:
  given = ("now", "limits", "initial")
  return schema.make(RANK_RULES, m.ranks, "config.method.ranks", given)


def _switch(m: Method) -> Callable:
  if m.switch is None:
    return lambda before, now: False
  given = ("before", "now")
  return schema.make(SWITCHES, m.switch, "config.method.switch", given)


def _every_steps(m: Method) -> int | None:
  def options(*, every_steps: schema.Count) -> int:
    return every_steps

  if m.project is None:
    return None
  return options(**schema.bind(options, m.project, "config.method.project"))


def sampler(section: Mapping[str, Any], where: str) -> Callable:
  """Builds the ranks' sampler from a section at a path of the config."""
  chosen = schema.make(SAMPLERS, section, where, ("key", "ranks"))
  try:  # a wrong value shows now, not within the first step
    chosen(jax.random.key(0), {"rank": jnp.ones((), jnp.int32)})
  except ValueError as error:
    raise ConfigError(f"{where}: {error}") from error
  return chosen


def stored(key: jax.Array, ranks: Tree) -> Tree:
  """Names no rank: layers multiply their factors as they are stored."""
  del key, ranks
  return {}


def _samplers(m: Method, sections: Mapping[str, Mapping]) -> dict:
  phases = {  # checked even if they are not used
    phase: sampler(section, f"config.{phase}.sampler")
    for phase, section in sections.items()
  }
  if m.sampler is None:
    return dict.fromkeys(phases, stored)
  if m.sampler.get("name") != "phase":
    own = sampler(m.sampler, "config.method.sampler")
    return dict.fromkeys(phases, own)
  if options := sorted(m.sampler.keys() - {"name"}):
    raise ConfigError(
      f"config.method.sampler.{options[0]}: 'phase' has no options; set"
      " config.discover.sampler and config.settle.sampler"
    )
  return phases


def check(m: Method, settings: Settings) -> None:
  """Builds all pieces by name, so that wrong ones fail before data is read.

  Raises:
    ConfigError: names the key.
  """
  for make in (_decomposer, _rank_rule, _switch, _every_steps):
    make(m)
  _samplers(m, settings.samplers)
  for key, table in (("shrink", SHRINKERS), ("penalty", PENALTIES)):
    if getattr(m, key) is not None:
      schema.check_name(getattr(m, key), table, f"config.method.{key}")
  if m.nested is not None:
    nested.check(m)
  elif m.race is not None:
    race.check(m)
  elif m.budget is not None:
    parse_budget(m.budget)
    if m.decompose is None or m.decomposer["name"] == "adapter":
      raise ConfigError(
        f"{WHERE}: this method ends with dense kernels, so that it"
        " cannot meet one; remove it"
      )
  if m.controller is not None:
    controllers.check(m)
  if m.proximal and m.penalty != "group_lasso":
    raise ConfigError(
      'config.method.proximal: only penalty="group_lasso" has an exact step'
    )


# ---------------------------------------------------------------------------
# A method in a run
# ---------------------------------------------------------------------------


def bind(m: Method, settings: Settings, subject: Subject) -> Bound:
  """Binds a method's pieces to a run.

  Raises:
    ConfigError: names the key of a piece that does not fit.
    LowRankError: config.rules do not fit the layers.
  """
  check(m, settings)
  layers = subject.layers
  lams, step_lams = weights(m, settings)
  key = "config.discover.lam" if m.lam is None else "config.method.lam"
  penalty = step_penalty = shrink = controller = None
  ranks = _Ranks(m, settings.rules if m.decompose else (), subject)
  lasso: dict[str, Any] = {"kind": settings.lasso}
  if cost := m.lasso_cost or settings.lasso_cost:
    lasso["weights"] = controllers.component_weights(layers, ranks.limits, cost)
  if m.proximal:
    step_penalty = jax.jit(functools.partial(lowrank.group_lasso, **lasso))
  elif m.penalty is not None:
    own = lasso if m.penalty == "group_lasso" else {"kind": settings.lasso}
    penalty = functools.partial(PENALTIES[m.penalty], **own)
  if m.shrink is not None:
    shrink = _shrinker(m.shrink, settings.threshold)
  lam_key = f"{key} (now {lams['discover']:g})"
  if m.controller is not None:
    controller = controllers.bind(m, layers, ranks.limits, subject.dense)
    force = controller.options.force
    lam_key = f"config.method.controller.force (now {force:g})"
  plan, chain = _plans(m, settings, subject)
  return Bound(
    decompose_at=m.decompose,
    decompose=functools.partial(_decompose, m, ranks, subject),
    choose_ranks=ranks.choose,
    samplers=_samplers(m, settings.samplers),
    lams=lams,
    lam_key=lam_key,
    penalty=penalty,
    step_penalty=step_penalty,
    optimizer=functools.partial(
      wrap_optimizer, m, lasso, step_lams, layers, settings.momentum
    ),
    shrink=shrink,
    threshold=settings.threshold if m.shrink == "threshold" else None,
    fit=ranks.fit_found,
    project=None if m.project is None else ranks.project,
    project_every=_every_steps(m),
    project_lams=step_lams,
    stable_ranks=None if m.switch is None else ranks.stable_ranks,
    switches=_switch(m),
    race=plan,
    nested=chain,
    controller=controller,
  )


def _plans(
  m: Method, settings: Settings, s: Subject
) -> tuple[race.Race | None, nested.Nested | None]:
  """Binds a race for the method's budget, or its chain of levels.

  Raises:
    ConfigError: no layer is factored, or a budget cannot be met.
  """
  if m.race is None and m.nested is None:
    return None, None
  limits = selected(settings.rules, s)
  if not limits:
    raise ConfigError(
      "config.rules: no layer is factored, so there are no ranks to choose"
    )

  def see(params: Tree, batch_stats: Tree) -> Seen:
    return Seen(s, list(limits), params, batch_stats)

  tables = functools.partial(race.tables_of, s.layers, s.shapes, limits)
  if m.nested is not None:
    options = nested.options_of(m.nested)
    chain = nested.Nested(options, tables(options.kind), limits, s.layers, see)
    nested.limits_of(chain)  # one that cannot be met shows now
    return None, chain
  budget = race.parse(m.budget)
  options = race.options_of(m.race or {})
  counted = None if budget.kind == LATENCY else tables(budget.kind)
  if counted is not None:
    race.limit_of(counted, budget)  # one that cannot be met shows now

  def costs(measure: Measure) -> Tables:
    if counted is None:
      return latency_tables(s.layers, limits, measure)
    return counted

  return race.Race(options, budget, costs, limits, s.layers, see), None


def selected(rules: Sequence[Rule], s: Subject) -> dict[str, int]:
  """{path: largest rank} of the layers that rules select."""
  chosen = lowrank.resolve(rules, s.layers)
  return {path: rank for path, rank in chosen.items() if rank is not None}


@functools.cache  # one function, so that what is compiled for it is found
def _shrinker(name: str, threshold: float) -> Callable:
  return functools.partial(SHRINKERS[name], threshold=threshold)


def weights(m: Method, s: Settings) -> tuple[dict[str, float], ...]:
  """Returns {phase: lam} for a penalty in the loss, and for one in a step.

  Momentum mu multiplies what gradients do by 1 / (1 - mu), so that lam means
  the same in a step after the optimizer's as in the loss.
  """
  lams = dict(s.lams) if m.lam is None else dict.fromkeys(s.lams, m.lam)
  return lams, {p: lam / (1 - s.momentum) for p, lam in lams.items()}


def wrap_optimizer(
  m: Method,
  lasso: Mapping[str, Any],
  lams: Mapping[str, float],
  layers: Layers | None,
  momentum: float,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  discover_steps: int,
) -> optax.GradientTransformation:
  """Adds the method's proximal step and freezing to an optimizer.

  Args:
    m: the method.
    lasso: kind and weights of the group lasso.
    lams: its weight in each phase.
    layers: as in `prox.proximal`.
    momentum: of the optimizer, by which a weight given to an update counts.
    tx: the optimizer.
    schedule: of its learning rate.
    discover_steps: where the weight of the penalty changes.
  """
  if m.proximal:
    lam = optax.join_schedules(
      [optax.constant_schedule(lams[p]) for p in ("discover", "settle")],
      [discover_steps],
    )
    step = prox.proximal(
      schedule, lam, momentum=momentum, layers=layers, **lasso
    )
    tx = optax.chain(tx, step)
  return freeze.freeze_base(tx) if m.trainable == "factors" else tx


def _decompose(
  m: Method, ranks: "_Ranks", s: Subject, params: Tree, batch_stats: Tree
) -> tuple[dict, dict]:
  """Turns dense parameters into (params with factors, their ranks)."""
  chosen = ranks.choose(params)
  rules = [Rule(re.escape(path), rank) for path, rank in chosen.items()]

  seen = Seen(s, list(ranks.limits), params, batch_stats)
  factored = _decomposer(m)(params, rules, s.layers, moments=seen, key=s.key)
  return factored, lowrank.full_ranks(factored, s.layers)


class _Ranks:
  """The ranks that a rule and a budget give to the layers under config.rules.

  Attributes:
    limits: {path: largest rank}; {} if the method never decomposes.
  """

  def __init__(self, m: Method, rules: Sequence[Rule], subject: Subject):
    self._m, self._s, self._rule = m, subject, _rank_rule(m)
    self.limits = selected(rules, subject)
    if m.budget is not None and m.race is None:  # an impossible one shows now
      self._fit(dict.fromkeys(self.limits, 1), dict.fromkeys(self.limits, 1))

  def _spectra(self, params: Tree) -> Spectra:
    return spectra(params, self._s.layers, self.limits)

  @functools.cached_property
  def _initial_spectra(self) -> Spectra:
    return self._spectra(self._s.initial())

  def choose(self, params: Tree) -> dict[str, int]:
    """Applies the rank rule, and the budget, to dense parameters."""
    return self._choose(functools.cache(lambda: self._spectra(params)))

  def _choose(self, now: Callable) -> dict[str, int]:
    profile = self._rule(now, self.limits, lambda: self._initial_spectra)
    if self._m.budget is None or self._m.fits_later:
      return {
        path: min(max(math.ceil(r), 1), self.limits[path])
        for path, r in profile.items()
      }
    return {path: int(r) for path, r in self._fit(profile, self.limits).items()}

  def _fit(self, profile: Mapping, limits: Mapping) -> dict[str, np.ndarray]:
    s, budget = self._s, self._m.budget or ""  # not called without one
    return fit_budget(profile, limits, s.layers, budget, s.dense)

  def fit_found(self, ranks: Tree) -> Tree:
    """Lowers discovered ranks to the budget; without one, leaves them."""
    if self._m.budget is None or not self._m.fits_later or not ranks:
      return ranks
    flat = trees.flatten_ranks(jax.device_get(ranks))
    fitted = self._fit(flat, flat)
    return trees.unflatten_ranks(
      {path: jnp.asarray(r, jnp.int32) for path, r in fitted.items()}
    )

  def project(self, params: Tree, t: float) -> Tree:
    """Cuts dense kernels to the rule's ranks: see `project.project`."""
    if not self.limits:
      return params
    return project(params, self._s.layers, self.limits, self._choose, t)

  def stable_ranks(self, params: Tree) -> dict[str, float]:
    """Stable ranks of dense kernels."""
    return stable_ranks(self._spectra(params))
