"""Every method in the one loop: reports, ranks, freezing, zeros, resuming."""

import ast
import copy
import functools
import importlib.util
import itertools
import json
import pathlib
import re
import signal

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maestro
from maestro import data as data_lib
from maestro import introspect, lowrank, nn, streams, trees
from maestro.cost import budget
from maestro.cost import count as cost
from maestro.data import image
from maestro.errors import Interrupted, UserError
from maestro.lowrank import Rule
from maestro.methods import bind as binding
from maestro.methods import decomposers, penalties, rank_rules
from maestro.methods.subject import Subject
from maestro.methods.table import METHODS
from maestro.models import MODELS
from maestro.report import figures
from maestro.runs import checkpoint, metrics
from maestro.schema import ConfigError
from maestro.training import build, opened, optim
from maestro.training import loop as train
from maestro.training.config import parse

ROOT = pathlib.Path(__file__).parents[2]
BASE = {
  "model": {"name": "mlp", "features": [16]},
  "data": {"name": "digits"},
  "batch_size": 128,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "threshold": 0.3,
  "discover": {
    "epochs": 2,
    "schedule": {"name": "constant", "learning_rate": 0.05},
    "lam": 2e-2,
    "sampler": {"name": "one_layer"},
    "shrink": True,
  },
  "settle": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "checkpoint": {"keep": 9},
  "mesh": {"data": 1},
}
SHAPES = {"fc1": (64, 16), "fc2": (16, 10)}


def config(method, **changes):
  if method == "nested":  # two levels, as each is compiled
    method = {"name": "nested", "nested": {"levels": [1.0, 0.5]}}
  return copy.deepcopy(BASE) | {"method": method} | changes


@pytest.fixture(autouse=True)
def quickly(monkeypatch, jit):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)
  monkeypatch.setattr(jax, "jit", jit)


@functools.cache
def problem():
  """Returns (dataset, model, layers) of BASE."""
  dataset = data_lib.make("digits")
  facts = build.Facts.of(dataset)
  model = build.make_model(parse(config("dense")), facts)
  return dataset, model, introspect.layers(model, facts.example)


def subject(model, layers, params):
  """A network for a method; there are no examples of its data."""
  return Subject(
    model=model,
    layers=layers,
    dense=cost.count_cost(layers, params),
    shapes=params,
    initial=lambda: params,
    batches=lambda n: (),
    key=jax.random.key(2),
    calibration=jax.random.key(3),
    classifies=True,
  )


def bound(c, params):
  """Binds the method of a parsed config to BASE's network."""
  _, model, layers = problem()
  return binding.bind(
    c.method,
    build.settings(c),
    subject(model, layers, params),
  )


def make_optimizer(c, schedule, discover_steps):
  """The optimizer of a parsed config, for any parameters."""
  _, lams = binding.weights(c.method, build.settings(c))
  tx = optim.make(c.optimizer, schedule, {})
  return binding.wrap_optimizer(
    c.method, {"kind": c.lasso}, lams, None, 0.9, tx, schedule, discover_steps
  )


def saved(workdir, step=None):
  """(params, ranks) of a checkpoint, the newest by default."""
  params, _, ranks, _ = checkpoint.load_params(workdir / "checkpoints", step)
  return params, ranks


def final(workdir):
  """The deployed tree."""
  params, ranks = saved(workdir)
  return lowrank.extract(params, ranks, problem()[2])


def logits(params, ranks=None):
  dataset, model, _ = problem()
  variables = {"params": params} | ({"ranks": ranks} if ranks else {})
  return model.apply(variables, dataset.preprocess(dataset.val.inputs))


def sizes(params):
  return {k: n["u"].shape[-1] for k, n in trees.factored(params).items()}


# ---------------------------------------------------------------------------
# All methods
# ---------------------------------------------------------------------------


def macs_of_leaves(params):
  """MACs of a tree of dense layers: its matrices, each used once."""
  return sum(
    x.size
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if "bias" not in jax.tree_util.keystr(path)
  )


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_reports_what_its_tree_holds(name, tmp_path):
  results = train.train(config(name), tmp_path)
  params = final(tmp_path)
  leaves = jax.tree.leaves(params)
  assert results["final"]["params"] == sum(x.size for x in leaves)
  assert results["final"]["bytes"] == sum(x.nbytes for x in leaves)
  assert results["final"]["macs"] == macs_of_leaves(params)
  assert results["final"]["metrics"]["loss"] < np.log(10)
  assert train.evaluate_workdir(tmp_path)["test"] == results["final"]["metrics"]
  records = metrics.read(tmp_path)
  evaluated = [r for r in records if "val/loss" in r]
  assert [r["step"] for r in evaluated] == [8, 16, 24]
  assert all(np.isfinite(r["val/loss"]) for r in evaluated)
  assert results["train"]["compilations"] == len(results["train"]["programs"])
  rows = {row["path"]: row["rank"] for row in results["layers"]}
  assert (rows == {"fc1": None, "fc2": None}) == (name == "dense")
  # Ranks are in the state from decomposition on, and not before.
  when = METHODS[name].decompose
  ranked = [bool(saved(tmp_path, step)[1]) for step in (8, 16, 24)]
  assert (
    ranked
    == {
      "start": [True, True, True],
      "settle": [False, False, True],
      "end": [False, False, True],
      None: [False, False, False],
    }[when]
  )


