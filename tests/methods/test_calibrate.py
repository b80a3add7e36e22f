"""Tests the data-aware decomposition against brute force on explicit inputs."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro.nn
import maestro.taps
from maestro import data, lowrank, trees
from maestro.lowrank import Rule
from maestro.methods import calibrate
from maestro.methods.calibrate import CalibrationError
from maestro.models import LeNet
from maestro.trees import LowRankError

SINGLE = (
  "dense",
  "dense_single",
  "conv_same",
  "conv_explicit",
  "conv_circular",
  "conv_reflect",
  "conv_causal",
  "conv_3d_valid",
  "conv_input_dilation",
  "conv_grouped",
  "general",
  "general_batches",
  "embed",
)


def _correlated(*shape, seed=0):
  """Normal numbers that vary together and unequally along the last axis."""
  rng = np.random.default_rng((seed, *shape))
  mix = rng.standard_normal((shape[-1], shape[-1])) * np.geomspace(
    1.0, 0.05, shape[-1]
  )
  x = rng.standard_normal(shape) @ mix + 0.3
  return jnp.asarray(x, jnp.float32)


def _batches(case, count=3):
  """Batches for a case's model, float inputs or tokens."""
  if jnp.issubdtype(case.x.dtype, jnp.integer):
    # Tokens of unequal frequency, 7 and 8 never.
    return [jnp.asarray(case.x) ** 2 % (7 - i) for i in range(count)]
  return [_correlated(*case.x.shape, seed=i) for i in range(count)]


def _outputs(spec, y):
  """Lays a layer's output out as [*groups, N, out]."""
  if spec.kind == "conv" and spec.groups:
    return np.moveaxis(y.reshape((-1, *spec.groups, spec.n_out)), 1, 0)
  return y.reshape((*spec.groups, -1, spec.n_out))


def _matrix(spec, kernel):
  return np.asarray(trees.to_matrix(kernel, spec), np.float64)


def _rows(case, batches, params, path=""):
  """All inputs of a layer as rows of float64 [*groups, N, in]."""
  spec, parts = case.layers[path], []
  for x in batches:
    seen = maestro.taps.capture_inputs(case.model, {"params": params}, x)
    for rows in seen[path]:
      part = np.asarray(rows)
      if spec.kind == "embed":
        part = np.eye(spec.n_in)[part]
      parts.append(part.astype(np.float64))
  return np.concatenate(parts, axis=-2)


def _without_bias(params):
  return {
    k: _without_bias(x)
    if isinstance(x, dict)
    else jnp.zeros_like(x)
    if k == "bias"
    else x
    for k, x in params.items()
  }


def _relative(x, difference, k):
  """||X D||^2 / ||X K||^2 over the last two axes."""
  top = np.sum((x @ difference) ** 2, axis=(-2, -1))
  return top / np.sum((x @ k) ** 2, axis=(-2, -1))


# ---------------------------------------------------------------------------
# What a layer sees
# ---------------------------------------------------------------------------


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", SINGLE)
def test_captured_rows_times_kernel_are_the_outputs(cases, jit, name):
  """For strides, paddings, dilations, groups, contracted and batch axes."""
  case = cases[name]
  spec, params = case.layers[""], _without_bias(case.dense)

  @jit
  def run(x):
    y = case.model.apply({"params": params}, x)
    return y, maestro.taps.capture_inputs(case.model, {"params": params}, x)

  y, seen = run(case.x)
  (rows,) = seen[""]
  rows = np.asarray(rows)
  if spec.kind == "embed":
    assert np.issubdtype(rows.dtype, np.integer)
    rows = np.eye(spec.n_in)[rows]
  found = rows @ _matrix(spec, params[spec.weight])
  want = _outputs(spec, np.asarray(y))
  np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.quick(1)
def test_factored_layers_see_the_same(cases):
  case = cases["remat"]
  x = _correlated(*case.x.shape)
  dense = maestro.taps.capture_inputs(case.model, {"params": case.dense}, x)
  low = maestro.taps.capture_inputs(case.model, {"params": case.factored}, x)
  assert set(dense) == {"first", "last"}
  for path in dense:
    np.testing.assert_allclose(low[path][0], dense[path][0], atol=1e-5)


