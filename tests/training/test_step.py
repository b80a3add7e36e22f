"""One step of training and exact evaluation, on one device and on eight."""

import functools
import math
import pathlib
import runpy
import types

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maestro import data as data_lib
from maestro import introspect as nn
from maestro import lowrank, ops, sampling
from maestro.data import Split
from maestro.errors import UserError
from maestro.lowrank import Rule
from maestro.models.mlp import MLP
from maestro.ops import pallas_tpu, switch
from maestro.parallel.mesh import MeshShape, make_mesh, replicate
from maestro.parallel.rules import Placement
from maestro.training import accumulate, build, losses
from maestro.training.config import FullPass, parse
from maestro.training.evaluate import make_evaluate
from maestro.training.state import TrainState, new_state, zero_metrics
from maestro.training.step import make_dispatch, make_step

ROOT = pathlib.Path(__file__).parents[2]
MODEL = MLP(num_classes=4, features=(8,))
BATCH, SIZE = 16, 48


def preprocess(x, key=None):
  del key
  return x.astype(jnp.float32)


@pytest.fixture(autouse=True)
def quickly(monkeypatch, jit):
  monkeypatch.setattr(jax, "jit", jit)


@functools.cache
def problem():
  """Returns data and decomposed parameters."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((SIZE, 6)).astype(np.float32)
  y = rng.integers(0, 4, SIZE).astype(np.int32)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]
  dense = jax.tree.map(
    lambda a: jnp.asarray(rng.standard_normal(a.shape) / 2, jnp.float32),
    shapes,
  )
  params = lowrank.decompose(dense, [Rule()], nn.layers(MODEL, x))
  return x, y, params


# The learning rate is 1 without momentum: updates are gradients.
SGD = optax.sgd(1.0)


def run(
  devices=1,
  steps=1,
  dispatch=1,
  sampler=sampling.independent,
  implementation="xla",
  **options,
):
  """Returns (state, losses) after some steps."""
  x, y, params = problem()
  mesh = make_mesh(MeshShape(data=devices))
  defaults = {"lam": 0.01, "penalty": lowrank.group_lasso, "full_pass": None}
  step = make_step(
    MODEL,
    SGD,
    loss="cross_entropy",
    preprocess=preprocess,
    sampler=sampler,
    batch_size=BATCH,
    steps_per_epoch=SIZE // BATCH,
    placement=Placement(mesh, {}),
    **defaults | options,
  )
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=jax.tree.map(jnp.array, params),
    batch_stats={},
    opt_state=SGD.init(params),
    ranks=lowrank.full_ranks(params),
    key=jax.random.key_data(jax.random.key(1)),
    metrics=zero_metrics("cross_entropy"),
  )
  order = data_lib.epoch_order(0, 0, SIZE)
  state = replicate(state, mesh)
  data = replicate({"inputs": x, "targets": y, "order": order}, mesh)
  prefer = ops.prefer(implementation, mesh=mesh, rows=("data", "fsdp"))
  step = prefer(step)
  call, found = make_dispatch(step, dispatch), []
  for _ in range(steps // dispatch):
    state, step_losses = call(state, data)
    found += np.asarray(step_losses).tolist()
  return state, found


def gradients(state):
  return jax.tree.map(lambda a, b: b - a, state.params, problem()[2])


def test_eight_devices_take_the_step_of_one(close):
  (one, loss_one), (eight, loss_eight) = run(1), run(8)
  assert len(eight.params["fc1"]["u"].devices()) == 8
  np.testing.assert_allclose(loss_eight, loss_one, rtol=1e-5)
  close(jax.device_get(gradients(eight)), jax.device_get(gradients(one)), 1e-5)
  close(jax.device_get(eight.metrics), jax.device_get(one.metrics), 1e-5)


def test_a_step_minimises_the_loss_at_sampled_ranks_plus_the_lasso(close):
  x, y, params = problem()
  ranks = lowrank.full_ranks(params)
  lam = 0.01
  state, (loss,) = run(
    lam=lam, sampler=functools.partial(sampling.fixed, fraction=0.5)
  )
  half = sampling.fixed(jax.random.key(0), ranks, fraction=0.5)
  batch = np.asarray(data_lib.epoch_order(0, 0, SIZE))[:BATCH]

  def objective(params):
    out = MODEL.apply({"params": lowrank.mask(params, half)}, x[batch])
    task = jnp.mean(losses.cross_entropy(out, jnp.asarray(y[batch])))
    return task + lam * lowrank.group_lasso(params, ranks)

  wanted, grads = jax.value_and_grad(objective)(params)
  assert loss == pytest.approx(float(wanted), rel=1e-5)
  close(gradients(state), grads, 1e-4)
  assert state.step == 1
  assert state.metrics["steps"] == 1
  total = state.metrics["loss"] + state.metrics["penalty"]
  assert float(total) == pytest.approx(loss, rel=1e-6)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("implementation", "options"),
  [
    ("switch", {}),
    ("switch", {"accumulate": 2}),
    ("switch", {"remat": "dots"}),
    ("switch", {"full_pass": FullPass(distill=0.5)}),
    ("switch", {"dispatch": 3}),
    ("pallas_tpu", {"remat": "dots", "devices": 8}),
  ],
)
def test_a_step_whose_cost_follows_the_ranks_is_the_same_step(
  implementation, options, close, monkeypatch
):
  for module in (switch, pallas_tpu):  # small as they are
    monkeypatch.setattr(module, "pays", lambda *_: True)
  masked, losses_masked = run(steps=3, **options)
  followed, losses_followed = run(
    steps=3, implementation=implementation, **options
  )
  np.testing.assert_allclose(losses_followed, losses_masked, rtol=1e-4)
  close(gradients(followed), gradients(masked), 1e-4)


def test_steps_follow_ranks_where_all_fall_in_a_step():
  one, eight = (make_mesh(MeshShape(data=n)) for n in (1, 8))
  drawn = functools.partial(sampling.independent)
  assert build._implementation(drawn, one) == "switch"
  assert build._implementation(drawn, eight) == "xla"
  chip = types.SimpleNamespace(platform="tpu")
  for axes, wanted in (({"data": 8}, "pallas_tpu"), ({"model": 2}, "xla")):
    shape = {"data": 1, "fsdp": 1, "model": 1} | axes
    devices = np.full(math.prod(shape.values()), chip)
    pod = types.SimpleNamespace(shape=shape, devices=devices, size=devices.size)
    assert build._implementation(drawn, pod) == wanted
  for other in (sampling.one_layer, sampling.full):
    assert build._implementation(functools.partial(other), one) == "xla"


def test_full_distillation_at_full_rank_is_training_on_labels(close):
  plain, _ = run(sampler=sampling.full)
  taught, _ = run(sampler=sampling.full, full_pass=FullPass(distill=1.0))
  close(gradients(taught), gradients(plain), 1e-4)


def test_no_distillation_at_full_rank_counts_the_labels_twice(close):
  plain, _ = run(sampler=sampling.full, lam=0.0)
  twice, _ = run(
    sampler=sampling.full, lam=0.0, full_pass=FullPass(distill=0.0)
  )
  close(gradients(twice), jax.tree.map(lambda x: 2 * x, gradients(plain)), 1e-4)


def test_distillation_is_the_scaled_divergence_from_the_teacher():
  rng = np.random.default_rng(0)
  student, teacher = rng.standard_normal((2, 5, 3)).astype(np.float32)

  def softmax(x):
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)

  p, q = softmax(teacher / 2), softmax(student / 2)
  wanted = 4 * np.sum(p * np.log(p / q), -1)
  found = losses.distillation(jnp.asarray(student), jnp.asarray(teacher), 2.0)
  np.testing.assert_allclose(found, wanted, rtol=1e-4)
  grad = jax.grad(lambda t: losses.distillation(student, t, 2.0).sum())
  assert not np.any(grad(jnp.asarray(teacher)))


def test_several_steps_of_one_dispatch_are_the_steps_of_several(close):
  (one, loss_one), (three, loss_three) = run(steps=3), run(steps=3, dispatch=3)
  np.testing.assert_allclose(loss_three, loss_one, rtol=1e-5)
  close(three.params, one.params, 1e-5)


# ---------------------------------------------------------------------------
# Micro-batches
# ---------------------------------------------------------------------------


@pytest.fixture(params=["unrolled", "scanned"])
def repeated(request, monkeypatch):
  """Runs micro-batches as on CPUs, and as elsewhere."""
  unrolled = request.param == "unrolled"
  monkeypatch.setattr("maestro.training.step.unrolls", lambda mesh: unrolled)


@pytest.mark.quick(1)
@pytest.mark.usefixtures("repeated")
@pytest.mark.parametrize(
  ("parts", "full_pass"), [(2, FullPass(distill=0.5)), (8, None)]
)
def test_a_step_of_micro_batches_is_the_plain_step(parts, full_pass, close):
  options = {"full_pass": full_pass, "steps": 3}
  (plain, losses), (made, found) = (
    run(**options),
    run(**options, accumulate=parts),
  )
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  close(made.params, plain.params, 1e-5)
  close(made.metrics, plain.metrics, 1e-5)


def test_the_penalty_of_micro_batches_counts_once(close):
  # Far larger than the task: twice or an eighth of it would show at once.
  plain, made = (run(lam=100.0, accumulate=k)[0] for k in (1, 8))
  close(gradients(made), gradients(plain), 1e-5)
  close(made.metrics["penalty"], plain.metrics["penalty"], 1e-6)


@pytest.mark.quick(1)
@pytest.mark.parametrize("parts", [1, 4])
def test_ranks_are_sampled_once_a_step_whatever_the_parts(parts):
  drawn = []

  def sampler(key, ranks):
    drawn.append(jax.random.key_data(key))
    return sampling.independent(key, ranks)

  run(sampler=sampler, accumulate=parts)
  assert len(drawn) == 1


@pytest.mark.quick(1)
@pytest.mark.usefixtures("repeated")
def test_micro_batches_split_over_devices(close):
  (one, loss_one), (four, loss_four) = (
    run(devices, steps=2, accumulate=4) for devices in (1, 4)
  )
  np.testing.assert_allclose(loss_four, loss_one, rtol=1e-5)
  close(jax.device_get(four.params), jax.device_get(one.params), 1e-5)


def test_gradients_are_averaged_in_float32():
  # In bfloat16, 1 + 2^-9 is 1.
  given = jnp.asarray([1.0] + [2.0**-9] * 7, jnp.bfloat16)

  def function(params, carried, part, i):
    del params, i
    return (part[0], carried), part[0]

  mean, grads, _ = accumulate.mean_gradient(
    function, None, {}, given, 8, unroll=True
  )
  assert grads.dtype == mean.dtype == jnp.float32
  assert float(grads) == float(mean) == (1 + 7 * 2.0**-9) / 8


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("remat", "parts"), [("all", 1), ("dots", 2), ("dots_with_no_batch_dims", 1)]
)
def test_what_is_computed_again_has_the_same_gradients(remat, parts, close):
  full_pass = FullPass(distill=0.5)
  plain, made = (
    run(full_pass=full_pass, accumulate=parts, remat=name)[0]
    for name in ("none", remat)
  )
  close(gradients(made), gradients(plain), 1e-6)


class Normed(linen.Module):
  """A batch norm with weights around it."""

  @linen.compact
  def __call__(self, x, train=False):
    x = linen.Dense(5, use_bias=False, name="first")(x)
    norm = linen.BatchNorm(not train, momentum=0.6, name="norm")
    return linen.Dense(4, name="last")(jnp.tanh(norm(x)))


@pytest.mark.quick(0)
def test_statistics_are_those_of_the_micro_batches_in_order(close):
  x, y, _ = problem()
  variables = Normed().init(jax.random.key(0), x)
  params, stats = variables["params"], variables["batch_stats"]
  step = make_step(
    Normed(),
    SGD,
    loss="cross_entropy",
    preprocess=preprocess,
    sampler=sampling.full,
    batch_size=12,
    steps_per_epoch=4,
    lam=0.0,
    penalty=None,
    full_pass=None,
    placement=Placement(make_mesh(MeshShape(data=1)), {}),
    accumulate=3,
  )
  state = new_state(0, "cross_entropy", SGD, params, stats, {})
  order = data_lib.epoch_order(0, 0, SIZE)
  state, loss = jax.jit(step)(
    state, {"inputs": x, "targets": y, "order": order}
  )

  def task(params, stats, batch):
    out, new = Normed().apply(
      {"params": params, "batch_stats": stats},
      x[batch],
      train=True,
      mutable=["batch_stats"],
    )
    loss = jnp.mean(losses.cross_entropy(out, jnp.asarray(y[batch])))
    return loss, new["batch_stats"]

  wanted, total = jax.tree.map(jnp.zeros_like, params), 0.0
  for i in range(3):  # every third example
    part = np.asarray(order)[:12][i::3]
    grad = jax.value_and_grad(task, has_aux=True)
    (value, stats), grads = grad(params, stats, part)
    wanted = jax.tree.map(lambda a, b: a + b / 3, wanted, grads)
    total += value / 3
  assert float(loss) == pytest.approx(float(total), rel=1e-5)
  found = jax.tree.map(lambda a, b: a - b, params, state.params)
  close(found, wanted, 1e-5)
  close(state.batch_stats, stats, 1e-5)


def test_a_batch_that_does_not_exist_of_devices_is_refused():
  with pytest.raises(UserError, match=r"config.mesh: data=9.*there are 8"):
    make_mesh(MeshShape(data=9))


# ---------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_with_a_ragged_last_batch_is_the_plain_mean(devices):
  x, y, params = problem()
  x, y = x[:37], y[:37]
  mesh = make_mesh(MeshShape(data=devices))
  evaluate = make_evaluate(
    MODEL,
    loss="cross_entropy",
    preprocess=preprocess,
    batch_size=16,
    mesh=mesh,
  )
  found = evaluate(replicate({"params": params}, mesh), Split(x, y))
  logits = np.asarray(MODEL.apply({"params": params}, x), np.float64)
  log_z = np.log(np.sum(np.exp(logits), axis=1))
  assert found["loss"] == pytest.approx(
    np.mean(log_z - logits[np.arange(37), y]), rel=1e-5
  )
  assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == y))


def test_padding_that_overflows_does_not_reach_the_mean():
  # The padding repeats the last example; only that one may be infinite.
  x, y, params = problem()
  x = x[:5].copy()
  x[-1] = np.inf
  evaluate = make_evaluate(
    MODEL,
    loss="cross_entropy",
    preprocess=lambda x, key=None: jnp.where(jnp.isinf(x), 0.0, x),
    batch_size=8,
    mesh=make_mesh(MeshShape(data=1)),
  )
  assert np.isfinite(evaluate({"params": params}, Split(x, y[:5]))["loss"])


# ---------------------------------------------------------------------------
# Sampling and order, as the shipped config has them
# ---------------------------------------------------------------------------


def test_the_shipped_config_samples_below_full_rank_from_the_first_steps():
  module = runpy.run_path(str(ROOT / "configs" / "digits_od.py"))
  c = parse(module["get_config"]("maestro").to_dict())
  options = dict(c.discover.sampler)
  sampler = sampling.SAMPLERS[options.pop("name")]
  ranks = {
    "fc1": {"rank": jnp.int32(64)},
    "fc2": {"rank": jnp.int32(128)},
    "fc3": {"rank": jnp.int32(10)},
  }
  draw = jax.jit(lambda key: sampler(key, ranks, **options))
  key = jax.random.key(c.seed)
  below, layers = 0, set()
  for step in range(20):
    sampled = draw(jax.random.fold_in(key, step))
    for layer, full in ranks.items():
      rank = int(sampled[layer]["rank"])
      assert 1 <= rank <= int(full["rank"])
      if rank < int(full["rank"]):
        below += 1
        layers.add(layer)
  assert below >= 15 and len(layers) >= 2


def test_ranks_sampled_differ_between_steps_and_not_between_runs():
  first, second = run(steps=3, lam=0.0), run(steps=3, lam=0.0)
  assert first[1] == second[1]
  full = run(steps=3, lam=0.0, sampler=sampling.full)
  assert first[1] != full[1]


def test_an_epoch_covers_the_split_and_epochs_differ():
  first, second = (
    np.asarray(data_lib.epoch_order(3, epoch, SIZE)) for epoch in (0, 1)
  )
  assert sorted(first) == sorted(second) == list(range(SIZE))
  assert first.tolist() != second.tolist()
  np.testing.assert_array_equal(first, data_lib.epoch_order(3, 0, SIZE))


def test_the_steps_of_an_epoch_see_every_example_once():
  # The gradient of a linear probe of one-hot inputs tells who was there.
  seen = []
  order = data_lib.epoch_order(0, 5, SIZE)
  data = {
    "inputs": np.arange(SIZE, dtype=np.float32)[:, None],
    "targets": np.zeros(SIZE, np.int32),
    "order": order,
  }

  class Probe:
    def __call__(self, x):
      """Is not told whether it trains."""

    def apply(self, variables, x, rngs):
      del rngs
      logits = variables["params"]["w"] * jnp.ones((x.shape[0], 2))
      index = x[:, 0].astype(jnp.int32)
      # The gradient for `seen` counts how often an example was used.
      logits += 0 * logits.at[:, 0].add(1.0)
      extra = variables["params"]["seen"][index]
      return jnp.stack([logits[:, 0] - extra, logits[:, 1]], axis=1)

  step = make_step(
    Probe(),
    SGD,
    loss="cross_entropy",
    preprocess=preprocess,
    sampler=sampling.full,
    batch_size=BATCH,
    steps_per_epoch=SIZE // BATCH,
    lam=0.0,
    penalty=None,
    full_pass=None,
    placement=Placement(make_mesh(MeshShape(data=1)), {}),
  )
  params = {"w": jnp.zeros(()), "seen": jnp.zeros(SIZE)}
  state = TrainState(
    step=jnp.int32(5 * SIZE // BATCH),
    params=params,
    batch_stats={},
    opt_state=SGD.init(params),
    ranks={},
    key=jax.random.key_data(jax.random.key(1)),
    metrics=zero_metrics("cross_entropy"),
  )
  call = jax.jit(step)
  for _ in range(SIZE // BATCH):
    before = state.params["seen"]
    state, _ = call(state, data)
    moved = np.flatnonzero(np.asarray(state.params["seen"] != before))
    assert len(moved) == BATCH
    seen += moved.tolist()
  assert sorted(seen) == list(range(SIZE))
