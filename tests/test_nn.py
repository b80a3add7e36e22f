"""Tests that the layers compute one function in every form of its weight."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro.introspect
import maestro.nn
from maestro import lowrank, trees
from maestro.lowrank import Rule
from maestro.trees import LowRankError

LEVELS = ("full", "half", 1, 0)


def _equations(jaxpr):
  """Every equation of a jaxpr, those of inner jaxprs included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _equations(inner)


# ---------------------------------------------------------------------------
# One function: dense, decomposed, masked, at ranks, truncated, merged
# ---------------------------------------------------------------------------


@pytest.mark.quick(2)
def test_decomposed_equals_dense_at_full_rank(case, close):
  y, _, *dx = case.run("plain", case.dense)
  found, _, *found_dx = case.run("plain", case.factored)
  close((found, found_dx), (y, dx))


def _cut(tree, like):
  """The corner of every leaf that has the shape of another tree's leaf."""
  return jax.tree.map(
    lambda x, y: np.asarray(x)[tuple(map(slice, y.shape))], tree, like
  )


@pytest.mark.quick(3)
@pytest.mark.parametrize("level", LEVELS)
def test_every_truncated_form_equals_mask(case, jit, close, level):
  if case.name == "network" and level in ("full", 1):
    pytest.skip("takes long; its layers are tested one by one")
  params, ranks = case.factored, case.ranks(level)
  y, dp, *dx = case.run("mask", params, ranks)

  @jit
  def forms(params):
    return (
      lowrank.truncate(params, ranks),
      lowrank.truncate(params, ranks, multiple_of=4),
      lowrank.merge(lowrank.mask(params, ranks), case.layers),
      lowrank.extract(params, ranks, case.layers),
    )

  small, padded, merged, extracted = forms(params)
  for how, form in (("ranks", params), ("plain", small), ("ranks", padded)):
    given = ranks if how == "ranks" else None
    found, found_dp, *found_dx = case.run(how, form, given)
    close((found, found_dp, found_dx), (y, _cut(dp, form), dx))
  for form in (merged, extracted):
    found, _, *found_dx = case.run("plain", form)
    close((found, found_dx), (y, dx))


@pytest.mark.quick(8)
@pytest.mark.parametrize("how", ["mask", "ranks"])
@pytest.mark.parametrize("level", ["half", 1, 0])
def test_gradient_beyond_the_rank_is_exactly_zero(
  case, reference_mask, how, level
):
  ranks = case.ranks(level)
  _, grads, *_ = case.run(how, case.factored, ranks)
  jax.tree.map(
    np.testing.assert_array_equal, grads, reference_mask(grads, ranks)
  )


@pytest.mark.parametrize("how", ["mask", "ranks"])
@pytest.mark.parametrize("level", ["half", 1, 0])
def test_nan_beyond_the_rank_reaches_nothing(case, reference_mask, how, level):
  ranks = case.ranks(level)
  poisoned = reference_mask(case.factored, ranks, np.nan)
  clean = case.run(how, case.factored, ranks)
  found = case.run(how, poisoned, ranks)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
  jax.tree.map(np.testing.assert_array_equal, found, clean)


@pytest.mark.quick(11)
@pytest.mark.parametrize("form", ["mask", "ranks", "truncate"])
def test_rank_zero_gives_exactly_the_bias(case, jit, form):
  if "" not in case.layers:
    pytest.skip("more than one layer")
  spec, ranks = case.layers[""], case.ranks(0)
  shape = case.run("plain", case.dense)[0].shape
  if form == "truncate":
    small = jit(lambda params: lowrank.truncate(params, ranks))(case.factored)
    y = case.run("plain", small)[0]
  else:
    y = case.run(form, case.factored, ranks)[0]
  bias = case.dense.get("bias", jnp.zeros(()))
  if spec.kind == "dense" and spec.groups:  # [*batch, *features]
    n = len(spec.groups)
    gap = (1,) * (len(shape) - bias.ndim)
    bias = bias.reshape((*bias.shape[:n], *gap, *bias.shape[n:]))
  assert jnp.array_equal(y, np.broadcast_to(bias, shape))
  assert y.shape == shape


