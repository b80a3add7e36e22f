"""The pieces that methods are made of: small functions in plain dictionaries.

`Method` says which of them a run uses; the functions at the end of this file
build, from a config, what the loop calls. To add a method, add a function here
if it needs a new one, and name the pieces in `maestro.methods.table.METHODS`.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maestro import lowrank, trees
from maestro.cost import count as cost
from maestro.cost.budget import fit_budget, parse_budget
from maestro.data import Dataset, epoch_order
from maestro.lowrank import Rule
from maestro.methods import calibrate, prox
from maestro.methods.decomposers import DECOMPOSERS, SUPPLIED
from maestro.methods.penalties import PENALTIES, SHRINKERS
from maestro.methods.project import matrices, put_together, spectra, svds
from maestro.methods.rank_rules import (
  RANK_RULES,
  SWITCHES,
  Spectra,
  stable_ranks,
)
from maestro.methods.table import TIMES, Method
from maestro.schema import ConfigError, bind, choose
from maestro.training import build, optim
from maestro.training.config import Config, parse_rules
from maestro.trees import Layers, Tree


def _known(value: Any, table: Iterable[str], where: str) -> None:
  names = list(table)
  if value is not None and value not in names:
    close = difflib.get_close_matches(str(value), names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{where}: {value!r} is unknown{hint} (one of {names})")


def _piece(table: Mapping, section: Mapping, key: str, given=()) -> Callable:
  """Returns the function that a section names, with its options."""
  where = f"config.method.{key}"
  function, options = choose(table, section, where)
  return functools.partial(function, **bind(function, options, where, given))


def check(c: Config) -> None:
  """Checks all pieces of config.method, so that wrong ones fail at once.

  Raises:
    ConfigError: names the key.
  """
  m = c.pieces
  _known(m.decompose, TIMES, "config.method.decompose")
  _known(m.shrink, SHRINKERS, "config.method.shrink")
  _known(m.penalty, PENALTIES, "config.method.penalty")
  _known(m.trainable, ("all", "factors"), "config.method.trainable")
  _decomposer(m)
  if m.decomposer.get("examples", 1) < 1:
    raise ConfigError("config.method.decomposer.examples: below 1")
  if m.decompose is not None:
    rule = _rank_rule(m)
    rule(lambda: {}, {}, lambda: {})  # a wrong value shows now
  if m.budget is not None:
    parse_budget(m.budget)
    if m.decompose is None or m.decomposer["name"] == "adapter":
      raise ConfigError(
        "config.method.budget: this method ends with dense kernels, so that it"
        " cannot meet one; remove it"
      )
  if m.lam is not None and not 0 <= m.lam < math.inf:
    raise ConfigError(f"config.method.lam: {m.lam} is no finite weight >= 0")
  if m.proximal and m.penalty != "group_lasso":
    raise ConfigError(
      'config.method.proximal: only penalty="group_lasso" has an exact step'
    )
  if m.switch is not None:
    _switch(m)({}, {})
  if m.project is not None:
    bind(_projection_options, m.project, "config.method.project")
    if _projection_options(**m.project) < 1:
      raise ConfigError("config.method.project.every_steps: below 1")
  if m.decompose == "settle" and not c.settle.epochs:
    raise ConfigError(
      "config.settle.epochs: 0, but config.method decomposes at the start of"
      ' settle; raise it, or set config.method.decompose to "end"'
    )
  _check_times(m)


def _check_times(m: Method) -> None:
  """Refuses pieces that would do nothing, as kernels are factors or are not."""
  of_factors = {
    "sampler": m.sampler is not None,
    "shrink": m.shrink is not None,
    "penalty": m.penalty is not None,
    "trainable": m.trainable == "factors",
  }
  of_kernels = {
    "switch": m.switch is not None,
    "project": m.project is not None,
  }
  if m.decompose in (None, "end"):
    for key in (key for key, used in of_factors.items() if used):
      raise ConfigError(
        f"config.method.{key}: would do nothing, as no layer has factors while"
        f" it trains; set config.method.decompose (now {m.decompose!r}) to"
        ' "start" or "settle"'
      )
  if m.decompose in (None, "start"):
    for key in (key for key, used in of_kernels.items() if used):
      raise ConfigError(
        f"config.method.{key}: would do nothing, as it looks at dense kernels"
        f" that become factors; set config.method.decompose (now"
        f' {m.decompose!r}) to "settle" or "end"'
      )
  options = sorted(set(m.sampler or ()) - {"name"})
  if options and m.sampler["name"] == "phase":
    raise ConfigError(
      f"config.method.sampler.{options[0]}: 'phase' has no options; set"
      " config.discover.sampler and config.settle.sampler"
    )


def _projection_options(*, every_steps: int) -> int:
  return every_steps


def _decomposer(m: Method) -> Callable:
  return _piece(DECOMPOSERS, m.decomposer, "decomposer", SUPPLIED)


def _rank_rule(m: Method) -> Callable:
  return _piece(RANK_RULES, m.ranks, "ranks", ("now", "limits", "initial"))


def _switch(m: Method) -> Callable:
  return _piece(SWITCHES, m.switch or {}, "switch", ("before", "now"))


def stored(key: jax.Array, ranks: Tree) -> Tree:
  """Names no rank: layers multiply their factors as they are stored."""
  del key, ranks
  return {}


def make_sampler(c: Config, phase: str) -> Callable:
  """Returns sampler(key, ranks) of a phase, as the method takes it."""
  phases = build.make_sampler(c, phase)  # checked even if it is not used
  if c.pieces.sampler is None:
    return stored
  if c.pieces.sampler.get("name") == "phase":
    return phases
  return build.sampler(c.pieces.sampler, "config.method.sampler")


def weight(c: Config, phase: str) -> float:
  """Returns the weight of the penalty in a phase."""
  lam = c.pieces.lam
  return getattr(c, phase).lam if lam is None else lam


def step_weight(c: Config, phase: str) -> float:
  """Returns the weight of a penalty that is a step after the optimizer's.

  Momentum mu multiplies what gradients do by 1 / (1 - mu), so that lam means
  the same there as in the loss.
  """
  return weight(c, phase) / (1 - (c.optimizer.get("momentum") or 0.0))


def make_penalty(c: Config) -> Callable[[Tree, Tree], jax.Array] | None:
  """Returns penalty(params, ranks) for the loss; None without one there."""
  m = c.pieces
  if m.penalty is None or m.proximal:
    return None
  return functools.partial(PENALTIES[m.penalty], kind=c.lasso)


def make_step_penalty(c: Config) -> Callable[[Tree, Tree], jax.Array] | None:
  """Returns penalty(params, ranks) of the proximal step; None without one."""
  if not c.pieces.proximal:
    return None
  return jax.jit(functools.partial(lowrank.group_lasso, kind=c.lasso))


def make_shrink(c: Config) -> Callable[[Tree, Tree], Tree] | None:
  """Returns shrink(params, ranks) -> ranks; None if ranks stay."""
  if c.pieces.shrink is None:
    return None
  return _shrinker(c.pieces.shrink, c.threshold)


@functools.cache  # one function, so that what is compiled for it is found
def _shrinker(name: str, threshold: float) -> Callable:
  return functools.partial(SHRINKERS[name], threshold=threshold)


def make_optimizer(
  c: Config,
  schedule: optax.Schedule,
  discover_steps: int,
  layers: Layers | None = None,
) -> optax.GradientTransformation:
  """Returns config.optimizer with the method's proximal step and freezing.

  Args:
    c: the run.
    schedule: of its learning rate.
    discover_steps: where the weight of the penalty changes.
    layers: as in `prox.proximal`.
  """
  tx, m = optim.make(c.optimizer, schedule), c.pieces
  if m.proximal:
    lams = [step_weight(c, phase) for phase in ("discover", "settle")]
    lam = optax.join_schedules(
      [optax.constant_schedule(x) for x in lams], [discover_steps]
    )
    step = prox.proximal(
      lambda count: schedule(count) * lam(count),
      1.0,
      kind=c.lasso,
      layers=layers,
    )
    tx = optax.chain(tx, step)
  return optim.freeze_base(tx) if m.trainable == "factors" else tx


class Pieces:
  """What the loop calls of a method that decomposes, projects or switches.

  Args:
    c: the run.
    model: its module.
    dataset: whose training examples a decomposer may see.
    layers: of the model.
    dense: cost of the dense network.
    initial: returns the random dense parameters of the run's seed.

  Attributes:
    limits: {path: largest rank} of the layers that config.rules select; {} if
      the method never decomposes.
  """

  def __init__(
    self,
    c: Config,
    model: Any,
    dataset: Dataset,
    layers: Layers,
    dense: cost.Cost,
    initial: Callable[[], Tree],
  ):
    self._c, self._m, self._model, self._dataset = c, c.pieces, model, dataset
    self._layers, self._dense, self._initial = layers, dense, initial
    rules = parse_rules(c.rules) if c.pieces.decompose else []
    chosen = lowrank.resolve(rules, layers)
    self.limits = {path: r for path, r in chosen.items() if r is not None}
    if self._m.budget is not None:  # one that cannot be met shows now
      self._fit(dict.fromkeys(self.limits, 1), dict.fromkeys(self.limits, 1))

  def choose_ranks(self, params: Tree) -> dict[str, int]:
    """Applies the rank rule, and the budget, to dense parameters."""
    now = functools.cache(lambda: spectra(params, self._layers, self.limits))
    return self._choose(now)

  def _choose(self, now: Callable[[], Spectra]) -> dict[str, int]:
    m = self._m
    profile = _rank_rule(m)(now, self.limits, self._initial_spectra)
    if m.budget is None or m.fits_later:
      return {
        path: min(max(math.ceil(r), 1), self.limits[path])
        for path, r in profile.items()
      }
    return {path: int(r) for path, r in self._fit(profile, self.limits).items()}

  def _fit(self, profile: Mapping, limits: Mapping) -> dict[str, np.ndarray]:
    return fit_budget(
      profile, limits, self._layers, self._m.budget, self._dense
    )

  @functools.cached_property
  def _initial_values(self) -> Spectra:
    return spectra(self._initial(), self._layers, self.limits)

  def _initial_spectra(self) -> Spectra:
    return self._initial_values

  def decompose(self, params: Tree, batch_stats: Tree) -> tuple[dict, dict]:
    """Turns dense parameters into (params with factors, their ranks)."""
    ranks = self.choose_ranks(params)
    rules = [Rule(re.escape(path), rank) for path, rank in ranks.items()]

    def moments(examples: int) -> dict[str, jax.Array]:
      variables = {"params": params}
      if batch_stats:
        variables["batch_stats"] = batch_stats
      chosen = {path: self._layers[path] for path in self.limits}
      return calibrate.second_moments(
        self._model, variables, self._batches(examples), chosen, train=False
      )

    # Another stream than those of initial weights and of steps.
    key = jax.random.fold_in(jax.random.key(self._c.seed), 2)
    factored = _decomposer(self._m)(
      params, rules, self._layers, moments=moments, key=key
    )
    return factored, lowrank.full_ranks(factored, self._layers)

  def _batches(self, examples: int) -> Iterable[jax.Array]:
    """Preprocesses a fixed choice of training examples."""
    split = self._dataset.train
    order = np.asarray(epoch_order(0, 0, len(split)))[:examples]
    for start in range(0, len(order), 256):
      x = split.inputs[np.sort(order[start : start + 256])]
      yield self._dataset.preprocess(jnp.asarray(x))

  def fit(self, ranks: Tree) -> Tree:
    """Lowers discovered ranks to the budget; without one, leaves them."""
    if self._m.budget is None or not self._m.fits_later or not ranks:
      return ranks
    flat = trees.flatten_ranks(jax.device_get(ranks))
    return trees.unflatten_ranks(
      {
        path: jnp.asarray(r, jnp.int32)
        for path, r in self._fit(flat, flat).items()
      }
    )

  @property
  def project_every(self) -> int | None:
    """Steps from one projection to the next."""
    if self._m.project is None:
      return None
    return _projection_options(**self._m.project)

  def project(self, params: Tree, t: float) -> Tree:
    """Cuts dense kernels to the method's ranks, singular values less t.

      K = U diag(s) V^T  ->  sum_{k < r} max(s_k - t, 0) u_k v_k^T

    TRP (Xu et al., 2020) truncates every few steps and adds a sub-gradient of
    the nuclear norm, U V^T, to the gradient in between. A step t along it
    lowers every singular value by t; taking it at the projection, all at once,
    and stopping at zero, is ours: it needs no more decompositions.
    """
    if not self.limits:
      return params
    parts = svds(matrices(params, self._layers, self.limits))
    ranks = self._choose(
      lambda: {path: np.asarray(s) for path, (_, s, _) in parts.items()}
    )
    changes = {}
    for path, matrix in put_together(parts, ranks, jnp.float32(t)).items():
      spec, node = self._layers[path], trees.get(params, path)
      kernel = trees.to_kernel(matrix, spec).astype(node[spec.weight].dtype)
      changes[path] = dict(node) | {spec.weight: kernel}
    return trees.replace(params, changes)

  def stable_ranks(self, params: Tree) -> dict[str, float] | None:
    """Stable ranks of dense kernels; None if the method has no switch."""
    if self._m.switch is None:
      return None
    return stable_ranks(spectra(params, self._layers, self.limits))

  def switches(self, before: Mapping, now: Mapping) -> bool:
    """True if the stable ranks of two epochs end discover."""
    return _switch(self._m)(before, now)
