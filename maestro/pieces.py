"""The pieces that methods are made of: small functions in plain dictionaries.

`Method` says which of them a run uses; the functions at the end of this file
build, from a config, what the loop calls. To add a method, add a function here
if it needs a new one, and name the pieces in `maestro.methods.METHODS`.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maestro import build, calibrate, cost, lowrank, optim, prox
from maestro.budget import Budget, BudgetError
from maestro.config import Config, ConfigError, bind, choose, parse_rules
from maestro.data import Dataset, epoch_order
from maestro.lowrank import LayerSpec, Rule, Tree
from maestro.methods import TIMES, Method

Layers = Mapping[str, LayerSpec]
Spectra = Mapping[str, np.ndarray]  # {path: singular values [*lead, R]}

# ---------------------------------------------------------------------------
# Decomposers: (params, rules, layers, moments=, key=, options) -> params
# ---------------------------------------------------------------------------


def svd(params: Tree, rules, layers: Layers, *, moments, key) -> dict:
  """Takes the best approximation of each kernel: `lowrank.decompose`.

  At the start of training this is spectral initialisation.
  """
  del moments, key
  return lowrank.decompose(params, rules, layers)


def data(
  params: Tree, rules, layers: Layers, *, moments, key, examples: int = 512
) -> dict:
  """Takes the best approximation of each layer's outputs on training data.

  See `maestro.calibrate`; `examples` training examples are its data.
  """
  del key
  return calibrate.decompose(params, rules, layers, moments(examples))


def random(params: Tree, rules, layers: Layers, *, moments, key) -> dict:
  """Forgets the kernel: normal u and v, whose product has its mean square.

  E (u @ v)_ij^2 = mean(K^2),   E u_ik^2 = E v_kj^2
  """
  del moments
  changes = {}
  for path, rank, key_u, key_v in _selected(rules, layers, key):
    spec, node = layers[path], lowrank.get(params, path)
    kernel = node[spec.weight]
    square = jnp.mean(kernel.astype(jnp.float32) ** 2)
    scale = ((square / max(rank, 1)) ** 0.25).astype(kernel.dtype)
    shape_u, shape_v = _factor_shapes(spec, rank)
    changes[path] = {k: x for k, x in node.items() if k != spec.weight} | {
      "u": scale * jax.random.normal(key_u, shape_u, kernel.dtype),
      "v": scale * jax.random.normal(key_v, shape_v, kernel.dtype),
    }
  return lowrank.replace(params, changes)


def adapter(params: Tree, rules, layers: Layers, *, moments, key) -> dict:
  """Keeps the kernel and adds factors: u random, v zero (Hu et al., 2022).

    weight = kernel + u @ v,   u ~ N(0, 1 / in)

  so that the function is as it was.
  """
  del moments
  changes = {}
  for path, rank, key_u, _ in _selected(rules, layers, key):
    spec, node = layers[path], lowrank.get(params, path)
    dtype = node[spec.weight].dtype
    shape_u, shape_v = _factor_shapes(spec, rank)
    u = jax.random.normal(key_u, shape_u, dtype)
    changes[path] = dict(node) | {
      "u": u / math.sqrt(spec.n_in),
      "v": jnp.zeros(shape_v, dtype),
    }
  return lowrank.replace(params, changes)


def _selected(rules, layers: Layers, key: jax.Array) -> Iterator[tuple]:
  """Yields (path, rank, a key for u, one for v) of the layers to decompose."""
  for i, (path, rank) in enumerate(lowrank.resolve(rules, layers).items()):
    if rank is not None:
      yield path, rank, *jax.random.split(jax.random.fold_in(key, i))


def _factor_shapes(spec: LayerSpec, rank: int) -> tuple[tuple, tuple]:
  return (
    (*spec.lead, *spec.inputs, rank),
    (*spec.lead, rank, *spec.outputs),
  )


DECOMPOSERS = {"svd": svd, "data": data, "random": random, "adapter": adapter}
_SUPPLIED = ("params", "rules", "layers", "moments", "key")

# ---------------------------------------------------------------------------
# Rank rules: (now, limits, initial, options) -> {path: real number}
#
# now() and initial() give the spectra of the kernels and of those that training
# started from, at random; limits are the largest ranks. What a rule returns is
# rounded up, or, with a budget, scaled to it and then rounded.
# ---------------------------------------------------------------------------


def full(now, limits: Mapping[str, int], initial) -> dict[str, int]:
  """Keeps the ranks that config.rules give, by default the full ones."""
  del now, initial
  return dict(limits)


def fraction(
  now, limits: Mapping[str, int], initial, *, fraction: float
) -> dict[str, Fraction]:
  """Keeps a fraction of every layer's components."""
  del now, initial
  if not 0 < fraction <= 1:
    raise ConfigError(
      f"config.method.ranks.fraction: {fraction} is outside (0, 1]"
    )
  ratio = Fraction(fraction).limit_denominator(1024)
  return {path: ratio * rank for path, rank in limits.items()}