@pytest.mark.quick(4)
def test_kernel_and_factors_add_up(case, jit, close):
  if case.name == "embed_tied":
    pytest.skip("covered by embed and embed_attend")
  ranks = case.ranks("half")

  @jit
  def merge(params):
    return lowrank.merge(params, case.layers)

  half = jit(lambda params: lowrank.truncate(params, ranks))(case.factored)
  merged = merge(half)

  def both(base, low):
    if "u" in low:
      return {**base, "u": low["u"], "v": low["v"]}
    return {
      k: both(x, low[k]) if isinstance(x, dict) else x for k, x in base.items()
    }

  def add(path, base, low):
    weight = path[-1].key in ("kernel", "embedding")
    return np.asarray(base) + np.asarray(low) if weight else base

  adapted = both(case.dense, half)
  for path, spec in case.layers.items():
    if spec.full_rank > 1:
      node = trees.get(adapted, path)
      assert {spec.weight, "u", "v"} <= set(node)
  # Factored layers hold the sum; the depthwise layer, only its kernel.
  total = jax.tree_util.tree_map_with_path(add, case.dense, merged)
  for path, spec in case.layers.items():
    if spec.full_rank == 1:
      total[path] = case.dense[path]
  close(merge(adapted), total)
  y, _, *dx = case.run("plain", total)
  found, _, *found_dx = case.run("plain", adapted)
  close((found, found_dx), (y, dx))


def test_rank_zero_of_an_adapter_leaves_its_base(cases):
  case = cases["dense"]
  adapted = {**case.dense, "u": case.factored["u"], "v": case.factored["v"]}
  y = case.run("plain", case.dense)[0]
  assert jnp.array_equal(case.run("ranks", adapted, case.ranks(0))[0], y)


# ---------------------------------------------------------------------------
# Flax
# ---------------------------------------------------------------------------


@pytest.fixture
def accelerator(monkeypatch):
  """Traces as for a TPU: on CPUs, `ops.convolution` is no plain `lax` call."""
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


@pytest.mark.usefixtures("accelerator")
def test_dense_form_is_the_flax_layer(case):
  ours, theirs = (
    str(jax.make_jaxpr(m.init_with_output)(jax.random.key(3), case.x))
    for m in (case.model, case.build(flax.linen))
  )
  assert ours == theirs  # the same program: the same numbers from one key
  shapes, flax_shapes = (
    jax.eval_shape(m.init_with_output, jax.random.key(3), case.x)
    for m in (case.model, case.build(flax.linen))
  )
  assert shapes == flax_shapes


def test_initial_values_and_outputs_are_those_of_flax(cases):
  case = cases["dense"]
  ours, theirs = (
    m.init_with_output(jax.random.key(3), case.x)
    for m in (case.model, case.build(flax.linen))
  )
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert ours[1]["params"]["kernel"].std() > 0


CONV_MASK = np.arange(2 * 2 * 3 * 6).reshape(2, 2, 3, 6) % 3 > 0
HALF = {"dtype": jnp.bfloat16}
HALF_PARAMS = {"param_dtype": jnp.bfloat16}
PRECISE = {"precision": "highest"}
NO_BIAS = {"use_bias": False}


