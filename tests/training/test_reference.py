"""The loop against a short training of its own kind, written out here.

Nothing of `maestro.training` is used in it: the order of examples, the key and
the rank of each step, the loss, momentum, shrinking and what is counted are put
down again from the documentation. What resume tests cannot see, since they
compare the loop with itself, shows here.
"""

import copy
import dataclasses

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maestro import data as data_lib
from maestro import sampling, streams
from maestro.lowrank import Rule
from maestro.methods import decomposers
from maestro.models.mlp import MLP
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.parallel.rules import Placement
from maestro.report import figures
from maestro.runs import checkpoint, metrics
from maestro.training import build, loop, losses, state, step
from maestro.training.config import parse

RATE, MOMENTUM, LAM, THRESHOLD, BATCH = 0.05, 0.9, 1e-2, 0.5, 128
CONFIG = {
  "model": {"name": "mlp", "features": [16]},
  "data": {"name": "digits"},
  "batch_size": BATCH,
  "seed": 3,
  "optimizer": {"name": "sgd", "momentum": MOMENTUM},
  "threshold": THRESHOLD,
  "discover": {
    "epochs": 2,
    "schedule": {"name": "constant", "learning_rate": RATE},
    "lam": LAM,
    "sampler": {"name": "one_layer"},
    "shrink": True,
  },
  "settle": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": RATE / 2},
  },
  "truncate": {"min_saving": 1.0},
  "checkpoint": {"every_epochs": 1, "keep": 9},
  "mesh": {"data": 1},
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch, jit):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)
  monkeypatch.setattr(jax, "jit", jit)


# ---------------------------------------------------------------------------
# Training, once more
# ---------------------------------------------------------------------------


@dataclasses.dataclass
class Reference:
  """What came of it: after each epoch, and at each step."""

  params: list
  ranks: list
  losses: list
  hits: list
  norms: list
  macs: list


def order_of(seed, epoch, n):
  key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), epoch)
  return np.asarray(jax.random.permutation(key, n))


def forward(params, x, ranks):
  for name in ("fc1", "fc2"):
    layer, r = params[name], ranks[name]
    live = jnp.arange(layer["u"].shape[1]) < r
    hidden = (x @ layer["u"]) * live[None, :]
    x = hidden @ layer["v"] + layer["bias"][None, :]
    x = jnp.maximum(x, 0) if name == "fc1" else x
  return x


def suffix_norms(x, r):
  live = (jnp.arange(x.shape[0]) < r)[:, None]
  square = jnp.cumsum(jnp.sum(jnp.where(live, x, 0.0) ** 2, 1)[::-1])[::-1]
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0)