def constant(
  now, limits: Mapping[str, int], initial, *, rank: int
) -> dict[str, int]:
  """Gives every layer one rank, or its full rank where that is less."""
  del now, initial
  if rank < 1:
    raise ConfigError(f"config.method.ranks.rank: {rank} is below 1")
  return {path: min(rank, limit) for path, limit in limits.items()}


def energy(
  now: Callable[[], Spectra],
  limits: Mapping[str, int],
  initial,
  *,
  lost: float = 0.02,
) -> dict[str, int]:
  """Keeps the fewest components that lose at most a part of ||K||_F^2.

  r = min{r: sum_{k >= r} s_k^2 <= lost * sum_k s_k^2}
  """
  del initial
  if not 0 <= lost < 1:
    raise ConfigError(f"config.method.ranks.lost: {lost} is outside [0, 1)")
  ranks = {}
  for path, s in now().items():
    square = s.astype(np.float64) ** 2
    tail = np.cumsum(square[..., ::-1], axis=-1)[..., ::-1]
    # A component stays if without it, and those after it, too much is lost.
    count = np.max(np.sum(tail > lost * tail[..., :1], axis=-1), initial=1)
    ranks[path] = min(int(count), limits[path])
  return ranks


def stable_rank(
  now: Callable[[], Spectra],
  limits: Mapping[str, int],
  initial: Callable[[], Spectra],
) -> dict[str, float]:
  """Scales stable ranks such that the random start has its full rank.

    r = full rank * stable(K) / stable(K at the start)

  The scaled stable rank of Cuttlefish (Wang et al., MLSys 2023). Rounding, and
  the bounds by 1 and by config.rules, are ours.
  """
  start, ranks = stable_ranks(initial()), {}
  for path, value in stable_ranks(now()).items():
    size = now()[path].shape[-1]
    scaled = size * value / start[path] if start[path] else 0.0
    ranks[path] = min(max(scaled, 1.0), limits[path])
  return ranks


def stable_ranks(spectra: Spectra) -> dict[str, float]:
  """Returns sum_k s_k^2 / max_k s_k^2, the largest of a stacked layer."""
  found = {}
  for path, s in spectra.items():
    square = s.astype(np.float64) ** 2
    top = np.max(square, axis=-1)
    ratio = np.sum(square, axis=-1) / np.where(top > 0, top, 1.0)
    found[path] = float(np.max(ratio))
  return found


RANK_RULES = {
  "full": full,
  "fraction": fraction,
  "constant": constant,
  "energy": energy,
  "stable_rank": stable_rank,
}

# ---------------------------------------------------------------------------
# Penalties: (params, ranks, kind) -> scalar; kind is config.lasso
# ---------------------------------------------------------------------------


def frobenius(params: Tree, ranks: Tree, kind: str = "") -> jax.Array:
  """Sums 1/2 ||u @ v||_F^2 over all factored layers: decay of the products.

    ||u v||_F^2 = sum((u^T u) * (v v^T))

  by Gram matrices, in O((in + out) R^2) instead of in * out * R. A layer's
  own kernel, if held, does not count.
  """
  del kind
  total = jnp.zeros((), jnp.float32)
  for node, rank in lowrank.paired(params, ranks).values():
    lead, R = jnp.shape(rank), node["u"].shape[-1]
    n = len(lead)
    u, v = (
      node[name].astype(jnp.promote_types(node[name].dtype, jnp.float32))
      for name in ("u", "v")
    )
    u = u.reshape((*lead, math.prod(u.shape[n:-1]), R))
    v = v.reshape((*lead, R, math.prod(v.shape[n + 1 :])))
    high = jax.lax.Precision.HIGHEST
    left = jnp.einsum("...ia,...ib->...ab", u, u, precision=high)
    right = jnp.einsum("...ai,...bi->...ab", v, v, precision=high)
    total += 0.5 * jnp.sum(left * right)
  return total