@pytest.mark.quick(1)
@pytest.mark.mixed_types
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("options", [HALF, HALF_PARAMS, PRECISE, NO_BIAS])
@pytest.mark.parametrize(
  ("name", "shape", "arguments"),
  [
    ("Dense", (4, 5), {"features": 6}),
    ("DenseGeneral", (4, 5), {"features": (2, 3)}),
    ("Conv", (2, 3, 3, 3), {"features": 6, "kernel_size": (2, 2)}),
    ("Embed", None, {"num_embeddings": 9, "features": 6}),
  ],
)
def test_options_act_as_in_flax(name, shape, arguments, options, close):
  if name == "Embed" and options in (PRECISE, NO_BIAS):
    pytest.skip("Embed has no such option")
  x = np.arange(5) if shape is None else np.full(shape, 1 / 3, np.float32)
  ours = getattr(maestro.nn, name)(**arguments, **options)
  theirs = getattr(flax.linen, name)(**arguments, **options)
  key = jax.random.key(0)
  assert str(jax.make_jaxpr(ours.init_with_output)(key, x)) == str(
    jax.make_jaxpr(theirs.init_with_output)(key, x)
  )
  shapes = jax.eval_shape(ours.init, key, x)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes
  )
  assert ("bias" in params) == (name != "Embed" and options != NO_BIAS)
  y = theirs.apply({"params": params}, x)
  layers = maestro.introspect.layers(ours, x)
  factored = lowrank.decompose(params, [Rule()], layers)
  assert {k: p.dtype for k, p in factored.items() if k != "bias"} == (
    dict.fromkeys("uv", ours.param_dtype)
  )
  found = ours.apply({"params": factored}, x)
  assert found.dtype == y.dtype
  assert options != HALF or y.dtype == jnp.bfloat16
  close(found, y, 0.04 if options in (HALF, HALF_PARAMS) else 1e-5)


def test_precision_reaches_both_products(case):
  if not hasattr(case.model, "precision"):
    pytest.skip("no precision")
  model = case.model.clone(precision="highest")
  jaxpr = jax.make_jaxpr(model.apply)({"params": case.factored}, case.x)
  products = [
    e.params["precision"]
    for e in _equations(jaxpr.jaxpr)
    if e.primitive.name in ("dot_general", "conv_general_dilated")
  ]
  assert len(products) == 2
  assert all("HIGHEST" in str(p) for p in products)


@pytest.mark.mixed_types
@pytest.mark.parametrize("level", LEVELS)
def test_conv_mask_applies_to_the_product(level, close):
  x = jnp.cos(jnp.arange(96.0)).reshape(2, 4, 4, 3)
  model = maestro.nn.Conv(6, (2, 2), mask=CONV_MASK)
  params = {
    "kernel": jnp.sin(jnp.arange(72.0)).reshape(2, 2, 3, 6),
    "bias": jnp.arange(6.0),
  }
  flax_model = flax.linen.Conv(6, (2, 2), mask=CONV_MASK)
  layers = maestro.introspect.layers(model, x)
  factored = lowrank.decompose(params, [Rule()], layers)
  ranks = {"rank": jnp.int32({"full": 6, "half": 3}.get(level, level))}
  merged = lowrank.merge(lowrank.mask(factored, ranks))
  expected = flax_model.apply({"params": merged}, x)
  close(model.apply({"params": factored, "ranks": ranks}, x), expected)
  if level == "full":
    close(model.apply({"params": factored}, x), expected)


def test_conv_mask_refuses_what_it_cannot_do():
  x = jnp.ones((1, 3, 3, 4))
  mask = np.ones((2, 2, 2, 6))
  model = maestro.nn.Conv(6, (2, 2), feature_group_count=2, mask=mask)
  factors = {"u": jnp.ones((2, 2, 2, 2, 3)), "v": jnp.ones((2, 3, 3))}
  factored = factors | {"bias": jnp.ones(6)}
  with pytest.raises(LowRankError, match=r"mask on a grouped.*Rule"):
    model.apply({"params": factored}, x)


@pytest.mark.parametrize("name", ["dot_general", "dot_general_cls"])
def test_factored_dense_refuses_another_product(cases, name):
  model = maestro.nn.Dense(6, **{name: jax.lax.dot_general})
  message = rf"`{name}`.*Rule\('', decompose=False\)"
  with pytest.raises(LowRankError, match=message):
    model.apply({"params": cases["dense"].factored}, cases["dense"].x)


