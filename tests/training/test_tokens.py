"""Losses, steps and evaluations of tokens: means over all that count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maestro import introspect as nn
from maestro import lowrank, models, sampling
from maestro.data import Split
from maestro.lowrank import Rule
from maestro.parallel.mesh import MeshShape, make_mesh, replicate
from maestro.parallel.rules import Placement
from maestro.schema import ConfigError
from maestro.training import losses
from maestro.training.config import FullPass, parse
from maestro.training.evaluate import make_evaluate
from maestro.training.judge import make_judge
from maestro.training.state import TrainState, zero_metrics
from maestro.training.step import make_step

WORDS, LENGTH, BATCH = 11, 8, 8
MODEL = models.GPT(WORDS, LENGTH, layers=1, width=8, heads=2, dropout=0.0)
SGD = optax.sgd(1.0)  # updates are gradients


@pytest.fixture(autouse=True)
def quickly(monkeypatch, jit):
  monkeypatch.setattr(jax, "jit", jit)


def sentences(n, longest=LENGTH, seed=0):
  """Returns a split of rows of 1 to `longest` tokens, unequal ones."""
  rng = np.random.default_rng(seed)
  x = np.zeros((n, LENGTH), np.int32)
  y = np.full((n, LENGTH), -1, np.int32)
  for i in range(n):
    k = rng.integers(1, longest + 1)
    y[i, :k] = rng.integers(3, WORDS, k)
    x[i, :k] = np.append(2, y[i, : k - 1])
  return Split(x, y)


@functools.cache
def problem():
  x = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]
  rng = np.random.default_rng(1)
  dense = jax.tree.map(
    lambda a: jnp.asarray(rng.standard_normal(a.shape) / 2, jnp.float32), shapes
  )
  rule = Rule("blocks/.*(up|down)")
  params = lowrank.decompose(dense, [rule], nn.layers(MODEL, x))
  return params, lowrank.full_ranks(params)


def step_of(split, devices=1, **options):
  """Returns (gradients, metrics) of a step on a split's first sentences."""
  params, ranks = problem()
  mesh = make_mesh(MeshShape(data=devices))
  given = {"lam": 0.01, "penalty": lowrank.group_lasso, "full_pass": None}
  given["sampler"] = sampling.independent
  step = make_step(
    MODEL,
    SGD,
    loss="cross_entropy",
    preprocess=lambda x, key=None: x,
    batch_size=BATCH,
    steps_per_epoch=1,
    placement=Placement(mesh, {}),
    **given | options,
  )
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats={},
    opt_state=SGD.init(params),
    ranks=ranks,
    key=jax.random.key_data(jax.random.key(1)),
    metrics=zero_metrics("cross_entropy"),
  )
  data = {
    "inputs": split.inputs,
    "targets": split.targets,
    "order": np.arange(BATCH, dtype=np.int32),
  }
  new, _ = jax.jit(step)(replicate(state, mesh), replicate(data, mesh))
  grads = jax.tree.map(lambda a, b: b - a, new.params, params)
  return jax.device_get((grads, new.metrics))


def test_labels_below_0_carry_no_loss_and_no_gradient():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
  labels = jnp.asarray([[1, -1, 4], [-1, -1, -1]])
  log_p = np.asarray(jax.nn.log_softmax(logits))
  want = [-log_p[0, 0, 1] - log_p[0, 2, 4], 0.0]
  np.testing.assert_allclose(losses.cross_entropy(logits, labels), want, 1e-5)
  grads = jax.grad(lambda x: losses.cross_entropy(x, labels).sum())(logits)
  assert not np.any(grads[0, 1]) and not np.any(grads[1])
  assert np.all(np.any(grads[0, ::2], axis=-1))
  right = logits.at[0, 0, 1].set(9.0).at[0, 2, 4].set(-9.0)
  assert losses.accuracy(right, labels).tolist() == [1.0, 0.0]
  assert float(losses.weight(labels)) == 2 / 2
  assert float(losses.weight(labels[:, :1])) == 2 / 1
  assert losses.weight(jnp.asarray([3, 0])) == 1.0
  assert losses.weight(jnp.ones((2, 3))) == 1.0  # of a regression


@pytest.mark.quick(1)
@pytest.mark.parametrize("labels", [[1, 4], [[1, 0], [2, 4]]])
def test_label_smoothing_is_that_of_smoothed_targets(labels):
  labels = jnp.asarray(labels)
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(*labels.shape, 5)), jnp.float32)
  soft = optax.smooth_labels(jax.nn.one_hot(labels, 5), 0.2)
  want = optax.softmax_cross_entropy(logits, soft)
  want = want if labels.ndim == 1 else want.sum(-1)
  found = losses.cross_entropy(logits, labels, smoothing=0.2)
  np.testing.assert_allclose(found, want, rtol=1e-5)


