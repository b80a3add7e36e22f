"""Reading models: costs by hand, kernels that are changed, ranks not read."""

import flax
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro import introspect, lowrank, nn, trees
from maestro.cost.count import count_cost
from maestro.lowrank import Rule
from maestro.models import MODELS
from maestro.trees import LowRankError


def shape(*sizes, dtype="float32"):
  return jax.ShapeDtypeStruct(sizes, dtype)


def counted(model, *inputs, **kwargs):
  layers = introspect.layers(model, *inputs, **kwargs)
  params = jax.eval_shape(
    lambda *x: model.init(jax.random.key(0), *x, **kwargs), *inputs
  )
  return count_cost(layers, params["params"])


class Model(flax.linen.Module):
  """A model of one function of (module, inputs)."""

  function: object

  @flax.linen.compact
  def __call__(self, *inputs):
    return self.function(*inputs)


# ---------------------------------------------------------------------------
# Costs, by hand
# ---------------------------------------------------------------------------


def _reshaped(x):
  b, t, d = x.shape
  return flax.linen.Dense(4)(x.reshape(b * t, d)).reshape(b, t, 4)


def _time_first(x):
  return nn.Dense(4)(jnp.swapaxes(x, 0, 1))


def _keyword(x):
  return nn.Dense(4)(inputs=x)


def _scanned(x):
  """A layer whose one kernel is reused in five steps."""
  body = flax.linen.scan(
    Step,
    variable_broadcast=("params", "ranks"),
    split_rngs={"params": False},
    length=5,
  )
  return body(6)(x, None)[0]


class Step(flax.linen.Module):
  width: int

  @flax.linen.compact
  def __call__(self, x, _):
    return jnp.tanh(nn.Dense(self.width, name="layer")(x)), None


def _vmapped(x):
  """One kernel for all of an axis that the layer does not see."""
  layer = flax.linen.vmap(
    nn.Dense,
    variable_axes={"params": None},
    split_rngs={"params": False},
    in_axes=1,
    out_axes=1,
  )
  return layer(4)(x)


def _branches(x):
  big, small = nn.Dense(4, name="big"), nn.Dense(4, name="small")
  y = big(x) + small(x[:, :1])
  return flax.linen.cond(
    jnp.all(y > 0), lambda m, x: m(x), lambda m, x: x[..., :4], big, x
  )


COSTS = {
  "recurrent": (lambda x: flax.linen.RNN(flax.linen.GRUCell(4))(x), 840),
  "lstm": (
    lambda x: flax.linen.RNN(flax.linen.OptimizedLSTMCell(4))(x),
    7 * 16 * (6 + 4),
  ),
  "batch_in_rows": (_reshaped, 7 * 24),
  "time_first": (_time_first, 7 * 24),
  "keyword": (_keyword, 7 * 24),
  "reused_in_a_scan": (_scanned, 5 * 7 * 36),
  "vmapped": (_vmapped, 7 * 24),
  "branches": (_branches, (7 + 1 + 7) * 24),
  "einsum": (
    lambda x: flax.linen.Einsum((6, 3), "btd,df->btf")(x),
    7 * 6 * 3,
  ),
  "attention": (
    lambda x: flax.linen.MultiHeadDotProductAttention(2)(x),
    7 * 4 * 36 + 2 * 7 * 7 * 6,
  ),
}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", COSTS)
def test_macs_are_those_of_one_example(name, batch):
  function, macs = COSTS[name]
  assert counted(Model(function), shape(batch, 7, 6)).macs == macs


@pytest.mark.parametrize(
  ("strides", "padding"), [(1, "SAME"), (2, "SAME"), (3, "VALID")]
)
def test_a_transposed_convolution_costs_its_inputs(strides, padding):
  layer = flax.linen.ConvTranspose(
    16, (3, 3), strides=(strides, strides), padding=padding
  )
  cost = counted(layer, shape(2, 4, 4, 3))
  assert cost.macs == 4 * 4 * 9 * 3 * 16
  assert cost.layers[0].params == 9 * 3 * 16 + 16 == cost.params


def test_attention_is_a_line_beside_its_projections():
  model = flax.linen.MultiHeadDotProductAttention(2)
  cost = counted(model, shape(2, 7, 6))
  rows = {row.path: (row.macs, row.params) for row in cost.layers}
  assert rows.pop("") == (2 * 7 * 7 * 6, 0)
  assert rows.keys() == {"query", "key", "value", "out"}
  assert sum(params for _, params in rows.values()) == cost.params