BUDGETED = sorted(METHODS.keys() - {"dense", "dylora", "nested"})


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_is_met_and_not_by_much_less(name, tmp_path):
  method = {"name": name, "budget": "macs:0.5"}
  discover = BASE["discover"] | {"lam": 1e-4}  # leaves enough to cut
  results = train.train(config(method, discover=discover), tmp_path)
  fraction = results["final"]["macs"] / results["dense"]["macs"]
  assert 0.45 < fraction <= 0.5
  assert results["final"]["macs"] == macs_of_leaves(final(tmp_path))


def test_a_budget_without_settle_cuts_after_the_last_step(tmp_path):
  c = config({"name": "maestro", "budget": "params:0.4"})
  c["discover"] |= {"lam": 1e-4}
  c["settle"] |= {"epochs": 0}
  results = train.train(c, tmp_path)
  assert results["final"]["params"] <= 0.4 * results["dense"]["params"]
  assert results["final"]["params"] > 0.3 * results["dense"]["params"]
  record = metrics.read(tmp_path)[-1]
  assert record["cost/params"] == results["final"]["params"]
  found = results["final"]["val_metrics"]["loss"]
  assert record["val/loss"] == pytest.approx(found, abs=1e-5)


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  "name", ["nested", "pufferfish", "race", "trp", "prox"]
)
def test_eight_devices_do_as_one(name, tmp_path):
  found = []
  for devices in (1, 8):
    workdir = tmp_path / str(devices)
    method = {"name": name, "budget": "macs:0.5"}
    method = name if name == "nested" else method
    found.append(
      train.train(config(method, mesh={"data": devices}), workdir)["final"]
    )
  assert found[0]["macs"] == pytest.approx(found[1]["macs"], rel=0.1)
  ours, theirs = (f["metrics"]["loss"] for f in found)
  assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("name", ["loop", "rounds", "step", "state"])
def test_what_runs_a_method_knows_none(name):
  text = (ROOT / "maestro" / "training" / f"{name}.py").read_text()
  for node in ast.walk(ast.parse(text)):
    module = getattr(node, "module", None) or ""
    assert not (isinstance(node, ast.ImportFrom) and "methods" in module)
    if isinstance(node, ast.Attribute | ast.Name):
      names = {getattr(node, "attr", ""), getattr(node, "id", "")}
      assert not names & {"METHODS", "Method"}


# ---------------------------------------------------------------------------
# When and how kernels become factors
# ---------------------------------------------------------------------------


@pytest.fixture
def dense(tmp_path_factory):
  """The workdir of a dense run, made once, and compiled as the others are."""
  workdir = tmp_path_factory.getbasetemp() / "methods_dense"
  train.train(config("dense"), workdir)
  return workdir


