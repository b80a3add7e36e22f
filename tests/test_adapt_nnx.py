"""Models of flax.nnx on factors: equal to mask, merge and the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maestro
from maestro import Rule, introspect, lowrank, trees
from maestro.products import products
from maestro.trees import LowRankError

KEY = jax.random.key(0)
TOKENS = jnp.arange(20).reshape(4, 5) % 11


class Block(nnx.Module):
  def __init__(self, width, rngs):
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
    self.up = nnx.Linear(width, 2 * width, rngs=rngs)
    self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norm(x))
    return x + self.drop(self.down(nnx.gelu(self.up(x))))


class Net(nnx.Module):
  """A list of blocks, a convolution, batch norm, and a table used twice."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 8, rngs=rngs)
    self.blocks = nnx.List([Block(8, rngs) for _ in range(2)])
    self.conv = nnx.Conv(8, 6, (3,), strides=2, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.head = nnx.Linear(6, 8, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x)
    x = nnx.relu(self.norm(self.conv(x)))
    return self.embed.attend(self.head(x))


ATTENTION = [f"attention/{name}" for name in ("query", "key", "value", "out")]
LAYERS = {
  "embed",
  "conv",
  "head",
  *(f"blocks/{i}/{n}" for i in (0, 1) for n in (*ATTENTION, "up", "down")),
}


@pytest.fixture
def net():
  return Net(nnx.Rngs(0))


def pieces(net, *inputs, **kwargs):
  """(model, its variables, layers, params on factors, their ranks)."""
  model = maestro.factored(net)
  variables = model.init(KEY, *inputs, **kwargs)
  layers = maestro.layers(model, *inputs, **kwargs)
  params = maestro.decompose(variables["params"], [Rule()], layers)
  return model, variables, layers, params, maestro.full_ranks(params, layers)


def test_dense_it_is_the_model_and_has_its_numbers(net, close):
  numbers = nnx.Not(nnx.RngKey)
  before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(net, numbers)))
  model = maestro.factored(net)
  variables = model.init(KEY, TOKENS, train=True)
  net.eval()
  close(model.apply(variables, TOKENS, train=False), net(TOKENS), 1e-6)
  stored = variables["params"]["blocks"]["1"]["up"]["kernel"]
  np.testing.assert_array_equal(stored, net.blocks[1].up.kernel[...])
  after = nnx.to_pure_dict(nnx.state(net, numbers))
  jax.tree.map(np.testing.assert_array_equal, before, after)  # not changed