@pytest.mark.quick(1)
def test_what_cannot_be_factored_is_left_dense_and_counts():
  def function(x):
    return nn.Dense(3)(flax.linen.ConvTranspose(4, (3,))(x))

  model, x = Model(function), jnp.ones((2, 7, 6))
  params = model.init(jax.random.key(0), x)["params"]
  layers = introspect.layers(model, x)
  factored = lowrank.decompose(params, [Rule()], layers)
  assert set(factored["ConvTranspose_0"]) == {"kernel", "bias"}
  cost = count_cost(layers, factored)
  assert cost.macs == 7 * (3 * 6 * 4 + 3 * (4 + 3))
  with pytest.raises(LowRankError, match="matches no layer"):
    lowrank.decompose(params, [Rule("Conv_0")], layers)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
  ("name", "inputs", "macs"),
  [
    ("resnet18", (32, 32, 3), 555_422_720),
    ("vgg19", (32, 32, 3), 398_136_320),
    ("lenet", (28, 28, 1), 281_640),
  ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_papers_networks_cost_what_it_says(name, inputs, macs, batch):
  model = MODELS[name](num_classes=10)
  assert counted(model, shape(batch, *inputs), train=False).macs == macs


def test_a_batch_that_is_written_into_a_model_is_divided_out():
  model = Model(lambda x: nn.Dense(4)(x.reshape(3, 7, 6)))
  assert counted(model, shape(3, 42)).macs == 7 * 24


def test_a_name_with_a_slash_is_refused():
  model = Model(lambda x: nn.Dense(4, name="a/b")(x))
  with pytest.raises(LowRankError, match=r"a/b.*name it otherwise"):
    introspect.layers(model, shape(2, 6))


# ---------------------------------------------------------------------------
# Kernels that a model changes before it uses them
# ---------------------------------------------------------------------------


class StandardConv(nn.Conv):
  """Weight standardisation by way of `param`."""

  def param(self, name, *args, **kwargs):
    w = super().param(name, *args, **kwargs)
    if name != "kernel":
      return w
    w = w - jnp.mean(w, axis=(0, 1, 2), keepdims=True)
    return w / (jnp.std(w, axis=(0, 1, 2), keepdims=True) + 1e-5)


class Doubled(nn.Dense):
  def param(self, name, *args, **kwargs):
    value = super().param(name, *args, **kwargs)
    return 2 * value if name == "kernel" else value


def _mapped(x):
  layer = flax.linen.map_variables(
    nn.Dense,
    "params",
    trans_in_fn=lambda p: jax.tree.map(jnp.sign, p),
    init=True,
    mutable=True,
  )
  return layer(4)(x)


ALTERED = {
  "standardised": lambda x: StandardConv(4, (3, 3))(x),
  "doubled": lambda x: Doubled(4)(x),
  "weight_norm": lambda x: flax.linen.WeightNorm(nn.Dense(4))(x),
  "spectral_norm": lambda x: flax.linen.SpectralNorm(nn.Dense(4))(
    x, update_stats=False
  ),
  "mapped": _mapped,
  "within_remat": lambda x: flax.linen.remat(Doubled)(4)(x),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ALTERED)
def test_a_kernel_that_the_model_changes_is_not_factored(name):
  def function(x):
    return nn.Dense(3, name="head")(ALTERED[name](x).reshape(len(x), -1))

  model, x = Model(function), jnp.ones((2, 6, 6, 3))
  variables = model.init(jax.random.key(0), x)
  layers = introspect.layers(model, x)
  (path,) = (path for path, spec in layers.items() if spec.altered)
  assert path != "head"
  with pytest.raises(LowRankError, match=f"{path!r}.*decompose=False"):
    lowrank.decompose(variables["params"], [Rule()], layers)
  rules = [Rule(path, decompose=False), Rule()]
  factored = lowrank.decompose(variables["params"], rules, layers)
  y = model.apply(variables, x)
  found = model.apply({**variables, "params": factored}, x)
  np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)


