"""The paper's theory on linear maps: ordered dropout against SVD and PCA.

  python -m experiments.theory                  # four cases, five seeds, figure
  python -m experiments.theory --seeds=20       # more seeds
  python -m experiments.theory --smoke          # a short form; keeps nothing

On a linear map, the objective of ordered dropout is the PCA of the transformed
data. Each case trains factors u, v by full-batch SGD with one-layer sampling
on the mean over examples of the squared error norm, and compares them with
NumPy's decomposition:

  svd           x = identity: the truncated SVD of the map, at every rank k
  pca           x = y = 3 orthonormal points in R^10: their PCA, at rank 3
  adaptive_pca  the same; one point is dropped half-way: its component goes
  data_order    inputs weigh direction k by k / sigma_k: the order is the data's

Results go to experiments/results/theory/, the figure that is drawn from them to
docs/images/theory.png; docs/theory.md explains both. Exits with 1 if a bar is
not met.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np
import optax
from absl import flags

import maestro
from experiments import runs
from maestro import cli, sampling
from maestro.data import synthetic
from maestro.errors import UserError
from maestro.models import LinearAutoencoder, LinearMap
from maestro.report.style import COLOURS, GREY, INK, STYLE
from maestro.report.tables import align
from maestro.runs.provenance import git_commit
from maestro.training import losses

Sampler = Callable[[jax.Array, Any], Any]


# ---------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a case is trained.

  Attributes:
    steps: of full-batch SGD.
    learning_rate: of the first half of the steps.
    final_rate: to which it goes, exponentially, in the second half.
    momentum: of SGD.
    lam: weight of the flat group lasso.
    full_pass: whether each step adds the loss of the full network.
    records: how often the factors are recorded.
  """

  steps: int
  learning_rate: float
  final_rate: float
  momentum: float = 0.0
  lam: float = 0.0
  full_pass: bool = False
  records: int = 100