def test_one_embedding_is_broadcast(close):
  model = maestro.nn.Embed(1, 4)
  tokens = np.zeros((2, 3), np.int32)
  params = {"embedding": jnp.arange(4.0).reshape(1, 4)}
  u, v = np.array([[2.0]], np.float32), params["embedding"] / 2
  y = model.apply({"params": params}, tokens)
  close(model.apply({"params": {"u": u, "v": v}}, tokens), y)


def test_factored_embed_refuses_floats(cases):
  with pytest.raises(ValueError, match="integer"):
    maestro.nn.Embed(9, 6).apply(
      {"params": cases["embed"].factored}, jnp.ones((2, 3))
    )


def test_factor_without_its_pair_raises(cases):
  case = cases["remat"]
  params = dict(case.factored)
  params["last"] = {k: x for k, x in params["last"].items() if k != "v"}
  with pytest.raises(LowRankError, match=r"'last'.*no `v`"):
    case.model.apply({"params": params}, case.x)


# ---------------------------------------------------------------------------
# Ranks at run time
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["network", "scan", "embed_tied"])
def test_one_trace_serves_all_ranks(cases, name):
  case, traces = cases[name], []

  @jax.jit
  def apply(params, ranks):
    traces.append(None)
    return case.model.apply({"params": params, "ranks": ranks}, case.x)

  rng = np.random.default_rng(0)
  outputs = set()
  for _ in range(50):
    ranks = jax.tree.map(
      lambda r: jnp.asarray(rng.integers(0, np.asarray(r) + 1), jnp.int32),
      case.full,
    )
    outputs.add(np.asarray(apply(case.factored, ranks)).tobytes())
  assert len(traces) == 1
  assert len(outputs) > 5  # the ranks did reach the layers


@pytest.mark.quick(15)
@pytest.mark.parametrize("how", ["plain", "ranks"])
def test_factors_are_never_multiplied_with_each_other(case, how):
  small = lowrank.truncate(case.factored, case.ranks(2))
  forbidden = set()
  for spec in case.layers.values():
    if spec.full_rank > 1:
      # As stored, as matrices, and one element of a stack of them.
      shapes = (
        spec.kernel_shape,
        (*spec.lead, spec.n_in, spec.n_out),
        (spec.n_in, spec.n_out),
        spec.kernel_shape[len(spec.stack) :],
        (*spec.groups, spec.n_in, spec.n_out),
      )
      forbidden |= set(shapes)

  def shapes(params):
    function = case.run.__wrapped__
    jaxpr = jax.make_jaxpr(lambda p, r: function(how, p, r))(
      params, case.ranks(2)
    )
    return {
      tuple(variable.aval.shape)
      for equation in _equations(jaxpr.jaxpr)
      for variable in equation.outvars
    }

  assert not shapes(small) & forbidden
  assert shapes(case.dense) & forbidden  # the test would see a product


@pytest.mark.parametrize("value", [-1, 99])
def test_concrete_rank_out_of_range_raises(cases, value):
  case = cases["remat"]
  ranks = {"last": {"rank": jnp.int32(value)}}
  with pytest.raises(LowRankError, match=r"'last'.*outside \[0, 5\]"):
    case.model.apply({"params": case.factored, "ranks": ranks}, case.x)


@pytest.mark.parametrize("level", ["full", 0])
def test_traced_rank_out_of_range_is_clipped(case, level):
  wild = jax.tree.map(
    lambda r: r * 0 + (99 if level == "full" else -7), case.full
  )
  expected = case.run("ranks", case.factored, case.ranks(level))
  for how in ("ranks", "mask"):
    found = case.run(how, case.factored, wild)
    assert jnp.array_equal(found[0], expected[0])


def test_ranks_of_a_dense_layer_are_ignored(cases):
  case = cases["dense"]
  y = case.run("plain", case.dense)[0]
  assert jnp.array_equal(case.run("ranks", case.dense, case.ranks(1))[0], y)