def cross_entropy(logits, y):
  picked = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
  return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def train_again(full_pass=False):
  """Trains CONFIG's network: three epochs of the paper's method."""
  dataset = data_lib.make("digits")
  inputs, targets = dataset.train.inputs, dataset.train.targets
  x_all = np.asarray(inputs).reshape(len(inputs), -1)
  seed, steps = CONFIG["seed"], len(inputs) // BATCH
  kernels = MLP(num_classes=10, features=(16,)).init(
    streams.stream(seed, "initial"), jnp.zeros((1, 8, 8, 1))
  )["params"]
  params, ranks = {}, {}
  for name, node in kernels.items():
    left, s, right = np.linalg.svd(node["kernel"], full_matrices=False)
    root = np.sqrt(s)
    params[name] = {
      "u": jnp.asarray(left * root),
      "v": jnp.asarray(root[:, None] * right),
      "bias": node["bias"],
    }
    ranks[name] = len(s)
  trace = jax.tree.map(jnp.zeros_like, params)

  def objective(params, ranks, sampled, x, y, lam):
    out = forward(params, x, sampled)
    task = cross_entropy(out, y)
    if full_pass:  # half of it for the teacher's soft targets
      teacher = forward(params, x, ranks)
      soft = jax.nn.softmax(jax.lax.stop_gradient(teacher))
      log = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
      found = jax.nn.log_softmax(out)
      kl = jnp.mean(jnp.sum(soft * (log - found), 1))
      task = 0.5 * task + 0.5 * kl + cross_entropy(teacher, y)
    lasso = 0.0
    for name, node in params.items():
      lasso += jnp.sum(suffix_norms(node["u"].T, ranks[name]))
      lasso += jnp.sum(suffix_norms(node["v"], ranks[name]))
    hits = jnp.mean(jnp.argmax(out, 1) == y)
    return task + lam * lasso, (task, hits)

  grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
  found = Reference([], [], [], [], [], [])
  count, macs = 0, 0
  parent = streams.stream(seed, "steps")
  for epoch in range(3):
    discover, order = epoch < 2, order_of(seed, epoch, len(inputs))
    for i in range(steps):
      key = jax.random.split(jax.random.fold_in(parent, count), 3)[0]
      sampled = dict(ranks)
      if discover:
        tree = {name: {"rank": jnp.int32(r)} for name, r in ranks.items()}
        tree = sampling.one_layer(key, tree)
        sampled = {name: int(node["rank"]) for name, node in tree.items()}
      batch = order[i * BATCH : (i + 1) * BATCH]
      lam = LAM if discover else 0.0
      (_, (task, hits)), grads = grad(
        params, ranks, sampled, x_all[batch], targets[batch], lam
      )
      trace = jax.tree.map(lambda m, g: g + MOMENTUM * m, trace, grads)
      rate = RATE if discover else RATE / 2
      params = jax.tree.map(lambda p, m, r=rate: p - r * m, params, trace)
      stored = sum(n["u"].size + n["v"].size for n in params.values())
      macs += (2 if full_pass else 1) * 3 * BATCH * stored
      count += 1
      found.losses.append(float(task))
      found.hits.append(float(hits))
      leaves = jax.tree.leaves(grads)
      found.norms.append(float(jnp.sqrt(sum(jnp.sum(g * g) for g in leaves))))
    if discover:
      for name, node in params.items():
        score = suffix_norms(node["u"].T, ranks[name])
        score = score * suffix_norms(node["v"], ranks[name])
        ranks[name] = min(ranks[name], int(jnp.sum(score > THRESHOLD)))
        for tree in (params, trace):
          r, own = ranks[name], tree[name]
          tree[name] = own | {
            "u": own["u"].at[:, r:].set(0.0),
            "v": own["v"].at[r:].set(0.0),
          }
    if epoch == 1:  # settling cuts what is dead
      for tree in (params, trace):
        for name, r in ranks.items():
          own = tree[name]
          tree[name] = own | {"u": own["u"][:, :r], "v": own["v"][:r]}
    found.params.append(params)
    found.ranks.append(dict(ranks))
    found.macs.append(macs)
    params, trace = copy.copy(params), copy.copy(trace)
  return found


# ---------------------------------------------------------------------------
# The loop, beside it
# ---------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("full_pass", [False, True])
def test_the_loop_trains_as_its_method_is_written(full_pass, tmp_path):
  wanted = train_again(full_pass)
  config = copy.deepcopy(CONFIG)
  if full_pass:
    config["full_pass"] = {"distill": 0.5, "temperature": 1.0}
  results = loop.train(config, tmp_path)
  steps = len(wanted.losses) // 3
  assert wanted.ranks[0] != wanted.ranks[1] or wanted.ranks[0]["fc1"] < 16
  records = {r["step"]: r for r in metrics.read(tmp_path)}
  for epoch in range(3):
    at = slice(epoch * steps, (epoch + 1) * steps)
    record = records[(epoch + 1) * steps]
    assert record["rank/total"] == sum(wanted.ranks[epoch].values())
    for key, values in (
      ("train/loss", wanted.losses),
      ("train/accuracy", wanted.hits),
      ("train/grad_norm", wanted.norms),
    ):
      assert record[key] == pytest.approx(np.mean(values[at]), rel=2e-4), key
    rate = RATE if epoch < 2 else RATE / 2
    assert record["learning_rate"] == pytest.approx(rate)
    if epoch == 1:
      continue  # the checkpoint is of before the cut
    params, *_ = checkpoint.load_params(
      tmp_path / "checkpoints", (epoch + 1) * steps
    )
    for name, node in jax.device_get(wanted.params[epoch]).items():
      found = params[name]
      assert found["u"].shape == node["u"].shape
      np.testing.assert_allclose(found["bias"], node["bias"], atol=2e-5)
      # Up to the sign of each component, which a decomposition leaves open.
      sign = np.sign(np.sum(found["u"] * node["u"], 0))
      close = {"rtol": 2e-3, "atol": 2e-5}
      np.testing.assert_allclose(found["u"], node["u"] * sign[None, :], **close)
      np.testing.assert_allclose(found["v"], node["v"] * sign[:, None], **close)
  assert results["train"]["macs_total"] == wanted.macs[-1]


