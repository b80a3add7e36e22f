"""Optimizers, schedules, and the truncation of optimizer states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from maestro import introspect as nn
from maestro import lowrank
from maestro.lowrank import Rule
from maestro.models.mlp import MLP
from maestro.schema import ConfigError
from maestro.training import optim, schedules
from maestro.training.durations import Clock

# ---------------------------------------------------------------------------
# A small decomposed network and one training step of it
# ---------------------------------------------------------------------------

MODEL = MLP(num_classes=5, features=(12, 10))
LOW = {"fc1": {"rank": 3}, "fc2": {"rank": 5}, "fc3": {"rank": 0}}


@functools.cache
def problem():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((16, 9)), jnp.float32)
  y = jnp.asarray(rng.integers(0, 5, 16))
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]
  dense = jax.tree.map(
    lambda a: jnp.asarray(rng.standard_normal(a.shape) / 3, jnp.float32),
    shapes,
  )
  params = lowrank.decompose(dense, [Rule()], nn.layers(MODEL, x))
  return x, y, params


def loss_of(params):
  x, y, _ = problem()
  logits = MODEL.apply({"params": params}, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def stepper(tx, jit):
  """Compiles (params, state) -> (params, state, update), once per shape."""

  def step(params, state):
    updates, state = tx.update(jax.grad(loss_of)(params), state, params)
    return optax.apply_updates(params, updates), state, updates

  return jit(step)


def shapes(tree):
  return jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), tree)


def by_name(params):
  """Labels factors u by "u" and all else by "rest"."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "u" if path[-1].key == "u" else "rest", params
  )


def factors_only(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ("u", "v"), params
  )


OPTIMIZERS = {
  "sgd_momentum": (lambda: optax.sgd(0.05, momentum=0.9), 3),
  "nesterov": (lambda: optax.sgd(0.05, momentum=0.9, nesterov=True), 3),
  "adam": (lambda: optax.adam(0.01), 3),
  "adamw": (lambda: optax.adamw(0.01, weight_decay=0.1), 3),
  "lion": (lambda: optax.lion(0.01), 3),
  "chain": (
    lambda: optax.chain(
      optax.clip_by_global_norm(0.1),
      optax.add_decayed_weights(0.01),
      optax.sgd(0.05, momentum=0.9),
    ),
    3,
  ),
  "masked": (lambda: optax.masked(optax.adam(0.01), factors_only), 3),
  "partition": (
    lambda: optax.partition(
      {"u": optax.adam(0.01), "rest": optax.sgd(0.05, momentum=0.9)}, by_name
    ),
    3,
  ),
  "inject_hyperparams": (
    lambda: optax.inject_hyperparams(optax.adam)(
      learning_rate=optax.linear_schedule(0.01, 0.02, 10)
    ),
    3,
  ),
  "muon": (
    lambda: optim.make(
      {"name": "muon", "weight_decay": 0.1},
      optax.constant_schedule(0.01),
      nn.layers(MODEL, problem()[0]),
    ),
    3,
  ),
  "multi_steps": (lambda: optax.MultiSteps(optax.adam(0.01), 2), 4),
  "schedule_free": (
    lambda: contrib.schedule_free(optax.sgd(0.05), 0.05, b1=0.9),
    3,
  ),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_truncated_state_goes_on_as_the_masked_one(
  name, multiple_of, jit, close
):
  build, steps = OPTIMIZERS[name]
  tx = build()
  step = stepper(tx, jit)
  params = problem()[2]
  state = tx.init(params)
  for _ in range(steps):  # at full rank: moments of all components fill
    params, state, _ = step(params, state)
  params, state = lowrank.mask(params, LOW), optim.mask(state, params, LOW)
  for _ in range(2):  # at low rank, masked
    params, state, _ = step(params, state)

  small = lowrank.truncate(params, LOW, multiple_of)
  cut = optim.truncate(tx, state, params, LOW, multiple_of)

  wanted = jax.eval_shape(tx.init, small)
  assert jax.tree.structure(cut) == jax.tree.structure(wanted)
  assert shapes(cut) == shapes(wanted)
  assert abs(loss_of(small) - loss_of(params)) < 1e-6
  # MultiSteps moves only at every second step: take two.
  for _ in range(2):
    params, state, big_update = step(params, state)
    small, cut, small_update = step(small, cut)
    sliced = lowrank.truncate(big_update, LOW, multiple_of)
    close(small_update, sliced, 1e-5)
    for a, b in zip(
      jax.tree.leaves(small_update), jax.tree.leaves(sliced), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=1e-6)
    # Nothing that was given up came back.
    for a, b in zip(
      jax.tree.leaves(params),
      jax.tree.leaves(lowrank.mask(params, LOW)),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)
  close(cut, optim.truncate(tx, state, params, LOW, multiple_of), 1e-5)


def test_masking_a_state_keeps_shapes_and_zeroes_dead_components(jit):
  tx = optax.adam(0.01)
  params = problem()[2]
  state = tx.init(params)
  for _ in range(2):
    params, state, _ = stepper(tx, jit)(params, state)
  masked = optim.mask(state, params, LOW)
  assert shapes(masked) == shapes(state)
  for before, after in (
    (state[0].mu, masked[0].mu),
    (state[0].nu, masked[0].nu),
  ):
    for layer, rank in ((k, v["rank"]) for k, v in LOW.items()):
      u, v = np.asarray(after[layer]["u"]), np.asarray(after[layer]["v"])
      assert not u[:, rank:].any() and not v[rank:].any()
      np.testing.assert_array_equal(u[:, :rank], before[layer]["u"][:, :rank])
      np.testing.assert_array_equal(v[:rank], before[layer]["v"][:rank])
      np.testing.assert_array_equal(after[layer]["bias"], before[layer]["bias"])
  assert masked[0].count == state[0].count


def test_masking_can_be_traced():
  tx = optax.sgd(0.1, momentum=0.9)
  params = problem()[2]
  state = tx.init(params)
  ranks = jax.tree.map(jnp.int32, LOW)
  masked = jax.eval_shape(optim.mask, state, params, ranks)
  assert jax.tree.map(jnp.shape, masked) == jax.tree.map(jnp.shape, state)


FIELDS = ("mu", "nu", "trace", "count", "0", "inner_state", "hyperparams")


@pytest.mark.parametrize("name", ["sgd_momentum", "adam", "lion", "chain"])
@pytest.mark.parametrize("field", FIELDS)
def test_modules_may_be_called_as_fields_of_a_state(name, field):
  node = {"u": jnp.ones((4, 3)), "v": jnp.ones((3, 5))}
  params = {"fc": node, field: {"fc": node, field: {"fc": node}}}
  ranks = {
    "fc": {"rank": 1},
    field: {"fc": {"rank": 3}, field: {"fc": {"rank": 2}}},
  }
  tx = OPTIMIZERS[name][0]()
  state = jax.tree.map(jnp.ones_like, tx.init(params))
  found = optim.mask(state, params, ranks)
  wanted = optax.tree_map_params(
    tx, lambda _, x: x, state, lowrank.mask(params, ranks)
  )
  assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted))