def test_plain_flax_layers_are_seen(cases):
  case = cases["conv_same"]
  model = case.build(flax.linen)
  want = maestro.taps.capture_inputs(case.model, {"params": case.dense}, case.x)
  found = maestro.taps.capture_inputs(model, {"params": case.dense}, case.x)
  np.testing.assert_array_equal(found[""][0], want[""][0])


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", SINGLE)
def test_moments_are_those_of_explicit_inputs(cases, name):
  case, batches = cases[name], _batches(cases[name])
  x = _rows(case, batches, case.dense)
  moments = calibrate.second_moments(
    case.model, {"params": case.dense}, batches, case.layers
  )
  want = np.swapaxes(x, -1, -2) @ x / x.shape[-2]
  if case.layers[""].kind == "embed":
    assert moments[""].ndim == 1
    want = np.diagonal(want)
  np.testing.assert_allclose(
    moments[""], want, rtol=1e-5, atol=1e-6 * np.abs(want).max()
  )


class Twice(flax.linen.Module):
  """Calls one layer twice."""

  @flax.linen.compact
  def __call__(self, x, train=True):
    layer = maestro.nn.Dense(5, name="fc")
    return layer(jnp.tanh(layer(x))) if not train else layer(x)


@pytest.mark.quick(1)
def test_calls_add_up_and_options_and_ragged_batches_pass():
  model, x = Twice(), _correlated(7, 5)
  variables = model.init(jax.random.key(0), x)
  layers = maestro.introspect.layers(model, x, train=False)
  moments = calibrate.second_moments(
    model, variables, [(x[:4],), x[4:]], layers, train=False
  )["fc"]
  k = np.asarray(variables["params"]["fc"]["kernel"], np.float64)
  rows = np.concatenate([x, np.tanh(x @ k)])
  np.testing.assert_allclose(moments, rows.T @ rows / 14, atol=1e-5)


@pytest.mark.quick(1)
def test_stacked_layers_need_the_scan_to_hand_their_inputs_out(cases):
  case = cases["scan"]
  x = _correlated(*case.x.shape)
  with pytest.raises(CalibrationError, match=r"'blocks/Dense_0'.*captured"):
    calibrate.second_moments(
      case.model, {"params": case.dense}, [x], case.layers
    )
  model = case.model.clone(axes=("params", "ranks", "captured"))
  moments = calibrate.second_moments(
    model, {"params": case.dense}, [x], case.layers
  )
  (node,) = jax.tree.map(np.asarray, case.dense["blocks"]).values()
  y = np.asarray(x)
  for i in range(3):
    want = y.T @ y / len(y)
    found = moments["blocks/Dense_0"][i]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    y = y + np.tanh(y @ node["kernel"][i] + node["bias"][i])
  factors = calibrate.decompose(case.dense, [Rule()], case.layers, moments)
  shapes = jax.tree.map(jnp.shape, case.factored)
  assert jax.tree.map(jnp.shape, factors) == shapes


def test_a_tied_embedding_counts_its_look_ups_only(cases):
  case = cases["embed_tied"]
  moments = calibrate.second_moments(
    case.model, {"params": case.dense}, [case.x], case.layers
  )
  counts = np.bincount(np.ravel(case.x), minlength=9)
  np.testing.assert_allclose(moments["embed"], counts / case.x.size, rtol=1e-6)


# ---------------------------------------------------------------------------
# The decomposition
# ---------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", SINGLE)
def test_every_rank_is_the_brute_force_optimum(cases, name):
  """By Eckart and Young on X K; also where C is singular (few inputs)."""
  case, batches = cases[name], _batches(cases[name])
  spec = case.layers[""]
  moments = calibrate.second_moments(
    case.model, {"params": case.dense}, batches, case.layers
  )
  x = _rows(case, batches, case.dense)
  k = _matrix(spec, case.dense[spec.weight])
  s2 = np.linalg.svd(x @ k, compute_uv=False) ** 2
  table = calibrate.compare(case.dense, case.layers, moments)[""]
  factors = calibrate.decompose(case.dense, [Rule()], case.layers, moments)
  plain = lowrank.decompose(case.dense, [Rule()], case.layers)
  ranks = lowrank.full_ranks(factors, case.layers)
  for r in range(spec.full_rank + 1):
    best = np.sum(s2[..., r:], axis=-1) / np.sum(s2, axis=-1)
    at = jax.tree.map(lambda full, r=r: jnp.full_like(full, r), ranks)
    for tree, column in ((factors, "data"), (plain, "svd")):
      merged = lowrank.merge(lowrank.mask(tree, at), case.layers)
      a = _matrix(spec, merged[spec.weight])
      error = _relative(x, k - a, k)
      np.testing.assert_allclose(table[column][..., r], error, atol=2e-6)
    np.testing.assert_allclose(table["data"][..., r], best, atol=1e-6)
    assert np.all(table["data"][..., r] <= table["svd"][..., r] + 1e-6)
  assert np.all(table["data"][..., 0] == 1.0)
  assert np.all(table["data"][..., -1] == 0.0)