def fit(
  model: Any,
  x: jax.Array,
  y: jax.Array,
  seed: jax.Array,
  *,
  scale: jax.Array,
  used: jax.Array,
  recipe: Recipe,
  sampler: Sampler,
) -> tuple[jax.Array, jax.Array]:
  """Trains the factors of a linear map: u [T + 1, in, R], v [T + 1, R, out].

    loss = mean_n ||y_n - x_n u_:b v_:b||^2,  b drawn anew in each step
           (+ the same at full rank)  + lam * group_lasso(flat)

  Starts from the model's initial weights, decomposed at full rank.

  Args:
    model: a Linen module with one layer, "map".
    x: inputs [n, in].
    y: targets [n, out].
    seed: of the initial weights and of the sampled ranks.
    scale: multiplies the learning rate.
    used: [2, n], which examples are used in each half of the steps.
    recipe: what else there is to choose.
    sampler: (key, ranks) -> ranks.

  Returns:
    The factors at the start and at T = recipe.records equal distances.
  """
  key_init, key_rank = jax.random.split(jax.random.key(seed))
  params = model.init(key_init, x)["params"]
  params = maestro.decompose(params, [maestro.Rule()], maestro.layers(model, x))
  ranks = maestro.full_ranks(params)
  half = recipe.steps // 2
  rate = optax.exponential_decay(
    recipe.learning_rate,
    recipe.steps - half,
    recipe.final_rate / recipe.learning_rate,
    transition_begin=half,
  )
  tx = optax.chain(optax.sgd(rate, recipe.momentum), optax.scale(scale))

  def step(carry, i):
    params, opt_state = carry
    sampled = sampler(jax.random.fold_in(key_rank, i), ranks)
    weights = jnp.where(i < half, used[0], used[1])

    def objective(params):
      def task(ranks):
        out = model.apply({"params": params, "ranks": ranks}, x)
        errors = losses.squared_error(out, y)
        return jnp.sum(weights * errors) / jnp.sum(weights)

      loss = task(sampled)
      if recipe.full_pass:
        loss += task(ranks)
      if recipe.lam:
        loss += recipe.lam * maestro.group_lasso(params, ranks, kind="flat")
      return loss

    updates, opt_state = tx.update(jax.grad(objective)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  def stretch(carry, steps):
    carry, _ = jax.lax.scan(step, carry, steps)
    return carry, (carry[0]["map"]["u"], carry[0]["map"]["v"])

  steps = jnp.arange(recipe.steps).reshape(recipe.records, -1)
  start = params["map"]["u"][None], params["map"]["v"][None]
  _, trace = jax.lax.scan(stretch, (params, tx.init(params)), steps)
  u, v = (jnp.concatenate(pair) for pair in zip(start, trace, strict=True))
  return u, v


@functools.partial(jax.jit, static_argnames=("model", "recipe", "sampler"))
def _fit_all(model, recipe, sampler, x, y, seeds, scale, used):
  def run(x, y, seed, scale):
    options = {"scale": scale, "used": used}
    return fit(model, x, y, seed, **options, recipe=recipe, sampler=sampler)

  return jax.vmap(run)(x, y, seeds, scale)


def fit_all(model, x, y, seeds, recipe, sampler, *, scale=None, used=None):
  """`fit` for all seeds at once, in float64: arrays [S, T + 1, ...]."""
  scale = np.ones(len(seeds)) if scale is None else scale
  used = np.ones((2, x.shape[1])) if used is None else used
  x, y, scale, used = (np.asarray(a, np.float32) for a in (x, y, scale, used))
  u, v = _fit_all(model, recipe, sampler, x, y, np.asarray(seeds), scale, used)
  return np.asarray(u, np.float64), np.asarray(v, np.float64)


# ---------------------------------------------------------------------------
# Cases: (seeds, recipe, sampler) -> result, compared with NumPy
# ---------------------------------------------------------------------------

# The rates were chosen so that no seed diverges.
SVD = Recipe(20_000, 0.2, 0.2, momentum=0.9)
PCA = Recipe(10_000, 0.2, 0.002, lam=0.01, full_pass=True)
# The scale of the inputs bounds the rate at first, and no longer at the end.
DATA_ORDER = Recipe(40_000, 0.1, 0.5, momentum=0.9)


@dataclasses.dataclass(frozen=True)
class Check:
  """One number of each seed, and its bar.

  Attributes:
    name: what is measured.
    values: [S], one a seed.
    limit: of the bar; None only records.
    sign: "<=" or ">=": on which side of the limit a value should be; "=="
      asks for the limit itself.
  """

  name: str
  values: np.ndarray
  limit: float | None = None
  sign: str = "<="

  @property
  def worst(self) -> float:
    """The value that is furthest from (or least within) the bar."""
    if self.sign == "==" and self.limit is not None:
      return float(self.values[np.argmax(np.abs(self.values - self.limit))])
    return float(
      np.max(self.values) if self.sign == "<=" else np.min(self.values)
    )

  @property
  def passed(self) -> bool | None:
    """Whether every seed is within the bar; NaN never is. None: no bar."""
    if self.limit is None:
      return None
    within = {"<=": np.less_equal, ">=": np.greater_equal, "==": np.equal}
    return bool(np.all(within[self.sign](self.values, self.limit)))

  @property
  def bar(self) -> str:
    return "-" if self.limit is None else f"{self.sign} {self.limit:g}"

  def record(self) -> dict[str, Any]:
    """Everything, for the results file."""
    return {
      "bar": self.bar,
      "worst": _rounded(np.array(self.worst)),
      "mean": _rounded(np.mean(self.values)),
      "pass": self.passed,
      "per_seed": _rounded(self.values),
    }


def _rounded(values: np.ndarray) -> Any:
  """Nested lists of 4 significant digits, null for what is not finite."""
  if values.ndim:
    return [_rounded(x) for x in values]
  return float(f"{values:.4g}") if np.isfinite(values) else None


@dataclasses.dataclass(frozen=True)
class Result:
  """What one case measured.

  Attributes:
    case: its name.
    recipe: how it was trained.
    seeds: of the map or the points, the initial weights and the sampled ranks.
    checks: the numbers with bars.
    measured: {name: [S, ...]} at the end of training.
    curves: {name: [S, ..., T + 1]} along the training.
  """

  case: str
  recipe: Recipe
  seeds: Sequence[int]
  checks: tuple[Check, ...]
  measured: Mapping[str, np.ndarray]
  curves: Mapping[str, np.ndarray]


def _component_norms(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """||u[:, b]|| * ||v[b]||, the Frobenius norm of each component: [..., R]."""
  return np.linalg.norm(u, axis=-2) * np.linalg.norm(v, axis=-1)


def _maps(seeds: Sequence[int]) -> np.ndarray:
  """One map of true rank 3 a seed, [S, 9, 6]."""
  maps = [synthetic.make_map(9, 6, 3, seed=seed) for seed in seeds]
  return np.stack(maps).astype(np.float64)


def _points(seeds: Sequence[int]) -> np.ndarray:
  """Three orthonormal points in R^10 a seed, [S, 3, 10]."""
  return np.stack(
    [
      synthetic.linear(
        in_features=10,
        examples=3,
        inputs="orthonormal",
        target="input",
        seed=seed,
      ).train.inputs
      for seed in seeds
    ]
  ).astype(np.float64)


def svd(
  seeds: Sequence[int],
  *,
  recipe: Recipe = SVD,
  sampler: Sampler = sampling.one_layer,
) -> Result:
  """Trains on a map A of rank 3, x = identity: finds A_k for every k at once.

  The factors' first k components are compared with NumPy's truncated SVD A_k,
  and the components' norms with the singular values.
  """
  maps = _maps(seeds)
  x = np.broadcast_to(np.eye(9), (len(seeds), 9, 9))
  u, v = fit_all(LinearMap(6), x, maps, seeds, recipe, sampler)
  left, s, right = np.linalg.svd(maps, full_matrices=False)
  errors = []
  for k in range(1, s.shape[-1] + 1):
    best = (left[:, :, :k] * s[:, None, :k]) @ right[:, :k]
    error = u[..., :k] @ v[..., :k, :] - best[:, None]
    errors.append(np.sum(error**2, axis=(-2, -1)))
  errors = np.stack(errors, axis=1)
  norms = _component_norms(u[:, -1], v[:, -1])
  checks = (
    Check("max_k ||u_:k v_:k - A_k||^2", np.max(errors[..., -1], 1), 1e-3),
    Check("max_k |component norm - sigma_k|", np.max(abs(norms - s), 1), 1e-2),
  )
  measured = {
    "error_at_k": errors[..., -1],
    "component_norms": norms,
    "singular_values": s,
  }
  curves = {"error_at_k": errors}
  return Result("svd", recipe, seeds, checks, measured, curves)


def _subspace_cosine(v: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Smallest principal cosine of the row space of v with the PCA of x, [S]."""
  rank = v.shape[-2]
  principal = np.linalg.svd(x, full_matrices=False)[2][:, :rank]
  basis = np.linalg.qr(np.swapaxes(v, -1, -2))[0]
  return np.linalg.svd(principal @ basis, compute_uv=False)[:, -1]


def _component_curves(norms: np.ndarray) -> dict[str, np.ndarray]:
  """From norms [S, T + 1, R]: of the first three, and the largest other."""
  first = {f"component {b + 1}": norms[..., b] for b in range(3)}
  return first | {"largest other": np.max(norms[..., 3:], axis=-1)}


def pca(
  seeds: Sequence[int],
  *,
  recipe: Recipe = PCA,
  sampler: Sampler = sampling.one_layer,
) -> Result:
  """Trains an autoencoder on 3 orthonormal points: 3 components survive."""
  x = _points(seeds)
  u, v = fit_all(LinearAutoencoder(), x, x, seeds, recipe, sampler)
  norms = _component_norms(u, v)
  end, alive = norms[:, -1], norms[:, -1, :3]
  spread = np.max(alive, 1) / np.maximum(np.min(alive, 1), 1e-30) - 1
  checks = (
    Check("components >= 1e-6", np.sum(end >= 1e-6, axis=1), 3, "=="),
    Check("largest / smallest of 3, - 1", spread, 0.05),
    Check("largest of the others", np.max(end[:, 3:], axis=1), 1e-6),
    Check(
      "cosine with the PCA's space",
      _subspace_cosine(v[:, -1, :3], x),
      sign=">=",
    ),
  )
  measured = {"component_norms": end}
  curves = _component_curves(norms)
  return Result("pca", recipe, seeds, checks, measured, curves)


def adaptive_pca(
  seeds: Sequence[int],
  *,
  recipe: Recipe = PCA,
  sampler: Sampler = sampling.one_layer,
) -> Result:
  """Drops one of the 3 points half-way: the third component decays."""
  x = _points(seeds)
  u, v = fit_all(
    LinearAutoencoder(),
    x,
    x,
    seeds,
    recipe,
    sampler,
    used=[[1, 1, 1], [1, 1, 0]],
  )
  norms = _component_norms(u, v)
  end, before = norms[:, -1], norms[:, recipe.records // 2]
  checks = (
    Check("third component", end[:, 2], 1e-3),
    Check("third component before the drop", before[:, 2], sign=">="),
    Check("second component", end[:, 1], sign=">="),
    Check(
      "cosine with the PCA's space",
      _subspace_cosine(v[:, -1, :2], x[:, :2]),
      sign=">=",
    ),
  )
  measured = {"component_norms": end}
  curves = _component_curves(norms)
  return Result("adaptive_pca", recipe, seeds, checks, measured, curves)


def data_order(
  seeds: Sequence[int],
  *,
  recipe: Recipe = DATA_ORDER,
  sampler: Sampler = sampling.one_layer,
) -> Result:
  """Inputs weigh direction k of the map by k / sigma_k: the last comes first.

  With A = sum_k sigma_k l_k r_k^T, the three inputs are (k / sigma_k) l_k and
  their targets k r_k: component b should be l_(4 - b) and r_(4 - b). What u
  holds outside of the inputs' span gets no gradient and is left out.
  """
  maps = _maps(seeds)
  left, s, right = np.linalg.svd(maps, full_matrices=False)
  left, s, right = left[:, :, :3], s[:, :3], right[:, :3]
  weights = np.arange(1, 4) / s
  x = weights[:, :, None] * np.swapaxes(left, 1, 2)
  y = x @ maps
  # The loss's curvature in u is that of x^T x / n, times what v holds.
  scale = 3 / np.max(weights, axis=1) ** 2
  u, v = fit_all(LinearMap(6), x, y, seeds, recipe, sampler, scale=scale)
  u, v = u[:, -1], v[:, -1]

  seen = np.swapaxes(left, 1, 2) @ u[:, :, :3]  # [S, direction, component]
  cos_u = np.abs(seen) / np.linalg.norm(seen, axis=1, keepdims=True)
  cos_v = np.abs(right @ np.swapaxes(v[:, :3], 1, 2))
  cos_v /= np.linalg.norm(v[:, :3], axis=-1)[:, None, :]
  expected = np.arange(2, -1, -1), np.arange(3)

  def data_errors(product):
    ks = range(1, 4)
    gaps = [x @ (product(k) - maps) for k in ks]
    return np.stack([np.sum(gap**2, axis=(1, 2)) for gap in gaps], axis=1)

  ours = data_errors(lambda k: u[:, :, :k] @ v[:, :k])
  plain = data_errors(
    lambda k: (left[:, :, :k] * s[:, None, :k]) @ right[:, :k]
  )
  checks = (
    Check(
      "min_b |cos| of u with its direction",
      np.min(cos_u[:, *expected], axis=1),
      0.95,
      ">=",
    ),
    Check(
      "min_b |cos| of v with its direction",
      np.min(cos_v[:, *expected], axis=1),
      0.95,
      ">=",
    ),
    Check("error on the data at rank 1", ours[:, 0]),
    Check("the same of the SVD's order", plain[:, 0], sign=">="),
  )
  measured = {
    "cosines_u": cos_u,
    "cosines_v": cos_v,
    "data_error_at_k": ours,
    "data_error_at_k_of_svd": plain,
    "singular_values": s,
  }
  return Result("data_order", recipe, seeds, checks, measured, {})


CASES = {
  "svd": (svd, SVD),
  "pca": (pca, PCA),
  "adaptive_pca": (adaptive_pca, PCA),
  "data_order": (data_order, DATA_ORDER),
}


# ---------------------------------------------------------------------------
# Results, table, figure
# ---------------------------------------------------------------------------


def record(result: Result) -> dict[str, Any]:
  """Turns a result into what its file holds."""
  device = jax.devices()[0]
  steps = np.linspace(0, result.recipe.steps, result.recipe.records + 1)
  return {
    "case": result.case,
    "config": dataclasses.asdict(result.recipe) | {"sampler": "one_layer"},
    "git": git_commit(),
    "device": f"{device.platform}: {device.device_kind}",
    "jax": jax.__version__,
    "seeds": list(result.seeds),
    "checks": {check.name: check.record() for check in result.checks},
    "measured": {k: _rounded(x) for k, x in result.measured.items()},
    "curves": {"step": steps.astype(int).tolist()}
    | {k: _rounded(x) for k, x in result.curves.items()},
  }


def table(records: Sequence[Mapping[str, Any]]) -> str:
  """Tabulates the checks: bar, worst over seeds, mean, pass."""
  rows = [("case", "measured", "bar", "worst", "mean", "")]
  for one in records:
    for name, check in one["checks"].items():
      verdict = {True: "pass", False: "FAIL", None: ""}[check["pass"]]
      worst, mean = (
        "not finite" if check[k] is None else f"{check[k]:.3g}"
        for k in ("worst", "mean")
      )
      rows.append((one["case"], name, check["bar"], worst, mean, verdict))
  return "\n".join(align(rows, left=range(6)))


def _bar_line(axes, y, text):
  axes.axhline(y, color=INK, linewidth=0.9, linestyle="--")
  axes.annotate(
    text,
    (1, y),
    xycoords=("axes fraction", "data"),
    xytext=(0, 3),
    textcoords="offset points",
    ha="right",
    fontsize=8,
    color=INK,
  )


def _draw_errors(axes, one):
  steps = np.array(one["curves"]["step"]) / 1000
  errors = np.array(one["curves"]["error_at_k"])
  for k, colour in zip(range(errors.shape[1]), COLOURS, strict=False):
    worst = np.max(errors[:, k], axis=0)
    axes.plot(steps, worst, color=colour, label=f"k = {k + 1}")
  axes.set_yscale("log")
  axes.set(xlabel="thousand steps", ylabel="squared error, worst seed")
  axes.set_title("SVD: error of the first k against $A_k$")
  _bar_line(axes, 1e-3, "bar")
  axes.legend(ncols=2, fontsize=8)


def _draw_norms(axes, one):
  norms = np.array(one["measured"]["component_norms"])
  values = np.array(one["measured"]["singular_values"])
  axes.plot([0, 1.05], [0, 1.05], color=GREY, linewidth=1)
  for k, colour in zip(range(3), COLOURS, strict=False):
    axes.plot(
      values[:, k], norms[:, k], "o", color=colour, label=f"component {k + 1}"
    )
  axes.plot(
    values[:, 3:].ravel(), norms[:, 3:].ravel(), "o", color=GREY, label="4 to 6"
  )
  axes.set(xlabel="singular value (NumPy)", ylabel="norm of the component")
  axes.set_title("SVD: norms are the singular values")
  axes.legend(fontsize=8)


def _draw_components(axes, one, title, bar):
  curves = dict(one["curves"])
  steps = np.array(curves.pop("step")) / 1000
  colours = (*COLOURS[:3], GREY)
  widths = (5, 3, 1.2, 1.6)  # the first three lie on each other
  for (name, values), colour, width in zip(
    curves.items(), colours, widths, strict=True
  ):
    values = np.maximum(np.array(values, dtype=float), 1e-12)
    axes.plot(
      steps, np.max(values, axis=0), color=colour, linewidth=width, label=name
    )
  axes.set_yscale("log")
  axes.set_ylim(1e-11, 1e2)
  axes.set(xlabel="thousand steps", ylabel="norm, largest of the seeds")
  axes.set_title(title)
  _bar_line(axes, *bar)
  if one["case"] == "adaptive_pca":
    half = one["config"]["steps"] / 2000
    axes.axvline(half, color=INK, linewidth=0.9, linestyle=":")
    axes.annotate(
      "one point dropped",
      (half, 20),
      xytext=(4, 0),
      textcoords="offset points",
      fontsize=8,
      color=INK,
    )
  axes.legend(fontsize=8, loc="lower left")


def _draw_cosines(axes, one):
  cosines = np.mean(np.array(one["measured"]["cosines_u"]), axis=0)
  axes.imshow(cosines, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
  for (direction, component), value in np.ndenumerate(cosines):
    axes.text(
      component,
      direction,
      f"{value:.3f}",
      ha="center",
      va="center",
      color="white" if value > 0.5 else INK,
    )
  ticks = range(3)
  axes.set_xticks(ticks, [f"{b + 1}" for b in ticks])
  axes.set_yticks(ticks, [f"{k + 1}" for k in ticks])
  axes.grid(False)
  axes.tick_params(length=0)
  axes.set(xlabel="component of u", ylabel="singular direction of the map")
  axes.set_title("Data order: |cos|, mean over seeds")


def _draw_data_errors(axes, one):
  ks = np.arange(1, 4)
  series = {
    "SVD of the map": ("data_error_at_k_of_svd", GREY),
    "ordered dropout": ("data_error_at_k", COLOURS[0]),
  }
  for i, (label, (key, colour)) in enumerate(series.items()):
    errors = np.mean(np.array(one["measured"][key]), axis=0)
    bars = axes.bar(ks + 0.38 * (i - 0.5), errors, 0.36, color=colour)
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8, color=INK)
    bars.set_label(label)
  axes.set_xticks(ks)
  axes.set_ylim(0, 15)
  axes.grid(False, axis="x")
  axes.set(xlabel="rank k", ylabel="squared error on the data")
  axes.set_title("Data order: the SVD's order is wrong")
  axes.legend(fontsize=8)


def draw(records: Mapping[str, Mapping[str, Any]]) -> matplotlib.figure.Figure:
  """Draws the figure from the contents of the four results files."""
  with matplotlib.rc_context(STYLE):
    figure = matplotlib.figure.Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(2, 3)
    _draw_errors(grid[0, 0], records["svd"])
    _draw_components(
      grid[0, 1],
      records["pca"],
      "PCA: 3 of 10 components survive",
      (1e-6, "bar"),
    )
    _draw_cosines(grid[0, 2], records["data_order"])
    _draw_norms(grid[1, 0], records["svd"])
    _draw_components(
      grid[1, 1], records["adaptive_pca"], "Adaptive PCA: then 2", (1e-3, "bar")
    )
    _draw_data_errors(grid[1, 2], records["data_order"])
  return figure


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_integer("seeds", 5, "Seeds of each case.", 1)
  flags.DEFINE_bool("smoke", False, "A few steps each; not kept.")
  flags.DEFINE_string(
    "out", "experiments/results/theory", "Folder of the results files."
  )
  flags.DEFINE_string("figure", "docs/images/theory.png", "The figure.")


def main(argv: list[str]) -> None:
  """Runs the cases, keeps the results, draws the figure, prints the table."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  records = {}
  for name, (case, recipe) in CASES.items():
    if flags.FLAGS.smoke:
      recipe = dataclasses.replace(recipe, steps=2 * recipe.records)
    records[name] = record(case(range(flags.FLAGS.seeds), recipe=recipe))
  print(table(list(records.values())))
  if flags.FLAGS.smoke:
    print("\n--smoke: too few steps for the bars; nothing is kept")
    return
  for name, one in records.items():
    runs.write_results(pathlib.Path(flags.FLAGS.out) / f"{name}.json", one)
  figure = pathlib.Path(flags.FLAGS.figure)
  figure.parent.mkdir(parents=True, exist_ok=True)
  draw(records).savefig(figure)
  print(f"\nresults: {flags.FLAGS.out}, figure: {figure}")
  verdicts = [
    c["pass"] for one in records.values() for c in one["checks"].values()
  ]
  if False in verdicts:
    sys.exit(1)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