def test_all_is_listed_and_counted(net):
  model, variables, layers, params, ranks = pieces(net, TOKENS, train=False)
  assert {p for p, spec in layers.items() if spec.kind != "other"} == LAYERS
  assert trees.factored(params, layers).keys() == LAYERS
  half = jax.tree.map(lambda r: r // 2, ranks)
  small = maestro.extract(params, half, layers)
  for tree in (variables["params"], small):
    found = products(
      lambda tree: model.apply(
        {**variables, "params": tree}, TOKENS, train=False
      ),
      (tree,),
      [False] * len(jax.tree.leaves(tree)),
    )
    counted = maestro.count_cost(layers, tree).macs
    assert sum(product.real for product in found) == len(TOKENS) * counted


def joined(tree):
  """All numbers of a tree, to be compared by the largest of them."""
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_ranks_are_mask_merge_and_the_model(net, jit, close):
  """Values and gradients, traced; at last the same in the model itself."""
  model, variables, layers, params, full = pieces(net, TOKENS, train=False)
  traces = []

  def loss(params, ranks):
    found = {**variables, "params": params}
    found |= {"ranks": ranks} if ranks else {}
    y = model.apply(found, TOKENS, train=False)
    return jnp.sum(jnp.cos(jnp.arange(y.size).reshape(y.shape)) * y), y

  @jit
  def adapted(params, ranks):
    traces.append(1)
    return jax.grad(loss, has_aux=True)(params, ranks)

  @jit
  def plain(params, ranks):
    def merged(params):
      return loss(lowrank.merge(lowrank.mask(params, ranks), layers), None)

    return jax.grad(merged, has_aux=True)(params)

  maestro.check_ranks(
    model, {**variables, "params": params}, full, TOKENS, train=False
  )
  half = jax.tree.map(lambda r: r // 2, full)
  for ranks in (full, half):
    grads, y = adapted(params, ranks)
    wanted_grads, wanted = plain(params, ranks)
    close(y, wanted, 1e-5)
    close(joined(grads), joined(wanted_grads), 1e-5)
  assert len(traces) == 1
  small = maestro.extract(params, half, layers)
  close(loss(small, None)[1], y, 1e-5)

  net.eval()
  dense = lowrank.merge(lowrank.mask(params, half), layers)
  graph, state = nnx.split(net)
  flat = dict(nnx.to_flat_state(state))
  for path, variable in flat.items():
    node = dense
    for name in map(str, path):
      node = node.get(name) if isinstance(node, dict) else None
    if node is not None:
      kernel = jnp.reshape(node, variable.shape)
      flat[path] = variable.replace(kernel)
  itself = nnx.merge(graph, nnx.from_flat_state(flat))
  close(y, itself(TOKENS), 1e-5)


def test_statistics_and_random_numbers_are_linens(net, close):
  model, variables, _, params, _ = pieces(net, TOKENS, train=False)
  variables = {**variables, "params": params}

  def run(key):
    return model.apply(
      variables, TOKENS, train=True, rngs={"dropout": key}, mutable=True
    )

  y, new = run(KEY)
  np.testing.assert_array_equal(y, run(KEY)[0])
  assert np.any(y != run(jax.random.key(1))[0])
  assert new.keys() == {"params", "batch_stats"}
  assert np.any(new["batch_stats"]["norm"]["mean"])
  # Without dropout, the statistics are the model's own.
  for block in net.blocks:
    block.drop.rate = 0.0
  model = maestro.factored(net)
  _, new = model.apply(
    variables,
    TOKENS,
    train=True,
    rngs={"dropout": KEY},
    mutable=["batch_stats"],
  )
  net.train()
  net(TOKENS)
  close(new["batch_stats"]["norm"]["mean"], net.norm.mean[...], 1e-5)
  close(new["batch_stats"]["norm"]["var"], net.norm.var[...], 1e-5)


def test_statistics_of_a_batch_alone(net, close):
  """As those of Linen's: what recalibration asks for."""
  for block in net.blocks:
    block.drop.rate = 0.0
  model = maestro.factored(net)
  variables = model.init(KEY, TOKENS, train=False)

  def statistics():
    _, new = model.apply(
      variables,
      TOKENS,
      train=True,
      rngs={"dropout": KEY},
      mutable=["batch_stats"],
    )
    return new["batch_stats"]["norm"]

  old, moved = variables["batch_stats"]["norm"], statistics()
  with introspect.batch_statistics():
    alone = statistics()
  for name in ("mean", "var"):
    expected = 0.99 * old[name] + 0.01 * alone[name]
    close(moved[name], expected, 1e-5)


def test_training_on_random_numbers_needs_a_stream(net):
  model = maestro.factored(net)
  variables = model.init(KEY, TOKENS, train=False)
  with pytest.raises(LowRankError, match=r"drop.*rngs=\{\"dropout\": key\}"):
    model.apply(variables, TOKENS, train=True, mutable=["batch_stats"])
  # A new model is in training mode; its copies are told theirs.
  still = model.apply(variables, TOKENS)
  np.testing.assert_array_equal(
    still, model.apply(variables, TOKENS, train=False)
  )


def test_its_mode_is_told_as_others_are(net):
  told = introspect.mode(maestro.factored(net), train=True)
  assert told == {"train": True}

  class Told(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x, *, train):
      return self.layer(x) + (100.0 if train else 0.0)

  model = maestro.factored(Told())
  x = jnp.ones((1, 3))
  variables = model.init(KEY, x, train=False)
  low, high = (model.apply(variables, x, train=t) for t in (False, True))
  np.testing.assert_allclose(high - low, 100, rtol=1e-5)


class Own(nnx.Linear):
  def __call__(self, inputs):
    return inputs @ jnp.tanh(self.kernel[...])


@nnx.split_rngs(splits=3)
@nnx.vmap
def stacked(rngs):
  return nnx.Linear(6, 6, rngs=rngs)


class Odd(nnx.Module):
  """Layers that are none of ours to run."""

  def __init__(self, kind, rngs):
    self.plain = nnx.Linear(6, 6, rngs=rngs)
    self.kind = kind
    if kind == "subclass":
      self.odd = Own(6, 6, rngs=rngs)
    elif kind == "product":
      product = lambda *a, **k: 2 * jax.lax.dot_general(*a, **k)  # noqa: E731
      self.odd = nnx.Linear(6, 6, dot_general=product, rngs=rngs)
    else:
      self.odd = stacked(rngs)

  def __call__(self, x):
    x = self.plain(self.plain(x))  # called twice
    if self.kind != "stacked":
      return self.odd(x)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def each(x, layer):
      return layer(x)

    return each(x, self.odd)


@pytest.mark.parametrize("kind", ["subclass", "product", "stacked"])
def test_other_layers_stay_dense_and_are_counted(kind, close):
  net, x = Odd(kind, nnx.Rngs(0)), jnp.ones((2, 6))
  model, variables, layers, params, ranks = pieces(net, x)
  assert trees.factored(params, layers).keys() == {"plain"}
  close(model.apply(variables, x), net(x), 1e-6)
  close(model.apply({"params": params, "ranks": ranks}, x), net(x), 1e-5)
  products_of = {"subclass": 1, "product": 1, "stacked": 3}[kind]
  macs = maestro.count_cost(layers, variables["params"]).macs
  assert macs == 36 * (2 + products_of)


def test_a_kernel_that_is_read_outside_is_refused_by_name():
  class Tied(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.layer(x) @ self.layer.kernel[...].T

  model, x = maestro.factored(Tied()), jnp.ones((2, 6))
  variables = model.init(KEY, x)
  np.testing.assert_allclose(
    model.apply(variables, x), Tied()(x), rtol=1e-5, atol=1e-5
  )
  params = {"layer": {"u": jnp.ones((6, 2)), "v": jnp.ones((2, 6))}}
  params["layer"]["bias"] = jnp.zeros(6)
  rule = r"Rule\('layer', decompose=False\)"
  with pytest.raises(LowRankError, match=f"layer 'layer'.*{rule}"):
    model.apply({"params": params}, x)


def test_it_trains_on_factors_and_is_exported(net, tmp_path, close, jit):
  model, variables, layers, params, ranks = pieces(net, TOKENS, train=False)
  tx = optax.adam(1e-2)

  @jit
  def step(params, state, key):
    def loss(params):
      logits, _ = model.apply(
        {**variables, "params": params, "ranks": ranks},
        TOKENS,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
      )
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, TOKENS[:, :3]
      ).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  state, losses = tx.init(params), []
  for i in range(40):
    params, state, value = step(params, state, jax.random.key(i))
    losses.append(float(value))
  assert losses[-1] < losses[0] / 2

  def apply(params, tokens):
    found = {**variables, "params": params}
    return model.apply(found, tokens, train=False)

  half = jax.tree.map(lambda r: r // 2, ranks)
  maestro.export_model(
    apply, params, half, layers, (TOKENS,), out=tmp_path / "net"
  )
  exported, weights = maestro.load(tmp_path / "net")
  small = maestro.extract(params, half, layers)
  close(exported.apply(weights, TOKENS[:2]), apply(small, TOKENS[:2]), 1e-5)


class Transformed(nnx.Module):
  """A layer that is called directly, and others in other ways."""

  def __init__(self, kind):
    self.kind, rngs = kind, nnx.Rngs(0)
    self.plain = nnx.Linear(6, 6, rngs=rngs)
    self.odd = nnx.Linear(6, 6, rngs=rngs)
    if kind == "norm":
      self.odd = nnx.WeightNorm(self.odd, rngs=rngs)
    if kind == "rnn":
      self.odd = nnx.RNN(nnx.SimpleCell(6, 6, rngs=rngs))

  def __call__(self, x):
    x = self.plain(x)
    if self.kind == "remat":
      return nnx.remat(lambda layer, x: layer(x))(self.odd, x)
    if self.kind == "jit":
      return nnx.jit(lambda layer, x: layer(x))(self.odd, x)
    if self.kind == "changed":
      self.odd.kernel[...] = jnp.tanh(self.odd.kernel[...])
    if self.kind == "rnn":
      return self.odd(x[:, None])[:, 0]
    if self.kind == "both":  # a layer that is factored, within a transform
      return nnx.remat(lambda layer, x: layer(x))(self.plain, self.odd(x))
    return self.odd(x)


@pytest.mark.parametrize(
  "kind", ["norm", "rnn", "remat", "jit", "changed", "both"]
)
def test_a_weight_that_is_not_seen_as_it_is_stays_dense(kind, close):
  net, x = Transformed(kind), jnp.ones((2, 6))
  if kind == "both":
    with pytest.raises(LowRankError, match=r"layer 'plain'.*decompose=False"):
      pieces(net, x)
    return
  model, variables, layers, params, ranks = pieces(net, x)
  wanted = Transformed(kind)(x)
  assert trees.factored(params, layers).keys() == {"plain"}
  close(model.apply(variables, x), wanted, 1e-6)
  close(model.apply({"params": params, "ranks": ranks}, x), wanted, 1e-5)


def test_one_layer_alone_is_a_model(close):
  net, x = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 6))
  model, variables, layers, params, ranks = pieces(net, x)
  assert {*layers} == {""} and {"u", "v", "bias"} == {*params}
  close(model.apply(variables, x), net(x), 1e-6)
  close(model.apply({"params": params, "ranks": ranks}, x), net(x), 1e-5)


def test_what_is_no_module_is_refused():
  with pytest.raises(LowRankError, match="that can be called, got a Rngs"):
    maestro.factored(nnx.Rngs(0))