def test_the_comparison_is_not_trivial(cases):
  case = cases["dense"]
  moments = calibrate.second_moments(
    case.model, {"params": case.dense}, _batches(case), case.layers
  )
  table = calibrate.compare(case.dense, case.layers, moments)[""]
  assert np.all(table["data"][1:5] < 0.8 * table["svd"][1:5])


@pytest.mark.quick(2)
def test_full_rank_keeps_the_function_without_any_input(case, close):
  """Where no data say anything (C = 0) the order is that of the SVD."""
  moments = {
    path: np.zeros((*spec.lead, spec.n_in, spec.n_in))
    for path, spec in case.layers.items()
  }
  factors = calibrate.decompose(case.dense, [Rule()], case.layers, moments)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), factors) == jax.tree.map(
    lambda x: (x.shape, x.dtype), case.factored
  )
  close(lowrank.merge(factors, case.layers), case.dense)
  table = calibrate.compare(case.dense, case.layers, moments)
  for row in table.values():
    assert not np.any(row["svd"]) and not np.any(row["data"])


@pytest.mark.parametrize("name", ["dense", "dense_single", "embed"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_white_inputs_give_the_plain_decomposition(cases, name, scale):
  case = cases[name]
  spec = case.layers[""]
  moments = {"": scale * np.ones(spec.n_in)}
  if spec.kind != "embed":
    moments = {"": np.diag(moments[""])}
  found = calibrate.decompose(case.dense, [Rule()], case.layers, moments)
  want = lowrank.decompose(case.dense, [Rule()], case.layers)
  for a, b in ((found, want),):  # a component has no sign of its own
    signs = jnp.sign(jnp.sum(a["v"] * b["v"], axis=1))
    np.testing.assert_allclose(a["u"] * signs[None], b["u"], atol=1e-5)
    np.testing.assert_allclose(a["v"] * signs[:, None], b["v"], atol=1e-5)


def test_both_factors_of_a_component_have_one_norm(cases):
  case = cases["conv_grouped"]
  moments = calibrate.second_moments(
    case.model, {"params": case.dense}, _batches(case), case.layers
  )
  node = calibrate.decompose(case.dense, [Rule()], case.layers, moments)
  u = np.linalg.norm(
    np.reshape(node["u"], (2, -1, node["u"].shape[-1])), axis=1
  )
  v = np.linalg.norm(node["v"], axis=2)
  assert u.shape == (2, 5)
  np.testing.assert_allclose(u, v, rtol=1e-5)


def test_a_lower_rank_is_a_prefix_and_other_layers_stay(cases):
  case = cases["remat"]
  moments = calibrate.second_moments(
    case.model, {"params": case.dense}, _batches(case), case.layers
  )
  rules = [Rule("first", rank=2), Rule("last", decompose=False)]
  low = calibrate.decompose(case.dense, rules, case.layers, moments)
  full = calibrate.decompose(case.dense, [Rule()], case.layers, moments)
  np.testing.assert_array_equal(low["first"]["u"], full["first"]["u"][:, :2])
  np.testing.assert_array_equal(low["first"]["v"], full["first"]["v"][:2])
  assert low["last"] == case.dense["last"]
  assert low["first"]["bias"] is case.dense["first"]["bias"]


def test_what_no_input_uses_comes_last(cases):
  """Tokens that are never looked up cost nothing until the rank is full."""
  case = cases["embed"]
  table = case.dense["embedding"].at[:7].multiply(0.01)
  params = {"embedding": table}  # the rare rows are by far the largest
  counts = jnp.ones(9).at[7:].set(0.0)
  errors = calibrate.compare(params, case.layers, {"": counts})[""]
  assert errors["data"][1] < 0.9 and errors["svd"][1] > errors["data"][1]
  full = calibrate.decompose(params, [Rule()], case.layers, {"": counts})
  np.testing.assert_allclose(full["u"] @ full["v"], table, atol=1e-6)


# ---------------------------------------------------------------------------
# LeNet
# ---------------------------------------------------------------------------


def _check_lenet(batches, jit):
  model = LeNet(num_classes=10)
  shapes = jax.eval_shape(model.init, jax.random.key(0), batches[0])["params"]
  rng = np.random.default_rng(1)  # to compile JAX's generators takes seconds
  params = jax.tree.map(
    lambda x: jnp.asarray(
      rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1])), x.dtype
    ),
    shapes,
  )
  layers = maestro.introspect.layers(model, batches[0])
  moments = calibrate.second_moments(model, {"params": params}, batches, layers)
  table = calibrate.compare(params, layers, moments)
  assert set(table) == {"conv1", "conv2", "fc1", "fc2", "fc3"}
  for path, row in table.items():
    assert row["data"].shape == (layers[path].full_rank + 1,)
    assert np.all(row["data"] <= row["svd"] + 1e-6)
    assert np.all(np.diff(row["data"]) <= 0)
    assert np.any(row["data"] < 0.9 * row["svd"])
  factors = calibrate.decompose(params, [Rule()], layers, moments)
  apply = jit(model.apply)
  np.testing.assert_allclose(
    apply({"params": factors}, batches[0]),
    apply({"params": params}, batches[0]),
    atol=1e-4,
  )