@pytest.mark.quick(1)
@pytest.mark.parametrize("every", [1, 3])
def test_each_window_has_the_means_of_its_own_steps(every, tmp_path):
  wanted = train_again()
  loop.train(CONFIG | {"log_every_steps": every}, tmp_path)
  steps = len(wanted.losses) // 3
  ends = {r["step"]: r for r in metrics.read(tmp_path) if r["step"]}
  for epoch in range(3):
    start = epoch * steps
    for end in range(start + every, start + steps, 1):
      if end % every:
        continue
      first = max(start, end - every)
      mean = np.mean(wanted.losses[first:end])
      assert ends[end]["train/loss"] == pytest.approx(mean, rel=2e-4)
    whole = np.mean(wanted.losses[start : start + steps])
    last = ends[start + steps]["train/loss"]
    assert last == pytest.approx(whole, rel=2e-4)


# ---------------------------------------------------------------------------
# Which key draws what
# ---------------------------------------------------------------------------


class Noisy(flax.linen.Module):
  """Its loss is its dropout's mask, weighed by the image's noise."""

  @flax.linen.compact
  def __call__(self, x, train=False):
    scale = self.param("scale", flax.linen.initializers.ones, (1, 1))
    ones = jnp.ones_like(x)
    drop = flax.linen.Dropout(0.5, deterministic=not train)
    return scale * x * drop(ones)


def test_a_step_draws_ranks_images_and_dropout_from_keys_of_their_own():
  n, width = 8, 50
  inputs = np.zeros((n, width), np.float32)
  data = {
    "inputs": jnp.asarray(inputs),
    "targets": jnp.asarray(inputs),
    "order": jnp.arange(n),
  }
  seen = {}

  def preprocess(x, key):
    return x + jax.random.normal(key, x.shape)

  def sampler(key, ranks):
    seen["rank"] = key
    return ranks

  tx = optax.sgd(0.0)
  params = {"scale": jnp.ones((1, 1))}
  start = state.new_state(5, "squared_error", tx, params, {}, {})
  one = step.make_step(
    Noisy(),
    tx,
    loss="squared_error",
    preprocess=preprocess,
    sampler=sampler,
    batch_size=4,
    steps_per_epoch=2,
    lam=0.0,
    penalty=None,
    full_pass=None,
    placement=Placement(make_mesh(MeshShape(data=1)), {}),
  )
  found = []
  now = start
  for i in range(2):
    now, loss = one(now, data)
    found.append(float(loss))
    parent = jax.random.fold_in(streams.stream(5, "steps"), i)
    key_rank, key_image, key_dropout = jax.random.split(parent, 3)
    assert np.array_equal(
      jax.random.key_data(seen["rank"]), jax.random.key_data(key_rank)
    )
    x = preprocess(data["inputs"][:4], key_image)
    out = Noisy().apply(
      {"params": params}, x, train=True, rngs={"dropout": key_dropout}
    )
    example = losses.LOSSES["squared_error"](out, data["targets"][:4])
    assert found[i] == pytest.approx(float(jnp.mean(example)), rel=1e-6)
  assert found[0] != found[1]


def test_random_factors_have_a_stream_of_their_own():
  t = build.make_training(parse(CONFIG | {"method": "fixed"}))
  params, _ = t.initial()
  found, ranks = t.method.decompose(params, {})
  rules = [Rule(p, int(node["rank"])) for p, node in ranks.items()]
  for name, same in (("factors", True), ("initial", False), ("steps", False)):
    key = streams.stream(CONFIG["seed"], name)
    wanted = decomposers.random(params, rules, t.layers, moments=None, key=key)
    assert np.array_equal(found["fc1"]["u"], wanted["fc1"]["u"]) == same, name