def test_distillation_is_of_tokens_that_count():
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.normal(size=(1, 2, 3)), jnp.float32) for _ in "ab")
  one = losses.distillation(a[:, 0], b[:, 0], 2.0)
  both = losses.distillation(a, b, 2.0, jnp.asarray([[1, -1]]))
  np.testing.assert_allclose(both, one, rtol=1e-6)


@pytest.mark.quick(0)
def test_a_step_minimises_the_mean_over_tokens(close):
  params, ranks = problem()
  split = sentences(BATCH)
  grads, metrics = step_of(split, lam=0.0, sampler=lambda key, ranks: ranks)

  def mean(params):
    out = MODEL.apply({"params": params, "ranks": ranks}, split.inputs)
    y = split.targets
    log_p = jnp.take_along_axis(
      jax.nn.log_softmax(out), jnp.maximum(y, 0)[..., None], -1
    )[..., 0]
    return -jnp.sum(jnp.where(y >= 0, log_p, 0.0)) / np.sum(y >= 0)

  value, want = jax.jit(jax.value_and_grad(mean))(params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  most = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(want))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * most), grads, want
  )


@pytest.mark.quick(0)
@pytest.mark.parametrize("longest", [2, 5, 8])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_at_its_own_length_is_the_whole_one(longest, accumulate, close):
  split = sentences(BATCH, longest, seed=longest)
  want = step_of(split)
  found = step_of(split, lengths=(3, 5, LENGTH), accumulate=accumulate)
  assert_close_to_the_largest(found, want)


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  "options",
  [
    {"accumulate": 4},
    {"devices": 4},
    {"devices": 2, "accumulate": 2, "lengths": (3, LENGTH)},
  ],
)
def test_parts_of_a_batch_weigh_what_they_hold(options):
  split = sentences(BATCH, seed=3)
  counts = np.sum(split.targets >= 0, axis=1)
  assert len(set(counts.reshape(2, -1).sum(axis=0))) > 1  # unequal parts
  assert_close_to_the_largest(step_of(split, **options), step_of(split))


def test_a_full_pass_and_smoothing_are_means_over_tokens_too():
  options = {"label_smoothing": 0.1, "full_pass": FullPass(0.5, 2.0)}
  # Twice the same sentences have the same means, whatever is left out.
  split = sentences(BATCH // 2)
  twice = Split(
    np.concatenate([split.inputs, split.inputs]),
    np.concatenate([split.targets, split.targets]),
  )
  blank = Split(
    np.concatenate([split.inputs, np.zeros_like(split.inputs)]),
    np.concatenate([split.targets, np.full_like(split.targets, -1)]),
  )
  assert_close_to_the_largest(
    step_of(blank, **options), step_of(twice, **options)
  )


def assert_close_to_the_largest(found, want):
  (grads, metrics), (want_grads, want_metrics) = found, want
  for name, value in want_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
  most = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(want_grads))
  for a, b in zip(
    jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=3e-5 * most)


@pytest.mark.quick(0)
@pytest.mark.parametrize("batch_size", [3, 8])
def test_evaluation_and_judgement_are_means_over_tokens(batch_size):
  params, _ = problem()
  variables, split = {"params": params}, sentences(10, seed=5)
  evaluate = make_evaluate(
    MODEL,
    loss="cross_entropy",
    preprocess=lambda x, key=None: x,
    batch_size=batch_size,
    mesh=make_mesh(MeshShape(data=1)),
  )
  found = evaluate(variables, split)
  logits = np.asarray(MODEL.apply(variables, split.inputs), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  at = np.argwhere(split.targets >= 0)
  values = [-log_p[i, j, split.targets[i, j]] for i, j in at]
  np.testing.assert_allclose(found["loss"], np.mean(values), rtol=1e-5)
  np.testing.assert_allclose(
    found["perplexity"], np.exp(np.mean(values)), rtol=1e-5
  )
  right = [np.argmax(log_p[i, j]) == split.targets[i, j] for i, j in at]
  np.testing.assert_allclose(found["accuracy"], np.mean(right), rtol=1e-6)
  judge = make_judge(
    MODEL,
    loss="cross_entropy",
    preprocess=lambda x, key=None: x,
    split=split,
    examples=10,
    seed=0,
  )
  np.testing.assert_allclose(judge(variables), found["loss"], rtol=1e-5)


def test_smoothing_without_labels_is_refused():
  config = {
    "model": {"name": "mlp"},
    "data": {"name": "linear"},
    "discover": {"epochs": 1, "schedule": {"name": "constant"}},
    "settle": {"epochs": 0, "schedule": {"name": "constant"}},
    "optimizer": {"name": "sgd"},
    "batch_size": 2,
    "loss": "squared_error",
    "label_smoothing": 0.1,
  }
  with pytest.raises(ConfigError, match=r"label_smoothing: 0\.1, but"):
    parse(config)