@pytest.mark.quick(1)
def test_lenet_on_smooth_images(jit):
  rng = np.random.default_rng(0)
  noise = rng.standard_normal((2, 32, 28, 28, 1))
  smooth = np.cumsum(np.cumsum(noise, axis=2), axis=3) / 28
  _check_lenet([jnp.asarray(x, jnp.float32) for x in smooth], jit)


@pytest.mark.quick(0)
def test_lenet_on_mnist(jit):
  try:
    images = data.make("mnist").train.inputs[:64]
  except data.DataError as error:
    pytest.skip(f"MNIST is not prepared here: {error}")
  _check_lenet([jnp.asarray(images, jnp.float32) / 255], jit)


# ---------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------


def test_bad_input_is_named(cases):
  case = cases["remat"]
  params, layers, rules = case.dense, case.layers, [Rule()]
  eye = {"first": np.eye(6), "last": np.eye(7)}
  with pytest.raises(CalibrationError, match=r"'last' has no second moments"):
    calibrate.decompose(params, rules, layers, {"first": eye["first"]})
  with pytest.raises(CalibrationError, match=r"\['lost'\].*'first'"):
    calibrate.decompose(params, rules, layers, eye | {"lost": np.eye(2)})
  with pytest.raises(CalibrationError, match=r"\['lost'\]"):
    calibrate.compare(params, layers, {"lost": np.eye(2)})
  with pytest.raises(CalibrationError, match=r"'first'.*\(7, 7\).*\(6, 6\)"):
    calibrate.decompose(params, rules, layers, eye | {"first": np.eye(7)})
  bad = eye["first"].copy()
  bad[2, 3] = np.nan
  with pytest.raises(CalibrationError, match="'first': its moments"):
    calibrate.compare(params, layers, {"first": bad})
  node = {"kernel": jnp.full((6, 7), jnp.inf)}
  with pytest.raises(CalibrationError, match="'first': its weights"):
    calibrate.decompose(params | {"first": node}, rules, layers, eye)
  with pytest.raises(CalibrationError, match=r"'first'.*found factors"):
    calibrate.decompose(case.factored, rules, layers, eye)
  with pytest.raises(CalibrationError, match=r"'first'.*found None"):
    calibrate.decompose({}, rules, layers, eye)
  with pytest.raises(LowRankError, match=r"'fc.*' matches no layer"):
    calibrate.decompose(params, [Rule("fc.*")], layers, eye)


def test_bad_batches_are_named(cases):
  case = cases["remat"]
  variables = {"params": case.dense}
  with pytest.raises(CalibrationError, match="no batches"):
    calibrate.second_moments(case.model, variables, [], case.layers)
  with pytest.raises(CalibrationError, match="'first': its moments"):
    calibrate.second_moments(
      case.model, variables, [case.x.at[0, 0].set(jnp.nan)], case.layers
    )
  layers = case.layers | {"other": case.layers["first"]}
  with pytest.raises(CalibrationError, match=r"layers \['other'\]: no inputs"):
    calibrate.second_moments(case.model, variables, [case.x], layers)


def test_what_no_input_has_is_ordered_as_by_the_svd():
  """Inputs in half of all directions; moments rounded to float32."""
  rng = np.random.default_rng(0)
  q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
  x = (rng.standard_normal((500, 6)) @ q[:6]).astype(np.float32)
  unseen = np.array([32.0, 16.0, 8.0, 4.0, 2.0, 1.0])
  kernel = np.concatenate([q[:6].T, q[6:].T * unseen], axis=1)  # [12, 12]
  model = maestro.nn.Dense(12, use_bias=False)
  layers = maestro.introspect.layers(model, x)
  params = {"kernel": jnp.asarray(kernel, jnp.float32)}
  moments = {"": x.T @ x / len(x)}
  found = calibrate.decompose(params, [lowrank.Rule()], layers, moments)
  norms = np.linalg.norm(found["u"], axis=0) ** 2  # of K Q
  np.testing.assert_allclose(norms[:6], 1.0, rtol=0.01)
  np.testing.assert_allclose(norms[6:], unseen, rtol=0.05)