def test_a_parameter_that_has_the_shape_of_a_factor_is_left_alone():
  params = {
    "a": {"u": jnp.ones((4, 3)), "v": jnp.ones((3, 4))},
    "b": {"kernel": jnp.ones((4, 3))},
    "u": jnp.ones((4, 3)),
  }
  tx = optax.sgd(0.1, momentum=0.9)
  state = jax.tree.map(lambda x: x + 1, tx.init(params))
  masked = optim.mask(state, params, {"a": {"rank": 1}})
  trace = masked[0].trace
  assert trace["a"]["u"][0].tolist() == [1, 0, 0]
  assert bool(jnp.all(trace["b"]["kernel"] == 1))
  assert bool(jnp.all(trace["u"] == 1))


@pytest.mark.parametrize(
  ("name", "tx", "size"),
  [
    ("Adafactor", optax.adafactor(0.01), 256),
    ("Adafactor", optax.adafactor(0.01), 6),
    ("Adafactor", optax.chain(optax.clip(1.0), optax.adafactor(0.01)), 6),
    ("Muon", contrib.muon(0.01), 6),
    ("SM3", optax.sm3(0.01), 6),
  ],
  ids=["adafactor", "adafactor_small", "chained", "muon", "sm3"],
)
def test_states_that_do_not_mirror_parameters_are_refused_by_name(
  name, tx, size
):
  params = {
    "fc": {"u": jnp.ones((size, size)), "v": jnp.ones((size, size))},
    "bias": jnp.ones(size),
  }
  ranks = {"fc": {"rank": 2}}
  state = jax.jit(tx.init)(params)
  with pytest.raises(optim.OptimizerError, match=name) as error:
    optim.truncate(tx, state, params, ranks)
  assert "sgd" in str(error.value)  # what to use instead
  with pytest.raises(optim.OptimizerError, match=name):
    optim.mask(state, params, ranks)