PENALTIES = {"group_lasso": lowrank.group_lasso, "frobenius": frobenius}

# ---------------------------------------------------------------------------
# Shrinking: (params, ranks, threshold) -> ranks; threshold is config.threshold
# ---------------------------------------------------------------------------


def zeros(params: Tree, ranks: Tree, threshold: float) -> dict:
  """Counts components up to the last that is not exactly zero."""
  del threshold
  return prox.exact_ranks(params, ranks)


SHRINKERS = {"threshold": lowrank.shrink, "zeros": zeros}

# ---------------------------------------------------------------------------
# Switches: (before, now, options) -> bool, of an epoch's stable ranks
# ---------------------------------------------------------------------------


def settled(
  before: Mapping[str, float],
  now: Mapping[str, float],
  *,
  tolerance: float = 0.1,
) -> bool:
  """True once no stable rank moves by more than `tolerance` in an epoch.

  Cuttlefish's rule ends its dense warm-up when the derivative of all layers'
  stable ranks is small. Differences of one epoch, and of plain stable ranks
  rather than scaled ones, are ours.
  """
  if not tolerance >= 0:
    raise ConfigError(
      f"config.method.switch.tolerance: {tolerance} is not >= 0"
    )
  return bool(before) and all(
    abs(now[path] - before[path]) <= tolerance for path in now
  )


SWITCHES = {"stable_ranks": settled}


# ---------------------------------------------------------------------------
# Spectra and truncation of dense kernels
# ---------------------------------------------------------------------------


@jax.jit
def _svd(kernels: Mapping[str, jax.Array]) -> dict:
  return {
    path: jnp.linalg.svd(k.astype(jnp.float32), full_matrices=False)
    for path, k in kernels.items()
  }


@jax.jit
def _cut(parts: Mapping, ranks: Mapping[str, int], t: jax.Array) -> dict:
  """Puts kernels together from `rank` components, singular values less t."""
  matrices = {}
  for path, (u, s, vt) in parts.items():
    live = jnp.arange(s.shape[-1]) < ranks[path]
    s = jnp.where(live, jnp.maximum(s - t, 0.0), 0.0)
    matrices[path] = jnp.matmul(
      u * s[..., None, :], vt, precision=jax.lax.Precision.HIGHEST
    )
  return matrices


def _matrices(params: Tree, layers: Layers, paths: Iterable[str]) -> dict:
  """Returns dense kernels as matrices [*lead, in, out]."""
  return {
    path: lowrank.to_matrix(
      lowrank.get(params, path)[layers[path].weight], layers[path]
    )
    for path in paths
  }


def _spectra(params: Tree, layers: Layers, paths: Iterable[str]) -> Spectra:
  parts = _svd(_matrices(params, layers, paths))
  return {path: np.asarray(s) for path, (_, s, _) in parts.items()}


# ---------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------

BUDGETS = ("macs", "params")


def parse_budget(text: str) -> Budget:
  """Reads "macs:0.5" or "params:0.5".

  Raises:
    ConfigError: it is no budget, or of another kind.
  """
  try:
    budget = Budget.parse(text)
  except BudgetError as error:
    raise ConfigError(f"config.method.budget: {error}") from error
  if budget.kind not in BUDGETS:
    raise ConfigError(
      f"config.method.budget: {text!r} is of another kind than {BUDGETS}, which"
      " are known before training"
    )
  return budget


def _weight_cost(spec: LayerSpec, rank: int | None, kind: str) -> int:
  """Cost of a layer's weight in its final form; a rank of None is dense."""
  if rank is not None and lowrank.dense_is_cheaper(spec.n_in, spec.n_out, rank):
    rank = None
  if kind == "macs":
    return cost.layer_macs(spec, rank)
  numbers = spec.n_in * spec.n_out
  if rank is not None:
    numbers = rank * (spec.n_in + spec.n_out)
  return numbers * math.prod(spec.lead)


