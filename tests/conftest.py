"""Sets up JAX for the tests and holds the small models that they share."""

import atexit
import collections
import os
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: machine code is optimized only where
# XLA_FLAGS asks for it (HLO always is), and what one has compiled serves all,
# those in other processes too.
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_backend_optimization_level=0",
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
  )
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  compiled = tempfile.mkdtemp(prefix="maestro_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
  atexit.register(shutil.rmtree, compiled, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

import flax.linen  # noqa: E402

# A protocol that annotations of Flax's fields name, but that cannot be checked.
typing.runtime_checkable(flax.linen.linear.PromoteDtypeFn)

# Types and shapes are checked at every call of these; the hook rewrites modules
# as they are first imported.
CHECKED = ("ops", "lowrank", "sampling", "nn", "cost", "methods")
jaxtyping.install_import_hook(
  [f"maestro.{name}" for name in CHECKED],
  "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
import jax.numpy as jnp  # noqa: E402

import maestro.introspect  # noqa: E402
import maestro.nn  # noqa: E402
from maestro import cli, lowrank, trees  # noqa: E402
from maestro.lowrank import Rule  # noqa: E402

# Parameters of tests may have wrong types; these are made while collecting.
jaxtyping.config.update("jaxtyping_disable", True)


def pytest_addoption(parser):
  """`--cases`: the quick suite, what it leaves out, or both."""
  parser.addoption(
    "--cases",
    choices=("quick", "rest", "all"),
    default="quick",
    help="of tests marked quick(n): n cases of each, spread over all that there"
    " are; the others; or all. What is asked for by name (-k, ::) is all run.",
  )


def pytest_collection_modifyitems(config, items):
  """Leaves the cases that `--cases` asks for."""
  named = config.option.keyword or any("::" in a for a in config.args)
  cases = config.getoption("cases")
  if cases == "all" or (cases == "quick" and named):
    return
  groups, slow = collections.defaultdict(list), set()
  for item in items:
    if item.get_closest_marker("slow"):  # -m tells of these
      slow.add(item)
    else:
      groups[item.path, getattr(item, "originalname", item.name)].append(item)
  quick = set()
  for group in groups.values():
    mark = group[0].get_closest_marker("quick")
    n = len(group) if mark is None else min(mark.args[0], len(group))
    quick |= {group[i * len(group) // n] for i in range(n)}
  left = quick if cases == "quick" else {*items} - quick
  left |= slow
  config.hook.pytest_deselected(items=[i for i in items if i not in left])
  items[:] = [item for item in items if item in left]


def pytest_collection_finish():
  """From here on types are checked."""
  jaxtyping.config.update("jaxtyping_disable", False)


# Where nothing but the project computes: Flax and Optax mix types.
STRICT = ("ops", "cost", "parallel/test_rules", "test_lowrank", "test_sampling")
STRICT += ("test_nn", "test_introspect")


@pytest.fixture(autouse=True)
def commands_do_not_end_the_tests(monkeypatch):
  """What a command in this process does at exit would end pytest's own."""
  monkeypatch.setattr(cli, "exit_early", sys.exit)


@pytest.fixture(autouse=True)
def types_are_not_mixed(request):
  """No array becomes another type unasked, but where a test mixes them."""
  place = request.node.nodeid.removeprefix("tests/")
  mixed = request.node.get_closest_marker("mixed_types") is not None
  kind = "strict" if place.startswith(STRICT) and not mixed else "standard"
  with jax.numpy_dtype_promotion(kind):
    yield


@pytest.fixture(autouse=True)
def types_are_checked(request):
  """Lets those tests alone that give wrong types on purpose."""
  wrong = request.node.get_closest_marker("wrong_types") is not None
  jaxtyping.config.update("jaxtyping_disable", wrong)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


# ---------------------------------------------------------------------------
# Models, each built from `maestro.nn` or from `flax.linen` (m)
# ---------------------------------------------------------------------------


class Block(flax.linen.Module):
  """A residual layer in the form of a scan's body."""

  m: Any
  layer: Callable

  @flax.linen.compact
  def __call__(self, x, _):
    return x + jnp.tanh(self.layer(self.m)(x)), None


class Stack(flax.linen.Module):
  """Three residual layers with stacked parameters; `axes` may be wrong."""

  m: Any
  layer: Callable
  axes: tuple[str, ...] = ("params", "ranks")
  remat: bool = False

  @flax.linen.compact
  def __call__(self, x):
    block = flax.linen.remat(Block) if self.remat else Block
    scanned = flax.linen.scan(
      block,
      variable_axes=dict.fromkeys(self.axes, 0),
      split_rngs={"params": True},
      length=3,
    )
    return scanned(self.m, self.layer, name="blocks")(x, None)[0]


class Remat(flax.linen.Module):
  """Two layers, the first of which is recomputed in the backward pass."""

  m: Any

  @flax.linen.compact
  def __call__(self, x):
    x = flax.linen.remat(self.m.Dense)(7, name="first")(x)
    return self.m.Dense(5, name="last")(jnp.tanh(x))


class Tied(flax.linen.Module):
  """An embedding that also makes the logits."""

  m: Any

  @flax.linen.compact
  def __call__(self, tokens):
    embed = self.m.Embed(9, 6, name="embed")
    return embed.attend(jnp.tanh(embed(tokens)))


class Network(flax.linen.Module):
  """Convolutions (one depthwise, one grouped), a norm and two dense layers."""

  m: Any

  @flax.linen.compact
  def __call__(self, x):
    x = jnp.tanh(self.m.Conv(6, (3, 3), strides=2, name="stem")(x))
    x = self.m.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
    x = jnp.tanh(flax.linen.LayerNorm(name="norm")(x))
    x = self.m.Conv(8, (1, 1), feature_group_count=2, name="grouped")(x)
    x = x.reshape((x.shape[0], -1))
    x = jnp.tanh(self.m.Dense(10, name="hidden")(x))
    return self.m.Dense(5, name="head")(x)


def _normal(*shape, scale=1.0):
  # By NumPy: to compile JAX's generators would take most of the tests' time.
  rng = np.random.default_rng(shape)
  return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


QUICK_COMPILATION = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__[:2] == (0, 10):  # gone in 0.12
  QUICK_COMPILATION["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILATION)


TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5) * 7 % 9


@dataclasses.dataclass(frozen=True)
class Case:
  """One model with its inputs, parameters in all forms, and how to run it.

  Attributes:
    name: of the case.
    build: makes the model from a namespace of layers.
    inputs: shape of the inputs (normal numbers), or the inputs themselves.
    batch: how many examples the inputs hold.
  """

  name: str
  build: Callable[[Any], flax.linen.Module]
  inputs: Any
  batch: int = 2

  @functools.cached_property
  def model(self):
    return self.build(maestro.nn)

  @functools.cached_property
  def x(self):
    return _normal(*self.inputs) if type(self.inputs) is tuple else self.inputs

  @functools.cached_property
  def layers(self):
    return maestro.introspect.layers(self.model, self.x)

  @functools.cached_property
  def dense(self):
    """Parameters of the shapes that `init` gives; biases are not zero."""
    shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.x)
    return jax.tree.map(
      lambda x: _normal(*x.shape, scale=x.size**-0.25), shapes["params"]
    )

  @functools.cached_property
  def factored(self):
    return quick_jit(
      lambda params: lowrank.decompose(params, [Rule()], self.layers)
    )(self.dense)

  @functools.cached_property
  def full(self):
    return lowrank.full_ranks(self.factored, self.layers)

  def ranks(self, level):
    """A rank tree: "full", "half" (elements differ), or a number for all."""
    if level == "full":
      return self.full
    flat, count = {}, 0
    for path, rank in trees.flatten_ranks(self.full).items():
      rank = np.asarray(rank)
      if level == "half":
        index = count + np.arange(rank.size).reshape(rank.shape)
        value = (rank // 2 + index) % (rank + 1)
        count += rank.size
      else:
        value = np.minimum(rank, level)
      flat[path] = jnp.asarray(value, jnp.int32)
    return trees.unflatten_ranks(flat)

  @functools.cached_property
  def run(self):
    """Compiles (how, params, ranks) -> (y, gradients for params and inputs).

    how: "plain" ignores the ranks, "mask" masks the parameters, "ranks" passes
    the ranks as a collection.
    """
    smooth = jnp.issubdtype(self.x.dtype, jnp.inexact)

    def loss(params, x, how, ranks):
      variables = {"params": params}
      if how == "mask":
        variables = {"params": lowrank.mask(params, ranks)}
      elif how == "ranks":
        variables = {"params": params, "ranks": ranks}
      y = self.model.apply(variables, x)
      w = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
      return jnp.sum(w * y + 0.5 * y * y), y

    def run(how, params, ranks=None):
      grad = jax.grad(loss, (0, 1) if smooth else (0,), has_aux=True)
      grads, y = grad(params, self.x, how, ranks)
      return y, *grads

    return jax.jit(run, static_argnums=0, compiler_options=QUICK_COMPILATION)


def _case(name, inputs, build, batch=2):
  return Case(name, build, inputs, batch)


CASES = {
  case.name: case
  for case in (
    _case("dense", (2, 3, 9), lambda m: m.Dense(6)),
    _case("dense_single", (5,), lambda m: m.Dense(7, use_bias=False), 1),
    _case("conv_same", (2, 5, 6, 3), lambda m: m.Conv(6, (3, 2), (2, 1))),
    _case(  # without a batch axis
      "conv_explicit",
      (5, 6, 3),
      lambda m: m.Conv(
        6, (2, 2), (1, 2), padding=((2, 0), 1), kernel_dilation=(1, 2)
      ),
      1,
    ),
    _case(  # with two batch axes
      "conv_circular",
      (2, 2, 6, 6, 2),
      lambda m: m.Conv(
        6, (4, 3), 2, padding="CIRCULAR", kernel_dilation=(1, 2)
      ),
    ),
    _case(
      "conv_reflect",
      (2, 6, 6, 2),
      lambda m: m.Conv(6, (4, 3), padding="REFLECT", kernel_dilation=(1, 2)),
    ),
    _case(
      "conv_causal",
      (2, 7, 4),
      lambda m: m.Conv(
        6, 3, padding="CAUSAL", kernel_dilation=2, use_bias=False
      ),
    ),
    _case(
      "conv_3d_valid",
      (1, 3, 4, 3, 2),
      lambda m: m.Conv(6, (2, 2, 2), (1, 2, 1), padding="VALID"),
      1,
    ),
    _case(
      "conv_input_dilation",
      (2, 3, 3, 3),
      lambda m: m.Conv(6, (3, 3), padding=1, input_dilation=(2, 1)),
    ),
    _case(
      "conv_grouped",
      (2, 5, 5, 6),
      lambda m: m.Conv(
        10, (3, 2), 2, kernel_dilation=(1, 2), feature_group_count=2
      ),
    ),
    _case(
      "general", (2, 3, 4, 2), lambda m: m.DenseGeneral((2, 3), axis=(-1, 1))
    ),
    _case(
      "general_batches",
      (2, 3, 4, 3, 2),
      lambda m: m.DenseGeneral((2, 3), axis=(-2, -1), batch_dims=(0, 1)),
      1,
    ),
    _case("embed", TOKENS, lambda m: m.Embed(9, 6)),
    _case("embed_tied", TOKENS, Tied),
    _case("scan", (2, 6), lambda m: Stack(m, lambda m: m.Dense(6))),
    _case(
      "scan_remat_grouped",
      (2, 4, 4, 6),
      lambda m: Stack(
        m,
        lambda m: m.Conv(6, (2, 2), feature_group_count=2),
        remat=True,
      ),
    ),
    _case("remat", (2, 6), Remat),
    _case("network", (2, 6, 6, 3), Network),
  )
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
  """Every model in turn."""
  return request.param


@pytest.fixture
def cases():
  """All models by name."""
  return CASES


@pytest.fixture
def jit():
  """`jax.jit` with a quick compilation to slow code."""
  return quick_jit


@pytest.fixture
def counted():
  """Wraps a function so that `times` says how often it was called: traced.

  A jitted function's own cache may be emptied by all that a process compiles.
  """

  def wrap(f):
    def wrapped(*args, **kwargs):
      wrapped.times += 1
      return f(*args, **kwargs)

    wrapped.times = 0
    return wrapped

  return wrap


@pytest.fixture
def close():
  """Compares trees to 1e-5 of each leaf's largest number; shapes exactly."""

  def assert_close(actual, expected, tolerance=1e-5):
    def compare(path, a, b):
      a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
      scale = np.max(np.abs(b), initial=0.0)
      np.testing.assert_allclose(
        a,
        b,
        rtol=tolerance,
        atol=tolerance * scale,
        err_msg=jax.tree_util.keystr(path),
        strict=True,
      )

    jax.tree_util.tree_map_with_path(compare, actual, expected)

  return assert_close


@pytest.fixture
def reference_mask():
  """Puts a number (0) on dead components: `mask` again, in plain NumPy."""

  def fill(params, ranks, value=0.0):
    if "u" not in params:
      return {
        k: fill(x, ranks.get(k, {}), value) if isinstance(x, dict) else x
        for k, x in params.items()
      }
    if "rank" not in ranks:
      return params
    rank = np.asarray(ranks["rank"])
    u, v = np.array(params["u"]), np.array(params["v"])
    for index in np.ndindex(rank.shape):
      u[index][..., rank[index] :] = value
      v[index][rank[index] :] = value
    return {**params, "u": u, "v": v}

  return fill