@pytest.mark.quick(0)
def test_svd_is_the_truncation_of_the_trained_kernels(tmp_path, dense):
  train.train(config("svd"), tmp_path)
  params, _ = saved(tmp_path)
  kernels, _ = saved(dense)
  for path, shape in SHAPES.items():
    rank = -(-min(shape) // 4)
    assert params[path]["u"].shape == (shape[0], rank)
    u, s, vt = np.linalg.svd(kernels[path]["kernel"], full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    found = params[path]["u"] @ params[path]["v"]
    np.testing.assert_allclose(found, best, atol=1e-5)
    assert np.array_equal(params[path]["bias"], kernels[path]["bias"])


def test_data_svd_projects_on_what_training_examples_make(tmp_path, dense):
  method = {"name": "data_svd", "decomposer": {"name": "data", "examples": 99}}
  train.train(config(method), tmp_path)
  params, kernels = saved(tmp_path)[0], saved(dense)[0]
  dataset, _, _ = problem()
  order = data_lib.choice(0, len(dataset.train))[:99]
  x = np.asarray(dataset.preprocess(dataset.train.inputs[order]))
  x = x.reshape(99, -1)
  for path, shape in SHAPES.items():
    kernel, rank = kernels[path]["kernel"], -(-min(shape) // 4)
    q = np.linalg.svd(x @ kernel, full_matrices=False)[2][:rank]
    found = params[path]["u"] @ params[path]["v"]
    np.testing.assert_allclose(found, kernel @ q.T @ q, atol=2e-4)
    x = np.maximum(x @ kernel + kernels[path]["bias"], 0)


def test_pufferfish_trains_densely_then_with_a_fresh_optimizer(tmp_path, dense):
  train.train(config("pufferfish"), tmp_path)
  ours, theirs = saved(tmp_path, 16)[0], saved(dense, 16)[0]
  for path in SHAPES:
    assert np.array_equal(ours[path]["kernel"], theirs[path]["kernel"])
  assert sizes(saved(tmp_path)[0]) == {"fc1": 4, "fc2": 3}


def test_a_fresh_optimizer_goes_on_with_its_schedules():
  schedule = optax.linear_schedule(1.0, 0.0, 10)
  c = parse(config("prox"))
  tx = make_optimizer(c, schedule, 4)
  params = {"fc": {"u": jnp.ones((3, 2)), "v": jnp.ones((2, 3))}}
  state = optim.restart(tx, params, jnp.int32(7))
  counts = [
    int(x)
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if "count" in jax.tree_util.keystr(path)
  ]
  assert counts == [7, 7]


@pytest.mark.quick(0)
def test_random_factors_have_the_kernels_size_and_nothing_of_its_values(cases):
  for name in ("dense", "conv_same", "scan", "conv_grouped", "network"):
    case = cases[name]
    found = decomposers.random(
      case.dense, [Rule()], case.layers, moments=None, key=jax.random.key(0)
    )
    shapes = jax.tree.map(jnp.shape, case.factored)
    assert jax.tree.map(jnp.shape, found) == shapes, name
  layer = {"a": introspect.layers(nn.Dense(200), jnp.zeros((1, 300)))[""]}
  params = {"a": {"kernel": 0.3 * jnp.ones((300, 200)), "bias": jnp.ones(200)}}
  one, other = (
    decomposers.random(
      params, [Rule(rank=50)], layer, moments=None, key=jax.random.key(k)
    )["a"]
    for k in (0, 1)
  )
  assert not np.array_equal(one["u"], other["u"])
  assert np.array_equal(one["bias"], params["a"]["bias"])
  product = one["u"] @ one["v"]
  assert float(jnp.mean(product**2)) == pytest.approx(0.09, rel=0.1)
  norms = [float(jnp.mean(one[k] ** 2)) for k in ("u", "v")]
  assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_stable_ranks_start_at_the_full_rank_and_scale():
  spectra = {"a": np.array([4.0, 2.0, 2.0, 0.0]), "b": np.ones((2, 3))}
  limits = {"a": 4, "b": 2}
  same = rank_rules.stable_rank(lambda: spectra, limits, lambda: spectra)
  assert same == {"a": 4.0, "b": 2.0}
  now = {"a": np.array([4.0, 0.0, 0.0, 0.0]), "b": np.ones((2, 3))}
  # stable ranks: 1 now, 1.5 at the start
  found = rank_rules.stable_rank(lambda: now, limits, lambda: spectra)
  assert found["a"] == pytest.approx(4 / 1.5)


def test_energy_keeps_the_fewest_components():
  spectra = {"a": np.array([3.0, 2.0, 1.0]), "z": np.zeros(3)}
  limits = {"a": 3, "z": 3}
  for lost, rank in ((0.0, 3), (1 / 14 + 1e-6, 2), (0.07, 3), (0.4, 1)):
    found = rank_rules.energy(lambda: spectra, limits, None, lost=lost)
    assert found == {"a": rank, "z": 1}, lost


def test_cuttlefish_ends_discover_when_stable_ranks_settle(tmp_path):
  switch = {"name": "stable_ranks", "tolerance": 1e3}
  method = {"name": "cuttlefish", "switch": switch}
  discover = BASE["discover"] | {"epochs": 4}
  c = config(method, discover=discover)
  results = train.train(c, tmp_path)
  records = {r["epoch"]: r for r in metrics.read(tmp_path)}
  # Two epochs make the first difference; the run is as long as it was.
  assert [records[e]["phase"] for e in range(1, 6)] == [0, 0, 1, 1, 1]
  assert results["steps"] == 5 * 8
  assert not saved(tmp_path, 16)[1] and saved(tmp_path, 24)[1]


def test_the_epoch_that_ends_discover_records_the_rate_that_it_had(tmp_path):
  switch = {"name": "stable_ranks", "tolerance": 1e3}
  cosine = {"name": "cosine", "learning_rate": 0.05}
  discover = BASE["discover"] | {"epochs": 4, "schedule": cosine}
  c = config({"name": "cuttlefish", "switch": switch}, discover=discover)
  train.train(c, tmp_path)
  rates = {r["epoch"]: r.get("learning_rate") for r in metrics.read(tmp_path)}
  # Steps 0 .. 15 of a cosine over 4 epochs of 8 steps, whatever came then.
  wanted = 0.025 * (1 + np.cos(np.pi * 15 / 32))
  assert rates[2] == pytest.approx(wanted, rel=1e-5)


def test_the_end_of_a_shortened_discover_is_kept(tmp_path, monkeypatch):
  switch = {"name": "stable_ranks", "tolerance": 1e3}
  discover = BASE["discover"] | {"epochs": 4}
  c = config({"name": "cuttlefish", "switch": switch}, discover=discover)
  c["checkpoint"] = {"keep": 1}
  train.train(c, tmp_path)
  assert checkpoint.list_steps(tmp_path / "checkpoints") == [16, 40]
  assert opened.open_run(tmp_path, "discover").step == 16


@pytest.mark.quick(0)
def test_stable_ranks_are_measured_from_a_random_start(tmp_path, dense):
  c = config("cuttlefish", init_from=str(dense))
  seen = []
  keep = binding.bind

  def record(m, settings, subject):
    seen.append(subject.initial())
    return keep(m, settings, subject)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(binding, "bind", record)
    train.train(c, tmp_path)
  model = problem()[1]
  key = streams.stream(0, "initial")
  wanted = model.init(key, jnp.zeros((1, 64)))["params"]
  for path in SHAPES:
    np.testing.assert_allclose(
      seen[0][path]["kernel"], wanted[path]["kernel"], rtol=1e-6
    )


def test_trp_keeps_kernels_at_their_rank_while_training(tmp_path):
  project = {"every_steps": 8}
  ranks = {"name": "constant", "rank": 3}
  method = {"name": "trp", "project": project, "ranks": ranks, "lam": 0.0}
  train.train(config(method), tmp_path)
  kernel = saved(tmp_path, 8)[0]["fc1"]["kernel"]
  assert np.linalg.matrix_rank(kernel, tol=1e-4) == 3


def test_projections_fall_on_their_steps_in_any_dispatch(tmp_path):
  kernels = []
  for steps in (1, 4):
    workdir = tmp_path / str(steps)
    project = {"every_steps": 3}  # 3, 6, ... of 8 steps an epoch
    ranks = {"name": "constant", "rank": 3}
    method = {"name": "trp", "project": project, "ranks": ranks}
    train.train(config(method, steps_per_dispatch=steps), workdir)
    kernels.append(saved(workdir, 16)[0]["fc1"]["kernel"])
  np.testing.assert_allclose(*kernels, atol=1e-5)


@pytest.mark.quick(0)
def test_momentum_does_not_change_what_the_nuclear_norm_weighs(
  tmp_path, monkeypatch
):
  steps = {0.0: [], 0.5: []}
  for momentum, found in steps.items():

    def project(params, layers, paths, choose, t, found=found):
      del layers, paths, choose
      found.append(t)
      return params

    monkeypatch.setattr(binding, "project", project)
    c = config("trp", optimizer={"name": "sgd", "momentum": momentum})
    train.train(c, tmp_path / str(momentum))
  assert steps[0.0] and steps[0.0][0] == pytest.approx(20 * 0.05 * 3e-4)
  np.testing.assert_allclose(steps[0.5], 2 * np.array(steps[0.0]))


def test_a_projection_lowers_singular_values(dense):
  params = jax.tree.map(jnp.asarray, saved(dense)[0])
  ranks = {"name": "constant", "rank": 5}
  c = parse(config({"name": "trp", "ranks": ranks}))
  cut = bound(c, params).project(params, 0.5)
  for path in SHAPES:
    before = np.linalg.svd(params[path]["kernel"], compute_uv=False)
    after = np.linalg.svd(cut[path]["kernel"], compute_uv=False)
    wanted = np.maximum(before - 0.5, 0) * (np.arange(len(before)) < 5)
    np.testing.assert_allclose(after, wanted, atol=1e-5)


# ---------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------


@pytest.mark.quick(0)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adapters_leave_their_base_bit_for_bit(decay, tmp_path, dense):
  optimizer = BASE["optimizer"] | {"weight_decay": decay, "clip_norm": 1.0}
  c = config("dylora", init_from=str(dense), optimizer=optimizer)
  c["discover"] |= {"epochs": 0}
  train.train(c, tmp_path)
  base, (params, ranks) = saved(dense)[0], saved(tmp_path)
  for path in SHAPES:
    for name in ("kernel", "bias"):
      assert params[path][name].tobytes() == base[path][name].tobytes()
    assert np.any(params[path]["v"])
  # Any rank is usable: the function of the truncated tree, and no worse a
  # network than the base was.
  labels = problem()[0].val.targets

  def loss(params, ranks=None):
    return float(
      jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(
          logits(params, ranks), labels
        )
      )
    )

  start = loss(base)
  for r in range(5):
    at = {p: {"rank": jnp.int32(min(r, n))} for p, n in sizes(params).items()}
    small = lowrank.truncate(params, at)
    np.testing.assert_allclose(
      logits(lowrank.merge(small)), logits(params, at), atol=1e-4
    )
    assert loss(small) < start + 0.05 if r else loss(small) == start
  assert loss(params, jax.tree.map(jnp.asarray, ranks)) < start


def test_factors_alone_are_trained_once_there_are_any():
  c = parse(config("dylora"))
  tx = make_optimizer(c, optax.constant_schedule(1.0), 0)
  node = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
  factors = {"u": jnp.ones((3, 2)), "v": jnp.ones((2, 4))}
  for params, moved in (
    ({"a": node, "b": node | factors}, {"u", "v"}),
    ({"a": node, "b": node}, {"kernel", "bias"}),
  ):
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    for path, x in jax.tree_util.tree_leaves_with_path(updates):
      assert bool(np.any(x)) == (path[-1].key in moved), path


def test_what_adapters_remember_is_cut_with_them():
  c = parse(config("dylora"))
  tx = make_optimizer(c, optax.constant_schedule(1.0), 0)
  params = {
    "a": {
      "kernel": jnp.ones((3, 4)),
      "u": jnp.ones((3, 2)),
      "v": jnp.ones((2, 4)),
    }
  }
  _, state = tx.update(params, tx.init(params), params)
  ranks = {"a": {"rank": np.int32(1)}}
  cut = optim.truncate(tx, state, params, ranks)
  small = lowrank.truncate(params, ranks)
  updates, _ = tx.update(small, cut, small)
  assert updates["a"]["u"].shape == (3, 1)


# ---------------------------------------------------------------------------
# With convolutions and batch norm
# ---------------------------------------------------------------------------


def bars(data_dir=None, val_examples=64):
  """Images [16, 16, 3] of four classes: where a bright bar is."""
  del data_dir
  rng = np.random.default_rng(0)
  targets = rng.integers(0, 4, 512).astype(np.int32)
  x = rng.integers(0, 60, (512, 16, 16, 3), dtype=np.uint8)
  for i, c in enumerate(targets):
    x[i, 4 * c : 4 * c + 4] += 150
  cuts = [0, 512 - 2 * val_examples, 512 - val_examples, 512]
  splits = [
    data_lib.Split(x[a:b], targets[a:b]) for a, b in itertools.pairwise(cuts)
  ]
  preprocess = functools.partial(image.standardize, mean=0.3, std=0.3)
  return data_lib.Dataset("bars", *splits, num_classes=4, preprocess=preprocess)


# Truncating to a quarter without training after it may well lose everything.
HALF = {"name": "data_svd", "ranks": {"name": "fraction", "fraction": 0.5}}


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  "method", ["cuttlefish", HALF, "dylora", "nested", "race"], ids=str
)
def test_methods_hold_for_convolutions_with_batch_norm(
  method, tmp_path, monkeypatch
):
  monkeypatch.setitem(data_lib.DATASETS, "bars", bars)
  c = config(
    method,
    data={"name": "bars"},
    model={"name": "resnet18", "width": 4, "stage_sizes": [1, 1]},
    batch_size=64,
    batch_norm_examples=128,
  )
  results = train.train(c, tmp_path)
  assert results["final"]["metrics"]["loss"] < np.log(4)
  run = opened.open_run(tmp_path)
  small = lowrank.extract(run.params, run.ranks, run.layers)
  leaves = jax.tree.leaves(small)
  assert results["final"]["params"] == sum(x.size for x in leaves)
  found = train.evaluate_workdir(tmp_path)["test"]
  assert found["loss"] == pytest.approx(
    results["final"]["metrics"]["loss"], rel=1e-5
  )
  factored = set(trees.factored(run.params))
  assert factored == set(run.layers)
  if method == "dylora":  # kernels, scales and biases are those of the base
    base = saved(tmp_path, results["steps"] * 2 // 3)[0]
    keep = jax.tree_util.tree_leaves_with_path(base)
    for path, x in keep:
      node = trees.get(run.params, "/".join(k.key for k in path))
      assert node.tobytes() == x.tobytes(), path


# ---------------------------------------------------------------------------
# The proximal lasso
# ---------------------------------------------------------------------------


def test_the_penalty_of_a_proximal_step_is_logged(tmp_path):
  c = config("prox")
  train.train(c, tmp_path)
  params, ranks = saved(tmp_path, 8)
  lasso = maestro.group_lasso(lowrank.mask(params, ranks), ranks)
  found = metrics.read(tmp_path)[1]["train/penalty"]
  # Measured before the zeros of this epoch are cut off, which adds nothing.
  assert found == pytest.approx(2e-2 * float(lasso), rel=1e-3)


def test_prox_counts_exact_zeros(tmp_path):
  # A threshold that would end every layer is of no consequence.
  c = config("prox", threshold=1e9)
  c["discover"] |= {"lam": 0.05, "epochs": 3}
  c["truncate"] = {"max_compilations": 5, "multiple_of": 16}
  results = train.train(c, tmp_path)
  ranks = {row["path"]: row["rank"] for row in results["layers"]}
  assert all(0 < ranks[p] < min(SHAPES[p]) for p in SHAPES), ranks
  params, _ = saved(tmp_path, 24)  # not cut yet
  for path, rank in ranks.items():
    u, v = params[path]["u"], params[path]["v"]
    assert not u[:, rank:].any() and not v[rank:].any()
  small = final(tmp_path)
  for path, node in trees.factored(small).items():
    assert node["u"].shape[-1] == ranks[path]


def test_momentum_does_not_change_what_lambda_means():
  schedule = optax.constant_schedule(0.1)
  node = {"u": jnp.array([[3.0, 1.0]]), "v": jnp.array([[3.0], [1.0]])}
  moved = []
  for momentum in (0.0, 0.5):
    c = parse(config("prox", optimizer={"name": "sgd", "momentum": momentum}))
    tx = make_optimizer(c, schedule, 4)
    zero = jax.tree.map(jnp.zeros_like, {"fc": node})
    updates, _ = tx.update(zero, tx.init({"fc": node}), {"fc": node})
    moved.append(updates["fc"]["u"])
  np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-3)


def test_lambda_follows_the_phase():
  c = config("prox")
  c["settle"] |= {"lam": 0.0}
  tx = make_optimizer(parse(c), optax.constant_schedule(0.1), 1)
  params = {"fc": {"u": jnp.ones((3, 2)), "v": jnp.ones((2, 3))}}
  zero = jax.tree.map(jnp.zeros_like, params)
  first, state = tx.update(zero, tx.init(params), params)
  second, _ = tx.update(zero, state, params)
  assert np.all(first["fc"]["u"] < 0) and not np.any(second["fc"]["u"])


# ---------------------------------------------------------------------------
# The other pieces
# ---------------------------------------------------------------------------


def test_frobenius_is_the_norm_of_the_products(cases):
  for name in ("dense", "conv_same", "scan", "conv_grouped", "network"):
    case = cases[name]
    merged = lowrank.merge(case.factored, case.layers)
    wanted = sum(
      0.5 * float(jnp.sum(trees.get(merged, p)[case.layers[p].weight] ** 2))
      for p in trees.factored(case.factored)
    )
    found = penalties.frobenius(case.factored, case.full)
    assert float(found) == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", budget.BUDGETS)
@pytest.mark.parametrize("fraction", [0.45, 0.6, 0.8, 1.0])
def test_a_fit_is_the_largest_that_the_budget_allows(kind, fraction, cases):
  case = cases["network"]
  size = cost.count_cost(case.layers, case.dense)
  flat = trees.flatten_ranks(jax.device_get(case.full))
  text = f"{kind}:{fraction}"
  fitted = budget.fit_budget(flat, flat, case.layers, text, size)

  def spent(ranks):
    small = lowrank.extract(
      case.factored, trees.unflatten_ranks(ranks), case.layers
    )
    return getattr(cost.count_cost(case.layers, small), kind)

  most = fraction * getattr(size, kind)
  assert spent(fitted) <= most
  for path, rank in fitted.items():  # no layer can have one more
    if np.any(rank < flat[path]):
      assert spent(fitted | {path: rank + 1}) > most
  if fraction == 1.0:
    assert all(np.array_equal(fitted[p], flat[p]) for p in flat)


class Words(flax.linen.Module):
  """An embedding, whose look-ups cost less merged, and a layer on top."""

  @flax.linen.compact
  def __call__(self, tokens):
    return nn.Dense(8, name="fc")(nn.Embed(50, 8, name="words")(tokens))


@pytest.mark.parametrize("kind", budget.BUDGETS)
def test_no_ranks_that_fit_have_more_of_every_layer(kind):
  tokens = jax.ShapeDtypeStruct((1, 10), "int32")
  layers = introspect.layers(Words(), tokens)
  dense = jax.eval_shape(Words().init, jax.random.key(0), tokens)["params"]
  factored = jax.eval_shape(
    lambda p: lowrank.decompose(p, [Rule()], layers), dense
  )
  size, limits = cost.count_cost(layers, dense), {"fc": 8, "words": 8}
  costs = {}
  for pair in itertools.product(range(1, 9), repeat=2):
    ranks = trees.unflatten_ranks(dict(zip(limits, pair, strict=True)))
    small = jax.eval_shape(
      lambda p, ranks=ranks: lowrank.extract(p, ranks, layers), factored
    )
    costs[pair] = getattr(cost.count_cost(layers, small), kind)
  for percent in (48, 55, 60, 70, 80, 90, 95, 100):
    text = f"{kind}:{percent / 100}"
    most = budget.Budget.parse(text).limit(getattr(size, kind))
    found = budget.fit_budget(limits, limits, layers, text, size)
    found = tuple(int(found[path]) for path in limits)
    assert costs[found] <= most
    better = [
      pair
      for pair, spent in costs.items()
      if spent <= most and pair != found and min(np.subtract(pair, found)) >= 0
    ]
    assert not better, (percent, found, better)


@pytest.mark.parametrize("fraction", [0.4, 0.6])
def test_a_budget_scales_ranks_before_they_are_rounded(fraction):
  """A quarter and a half of every rank are the same proportions."""
  dataset, model, _ = problem()
  params = jax.eval_shape(
    model.init, jax.random.key(0), build.Facts.of(dataset).example
  )["params"]
  found = []
  for share in (0.25, 0.5):
    ranks = {"name": "fraction", "fraction": share}
    method = {"name": "svd", "ranks": ranks, "budget": f"macs:{fraction}"}
    c = parse(config(method))
    found.append(bound(c, params).choose_ranks(params))
  assert found[0] == found[1]
  free = parse(config({"name": "svd"}))
  assert bound(free, params).choose_ranks(params) == {"fc1": 4, "fc2": 3}


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  "method",
  [
    {"name": "pufferfish", "sampler": {"name": "one_layer"}},
    {"name": "maestro"},
    {"name": "maestro", "sampler": None, "shrink": None},
  ],
  ids=["sampled_in_settle", "sampled_from_the_start", "neither"],
)
def test_a_budget_holds_whatever_is_sampled(method, tmp_path):
  c = config(method | {"budget": "macs:0.5"})
  c["discover"] |= {"lam": 1e-4}
  results = train.train(c, tmp_path)
  assert 0.45 < results["final"]["macs"] / results["dense"]["macs"] <= 0.5