def test_check_ranks_passes_on_every_model(case):
  case.run("ranks", case.factored, case.full)  # fill caches of traces
  for _ in range(2):
    maestro.introspect.check_ranks(
      case.model, {"params": case.factored}, case.full, case.x
    )


@pytest.mark.parametrize("path", ["lost", "first/lost"])
def test_check_ranks_names_a_mistyped_path(cases, path):
  case = cases["remat"]
  flat = trees.flatten_ranks(case.full) | {path: jnp.int32(1)}
  with pytest.raises(LowRankError, match=rf"\['{path}'\]"):
    maestro.introspect.check_ranks(
      case.model,
      {"params": case.factored},
      trees.unflatten_ranks(flat),
      case.x,
    )


def test_check_ranks_names_a_dense_layer(cases):
  case = cases["remat"]
  params = case.factored | {"last": case.dense["last"]}
  with pytest.raises(LowRankError, match=r"\['last'\]"):
    maestro.introspect.check_ranks(
      case.model, {"params": params}, case.full, case.x
    )


def test_check_ranks_names_a_scan_without_ranks(cases):
  case = cases["scan"]
  model = case.model.clone(axes=("params",))
  with pytest.raises(LowRankError, match="blocks/Dense_0"):
    maestro.introspect.check_ranks(
      model, {"params": case.factored}, case.full, case.x
    )


# ---------------------------------------------------------------------------
# Reading a model
# ---------------------------------------------------------------------------


def test_layers_reads_flax_models_alike(case):
  assert (
    maestro.introspect.layers(case.build(flax.linen), case.x) == case.layers
  )


def test_layers_describes_every_kernel(case):
  for path, spec in case.layers.items():
    kernel = trees.get(case.dense, path)[spec.weight]
    assert kernel.shape == spec.kernel_shape
  kernels = [
    path
    for path, _ in jax.tree_util.tree_leaves_with_path(case.dense)
    if path[-1].key in ("kernel", "embedding")
  ]
  assert len(case.layers) == len(kernels)


@pytest.mark.parametrize(
  ("name", "path", "fields"),
  [
    ("dense", "", {"inputs": (9,), "outputs": (6,), "positions": 3}),
    ("dense_single", "", {"inputs": (5,), "outputs": (7,), "positions": 1}),
    ("conv_same", "", {"inputs": (3, 2, 3), "positions": 3 * 6}),
    ("conv_circular", "", {"positions": 2 * 3 * 3}),
    ("conv_explicit", "", {"positions": 6 * 3}),
    ("conv_grouped", "", {"groups": (2,), "inputs": (3, 2, 3)}),
    ("general", "", {"inputs": (3, 2), "outputs": (2, 3), "positions": 4}),
    ("general_batches", "", {"groups": (2, 3), "inputs": (3, 2)}),
    ("embed", "", {"kind": "embed", "lookups": 5, "positions": 0}),
    ("embed_tied", "embed", {"lookups": 5, "positions": 5}),
    ("scan", "blocks/Dense_0", {"stack": (3,), "positions": 1}),
    ("scan_remat_grouped", "blocks/Conv_0", {"positions": 16}),
    ("scan_remat_grouped", "blocks/Conv_0", {"stack": (3,), "groups": (2,)}),
    ("remat", "first", {"positions": 1}),
  ],
)
def test_layers_reads_what_shapes_cannot_tell(cases, name, path, fields):
  spec = cases[name].layers[path]
  assert {field: getattr(spec, field) for field in fields} == fields


def test_layers_adds_up_the_calls_of_a_shared_layer():
  class Shared(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
      layer = maestro.nn.Dense(4)
      return layer(layer(x)) + layer(x[:, :1])

  spec = maestro.introspect.layers(Shared(), jnp.ones((2, 3, 4)))["Dense_0"]
  assert spec.positions == 3 + 3 + 1