def test_an_unknown_state_that_does_not_shrink_is_refused_with_its_leaf():
  # Keeps one matrix product per factor: no mirror of the parameters.
  def init(params):
    return {"gram": jax.tree.map(lambda x: x.T @ x, params)}

  tx = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
  params = {"fc": {"u": jnp.ones((6, 4)), "v": jnp.ones((4, 5))}}
  with pytest.raises(optim.OptimizerError, match="gram/fc/u"):
    optim.truncate(tx, tx.init(params), params, {"fc": {"rank": 2}})


# ---------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------


def make_schedule(phases, steps_per_epoch):
  """The schedule of phases (name, epochs, section)."""
  sections = {name: section for name, _, section in phases}
  clock = Clock(
    steps_per_epoch, 1, **{name: n * steps_per_epoch for name, n, _ in phases}
  )
  return schedules.make(sections, clock)


def rates(phases, steps_per_epoch, steps):
  schedule = make_schedule(phases, steps_per_epoch)
  return [float(schedule(step)) for step in steps]


def test_piecewise_multiplies_at_fractions_of_its_phase():
  section = {
    "name": "piecewise",
    "learning_rate": 1.0,
    "boundaries": (0.5, 0.75),
    "factor": 0.1,
  }
  found = rates([("discover", 4, section)], 10, [0, 19, 20, 29, 30, 39])
  np.testing.assert_allclose(found, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)


def test_cosine_falls_to_its_final_fraction_of_the_peak():
  section = {"name": "cosine", "learning_rate": 2.0, "final_fraction": 0.25}
  found = rates([("settle", 2, section)], 10, [0, 10, 20])
  np.testing.assert_allclose(found, [2.0, 1.25, 0.5], rtol=1e-6)


def test_cosine_rises_linearly_during_warm_up():
  section = {"name": "cosine", "learning_rate": 2.0, "warmup_epochs": 0.5}
  found = rates([("settle", 2, section)], 20, [0, 4, 9, 10, 25, 40])
  np.testing.assert_allclose(found, [0.2, 1, 2, 2, 1, 0], atol=1e-6)


@pytest.mark.parametrize(
  "warmup", ["steps:10", "epochs:0.5", "examples:10", "fraction:0.25"]
)
def test_warm_up_is_as_long_in_every_unit(warmup):
  section = {"name": "cosine", "learning_rate": 2.0}
  steps = range(40)
  expected = rates([("settle", 2, section | {"warmup_epochs": 0.5})], 20, steps)
  assert rates([("settle", 2, section | {"warmup": warmup})], 20, steps) == (
    expected
  )