def test_an_impossible_budget_is_named():
  _, _, layers = problem()
  params = {
    path: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
    for path, shape in SHAPES.items()
  }
  size = cost.count_cost(layers, params)
  with pytest.raises(ConfigError, match=r"config.method.budget: 'macs:0.01'"):
    budget.fit_budget(
      {"fc1": 16, "fc2": 10}, {"fc1": 16, "fc2": 10}, layers, "macs:0.01", size
    )


BAD = {
  "method": ("pufferfsh", r"config.method.*mean 'pufferfish'"),
  "method_in_a_section": ({"name": "prx"}, r"config.method.*mean 'prox'"),
  "no_name": ({"ranks": {"name": "full"}}, r"config.method.name: missing"),
  "piece": ({"name": "svd", "rank": 3}, r"config.method.rank: .*mean 'ranks'"),
  "decompose": ({"name": "svd", "decompose": "stat"}, "decompose.*'start'"),
  "decomposer": (
    {"name": "svd", "decomposer": {"name": "sdv"}},
    r"config.method.decomposer.name.*mean 'svd'",
  ),
  "decomposer_option": (
    {"name": "svd", "decomposer": {"name": "data", "exmples": 3}},
    r"config.method.decomposer.exmples.*mean 'examples'",
  ),
  "rank_rule": (
    {"name": "svd", "ranks": {"name": "fractio", "fraction": 0.5}},
    r"config.method.ranks.name.*mean 'fraction'",
  ),
  "rank_value": (
    {"name": "svd", "ranks": {"name": "fraction", "fraction": 1.5}},
    r"config.method.ranks.fraction: 1.5",
  ),
  "penalty": (
    {"name": "maestro", "penalty": "group_laso"},
    r"config.method.penalty.*mean 'group_lasso'",
  ),
  "proximal": (
    {"name": "prox", "penalty": "frobenius"},
    r"config.method.proximal.*group_lasso",
  ),
  "shrink": (
    {"name": "maestro", "shrink": "zeroes"},
    r"config.method.shrink.*mean 'zeros'",
  ),
  "sampler": (
    {"name": "dylora", "sampler": {"name": "independant"}},
    r"config.method.sampler.name.*mean 'independent'",
  ),
  "trainable": (
    {"name": "dylora", "trainable": "factor"},
    r"config.method.trainable.*mean 'factors'",
  ),
  "budget": ({"name": "svd", "budget": "mac:0.5"}, "config.method.budget"),
  "budget_value": (
    {"name": "svd", "budget": "macs:50"},
    r"config.method.budget: .*must be in .0, 1.,",
  ),
  "budget_of_dense": (
    {"name": "dense", "budget": "macs:0.5"},
    "config.method.budget: .*dense kernels.*remove it",
  ),
  "budget_of_adapters": (
    {"name": "dylora", "budget": "macs:0.5"},
    "config.method.budget: .*dense kernels.*remove it",
  ),
  "no_examples": (
    {"name": "data_svd", "decomposer": {"name": "data", "examples": 0}},
    "config.method.decomposer.examples: 0 is out of range",
  ),
  "tolerance": (
    {"name": "cuttlefish", "switch": {"name": "stable_ranks", "tolerance": -1}},
    "config.method.switch.tolerance: -1 is out of range",
  ),
  "sampler_of_nothing": (
    {"name": "svd", "sampler": {"name": "one_layer"}},
    r"config.method.sampler: would do nothing.*now 'end'",
  ),
  "penalty_of_nothing": (
    {"name": "dense", "penalty": "frobenius"},
    r"config.method.penalty: would do nothing.*now None",
  ),
  "project_of_factors": (
    {"name": "fixed", "project": {"every_steps": 3}},
    r"config.method.project: would do nothing.*now 'start'",
  ),
  "switch_of_factors": (
    {"name": "maestro", "switch": {"name": "stable_ranks"}},
    r"config.method.switch: would do nothing",
  ),
  "phase_option": (
    {"name": "maestro", "sampler": {"name": "phase", "over": "pairs"}},
    r"config.method.sampler.over: 'phase' has no options",
  ),
  "lam": ({"name": "trp", "lam": -1.0}, "config.method.lam: -1"),
  "project": (
    {"name": "trp", "project": {"evry_steps": 3}},
    r"config.method.project.evry_steps.*mean 'every_steps'",
  ),
  "switch": (
    {"name": "cuttlefish", "switch": {"name": "stable_rank"}},
    r"config.method.switch.name.*mean 'stable_ranks'",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unknown_piece_is_named_before_anything_is_written(name, tmp_path):
  method, message = BAD[name]
  with pytest.raises(UserError, match=message):
    train.train(config(method), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_an_impossible_budget_is_named_before_anything_is_written(tmp_path):
  c = config({"name": "svd", "budget": "macs:0.01"})
  with pytest.raises(ConfigError, match=r"config.method.budget: 'macs:0.01'"):
    train.train(c, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.wrong_types
@pytest.mark.parametrize("momentum", [1.0, 1.5, -0.1, "0.9"])
def test_momentum_is_below_one(momentum, tmp_path):
  c = config("prox", optimizer={"name": "sgd", "momentum": momentum})
  with pytest.raises(ConfigError, match=r"config.optimizer.momentum"):
    train.train(c, tmp_path / "run")


def test_decomposing_at_settle_needs_settle(tmp_path):
  c = config("pufferfish")
  c["settle"] |= {"epochs": 0}
  with pytest.raises(ConfigError, match=r"config.settle.epochs: 0"):
    train.train(c, tmp_path / "run")


# ---------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------


class Killed(BaseException):
  """Ends a run as a kill would."""


def leaves_of(workdir):
  with checkpoint.Checkpoints(workdir / "checkpoints", keep=9) as kept:
    state, _ = kept.load(kept.latest, kept.shapes(kept.latest)[0])
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in leaves}


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  "name",
  [
    *("cuttlefish", "data_svd", "dylora", "nested", "prox", "pufferfish"),
    *("race", "trp"),
  ],
)
def test_a_killed_run_of_a_method_resumes_bit_identically(
  name, tmp_path, monkeypatch
):
  method = {"name": name}
  if name == "cuttlefish":
    method["switch"] = {"name": "stable_ranks", "tolerance": 1e3}
  if name == "trp":  # out of step with epochs
    method["project"] = {"every_steps": 5}
  if name == "prox":
    method["budget"] = "macs:0.5"
  c = config(method)
  # One more than cuttlefish needs to switch; two with factors.
  c["discover"] |= {"epochs": 3}
  c["settle"] |= {"epochs": 2}
  train.train(c, tmp_path / "whole")
  save = checkpoint.Checkpoints.save
  # After each save in turn: before and after kernels become factors.
  for _ in range(5):
    with monkeypatch.context() as patch:

      def once(*args):
        save(*args)
        raise Killed

      patch.setattr(checkpoint.Checkpoints, "save", once)
      with pytest.raises(Killed):
        train.train(c, tmp_path / "killed")
  results = train.train(c, tmp_path / "killed")
  whole = json.loads((tmp_path / "whole" / "results.json").read_text())
  assert leaves_of(tmp_path / "killed") == leaves_of(tmp_path / "whole")
  for key in ("final", "layers", "alarms", "steps"):
    assert results[key] == whole[key]
  for key in ("programs", "macs_total"):
    assert results["train"][key] == whole["train"][key]
  for part in ("whole", "killed"):
    assert len(metrics.read(tmp_path / part)) == 6


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  ("name", "stop"), [("trp", 13), ("dylora", 19), ("nested", 20)]
)
def test_a_run_stopped_within_an_epoch_resumes_bit_identically(
  name, stop, tmp_path, monkeypatch
):
  method = {"name": name}
  if name == "trp":  # the stop lies between two projections of an epoch
    method["project"] = {"every_steps": 5}
  c = config(method)
  whole = train.train(c, tmp_path / "whole")
  make, count = build.make_dispatch, 0

  def hooked(step, steps):
    dispatch = make(step, steps)

    def call(state, data):
      nonlocal count
      count += 1
      if count == stop:
        signal.raise_signal(signal.SIGTERM)
      return dispatch(state, data)

    return call

  with monkeypatch.context() as patch:
    patch.setattr(build, "make_dispatch", hooked)
    with pytest.raises(Interrupted, match=f"step {stop} of 24"):
      train.train(c, tmp_path / "stopped")
  results = train.train(c, tmp_path / "stopped")
  assert leaves_of(tmp_path / "stopped") == leaves_of(tmp_path / "whole")
  for key in ("final", "layers", "alarms", "steps"):
    assert results[key] == whole[key]


# ---------------------------------------------------------------------------
# Exact costs
# ---------------------------------------------------------------------------


def test_pufferfish_resnet18_has_its_published_size():
  path = ROOT / "configs" / "resnet_od.py"
  spec = importlib.util.spec_from_file_location("resnet_od", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = parse(module.get_config("pufferfish").to_dict())
  options = dict(c.model)
  model = MODELS[options.pop("name")](num_classes=10, **options)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
  layers = introspect.layers(model, x)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  method = binding.bind(
    c.method,
    build.settings(c),
    subject(model, layers, shapes),
  )
  found = {}

  def decompose(params):
    factored, ranks = method.decompose(params, {})
    found.update(trees.flatten_ranks(ranks))
    return factored

  params = jax.eval_shape(decompose, shapes)
  ours = cost.count_cost(layers, params)
  assert len(found) == 14 and len(layers) == 21
  assert ours.params == 3_336_266
  assert ours.params == sum(x.size for x in jax.tree.leaves(params))
  assert ours.macs == 216_208_384
  dense_rules = [r for r in c.rules if not r.decompose]
  assert dense_rules and all(isinstance(r, Rule) for r in dense_rules)


# ---------------------------------------------------------------------------
# docs/adding_a_method.md
# ---------------------------------------------------------------------------


@pytest.mark.quick(0)
def test_the_method_of_the_docs_is_short_and_runs(tmp_path, monkeypatch):
  text = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  assert len(code.splitlines()) < 60
  # Put back what they held, once the code has added to them.
  for table in (METHODS, penalties.PENALTIES):
    for name in list(table):
      monkeypatch.setitem(table, name, table[name])
    for name in ("my_spectral_fd", "product_decay"):
      monkeypatch.setitem(table, name, None)
      del table[name]
  exec(compile(code, "docs/adding_a_method.md", "exec"), {})
  found = train.train(config("my_spectral_fd"), tmp_path / "docs")
  wanted = train.train(config("spectral_fd"), tmp_path / "ours")
  for key in ("params", "macs"):
    assert found["final"][key] == wanted["final"][key]
  loss = found["final"]["metrics"]["loss"]
  assert loss == pytest.approx(wanted["final"]["metrics"]["loss"], rel=1e-3)
  added = metrics.read(tmp_path / "docs")[-1]["train/penalty"]
  kept = metrics.read(tmp_path / "ours")[-1]["train/penalty"]
  assert added == pytest.approx(kept, rel=1e-3) and added > 0
