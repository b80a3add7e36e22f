"""Tests of the method on parameter trees: factors, ranks, norms, shrinking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import lowrank, trees
from maestro.lowrank import Rule
from maestro.trees import LayerSpec, LowRankError


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _random(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _factors(seed=0):
  """Factors of every kind of layer: plain, convolution, stacked and grouped."""
  return {
    "fc": {"u": _random(7, 5, seed=seed), "v": _random(5, 6), "bias": BIAS},
    "conv": {"u": _random(3, 2, 4, 6, seed=seed), "v": _random(6, 8)},
    "stack": {"u": _random(2, 3, 4, 5, seed=seed), "v": _random(2, 3, 5, 2)},
  }


BIAS = jnp.arange(6.0)
RANKS = {
  "fc": {"rank": jnp.int32(3)},
  "conv": {"rank": jnp.int32(0)},
  "stack": {"rank": jnp.array([[1, 5, 0], [2, 3, 2]], jnp.int32)},
}


# ---------------------------------------------------------------------------
# Decomposing and merging
# ---------------------------------------------------------------------------


def test_merge_inverts_decompose(case, close):
  close(lowrank.merge(case.factored, case.layers), case.dense)
  plain = all(not s.lead and s.kind != "embed" for s in case.layers.values())
  if plain:
    close(lowrank.merge(case.factored), case.dense)


def test_merge_needs_layers_for_stacked_ones(cases):
  with pytest.raises(LowRankError, match=r"'blocks/Dense_0'.*layers="):
    lowrank.merge(cases["scan"].factored)


def test_merge_takes_only_the_chosen_layers(cases, close):
  case = cases["remat"]
  merged = lowrank.merge(
    case.factored, case.layers, where=lambda path: path == "last"
  )
  assert merged["first"] == case.factored["first"]
  close(merged["last"], case.dense["last"])


def test_decompose_orders_and_balances_components(case):
  for path, spec in case.layers.items():
    if spec.full_rank == 1:
      continue
    node = trees.get(case.factored, path)
    kernel = np.asarray(trees.get(case.dense, path)[spec.weight], np.float64)
    r = spec.full_rank
    if spec.kind == "conv" and spec.groups:
      g = spec.groups[0]
      kernel = kernel.reshape((*spec.stack, spec.n_in, g, spec.n_out))
      kernel = np.moveaxis(kernel, -2, -3)
    s = np.linalg.svd(
      kernel.reshape((*spec.lead, spec.n_in, spec.n_out)), compute_uv=False
    )
    u = np.asarray(node["u"]).reshape((*spec.lead, spec.n_in, r))
    v = np.asarray(node["v"]).reshape((*spec.lead, r, spec.n_out))
    for norms in (np.linalg.norm(u, axis=-2), np.linalg.norm(v, axis=-1)):
      np.testing.assert_allclose(norms**2, s, rtol=1e-4, atol=1e-5)


def test_decompose_to_a_lower_rank_is_the_best_approximation(cases, close):
  case = cases["conv_same"]
  low = lowrank.decompose(case.dense, [Rule(rank=2)], case.layers)
  assert low["u"].shape == (3, 2, 3, 2)
  assert low["v"].shape == (2, 6)
  close(low, lowrank.truncate(case.factored, case.ranks(2)))


def test_decompose_can_be_traced(cases, close, jit):
  case = cases["network"]

  def decompose(params):
    return lowrank.decompose(params, [Rule()], case.layers)

  shapes = jax.eval_shape(decompose, case.dense)
  assert shapes == jax.eval_shape(lambda p: p, case.factored)
  found = jit(decompose)(case.dense)
  close(
    lowrank.merge(found, case.layers), lowrank.merge(case.factored, case.layers)
  )


def test_decompose_leaves_the_rest_untouched(cases):
  case = cases["network"]
  rules = [
    Rule("hidden", decompose=False),
    Rule("hea.", rank=2),
    Rule(".*(ed|d.*)"),  # grouped and depthwise; hidden and head are decided
  ]
  params = lowrank.decompose(case.dense, rules, case.layers)
  assert params["head"]["u"].shape[-1] == 2
  assert params["grouped"]["u"].shape == (2, 1, 1, 3, 3)
  assert params["head"]["bias"] is case.dense["head"]["bias"]
  for path in ("stem", "depthwise", "norm", "hidden"):
    for name, leaf in case.dense[path].items():
      assert params[path][name] is leaf
  assert "kernel" in case.dense["head"]  # nothing is changed in place


def test_decompose_keeps_half_precision(cases):
  case = cases["conv_grouped"]
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.dense)
  params = lowrank.decompose(half, [Rule()], case.layers)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([Rule("stem"), Rule("lost")], r"rule 'lost' matches no layer"),
    ([Rule("ste")], r"rule 'ste' matches no layer.*'stem'"),
    ([Rule(), Rule("stem")], r"rule 'stem' is shadowed by an earlier rule"),
    ([Rule("(")], r"rule '\(' is not a regular expression"),
    ([Rule("stem", rank=7)], r"layer 'stem': rank 7 is outside \[0, 6\]"),
    ([Rule("stem", rank=-1)], r"layer 'stem': rank -1 is outside \[0, 6\]"),
    ([Rule("stem", rank=2.5)], r"layer 'stem': rank 2.5 is not an integer"),
  ],
)
def test_a_rule_that_does_not_fit_raises(cases, rules, message):
  case = cases["network"]
  with pytest.raises(LowRankError, match=message):
    lowrank.decompose(case.dense, rules, case.layers)


def test_decomposing_twice_raises(cases):
  case = cases["remat"]
  with pytest.raises(LowRankError, match=r"layer 'first'.*found factors"):
    lowrank.decompose(case.factored, [Rule()], case.layers)


def test_decomposing_another_kernel_raises(cases):
  case = cases["dense"]
  with pytest.raises(LowRankError, match=r"\(9, 6\).*found \(9, 7\)"):
    lowrank.decompose({"kernel": jnp.ones((9, 7))}, [Rule()], case.layers)
  with pytest.raises(LowRankError, match=r"dense 'kernel'"):
    lowrank.decompose({}, [Rule()], case.layers)


@pytest.mark.quick(4)
def test_from_zeros_the_product_takes_the_steps_of_the_kernel(case, close):
  """A step of 1 along the gradient, of u and v, moves u @ v as it is."""
  wanted = {}
  params = case.dense
  for i, (path, spec) in enumerate(case.layers.items()):
    node = dict(trees.get(params, path))
    if spec.full_rank > 1:
      wanted[path] = _random(*spec.kernel_shape, seed=i)
      node[spec.weight] = jnp.zeros(spec.kernel_shape)
      params = trees.replace(params, {path: node}) if path else node
  low = lowrank.decompose(params, [Rule()], case.layers)

  def kernels(params):
    merged = lowrank.merge(params, case.layers)
    return {
      path: trees.get(merged, path)[case.layers[path].weight] for path in wanted
    }

  def objective(params):
    found = kernels(params)
    return sum(jnp.vdot(wanted[path], x) for path, x in found.items())

  grads = jax.grad(objective)(low)
  moved = jax.tree.map(jnp.add, low, grads)
  assert all(not np.any(x) for x in kernels(low).values())
  close(kernels(moved), wanted, 1e-5)


def test_what_a_kernel_maps_to_zero_can_still_learn(cases):
  """A rank of 2 of 6: the others are zero on one side alone."""
  case = cases["dense"]
  kernel = _random(9, 2) @ _random(2, 6)
  low = lowrank.decompose({"kernel": kernel}, [Rule()], case.layers)
  np.testing.assert_allclose(low["u"] @ low["v"], kernel, atol=1e-5)
  norms = [np.linalg.norm(low["u"], axis=0), np.linalg.norm(low["v"], axis=1)]
  np.testing.assert_allclose(norms[0][:2], norms[1][:2], rtol=1e-5)
  assert not np.any(norms[0][2:])
  np.testing.assert_allclose(norms[1][2:], 1, rtol=1e-5)


def test_rank_zero_rule_keeps_no_component(cases):
  case = cases["dense"]
  low = lowrank.decompose(case.dense, [Rule(rank=0)], case.layers)
  assert low["u"].shape == (9, 0)
  merged = lowrank.merge(low)
  assert jnp.array_equal(merged["kernel"], jnp.zeros((9, 6)))


# ---------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------


def test_full_ranks_mirror_the_factored_layers(case):
  flat = trees.flatten_ranks(case.full)
  expected = {p: s for p, s in case.layers.items() if s.full_rank > 1}
  assert set(flat) == set(expected)
  for path, spec in expected.items():
    assert flat[path].dtype == jnp.int32
    assert flat[path].shape == spec.lead
    assert (np.asarray(flat[path]) == spec.full_rank).all()
  jax.tree.map(np.testing.assert_array_equal, case.full, case.ranks("full"))


def test_full_ranks_reads_leading_axes_from_shapes():
  ranks = lowrank.full_ranks(_factors())
  assert jax.tree.map(jnp.shape, ranks) == jax.tree.map(jnp.shape, RANKS)


def test_full_ranks_of_ambiguous_shapes_raises_and_asks_for_layers():
  params = {"fc": {"u": jnp.ones((3, 3, 3)), "v": jnp.ones((3, 3, 3))}}
  with pytest.raises(LowRankError, match=r"layer 'fc'.*layers="):
    lowrank.full_ranks(params)
  specs = {
    (): LayerSpec("dense", (3, 3), (3, 3)),
    (3,): LayerSpec("dense", (3,), (3,), stack=(3,)),
  }
  for shape, spec in specs.items():
    ranks = lowrank.full_ranks(params, {"fc": spec})
    assert ranks["fc"]["rank"].shape == shape


def test_full_ranks_of_dense_parameters_is_empty(cases):
  assert lowrank.full_ranks(cases["network"].dense) == {}


def test_ranks_flatten_and_unflatten(cases):
  flat = trees.flatten_ranks(RANKS | {"a": {"b": {"rank": 1}}})
  assert list(flat) == ["a/b", "conv", "fc", "stack"]
  assert trees.unflatten_ranks(flat)["a"] == {"b": {"rank": 1}}
  assert trees.unflatten_ranks({"": 3}) == {"rank": 3}
  with pytest.raises(LowRankError, match=r"leaf 'rnk' at 'a'"):
    trees.flatten_ranks({"a": {"rnk": 1}})


def test_mask_zeroes_exactly_what_is_beyond_the_rank(reference_mask):
  params = _factors()
  _equal(lowrank.mask(params, RANKS), reference_mask(params, RANKS))
  masked = jax.jit(lowrank.mask)(params, RANKS)
  _equal(masked, reference_mask(params, RANKS))


def test_mask_leaves_layers_without_a_rank():
  params = _factors()
  masked = lowrank.mask(params, {"fc": RANKS["fc"]})
  assert masked["conv"] == params["conv"]
  assert masked["fc"]["bias"] is params["fc"]["bias"]


@pytest.mark.parametrize(
  ("multiple_of", "sizes"),
  [(1, (3, 0, 5)), (2, (4, 0, 5)), (4, (4, 0, 5)), (8, (5, 0, 5))],
)
def test_truncate_rounds_up_to_a_multiple_but_not_above_the_factors(
  reference_mask, multiple_of, sizes
):
  params = _factors()
  small = lowrank.truncate(params, RANKS, multiple_of=multiple_of)
  found = tuple(small[p]["u"].shape[-1] for p in ("fc", "conv", "stack"))
  assert found == sizes
  for path, node in reference_mask(params, RANKS).items():
    size = small[path]["u"].shape[-1]
    v = node["v"][:, :, :size] if path == "stack" else node["v"][:size]
    _equal(small[path], {**node, "u": node["u"][..., :size], "v": v})


def test_truncate_takes_plain_integers():
  small = lowrank.truncate(_factors(), {"fc": {"rank": 2}})
  assert small["fc"]["v"].shape == (2, 6)


def test_truncate_refuses_traced_ranks():
  with pytest.raises(LowRankError, match=r"layer '\w+'.*concrete ranks"):
    jax.eval_shape(lambda r: lowrank.truncate(_factors(), r), RANKS)


CONSUMERS = {
  "mask": lowrank.mask,
  "truncate": lowrank.truncate,
  "importance": lowrank.importance,
  "group_lasso": lowrank.group_lasso,
  "shrink": lambda params, ranks: lowrank.shrink(params, ranks, 0.1),
}


@pytest.mark.parametrize("name", CONSUMERS)
@pytest.mark.parametrize(
  ("ranks", "message"),
  [
    ({"fc": {"rank": jnp.int32(6)}}, r"'fc': rank 6 is outside \[0, 5\]"),
    ({"fc": {"rank": -1}}, r"'fc': rank -1 is outside"),
    ({"fc": {"rank": 2.0}}, r"'fc': rank 2.0 is not an integer"),
    ({"lost": {"rank": 1}}, r"'lost' has no factors.*'conv', 'fc', 'stack'"),
    ({"fc": {"rank": jnp.array([1, 2])}}, r"'fc': factors.*\(2,\)"),
  ],
)
def test_ranks_that_do_not_fit_raise(name, ranks, message):
  with pytest.raises(LowRankError, match=message):
    CONSUMERS[name](_factors(), ranks)


def test_traced_ranks_out_of_range_are_clipped():
  params = {"fc": _factors()["fc"]}
  mask = jax.jit(lowrank.mask)
  _equal(mask(params, {"fc": {"rank": jnp.int32(99)}}), params)
  empty = lowrank.mask(params, {"fc": {"rank": 0}})
  _equal(mask(params, {"fc": {"rank": jnp.int32(-9)}}), empty)


@pytest.mark.parametrize(("rank", "dense"), [(2, False), (3, True), (4, True)])
def test_extract_merges_where_dense_is_no_larger(rank, dense, close):
  # Break-even of 4 x 12 is r = 48 / 16 = 3.
  params = {"u": _random(4, 4), "v": _random(4, 12)}
  layers = {"": LayerSpec("dense", (4,), (12,))}
  found = lowrank.extract(params, {"rank": rank}, layers)
  assert ("kernel" in found) == dense == lowrank.dense_is_cheaper(4, 12, rank)
  kernel = np.asarray(params["u"][:, :rank]) @ np.asarray(params["v"][:rank])
  close(found["kernel"] if dense else lowrank.merge(found)["kernel"], kernel)


# ---------------------------------------------------------------------------
# Norms
# ---------------------------------------------------------------------------


def _vectors(params, ranks):
  """Yields float64 (index, u [in, r], v [r, out], R) of every single map."""
  for path, rank in trees.flatten_ranks(ranks).items():
    node = trees.get(params, path)
    u, v = (np.asarray(node[n], np.float64) for n in ("u", "v"))
    for index in np.ndindex(np.shape(rank)):
      r = int(np.asarray(rank)[index])
      full = u.shape[-1]
      one_u = u[index].reshape(-1, full)[:, :r]
      yield (path, *index), one_u, v[index].reshape(full, -1)[:r], full


def _importance(params, ranks):
  """The formula, one component at a time: {(path, *index): [R]}."""
  scores = {}
  for index, u, v, full in _vectors(params, ranks):
    scores[index] = np.zeros(full)
    for b in range(u.shape[1]):
      scores[index][b] = np.linalg.norm(u[:, b:]) * np.linalg.norm(v[b:])
  return scores


def _lasso(params, ranks, kind):
  """The sum over groups as method.md writes it."""
  total = 0.0
  for _, u, v, _ in _vectors(params, ranks):
    r = u.shape[1]
    for b in range(r):
      end = r if kind == "hierarchical" else b + 1
      total += np.linalg.norm(u[:, b:end]) + np.linalg.norm(v[b:end])
  return total


def _scaled(kind):
  """Factors with components of many sizes: zeros, small and large ones."""
  params = _factors(seed=3)
  rng = np.random.default_rng(5)
  for node in params.values():
    r = node["u"].shape[-1]
    scale = {
      "plain": np.ones(r),
      "zeros": rng.integers(0, 2, r),
      "tail": np.arange(r) < 2,
      "none": np.zeros(r),
      "range": 10.0 ** rng.integers(-15, 15, r),
      "decay": 10.0 ** -np.arange(0, 2 * r, 2),
    }[kind]
    node["u"] = jnp.asarray(np.asarray(node["u"]) * scale, jnp.float32)
  return params


SCALES = ("plain", "zeros", "tail", "none", "range", "decay")


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("ranks", [None, RANKS], ids=["stored", "ranks"])
def test_importance_is_the_formula_and_falls(kind, ranks):
  params = _scaled(kind)
  scores = lowrank.importance(params, ranks)
  ranks = lowrank.full_ranks(params) if ranks is None else ranks
  expected = _importance(params, ranks)
  assert set(scores) == {"fc", "conv", "stack"}
  for (path, *index), values in expected.items():
    found = np.asarray(scores[path])[tuple(index)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values, rtol=1e-5)  # 0 is exactly 0
    assert (np.diff(found) <= 0).all()


def test_importance_never_rises_in_rounding():
  # Most components vanish beside the others, and v[b:] is the same for each b:
  # the sums are nearly equal, where parallel prefix sums break the order.
  n = 1000
  v = jnp.zeros((n, 1)).at[-1].set(1.0)
  for seed in range(10):
    rng = np.random.default_rng(seed)
    u = rng.random((1, n)) * np.where(rng.random(n) < 0.9, 1e-5, 1)
    params = {"u": jnp.asarray(u, jnp.float32), "v": v}
    assert (np.diff(lowrank.importance(params)[""]) <= 0).all()


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("lasso", ["hierarchical", "flat"])
@pytest.mark.parametrize("ranks", [None, RANKS], ids=["stored", "ranks"])
def test_group_lasso_is_the_formula(kind, lasso, ranks):
  params = _scaled(kind)
  found = lowrank.group_lasso(params, ranks, kind=lasso)
  ranks = lowrank.full_ranks(params) if ranks is None else ranks
  expected = _lasso(params, ranks, lasso)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert found.dtype == jnp.float32
  assert found.shape == ()


def test_group_lasso_is_hierarchical_by_default():
  params = _factors()
  value = lowrank.group_lasso(params)
  assert value == lowrank.group_lasso(params, kind="hierarchical")
  assert value != lowrank.group_lasso(params, kind="flat")


@pytest.mark.parametrize("lasso", ["hierarchical", "flat"])
def test_gradient_of_group_lasso_is_that_of_the_formula(jit, lasso):
  params = _factors(seed=1)
  grads = jit(jax.grad(lowrank.group_lasso), static_argnums=2)(
    params, RANKS, lasso
  )
  rng = np.random.default_rng(0)
  step = 1e-6
  for path in ("fc", "stack"):
    for name in ("u", "v"):
      x = np.asarray(params[path][name], np.float64)
      for flat in rng.choice(x.size, 12, replace=False):
        index = np.unravel_index(flat, x.shape)
        values = []
        for sign in (1, -1):
          moved = x.copy()
          moved[index] += sign * step
          node = {**params[path], name: moved}
          values.append(_lasso({**params, path: node}, RANKS, lasso))
        slope = (values[0] - values[1]) / (2 * step)
        found = grads[path][name][index]
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6)
  assert not np.any(grads["fc"]["bias"])
  assert not np.any(grads["conv"]["u"])  # rank 0


@pytest.mark.parametrize("lasso", ["hierarchical", "flat"])
@pytest.mark.parametrize("kind", SCALES)
def test_gradient_of_group_lasso_is_finite_and_zero_at_zeros(jit, kind, lasso):
  params = _scaled(kind)
  grads = jit(jax.grad(lowrank.group_lasso), static_argnums=2)(
    params, None, lasso
  )
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  for path, node in params.items():
    dead = np.asarray(node["u"]) == 0
    assert not np.any(np.asarray(grads[path]["u"])[dead])
    # An all-zero u does not stop v's part of the penalty.
    assert np.any(np.asarray(grads[path]["v"]))


@pytest.mark.quick(1)
@pytest.mark.parametrize("lasso", ["hierarchical", "flat"])
def test_norms_do_not_see_nan_beyond_the_rank(reference_mask, lasso):
  params = _factors()
  poisoned = jax.tree.map(
    jnp.asarray, reference_mask(params, RANKS, value=np.nan)
  )
  value_and_grad = jax.value_and_grad(lowrank.group_lasso)
  _equal(
    value_and_grad(poisoned, RANKS, lasso), value_and_grad(params, RANKS, lasso)
  )
  _equal(lowrank.importance(poisoned, RANKS), lowrank.importance(params, RANKS))


def test_gradient_of_group_lasso_beyond_the_rank_is_zero(reference_mask):
  grads = jax.grad(lowrank.group_lasso)(_factors(), RANKS)
  _equal(grads, reference_mask(grads, RANKS))


def test_group_lasso_without_factors_is_zero(cases):
  assert lowrank.group_lasso(cases["network"].dense) == 0


def test_unknown_lasso_raises():
  with pytest.raises(LowRankError, match="'nothing' is unknown"):
    lowrank.group_lasso(_factors(), kind="nothing")


# ---------------------------------------------------------------------------
# Shrinking
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 1e-7, 0.5, 3.0, 1e9])
@pytest.mark.parametrize("kind", SCALES)
def test_shrink_counts_a_prefix_and_never_rises(kind, threshold):
  params = _scaled(kind)
  shrunk = lowrank.shrink(params, RANKS, threshold)
  assert jax.tree.structure(shrunk) == jax.tree.structure(RANKS)
  flat = trees.flatten_ranks(shrunk)
  old = trees.flatten_ranks(RANKS)
  for path, rank in flat.items():
    assert rank.dtype == jnp.int32
    assert rank.shape == old[path].shape
    assert (np.asarray(rank) <= np.asarray(old[path])).all()
  for (path, *index), scores in _importance(params, RANKS).items():
    r = int(np.asarray(old[path])[tuple(index)])
    # A float64 score within rounding of the threshold would be ambiguous.
    assert not np.any(np.abs(scores / max(threshold, 1e-30) - 1) < 1e-5)
    live = scores[:r] >= threshold
    assert live.sum() == np.asarray(flat[path])[tuple(index)]
    assert live[: live.sum()].all()


def test_shrink_finds_planted_ranks():
  planted = {"fc": 2, "conv": 4, "stack": np.array([[1, 0, 5], [3, 2, 4]])}
  params = _factors()
  ranks = {p: {"rank": jnp.asarray(r, jnp.int32)} for p, r in planted.items()}
  params = lowrank.mask(params, ranks)
  found = lowrank.shrink(params, lowrank.full_ranks(params), 1e-6)
  _equal(found, ranks)
  _equal(lowrank.shrink(params, found, 1e-6), ranks)  # and stays


def test_shrink_can_be_traced():
  params = _factors()
  found = jax.jit(lowrank.shrink)(params, RANKS, 2.0)
  _equal(found, lowrank.shrink(params, RANKS, 2.0))


# ---------------------------------------------------------------------------
# Kernels that are not finite, zero, or of low rank; foreign parameters
# ---------------------------------------------------------------------------


def _layer(n_in=6, n_out=4, **options):
  return {"fc": trees.LayerSpec("dense", (n_in,), (n_out,), **options)}


def _kernel(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
def test_what_is_not_finite_is_refused_or_shows(value, lead):
  kernel = _kernel(*lead, 6, 4)
  kernel[..., 2, 1] = value
  layers, tree = _layer(stack=lead), {"fc": {"kernel": jnp.asarray(kernel)}}
  with pytest.raises(LowRankError, match=r"'fc'.*NaN or infinity"):
    lowrank.decompose(tree, [Rule()], layers)
  traced = jax.jit(lambda p: lowrank.decompose(p, [Rule()], layers))(tree)
  assert np.isnan(traced["fc"]["u"]).any() and np.isnan(traced["fc"]["v"]).any()


def test_nan_shows_in_penalty_importance_and_ranks():
  layers = _layer()
  tree = lowrank.decompose({"fc": {"kernel": _kernel(6, 4)}}, [Rule()], layers)
  ranks = lowrank.full_ranks(tree, layers)
  for name in ("u", "v"):
    factor = tree["fc"][name].at[0, 0].set(jnp.nan)
    bad = {"fc": tree["fc"] | {name: factor}}
    for kind in ("hierarchical", "flat"):
      assert np.isnan(lowrank.group_lasso(bad, ranks, kind))
    assert np.isnan(lowrank.importance(bad, ranks)["fc"]).any()
    with pytest.raises(LowRankError, match=r"'fc'.*NaN"):
      lowrank.shrink(bad, ranks, 1e-3)
    kept = jax.jit(lambda p, r: lowrank.shrink(p, r, 1e-3))(bad, ranks)
    assert int(kept["fc"]["rank"]) == 4


@pytest.mark.quick(1)
@pytest.mark.parametrize("true_rank", [0, 1, 3])
@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_components_of_nothing_can_learn(true_rank, lead):
  left, right = _kernel(*lead, 6, true_rank), _kernel(*lead, true_rank, 4)
  kernel, layers = left @ right, _layer(stack=lead)
  tree = lowrank.decompose({"fc": {"kernel": kernel}}, [Rule()], layers)
  merged = lowrank.merge(tree, layers)["fc"]["kernel"]
  np.testing.assert_allclose(merged, kernel, atol=2e-6)
  target = _kernel(*lead, 6, 4) + 1

  def loss(tree):
    return jnp.sum((lowrank.merge(tree, layers)["fc"]["kernel"] - target) ** 2)

  grads = jax.grad(loss)(tree)["fc"]
  moves = np.abs(grads["v"]).sum(-1) + np.abs(grads["u"]).sum(-2)
  assert np.all(moves > 0)  # every component, of every element
  ranks = lowrank.shrink(tree, lowrank.full_ranks(tree, layers), 1e-5)
  assert np.all(ranks["fc"]["rank"] == true_rank)


def test_a_large_kernel_of_low_rank_keeps_its_rank():
  kernel = _kernel(256, 16) @ np.linalg.qr(_kernel(256, 16))[0].T
  kernel *= 16 / np.linalg.norm(kernel)
  layers = _layer(256, 256)
  tree = lowrank.decompose({"fc": {"kernel": kernel}}, [Rule()], layers)
  ranks = lowrank.shrink(tree, lowrank.full_ranks(tree, layers), 1e-5)
  assert int(ranks["fc"]["rank"]) == 16


def test_complex_kernels_have_real_norms():
  kernel = (_kernel(5, 4) + 1j * _kernel(4, 5).T).astype(np.complex64)
  layers = _layer(5, 4)
  tree = lowrank.decompose({"fc": {"kernel": kernel}}, [Rule()], layers)
  np.testing.assert_allclose(
    lowrank.merge(tree, layers)["fc"]["kernel"], kernel, atol=2e-6
  )
  s = np.linalg.svd(kernel, compute_uv=False)
  wanted = 2 * np.sum(np.sqrt(np.cumsum(s[::-1])))
  assert float(lowrank.group_lasso(tree)) == pytest.approx(wanted, rel=1e-5)
  scores = lowrank.importance(tree)["fc"]
  np.testing.assert_allclose(scores, np.cumsum(s[::-1])[::-1], rtol=1e-5)


def test_foreign_parameters_called_u_and_v_are_left_alone():
  foreign = {
    "gate": {"u": {"kernel": _kernel(4, 4)}, "v": {"kernel": _kernel(4, 4)}},
    "scalar": {"u": jnp.ones(()), "v": jnp.ones((3,))},
    "unfit": {"u": _kernel(4, 3), "v": _kernel(2, 5)},
  }
  fitting = {"raw": {"u": _kernel(4, 3), "v": _kernel(3, 5)}}
  layers = _layer()
  start = {"fc": {"kernel": _kernel(6, 4)}} | foreign | fitting
  tree = lowrank.decompose(start, [Rule()], layers)
  assert set(trees.factored(tree)) == {"fc", "raw"}
  assert set(trees.factored(tree, layers)) == {"fc"}
  ranks = lowrank.full_ranks(tree, layers)
  assert set(ranks) == {"fc"}
  small = {"fc": {"rank": jnp.int32(2)}}
  forms = (
    lowrank.merge(tree, layers),
    lowrank.mask(tree, small),
    lowrank.truncate(tree, small),
    lowrank.extract(tree, small, layers),
  )
  for form in forms:
    for name, node in (foreign | fitting).items():
      jax.tree.map(np.testing.assert_array_equal, form[name], node)
  alone = lowrank.group_lasso({"fc": tree["fc"]}, ranks)
  assert float(lowrank.group_lasso(tree, ranks)) == float(alone)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
  "kernel",
  [jnp.ones((5, 5)), jnp.zeros((3, 4)), jnp.eye(4), jnp.diag(jnp.arange(4.0))],
)
def test_a_decomposition_is_not_differentiated_silently(kernel):
  layers = {"fc": LayerSpec("dense", kernel.shape[:1], kernel.shape[1:])}

  def loss(kernel):
    params = {"fc": {"kernel": kernel}}
    factored = lowrank.decompose(params, [Rule()], layers)
    return sum(jnp.sum(x) for x in jax.tree.leaves(factored))

  for derive in (jax.grad(loss), jax.jit(jax.grad(loss))):
    with pytest.raises(LowRankError, match="cannot be differentiated"):
      derive(kernel)
  cut_off = jax.grad(lambda k: loss(jax.lax.stop_gradient(k)))
  assert not np.any(cut_off(kernel))
