"""Tests the proximal step: a dual solver, its laws, and the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maestro import lowrank, trees
from maestro.methods import prox
from maestro.methods.prox import ProxError
from maestro.training import optim

KINDS = ("hierarchical", "flat")


def _random(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return rng.standard_normal(shape)


def _layer(n_in, rank, n_out, seed=0, decay=1.0):
  """Factors whose later components are the smaller ones, in float64."""
  sizes = decay ** np.arange(rank)
  return {
    "u": _random(n_in, rank, seed=seed) * sizes,
    "v": _random(rank, n_out, seed=seed) * sizes[:, None],
  }


def _tree(seed=0):
  """Plain, convolutional, stacked and grouped factors, and what has none."""
  return {
    "conv": {
      "u": _random(3, 2, 4, 6, seed=seed),
      "v": _random(6, 8, seed=seed),
      "bias": _random(8),
    },
    "fc": _layer(7, 5, 6, seed),
    "stack": {
      "u": _random(2, 3, 4, 5, seed=seed),
      "v": _random(2, 3, 5, 2, seed=seed),
    },
    "norm": {"scale": _random(4)},
  }


RANKS = {
  "conv": {"rank": jnp.int32(4)},
  "fc": {"rank": jnp.int32(5)},
  "stack": {"rank": jnp.array([[1, 5, 0], [2, 3, 2]], jnp.int32)},
}


def _single(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _groups(rank, kind):
  """Index sets of the components that each term of the lasso takes."""
  if kind == "flat":
    return [slice(b, b + 1) for b in range(rank)]
  return [slice(b, rank) for b in range(rank)]


def _solve(y, t, kind, passes=20000):
  """Minimises 1/2 ||x - y||^2 + t sum_g ||x_g|| for y [rank, size], float64.

  By projections of the dual, min_d 1/2 ||y - sum_g d_g||^2 with ||d_g|| <= t,
  from the largest group to the smallest (the wrong order for one pass to be
  enough), until the gap between primal and dual proves the distance.
  """
  groups = _groups(len(y), kind)
  duals = [np.zeros_like(y[g]) for g in groups]
  x = y.copy()
  for _ in range(passes):
    for g, d in zip(groups, duals, strict=True):
      x[g] += d
      norm = np.linalg.norm(x[g])
      d[:] = x[g] * min(1.0, t / norm) if norm else 0.0
      x[g] -= d
    primal = 0.5 * np.sum((x - y) ** 2)
    primal += t * sum(np.linalg.norm(x[g]) for g in groups)
    dual = 0.5 * np.sum(y**2) - 0.5 * np.sum(x**2)
    if primal - dual < 1e-15 * np.sum(y**2):  # ||x - solution||^2 <= 2 gap
      return x
  raise AssertionError(f"no convergence, gap {primal - dual}")


def _components(x, name, n_lead=0):
  """Lays a factor out as [*lead, R, size]."""
  x = np.asarray(x)
  if name == "u":
    x = np.moveaxis(x, -1, n_lead)
  return x.reshape((*x.shape[: n_lead + 1], -1))


# ---------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.03, 0.3, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_dual_solution(kind, t, seed):
  y = {"fc": _layer(7, 9, 5, seed, decay=0.8)}
  with jax.enable_x64(True):
    found = prox.prox(y, None, t, kind)["fc"]
  single = prox.prox(_single(y), None, t, kind)["fc"]
  for name in ("u", "v"):
    want = _solve(_components(y["fc"][name], name), t, kind)
    got = _components(found[name], name)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)
    got = _components(single[name], name)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_the_cases_above_keep_all_some_and_no_components():
  ranks = [
    int(
      prox.exact_ranks(
        prox.prox(_single({"fc": _layer(7, 9, 5, 0, decay=0.8)}), None, t)
      )["fc"]["rank"]
    )
    for t in (0.03, 0.3, 0.9)
  ]
  assert ranks[0] == 9 > ranks[1] > ranks[2] > 0


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.05, 0.4, 2.0])
def test_fulfils_the_optimality_condition(kind, t):
  """The change is a sum of sub-gradients of t ||x_g||, one for each group."""
  with jax.enable_x64(True):
    layer = _layer(6, 8, 5, seed=3)
    z = prox.prox({"fc": layer}, None, t, kind)["fc"]
    for name in ("u", "v"):
      y, x = _components(layer[name], name), _components(z[name], name)
      rest = y - x
      groups = _groups(len(y), kind)
      for g in groups:
        if np.any(x[g]):
          rest[g] -= t * x[g] / np.linalg.norm(x[g])
      for g in groups[::-1]:  # any sub-gradient of norm <= t fits a zero group
        if not np.any(x[g]):
          norm = np.linalg.norm(rest[g])
          rest[g] -= rest[g] * min(1.0, t / norm) if norm else 0.0
      np.testing.assert_allclose(rest, 0.0, atol=1e-12)


@pytest.mark.quick(0)
@pytest.mark.parametrize("kind", KINDS)
def test_lowers_the_objective_below_every_neighbour(kind, jit):
  y, t = _tree(), 0.2
  with jax.enable_x64(True):
    x = prox.prox(y, RANKS, t, kind)
    dead = lowrank.mask(y, RANKS)

    @jit
    def objective(z):
      squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), z, dead)
      lasso = lowrank.group_lasso(z, RANKS, kind)
      return 0.5 * sum(jax.tree.leaves(squares)) + t * lasso

    best = objective(x)
    ranks = jax.tree.map(np.asarray, RANKS)
    for seed in range(5):
      step = jit(lowrank.mask)(_tree(seed + 10), ranks)
      near = jax.tree.map(lambda a, b: a + 1e-3 * np.asarray(b), x, step)
      assert objective(near) > best


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_follows_double_at_a_large_rank(kind):
  y, t = {"fc": _layer(40, 128, 30, decay=0.99)}, 0.02
  with jax.enable_x64(True):
    want = prox.prox(y, None, t, kind)["fc"]
  found = prox.prox(_single(y), None, t, kind)["fc"]
  for name in ("u", "v"):
    np.testing.assert_allclose(found[name], want[name], rtol=0, atol=1e-6)


@pytest.mark.quick(0)
@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_identity(kind):
  tree = _single(_tree())
  _equal(prox.prox(tree, None, 0.0, kind), tree)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_strength_leaves_exact_zeros(kind):
  tree = _single(_tree())
  found = prox.prox(tree, None, 1e3, kind)
  for node in trees.factored(found).values():
    assert not np.any(node["u"]) and not np.any(node["v"])
  _equal(found["norm"], tree["norm"])
  _equal(found["conv"]["bias"], tree["conv"]["bias"])


def test_later_components_shrink_more():
  tree = _single({"fc": _layer(9, 40, 7, decay=0.95)})
  found = prox.prox(tree, None, 0.6)["fc"]
  for name in ("u", "v"):
    before = _components(tree["fc"][name], name)
    after = _components(found[name], name)
    scale = np.linalg.norm(after, axis=1) / np.linalg.norm(before, axis=1)
    assert 0 < np.sum(scale > 0) < 40
    assert np.all(np.diff(scale) <= 1e-6)
    assert np.all(np.diff(scale[scale > 0]) < 0)
    # The zeros are a suffix, and whole components.
    alive = np.any(after != 0, axis=1)
    assert np.all(np.diff(alive.astype(int)) <= 0)
    assert np.all((after != 0) == alive[:, None])


@pytest.mark.quick(0)
@pytest.mark.parametrize("kind", KINDS)
def test_is_firmly_non_expansive(kind):
  """||p - q||^2 <= <p - q, x - y> for p, q = prox(x), prox(y)."""
  with jax.enable_x64(True):
    for seed in range(10):
      x, y = _tree(seed), _tree(seed + 50)
      if seed % 2:  # also for neighbours, where equality is near
        y = jax.tree.map(lambda a, b: a + 0.01 * b, x, y)
      p = prox.prox(x, None, 0.3, kind)
      q = prox.prox(y, None, 0.3, kind)
      pairs = [
        (np.ravel(a - b), np.ravel(c - d))
        for (a, b, c, d) in zip(
          *map(jax.tree.leaves, (p, q, x, y)), strict=True
        )
      ]
      left = sum(a @ a for a, _ in pairs)
      right = sum(a @ b for a, b in pairs)
      assert left <= right * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_and_grouped_maps_are_steps_of_their_own(kind):
  tree, t = _single(_tree()), 0.4
  found = prox.prox(tree, RANKS, t, kind)["stack"]
  for index in np.ndindex(2, 3):
    alone = {"fc": {name: tree["stack"][name][index] for name in ("u", "v")}}
    rank = {"fc": {"rank": RANKS["stack"]["rank"][index]}}
    want = prox.prox(alone, rank, t, kind)["fc"]
    for name in ("u", "v"):
      np.testing.assert_allclose(found[name][index], want[name], atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_is_a_cut_before_and_after(kind):
  """Truncating first gives the same; dead components do not act."""
  tree = _single(_tree())
  at_ranks = prox.prox(tree, RANKS, 0.3, kind)
  of_masked = prox.prox(lowrank.mask(tree, RANKS), None, 0.3, kind)
  _equal(at_ranks, of_masked)
  small = prox.prox(lowrank.truncate(tree, RANKS), RANKS, 0.3, kind)
  cut = lowrank.truncate(at_ranks, RANKS)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), small, cut
  )


def test_layers_without_a_rank_are_left_alone():
  tree = _single(_tree())
  found = prox.prox(tree, {"fc": RANKS["fc"]}, 0.5)
  _equal(found["stack"], tree["stack"])
  _equal(found["conv"], tree["conv"])
  assert np.any(found["fc"]["u"] != tree["fc"]["u"])


@pytest.mark.parametrize("t", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_make_no_nan(kind, t):
  tree = jax.tree.map(jnp.zeros_like, _single(_tree()))
  with jax.debug_nans(True):
    _equal(prox.prox(tree, None, t, kind), tree)
    _equal(prox.prox(tree, RANKS, t, kind), tree)


@pytest.mark.quick(1)
@pytest.mark.parametrize("rank", [0, 1])
def test_truncated_to_almost_nothing(rank):
  layer = {"u": jnp.ones((3, rank)), "v": jnp.ones((rank, 2))}
  found = prox.prox({"fc": layer}, None, 0.1)
  assert found["fc"]["u"].shape == (3, rank)
  assert int(prox.exact_ranks(found)["fc"]["rank"]) == rank
  assert prox.prox({"norm": {"scale": 1.0}}, None, 0.1) == {
    "norm": {"scale": 1.0}
  }


def test_half_precision_keeps_its_type_and_its_zeros():
  tree = {"fc": _layer(7, 9, 5, decay=0.8)}
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
  found = prox.prox(half, None, 0.3)
  wide = prox.prox(
    jax.tree.map(lambda x: x.astype(jnp.float32), half), None, 0.3
  )
  assert found["fc"]["u"].dtype == jnp.bfloat16
  _equal(prox.exact_ranks(found), prox.exact_ranks(wide))
  _equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide))


def test_runs_under_jit_and_scan():
  tree = _single(_tree())

  def step(carry, t):
    return prox.prox(carry, RANKS, t), None

  strengths = jnp.array([0.1, 0.0, 0.2])
  found = jax.jit(lambda x: jax.lax.scan(step, x, strengths)[0])(tree)
  want = tree
  for t in strengths:
    want = prox.prox(want, RANKS, float(t))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    found,
    want,
  )


@pytest.mark.wrong_types
@pytest.mark.parametrize(
  ("t", "kind", "message"),
  [
    (-0.1, "flat", "t=-0.1"),
    (float("nan"), "flat", "t=nan"),
    ("1", "flat", "t='1'"),
    (0.1, "nested", "'nested'.*hierarchical"),
  ],
)
def test_bad_input_is_named(t, kind, message):
  with pytest.raises(ProxError, match=message):
    prox.prox(_single(_tree()), None, t, kind)


# ---------------------------------------------------------------------------
# Ranks by exact zeros
# ---------------------------------------------------------------------------


def test_exact_ranks_count_what_is_not_zero():
  tree = _single(_tree())
  _equal(prox.exact_ranks(tree), lowrank.full_ranks(tree))
  _equal(prox.exact_ranks(tree, RANKS), RANKS)
  tree["fc"]["u"] = tree["fc"]["u"].at[:, 3:].set(0.0)  # v_3, v_4 live on
  tree["conv"]["v"] = tree["conv"]["v"].at[1:].set(0.0)
  tree["conv"]["v"] = tree["conv"]["v"].at[0].set(1e-30)  # its square is zero
  tree["stack"]["u"] = tree["stack"]["u"].at[0, 1].set(0.0)
  ranks = jax.jit(prox.exact_ranks)(tree, RANKS)
  assert int(ranks["fc"]["rank"]) == 3
  assert int(ranks["conv"]["rank"]) == 1
  assert ranks["stack"]["rank"].tolist() == [[1, 0, 0], [2, 3, 2]]
  assert ranks["fc"]["rank"].dtype == jnp.int32


def test_a_zero_between_others_keeps_the_function():
  tree = _single({"fc": _layer(4, 5, 3)})
  tree["fc"]["u"] = tree["fc"]["u"].at[:, jnp.array([1, 4])].set(0.0)
  ranks = prox.exact_ranks(tree)
  assert int(ranks["fc"]["rank"]) == 4
  _equal(lowrank.merge(lowrank.mask(tree, ranks)), lowrank.merge(tree))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_spreads_and_never_lowers_a_rank(kind):
  tree = _single({"fc": _layer(4, 5, 3)})
  tree["fc"]["u"] = tree["fc"]["u"].at[2, 3].set(jnp.nan)
  assert int(prox.exact_ranks(tree)["fc"]["rank"]) == 5
  found = prox.prox(tree, None, 0.1, kind)["fc"]["u"]
  assert np.isnan(found[:, 3]).all()
  if kind == "hierarchical":
    assert np.isnan(found).all()
  assert (
    int(prox.exact_ranks({"fc": {**tree["fc"], "u": found}})["fc"]["rank"]) == 5
  )


# ---------------------------------------------------------------------------
# The optax transformation
# ---------------------------------------------------------------------------


def _train(tx, params, steps, grad):
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(grad(params), state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  return params, state


def _pull(params):
  """Gradient of 1/2 ||params - target||^2."""
  return jax.tree.map(jnp.subtract, params, _single(_tree(7)))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_sgd_is_followed_by_the_step_at_its_schedule(kind):
  params, lam = _single(_tree()), 0.5
  schedule = optax.piecewise_constant_schedule(0.3, {1: 0.1, 2: 2.0})
  tx = optax.chain(
    optax.sgd(schedule, momentum=0.9),
    prox.proximal(schedule, lam, kind=kind),
  )
  found, state = _train(tx, params, 4, _pull)
  want, trace = params, jax.tree.map(jnp.zeros_like, params)
  for rate in (0.3, 0.03, 0.06, 0.06):
    trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, _pull(want))
    want = jax.tree.map(lambda p, m, rate=rate: p - rate * m, want, trace)
    want = prox.prox(want, None, rate * lam, kind)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want
  )
  assert int(state[-1].count) == 4


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_finds_the_minimum(momentum):
  """Of 1/2 ||x - target||^2 + (1 - momentum) lam * lasso: a prox of target."""
  lam = 1.5 / (1.0 - (momentum or 0.0))
  tx = optax.chain(optax.sgd(0.2, momentum=momentum), prox.proximal(0.2, lam))
  found, _ = _train(tx, _single(_tree()), 200, _pull)
  want = prox.prox(_single(_tree(7)), None, 1.5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want
  )
  _equal(prox.exact_ranks(found), prox.exact_ranks(want))
  counts = prox.exact_ranks(found)["stack"]["rank"]
  assert 0 < np.sum(counts) < 30


@pytest.mark.quick(1)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_zeros_are_exact_and_stay(optimizer):
  """After an update, also beside momentum and a target that would revive."""
  rate, lam = 0.1, 3.0
  tx = optax.chain(
    {"sgd": optax.sgd(rate, momentum=0.9), "adam": optax.adam(rate)}[optimizer],
    prox.proximal(rate, lam),
  )
  params, state = _train(tx, _single(_tree()), 3, _pull)
  ranks = prox.exact_ranks(params)
  counts = [np.sum(r) for r in jax.tree.leaves(ranks)]
  full = [np.sum(r) for r in jax.tree.leaves(lowrank.full_ranks(params))]
  assert sum(counts) < sum(full)
  # From here on the layers are at these ranks: no gradient, no memory beyond.
  params = lowrank.mask(params, ranks)
  state = optim.mask(state, params, ranks)
  for _ in range(3):
    grads = lowrank.mask(_pull(params), ranks)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    _equal(params, lowrank.mask(params, ranks))


def test_the_state_is_cut_with_the_parameters():
  params = _single(_tree())
  tx = optax.chain(optax.sgd(0.1, momentum=0.9), prox.proximal(0.1, 0.5))
  params, state = _train(tx, params, 2, _pull)
  params, state = lowrank.mask(params, RANKS), optim.mask(state, params, RANKS)
  grads = lowrank.mask(_pull(params), RANKS)
  cut = optim.truncate(tx, state, params, RANKS)
  assert int(cut[-1].count) == 2
  small = lowrank.truncate(params, RANKS)
  updates, _ = tx.update(grads, state, params)
  want = lowrank.truncate(optax.apply_updates(params, updates), RANKS)
  updates, _ = tx.update(lowrank.truncate(grads, RANKS), cut, small)
  found = optax.apply_updates(small, updates)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, want
  )


def test_ambiguous_shapes_need_layers():
  params = {"fc": {"u": jnp.ones((5, 5, 5)), "v": jnp.ones((5, 5, 5))}}
  tx = prox.proximal(0.1, 0.1)
  with pytest.raises(trees.LowRankError, match=r"'fc'.*layers="):
    tx.update(params, tx.init(params), params)
  spec = trees.LayerSpec("dense", (5,), (5,), stack=(5,))
  tx = prox.proximal(0.1, 0.1, layers={"fc": spec})
  updates, _ = tx.update(params, tx.init(params), params)
  want = prox.prox(
    {"fc": {"u": 2 * jnp.ones((5, 5)), "v": 2 * jnp.ones((5, 5))}}, None, 0.01
  )
  np.testing.assert_allclose(
    updates["fc"]["u"][3] + 1, want["fc"]["u"], atol=1e-6
  )


def test_transformation_names_bad_input():
  with pytest.raises(ProxError, match="lam=-1"):
    prox.proximal(0.1, -1.0)
  with pytest.raises(ProxError, match="learning_rate=inf"):
    prox.proximal(float("inf"), 1.0)
  with pytest.raises(ProxError, match="'lasso'"):
    prox.proximal(0.1, 1.0, kind="lasso")
  tx = prox.proximal(optax.constant_schedule(0.1), 1.0)
  params = _single(_tree())
  with pytest.raises(ProxError, match="params"):
    tx.update(params, tx.init(params))