def test_no_step_of_warm_up_is_lost_to_a_rate_of_zero():
  section = {"name": "cosine", "learning_rate": 2.0, "warmup_epochs": 0.5}
  for steps in (2, 6, 10, 40):
    found = rates([("settle", 2, section)], steps, range(steps // 2))
    np.testing.assert_allclose(
      found, 2.0 * (np.arange(steps // 2) + 1) / (steps // 2), rtol=1e-6
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 100])
def test_boundaries_that_fall_on_one_step_all_count(steps):
  section = {
    "name": "piecewise",
    "learning_rate": 1.0,
    "boundaries": (0.45, 0.5, 0.55),
    "factor": 0.5,
  }
  (last,) = rates([("settle", 1, section)], steps, [steps])
  assert last == pytest.approx(0.125)


def test_phases_join_at_the_first_step_of_the_next():
  phases = [
    ("discover", 2, {"name": "constant", "learning_rate": 3.0}),
    ("settle", 1, {"name": "cosine", "learning_rate": 1.0}),
  ]
  found = rates(phases, 5, [0, 9, 10, 15])
  np.testing.assert_allclose(found, [3, 3, 1, 0], atol=1e-6)


@pytest.mark.parametrize("end", [5, 10, 15])
def test_a_discover_that_ends_early_leaves_its_rates_and_settle_the_rest(end):
  """Also within its warm-up of ten steps, which is what was planned."""
  warm = {"name": "cosine", "learning_rate": 2.0, "warmup_epochs": 1.0}
  sections = {
    "discover": warm,
    "settle": {"name": "cosine", "learning_rate": 1.0},
  }
  clock = Clock(10, 1, discover=20, settle=20)
  planned = schedules.make(sections, clock)
  found = schedules.make(sections, clock, end)
  for step in range(end):
    assert float(found(step)) == float(planned(step))
  assert float(found(end)) == 1.0
  half = end + (40 - end) / 2
  assert float(found(half)) == pytest.approx(0.5)
  assert float(found(40)) == pytest.approx(0, abs=1e-6)


def test_a_phase_of_no_epochs_has_no_schedule():
  bad = {"name": "no such schedule"}
  phases = [
    ("discover", 0, bad),
    ("settle", 1, {"name": "constant", "learning_rate": 0.5}),
  ]
  assert rates(phases, 5, [0, 4]) == [0.5, 0.5]


CONSTANT = {"name": "constant", "learning_rate": 0.1}


@pytest.mark.parametrize(
  ("section", "key"),
  [
    ({"name": "cosin", "learning_rate": 0.1}, "name.*cosine"),
    ({"learning_rate": 0.1}, "name"),
    ({"name": "constant"}, "learning_rate"),
    (CONSTANT | {"learning_rate": "0.1"}, "learning_rate"),
    (CONSTANT | {"warmup": 1}, "warmup"),
    (CONSTANT | {"name": "cosine", "warmup_epochs": 2}, "warmup_epochs"),
    (CONSTANT | {"name": "cosine", "warmup": "steps:20"}, "warmup: steps:20"),
    (CONSTANT | {"name": "cosine", "warmup": "step:2"}, "warmup: 'step:2'"),
    (CONSTANT | {"name": "piecewise", "boundaries": (1.5,)}, "boundaries"),
    (CONSTANT | {"name": "piecewise"}, "boundaries"),
    (CONSTANT | {"learning_rate": -1.0}, "learning_rate"),
    (CONSTANT | {"learning_rate": float("inf")}, "learning_rate"),
    (CONSTANT | {"name": "cosine", "warmup_epochs": -5}, "warmup_epochs"),
    (CONSTANT | {"name": "cosine", "final_fraction": 2.0}, "final_fraction"),
  ],
)
def test_a_bad_schedule_option_is_named(section, key):
  with pytest.raises(ConfigError, match=f"schedule.{key}"):
    make_schedule([("settle", 2, section)], 10)


# ---------------------------------------------------------------------------
# config.optimizer
# ---------------------------------------------------------------------------


def first_update(section, params, grads):
  tx = optim.make(section, optax.constant_schedule(1.0), {})
  return tx.update(grads, tx.init(params), params)[0]


def test_clip_norm_bounds_the_norm_of_the_gradients():
  grads = {"w": jnp.array([30.0, 40.0])}
  found = first_update({"name": "sgd", "clip_norm": 1.0}, grads, grads)
  np.testing.assert_allclose(found["w"], [-0.6, -0.8], rtol=1e-6)
  found = first_update({"name": "sgd", "clip_norm": None}, grads, grads)
  np.testing.assert_allclose(found["w"], [-30, -40], rtol=1e-6)


def test_weight_decay_is_added_to_clipped_gradients():
  params = {"w": jnp.array([10.0])}
  grads = {"w": jnp.array([2.0])}
  section = {"name": "sgd", "weight_decay": 0.1, "clip_norm": 1.0}
  found = first_update(section, params, grads)
  np.testing.assert_allclose(found["w"], [-2.0], rtol=1e-6)


def test_weight_decay_of_adamw_is_decoupled():
  params = {"w": jnp.array([10.0])}
  grads = {"w": jnp.array([0.0])}
  found = first_update({"name": "adamw", "weight_decay": 0.1}, params, grads)
  np.testing.assert_allclose(found["w"], [-1.0], rtol=1e-6)


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({"name": "sdg"}, "optimizer.name.*sgd"),
    ({}, "optimizer.name"),
    ({"name": "adafactor"}, "optimizer.name.*adafactor.*sgd"),
    ({"name": "muon", "momentum": 0.9}, "optimizer.momentum"),
    ({"name": "sgd", "momentun": 0.9}, "optimizer.momentun.*momentum"),
    ({"name": "sgd", "nesterov": 1}, "optimizer.nesterov"),
    ({"name": "adam", "b1": "0.9"}, "optimizer.b1"),
    ({"name": "sgd", "learning_rate": 0.1}, "optimizer.learning_rate"),
    ({"name": "sgd", "clip_norm": 0.0}, "optimizer.clip_norm"),
    ({"name": "sgd", "clip_norm": "a"}, "optimizer.clip_norm"),
    ({"name": "sgd", "weight_decay": "a"}, "optimizer.weight_decay"),
    ({"name": "sgd", "weight_decay": -1.0}, "optimizer.weight_decay"),
    ({"name": "adamw", "weight_decay": -1.0}, "optimizer.weight_decay"),
    ({"name": "sgd", "weight_decay": float("nan")}, "optimizer.weight_decay"),
    ({"name": "adam", "b2": 1.0}, "optimizer.b2"),
  ],
)
def test_a_bad_optimizer_option_is_named(section, message):
  with pytest.raises(ConfigError, match=message):
    optim.make(section, optax.constant_schedule(0.1), {})


# What a section does not say is what stands here, not what optax thinks of.
PLAIN = {
  "sgd": lambda rate: optax.sgd(rate),
  "adam": lambda rate: optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8),
  "adamw": lambda rate: optax.adamw(rate, weight_decay=0.0),
  "lion": lambda rate: optax.lion(rate, b1=0.9, b2=0.99, weight_decay=0.0),
  "muon": lambda rate: optax.adam(rate, b1=0.9, b2=0.95, eps=1e-8),
}


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_without_options_nothing_decays(name):
  params = {"w": jnp.array([10.0, -3.0]), "b": jnp.array([2.0])}
  zero = jax.tree.map(jnp.zeros_like, params)
  found = first_update({"name": name}, params, zero)
  assert all(not np.any(x) for x in jax.tree.leaves(found))
  tx = PLAIN[name](1.0)
  grads = jax.tree.map(lambda x: 0.1 * x, params)
  wanted = tx.update(grads, tx.init(params), params)[0]
  jax.tree.map(
    np.testing.assert_array_equal,
    first_update({"name": name}, params, grads),
    wanted,
  )


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_decay_acts_on_the_paths_that_it_is_given(name):
  params = {
    "fc": {"u": jnp.ones((3, 2)), "v": jnp.ones((2, 4)), "bias": jnp.ones(4)},
    "norm": {"scale": jnp.ones(4)},
  }
  zero = jax.tree.map(jnp.zeros_like, params)
  decay = {"weight_decay": 0.1, "decay_paths": ".*/(kernel|u|v)"}
  found = first_update({"name": name} | decay, params, zero)
  for path, x in jax.tree_util.tree_leaves_with_path(found):
    assert bool(np.all(x < 0)) == (path[-1].key in ("u", "v")), path
    assert np.all(x < 0) or not np.any(x)
  with pytest.raises(ConfigError, match=r"decay_paths: 'kernel' matches none"):
    first_update(
      {"name": name} | decay | {"decay_paths": "kernel"}, params, zero
    )
  with pytest.raises(ConfigError, match=r"decay_paths: '\(' is no regular"):
    first_update({"name": name} | decay | {"decay_paths": "("}, params, zero)