def fit_budget(
  profile: Mapping[str, Any],
  limits: Mapping[str, Any],
  layers: Layers,
  budget: str,
  dense: cost.Cost,
) -> dict[str, np.ndarray]:
  """Raises ranks in proportion to a profile, as far as a budget allows.

    r_l = clip(floor(f * profile_l), 1, limit_l), 0 where the profile is 0

  with one factor f for all layers, which grows from 0. Where the next rank of a
  layer would exceed the budget, that layer stays as it is and the others go on,
  so that at the end no layer can have one more. The cost is that of the final
  network, `lowrank.extract`.

  Args:
    profile: {path: real number, or array of them [*lead]} to scale.
    limits: the largest ranks possible, likewise.
    layers: from `maestro.layers`.
    budget: "macs:0.5" or "params:0.5".
    dense: cost of the dense network.

  Raises:
    ConfigError: even rank 1 in every layer costs more.
  """
  bound = parse_budget(budget)
  kind, most = bound.kind, bound.value * getattr(dense, bound.kind)
  exact = np.vectorize(Fraction, otypes=[object])
  profile = {path: exact(x) for path, x in profile.items()}
  limits = {path: np.asarray(limits[path], np.int64) for path in profile}

  def at(path: str, f: Fraction) -> np.ndarray:
    r = np.asarray(profile[path] * f // 1, np.int64)
    return np.where(profile[path] > 0, np.clip(r, 1, limits[path]), 0)

  def spent_on(path: str, ranks: np.ndarray | None) -> int:
    rank = None if ranks is None else int(np.max(ranks, initial=0))
    return _weight_cost(layers[path], rank, kind)

  ranks = {path: at(path, Fraction(0)) for path in profile}
  spent = getattr(dense, kind) + sum(
    spent_on(path, r) - spent_on(path, None) for path, r in ranks.items()
  )
  if spent > most:
    raise ConfigError(
      f"config.method.budget: {budget!r} is below what rank 1 in every factored"
      " layer costs; raise it, or let config.rules select more layers"
    )
  rises = {
    (j / r, path)
    for path in profile
    for r, limit in np.broadcast(profile[path], limits[path])
    for j in range(2, int(limit) + 1)
    if r > 0
  }
  full = set()
  for f, path in sorted(rises):
    if path in full:
      continue
    more = at(path, f)
    extra = spent_on(path, more) - spent_on(path, ranks[path])
    if spent + extra > most:
      full.add(path)
    else:
      ranks[path], spent = more, spent + extra
  return ranks


# ---------------------------------------------------------------------------
# From a config to what the loop calls
# ---------------------------------------------------------------------------


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
  return _piece(DECOMPOSERS, m.decomposer, "decomposer", _SUPPLIED)


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
    now = functools.cache(lambda: _spectra(params, self._layers, self.limits))
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
    return _spectra(self._initial(), self._layers, self.limits)

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
    flat = lowrank.flatten_ranks(jax.device_get(ranks))
    return lowrank.unflatten_ranks(
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
    parts = _svd(_matrices(params, self._layers, self.limits))
    ranks = self._choose(
      lambda: {path: np.asarray(s) for path, (_, s, _) in parts.items()}
    )
    changes = {}
    for path, matrix in _cut(parts, ranks, jnp.float32(t)).items():
      spec, node = self._layers[path], lowrank.get(params, path)
      kernel = lowrank.to_kernel(matrix, spec).astype(node[spec.weight].dtype)
      changes[path] = dict(node) | {spec.weight: kernel}
    return lowrank.replace(params, changes)

  def stable_ranks(self, params: Tree) -> dict[str, float] | None:
    """Stable ranks of dense kernels; None if the method has no switch."""
    if self._m.switch is None:
      return None
    return stable_ranks(_spectra(params, self._layers, self.limits))

  def switches(self, before: Mapping, now: Mapping) -> bool:
    """True if the stable ranks of two epochs end discover."""
    return _switch(self._m)(before, now)


__all__ = [
  "BUDGETS",
  "DECOMPOSERS",
  "PENALTIES",
  "RANK_RULES",
  "SHRINKERS",
  "SWITCHES",
  "Pieces",
  "check",
  "fit_budget",
  "make_optimizer",
  "make_penalty",
  "make_sampler",
  "make_shrink",
  "make_step_penalty",
  "step_weight",
  "weight",
]