def test_no_kernel_of_an_ordinary_model_counts_as_changed(case):
  assert not any(spec.altered for spec in case.layers.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_change_of_precision_is_no_change(dtype):
  model = Model(lambda x: nn.Conv(4, (3, 3), dtype=dtype)(x))
  (spec,) = introspect.layers(model, shape(2, 6, 6, 3)).values()
  assert not spec.altered


def test_a_factored_layer_that_overrides_param_says_so():
  layer, x = Doubled(4), jnp.ones((2, 6))
  spec = introspect.layers(nn.Dense(4), x)
  params = lowrank.decompose(
    layer.init(jax.random.key(0), x)["params"], [Rule()], spec
  )
  with pytest.raises(LowRankError, match="Doubled overrides `param`"):
    layer.apply({"params": params}, x)


# ---------------------------------------------------------------------------
# Ranks that a transform does not pass on
# ---------------------------------------------------------------------------


class Cell(flax.linen.RNNCellBase):
  @flax.linen.compact
  def __call__(self, carry, x):
    joined = jnp.concatenate([carry, x], -1)
    y = jnp.tanh(nn.Dense(4, name="layer")(joined))
    return y, y

  def initialize_carry(self, rng, input_shape):
    return jnp.zeros((*input_shape[:-1], 4))

  @property
  def num_feature_axes(self):
    return 1


def _rnn(passed):
  names = ("params", "ranks") if passed else "params"
  return lambda x: flax.linen.RNN(Cell(), variable_broadcast=names)(x)


def _vmap(passed):
  axes = dict.fromkeys(("params", "ranks") if passed else ("params",), 0)
  return lambda x: flax.linen.vmap(
    nn.Dense, variable_axes=axes, split_rngs={"params": True}, in_axes=1
  )(4)(x)


def _scan(passed):
  names = ("params", "ranks") if passed else "params"
  return lambda x: flax.linen.scan(
    Step, variable_broadcast=names, split_rngs={"params": False}, length=2
  )(6)(x, None)[0]


@pytest.mark.quick(0)
@pytest.mark.parametrize("make", [_rnn, _vmap, _scan])
def test_a_rank_is_obeyed_or_missed_aloud(make, close):
  x = jnp.cos(jnp.arange(84.0)).reshape(2, 7, 6)
  model = Model(make(passed=True))
  layers = maestro.layers(model, x)
  params = model.init(jax.random.key(0), x)["params"]
  params = maestro.decompose(params, [Rule()], layers)
  ranks = jax.tree.map(
    lambda r: jnp.full_like(r, 2), maestro.full_ranks(params, layers)
  )
  variables = {"params": params, "ranks": ranks}
  masked = model.apply({"params": maestro.mask(params, ranks)}, x)
  close(model.apply(variables, x), masked)
  deaf = Model(make(passed=False))
  with pytest.raises(LowRankError, match=r"variable_broadcast=\(\"params\""):
    deaf.apply(variables, x)
  close(deaf.apply({"params": params}, x), model.apply({"params": params}, x))
  other = {"params": params, "ranks": {"elsewhere": {"rank": jnp.int32(1)}}}
  deaf.apply(other, x)  # names another layer


# ---------------------------------------------------------------------------
# Boxed parameters
# ---------------------------------------------------------------------------


def boxed(params, box):
  """Boxes every leaf and names its axes, each by another name."""
  return jax.tree.map(
    lambda x: box(x, tuple(f"axis{i}" for i in range(x.ndim))), params
  )


def names(tree):
  return jax.tree.map(
    lambda x: x.names, tree, is_leaf=lambda x: hasattr(x, "names")
  )


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  "box", [flax.linen.Partitioned, flax.linen.LogicallyPartitioned]
)
def test_boxes_are_kept_and_change_nothing(case, box, close):
  params, unbox = boxed(case.dense, box), flax.core.meta.unbox
  factored = lowrank.decompose(params, [Rule()], case.layers)
  close(unbox(factored), case.factored, 1e-4)
  ranks = case.ranks("half")
  for function in (lowrank.mask, lowrank.truncate):
    found, wanted = function(factored, ranks), function(case.factored, ranks)
    assert jax.tree.structure(names(found)) == jax.tree.structure(
      names(factored)
    )
    close(unbox(found), wanted, 1e-4)
  close(lowrank.full_ranks(factored, case.layers), case.full)
  merged = lowrank.merge(factored, case.layers)
  kept = names(merged)
  for path, spec in case.layers.items():
    node = trees.get(kept, path)
    wanted = trees.get(names(params), path)
    if spec.kind == "conv" and spec.groups:
      assert len(node["kernel"]) == len(wanted["kernel"])
    else:
      assert node == wanted
  if case.name not in ("scan", "scan_remat_grouped"):  # they re-box their own
    y = case.model.apply({"params": factored, "ranks": ranks}, case.x)
    close(
      y, case.model.apply({"params": unbox(factored), "ranks": ranks}, case.x)
    )


def test_a_model_with_partitioned_parameters_is_read_and_run():
  init = flax.linen.initializers.lecun_normal()

  def function(x):
    split = flax.linen.with_partitioning(init, ("in", "out"))
    return nn.Dense(5, kernel_init=split, name="layer")(x)

  model, x = Model(function), jnp.ones((2, 6))
  variables = model.init(jax.random.key(0), x)
  layers = introspect.layers(model, x)
  params = lowrank.decompose(variables["params"], [Rule()], layers)
  node = params["layer"]
  assert (node["u"].names, node["v"].names) == (("in", None), (None, "out"))
  assert count_cost(layers, params).macs == 5 * (6 + 5)
  np.testing.assert_allclose(
    model.apply({"params": params}, x), model.apply(variables, x), rtol=1e-5
  )