def test_the_inverse_root_goes_on_where_an_earlier_phase_ended():
  section = {
    "name": "inverse_sqrt",
    "learning_rate": 2.0,
    "warmup": "steps:4",
  }
  clock = Clock(10, 1, discover=30, settle=20)
  one = schedules.make(
    {"discover": section, "settle": section | {"begun": "steps:30"}}, clock
  )
  found = [float(one(step)) for step in (0, 1, 3, 15, 29, 30, 35)]
  want = [0.5, 1.0, 2.0, 1.0, 2 * (4 / 30) ** 0.5, 2 * (4 / 31) ** 0.5]
  np.testing.assert_allclose(found, [*want, 2 / 3], rtol=1e-6)
  # With this peak it is Noam's: width^-1/2 min(i^-1/2, i warmup^-3/2).
  width, warmup = 8, 4
  peak = (width * warmup) ** -0.5
  noam = schedules.inverse_sqrt(clock, 30, learning_rate=peak, warmup="steps:4")
  for i in (1, 3, 4, 5, 9):
    rate = width**-0.5 * min(i**-0.5, i * warmup**-1.5)
    np.testing.assert_allclose(noam(i - 1), rate, rtol=1e-6)
  with pytest.raises(ConfigError, match=r"schedule\.warmup: 'steps:0'"):
    schedules.inverse_sqrt(clock, 30, learning_rate=1.0, warmup="steps:0")
