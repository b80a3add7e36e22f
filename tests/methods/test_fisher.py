"""Both-sided moments and the fisher order, against gradients of kernels."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
import maestro.nn
import maestro.taps
from maestro import lowrank, trees
from maestro.lowrank import Rule
from maestro.methods import calibrate, fisher
from maestro.methods.fisher import Moments

KEY = jax.random.key(3)


def selected(case):
  """Layers whose rows are seen: scans that do not pass `captured` are not."""
  if case.name.startswith("scan"):
    pytest.skip("its scan does not pass `captured`; see test_a_scan")
  return {p: s for p, s in case.layers.items() if s.kind != "other"}


def kernel_gradient(case, params):
  def loss(params):
    y = case.model.apply({"params": params}, case.x)
    return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y)

  return jax.grad(loss)(params)


def tapped_gradient(case, params, layers, axes=()):
  def statistic(path, x, g):
    if jnp.issubdtype(x.dtype, jnp.integer):
      zero = jnp.zeros((layers[path].n_in, g.shape[-1]))
      return zero.at[x].add(g)
    return jnp.einsum("...ni,...nj->...ij", x, g)

  def loss(taps):
    y = maestro.taps.apply_tapped(
      case.model, {"params": params}, taps, statistic, case.x
    )
    return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y)

  zeros = {
    path: jnp.zeros((*spec.lead, spec.n_in, spec.n_out))
    for path, spec in layers.items()
  }
  return jax.grad(loss)(zeros)


@pytest.mark.quick(1)
def test_rows_and_gradients_make_up_the_gradient_of_the_kernel(case, close):
  layers = selected(case)
  want = kernel_gradient(case, case.dense)
  found = tapped_gradient(case, case.dense, layers)
  for path, spec in layers.items():
    kernel = trees.get(want, path)[spec.weight]
    close(found[path], trees.to_matrix(kernel, spec), 1e-4)


@pytest.mark.quick(1)
@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_that_passes_them_on_has_moments_per_layer(remat, cases, close):
  """As three layers one after the other."""
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)
  axes = ("params", "ranks", "captured")
  model = cases["scan"].model.clone(axes=axes, remat=remat)
  params = model.init(jax.random.key(0), x)["params"]
  layers = maestro.layers(model, x)
  (path,) = layers

  def moments(model, params, layers):
    return fisher.moments(model, {"params": params}, [x], layers, key=KEY)

  class Unrolled(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
      for i in range(3):
        x = x + jnp.tanh(maestro.nn.Dense(6, name=f"layer{i}")(x))
      return x

  unrolled = Unrolled()
  inner = trees.get(params, path)
  flat = {
    f"layer{i}": jax.tree.map(lambda x, i=i: x[i], inner) for i in range(3)
  }
  want = moments(unrolled, flat, maestro.layers(unrolled, x))
  found = moments(model, params, layers)[path]
  for i in range(3):
    close(jax.tree.map(lambda x, i=i: x[i], found), want[f"layer{i}"])


def test_a_scan_that_does_not_is_named(cases):
  case = cases["scan"]
  with pytest.raises(calibrate.CalibrationError, match=r"captured.*axes"):
    fisher.moments(
      case.model, {"params": case.dense}, [case.x], case.layers, key=KEY
    )


def moments_of(case, params=None, key=KEY):
  variables = {"params": case.dense if params is None else params}
  return fisher.moments(
    case.model, variables, [case.x], selected(case), key=key
  )


@pytest.mark.quick(2)
def test_moments_of_inputs_are_those_of_calibrate(case, close):
  layers = selected(case)
  want = calibrate.second_moments(
    case.model, {"params": case.dense}, [case.x], layers
  )
  for path, found in moments_of(case).items():
    close(found.inputs, want[path])


def test_batches_add_up_by_rows(cases, close):
  case, layers = cases["dense"], selected(cases["dense"])
  variables = {"params": case.dense}

  def of(batches):
    return fisher.moments(case.model, variables, batches, layers, key=KEY)

  close(of([case.x, case.x])[""].inputs, of([case.x])[""].inputs)


def test_gradients_are_weighted_by_what_the_outputs_weigh(cases, close):
  """One linear layer: g is z, whose moments a batch of many shows."""
  case = cases["dense_single"]
  x = jnp.asarray(np.random.default_rng(0).normal(size=(20_000, 5)))
  found = fisher.moments(
    case.model,
    {"params": case.dense},
    [x.astype(jnp.float32)],
    case.layers,
    key=KEY,
  )[""]
  centred = np.eye(7) - 1 / 7
  np.testing.assert_allclose(found.outputs, centred, atol=0.05)
  np.testing.assert_allclose(found.weighted, 6 * found.inputs, atol=0.3)


def test_a_table_counts_as_look_ups_and_as_logits(cases, close):
  case = cases["embed_tied"]
  ((path, spec),) = selected(case).items()
  found = moments_of(case)[path]
  table = np.asarray(case.dense["embed"]["embedding"], np.float64)
  z = jax.random.normal(jax.random.fold_in(KEY, 0), (2, 5, 9), jnp.float32)
  z = np.asarray(z - jnp.mean(z, -1, keepdims=True), np.float64).reshape(-1, 9)
  tokens = np.asarray(case.x).reshape(-1)
  q = np.tanh(table[tokens])
  g = (z @ table) * (1 - q**2)  # behind the look-ups
  weighted, outputs = np.zeros(9), np.zeros((6, 6))
  for i, token in enumerate(tokens):
    weighted[token] += np.sum(g[i] ** 2)
    weighted += np.sum(q[i] ** 2) * z[i] ** 2
    outputs += np.outer(g[i], g[i]) + np.sum(z[i] ** 2) * np.outer(q[i], q[i])
  assert spec.kind == "embed"
  close(found.weighted, jnp.asarray(weighted / len(tokens), jnp.float32))
  close(found.outputs, jnp.asarray(outputs / len(tokens), jnp.float32))
  close(found.inputs, jnp.bincount(tokens, length=9) / len(tokens))


def test_a_table_of_logits_alone_has_moments(close):
  class Head(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
      return maestro.nn.Embed(5, 3, name="head").attend(x)

  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
  params = Head().init(jax.random.key(0), x)["params"]
  layers = maestro.layers(Head(), x)
  found = fisher.moments(Head(), {"params": params}, [x], layers, key=KEY)
  z = jax.random.normal(jax.random.fold_in(KEY, 0), (4, 5), jnp.float32)
  z = z - jnp.mean(z, axis=-1, keepdims=True)
  close(found["head"].weighted, jnp.sum(x * x, -1) @ (z * z), 1e-4)
  strength = jnp.sum(z * z, axis=-1, keepdims=True)
  close(found["head"].outputs, (strength * x).T @ x, 1e-4)
  assert not np.any(found["head"].inputs)


@pytest.mark.quick(2)
def test_reordering_changes_no_output(case, close):
  layers = selected(case)
  ranks = case.ranks("half")
  found = moments_of(case)
  new = fisher.reorder(case.factored, ranks, layers, found)
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, case.factored)
  close(lowrank.mask(new, ranks), new, 0)  # the dead stay zero
  want, *_ = case.run("mask", case.factored, ranks)
  close(case.run("plain", new)[0], want)


@pytest.mark.quick(3)
def test_full_rank_keeps_the_kernel_and_the_norms_are_balanced(case, close):
  layers = selected(case)
  new = fisher.decompose(case.dense, [Rule()], layers, moments_of(case))
  close(case.run("plain", new)[0], case.run("plain", case.dense)[0])
  for path, node in trees.factored(new).items():
    rank = jnp.full(layers[path].lead, node["u"].shape[-1])
    u, v = (lowrank.squared_norms(node[n], n, rank) for n in "uv")
    close(u, v)


def weighted_loss(k, low, found):
  """||A^1/2 (K - low) G^1/2||^2."""
  a = np.asarray(found.weighted, np.float64)
  g = np.asarray(found.outputs, np.float64)
  g = g + 1e-3 * np.trace(g) / len(g) * np.eye(len(g))
  d = k - low
  a = np.diag(a) if a.ndim == 1 else a
  return np.trace(d.T @ a @ d @ g)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["dense", "conv_same", "embed", "network"])
def test_prefixes_lose_what_is_told_and_less_than_others(name, cases):
  case = cases[name]
  found, layers = moments_of(case), selected(case)
  tails = fisher.lost_energy(case.dense, {p: layers[p] for p in found}, found)[
    "fisher"
  ]
  rules = [Rule()]
  ours = trees.factored(fisher.decompose(case.dense, rules, layers, found))
  plain = trees.factored(lowrank.decompose(case.dense, rules, layers))
  for path, node in ours.items():
    spec = layers[path]
    if spec.lead:
      continue
    kernel = trees.get(case.dense, path)[spec.weight]
    k = np.asarray(trees.to_matrix(kernel, spec), np.float64)
    whole = weighted_loss(k, 0 * k, found[path])
    for r in range(1, spec.full_rank):
      lost = []
      for n in (node, plain[path]):
        u = np.asarray(n["u"], np.float64).reshape((spec.n_in, -1))[:, :r]
        v = np.asarray(n["v"], np.float64).reshape((-1, spec.n_out))[:r]
        lost.append(weighted_loss(k, u @ v, found[path]) / whole)
      assert lost[0] == pytest.approx(tails[path][r], abs=2e-4)
      assert lost[0] <= lost[1] + 1e-6


@pytest.mark.quick(3)
def test_tails_fall_from_one_to_zero(case):
  layers = selected(case)
  found = moments_of(case)
  tails = fisher.lost_energy(case.dense, layers, found)
  assert list(tails) == list(fisher.ORDERS)
  for order in tails.values():
    for path, tail in order.items():
      assert tail.shape == (layers[path].full_rank + 1,)
      assert tail[0] == pytest.approx(1) and tail[-1] == 0
      assert np.all(np.diff(tail) <= 1e-12)


def test_what_a_kernel_maps_to_zero_can_still_learn(cases):
  case = cases["dense"]
  kernel = np.zeros((9, 6), np.float32)
  kernel[0, 0] = 1
  params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(6)}
  new = fisher.decompose(
    params, [Rule()], case.layers, moments_of(case, params)
  )
  np.testing.assert_allclose(new["u"] @ new["v"], kernel, atol=1e-5)
  assert np.all(np.linalg.norm(new["u"], axis=0) > 0.1)


def bad_moments(case, **changes):
  found = moments_of(case)[""]
  fields = {n: getattr(found, n) for n in ("inputs", "weighted", "outputs")}
  return {"": Moments(**(fields | changes))}


def test_boxes_keep_the_names_of_their_axes(cases, close):
  case = cases["dense"]
  kernel = flax.linen.Partitioned(case.dense["kernel"], ("in", "out"))
  params = case.dense | {"kernel": kernel}
  found = moments_of(case)
  new = fisher.decompose(params, [Rule()], case.layers, found)
  assert new["u"].names == ("in", None) and new["v"].names == (None, "out")
  plain = fisher.decompose(case.dense, [Rule()], case.layers, found)
  close(new["u"].value, plain["u"], 0)
  inputs = {"": found[""].inputs}
  new = calibrate.decompose(params, [Rule()], case.layers, inputs)
  assert new["v"].names == (None, "out")


@pytest.mark.quick(2)
def test_what_has_no_order_is_told(cases):
  case = cases["dense"]
  params = {k: x.astype(jnp.complex64) for k, x in case.dense.items()}
  found = moments_of(case)
  with pytest.raises(calibrate.CalibrationError, match="is complex"):
    fisher.decompose(params, [Rule()], case.layers, found)
  with pytest.raises(calibrate.CalibrationError, match="is complex"):
    inputs = {"": found[""].inputs}
    calibrate.decompose(params, [Rule()], case.layers, inputs)

  class Two(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
      return maestro.nn.Dense(3)(x), x

  model, x = Two(), jnp.ones((2, 4))
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(calibrate.CalibrationError, match="returns a tuple"):
    fisher.moments(model, variables, [x], maestro.layers(model, x), key=KEY)


def test_bad_input_is_refused_by_name(cases):
  case = cases["dense"]
  layers, found = case.layers, moments_of(case)
  with pytest.raises(calibrate.CalibrationError, match="no batches"):
    fisher.moments(case.model, {"params": case.dense}, [], layers, key=KEY)
  with pytest.raises(calibrate.CalibrationError, match="no moments"):
    fisher.decompose(case.dense, [Rule()], layers, {})
  with pytest.raises(calibrate.CalibrationError, match="dense 'kernel'"):
    fisher.decompose(case.factored, [Rule()], layers, found)
  wrong = bad_moments(case, outputs=np.eye(3))
  with pytest.raises(calibrate.CalibrationError, match="do not fit"):
    fisher.decompose(case.dense, [Rule()], layers, wrong)
  with pytest.raises(calibrate.CalibrationError, match="do not fit"):
    fisher.reorder(case.factored, case.full, layers, wrong)
  nan = bad_moments(case, outputs=np.full((6, 6), np.nan))
  with pytest.raises(calibrate.CalibrationError, match="not all finite"):
    fisher.decompose(case.dense, [Rule()], layers, nan)
  with pytest.raises(calibrate.CalibrationError, match="not all finite"):
    fisher.moments(
      case.model, {"params": case.dense}, [case.x * np.nan], layers, key=KEY
    )
