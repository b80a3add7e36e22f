"""Unmodified Flax models on factors: equal to mask, merge and the model."""

import copy
import dataclasses
import functools
import gc
import weakref
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler as Pickler
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, meta

import maestro
from maestro import Rule, data, lowrank, trees
from maestro.products import products
from maestro.trees import LowRankError

# ---------------------------------------------------------------------------
# Models as others write them, small
# ---------------------------------------------------------------------------


class ResNetBlock(nn.Module):
  filters: int
  conv: Any
  norm: Any
  strides: tuple[int, int] = (1, 1)

  @nn.compact
  def __call__(self, x):
    y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
    y = self.conv(self.filters, (3, 3))(y)
    y = self.norm(scale_init=nn.initializers.constant(0.5))(y)
    if x.shape != y.shape:
      x = self.conv(self.filters, (1, 1), self.strides, name="proj")(x)
      x = self.norm(name="norm_proj")(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """With batch norm over the axis of a vmap or pmap."""

  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, train=True):
    conv = functools.partial(nn.Conv, use_bias=False)
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, axis_name=self.axis_name
    )
    x = nn.relu(norm(name="bn_init")(conv(4, (3, 3), name="conv_init")(x)))
    x = ResNetBlock(6, conv, norm, (2, 2))(x)
    return nn.Dense(5)(jnp.mean(x, axis=(1, 2)))


class Encoder(nn.Module):
  latents: int

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(9, name="fc1")(x))
    return (
      nn.Dense(self.latents, name="fc2_mean")(x),
      nn.Dense(self.latents, name="fc2_logvar")(x),
    )


class Decoder(nn.Module):
  @nn.compact
  def __call__(self, z):
    z = nn.relu(nn.Dense(9, name="fc1")(z))
    return nn.Dense(7, name="fc2")(z)


class VAE(nn.Module):
  """With a stream of random numbers, `setup`, and another method."""

  latents: int = 4

  def setup(self):
    self.encoder = Encoder(self.latents)
    self.decoder = Decoder()

  def __call__(self, x, z_rng):
    mean, logvar = self.encoder(x)
    noise = jax.random.normal(self.make_rng("noise"), mean.shape)
    noise += jax.random.normal(z_rng, logvar.shape)
    return self.decoder(mean + noise * jnp.exp(0.5 * logvar)), mean, logvar

  def generate(self, z):
    return nn.sigmoid(self.decoder(z))


class ActorCritic(nn.Module):
  """Returns log-probabilities and a value."""

  @nn.compact
  def __call__(self, x):
    dtype = jnp.float32
    x = x.astype(dtype) / 255.0
    x = nn.relu(
      nn.Conv(6, (4, 4), strides=(2, 2), name="conv1", dtype=dtype)(x)
    )
    x = nn.relu(nn.Dense(8, name="hidden", dtype=dtype)(x.reshape(len(x), -1)))
    logits = nn.Dense(3, name="logits", dtype=dtype)(x)
    return nn.log_softmax(logits), nn.Dense(1, name="value", dtype=dtype)(x)


class DecoderCell(nn.RNNCellBase):
  """Feeds its own prediction back where no token is given."""

  @nn.compact
  def __call__(self, carry, x):
    lstm_state, last = carry
    x = jnp.where(x.sum(-1, keepdims=True) > 0, x, last)
    lstm_state, y = nn.LSTMCell(5, name="cell")(lstm_state, x)
    logits = nn.Dense(x.shape[-1], name="projection")(y)
    return (lstm_state, jax.nn.softmax(logits)), (logits, y)

  @property
  def num_feature_axes(self):
    return 1


class Seq2seq(nn.Module):
  """Two RNNs; the second's cell is a module of its own."""

  @nn.compact
  def __call__(self, x, y):
    cell = nn.OptimizedLSTMCell(5, name="encoder")
    encoder = nn.RNN(cell, return_carry=True)
    state, _ = encoder(x, seq_lengths=jnp.array([4, 3]))
    decoder = nn.RNN(
      DecoderCell(name="decoder"), split_rngs={"params": False, "lstm": True}
    )
    return decoder(y[:, :-1], initial_carry=(state, y[:, 0]))


class TransformerBlock(nn.Module):
  cross: bool = False

  @nn.compact
  def __call__(self, x, encoded=None):
    attention = functools.partial(
      nn.MultiHeadDotProductAttention, 2, deterministic=True
    )
    mask = nn.make_causal_mask(x[..., 0]) if self.cross else None
    x = x + attention(name="attention")(nn.LayerNorm()(x), mask=mask)
    if self.cross:
      x = x + attention(name="cross")(nn.LayerNorm()(x), encoded, encoded)
    y = nn.Dense(12, name="up")(nn.LayerNorm()(x))
    return x + nn.Dense(8, name="down")(nn.gelu(y))


class Transformer(nn.Module):
  """An encoder and a decoder, of one embedding or two."""

  tied: bool

  def setup(self):
    self.source = nn.Embed(11, 8)
    self.target = self.source if self.tied else nn.Embed(11, 8)
    self.encoder = [TransformerBlock()]
    self.decoder = TransformerBlock(cross=True)
    if not self.tied:
      self.head = nn.Dense(11)

  def encode(self, tokens):
    x = self.source(tokens)
    for block in self.encoder:
      x = block(x)
    return x

  def __call__(self, source, target):
    x = self.decoder(self.target(target), self.encode(source))
    return self.target.attend(x / np.sqrt(8)) if self.tied else self.head(x)


class PartitionedLayer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    split = nn.with_logical_partitioning
    init = nn.initializers.lecun_normal()
    y = nn.DenseGeneral(
      (12,), kernel_init=split(init, ("embed", "mlp")), name="up"
    )(nn.LayerNorm()(x))
    y = nn.with_logical_constraint(nn.gelu(y), ("batch", "length", "mlp"))
    y = nn.DenseGeneral(
      8, kernel_init=split(init, ("mlp", "embed")), name="down"
    )(y)
    return x + y, None


class PartitionedDecoder(nn.Module):
  """Names the axes of its parameters, that of its scan, too."""

  @nn.compact
  def __call__(self, tokens):
    init = nn.with_partitioning(nn.initializers.normal(0.3), ("vocab", "embed"))
    embed = nn.Embed(9, 8, embedding_init=init, name="embed")
    layers = nn.scan(
      PartitionedLayer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x, _ = layers(name="layers")(embed(tokens), None)
    return embed.attend(x)


class ViTBlock(nn.Module):
  train: bool

  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y, y)
    y = nn.gelu(nn.Dense(12, name="up")(nn.LayerNorm()(x)))
    y = nn.Dropout(0.1, deterministic=not self.train)(y)
    return x + nn.Dense(8, name="down")(y), None


class ViT(nn.Module):
  """Blocks that are scanned and recomputed, with dropout."""

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Conv(8, (2, 2), strides=(2, 2), padding="VALID", name="embedding")(x)
    x = x.reshape(x.shape[0], -1, 8)
    x = x + self.param("pos", nn.initializers.normal(0.2), (1, *x.shape[1:]))
    blocks = nn.scan(
      nn.remat(ViTBlock, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      length=2,
    )
    x, _ = blocks(train, name="blocks")(x, None)
    return nn.Dense(5, name="head")(x.mean(axis=1))


class Mixer(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (2, 2), strides=(2, 2), name="stem")(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
    y = nn.gelu(nn.Dense(5, name="mix_in")(y))
    x = x + jnp.swapaxes(nn.Dense(x.shape[1], name="mix_out")(y), 1, 2)
    return nn.Dense(4, name="head")(jnp.mean(x, axis=1))


class Ensemble(nn.Module):
  """Members with parameters of their own, and one network that they share."""

  @nn.compact
  def __call__(self, x):
    own = nn.vmap(
      nn.Dense,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=None,
      axis_size=3,
    )
    shared = nn.vmap(
      nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}
    )
    y = shared(5, name="shared")(nn.tanh(own(6, name="own")(x)))
    return jnp.mean(y, axis=0)


class StdConv(nn.Conv):
  """Standardises its weights, as Big Transfer does."""

  def param(self, name, *args, **kwargs):
    w = super().param(name, *args, **kwargs)
    if name != "kernel":
      return w
    w = w - jnp.mean(w, axis=(0, 1, 2), keepdims=True)
    return w / (jnp.std(w, axis=(0, 1, 2), keepdims=True) + 1e-5)


class BiT(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.GroupNorm(2)(StdConv(4, (3, 3), name="root")(x))
    x = StdConv(6, (1, 1), name="block")(nn.relu(x))
    return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


class ConvLSTM(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.RNN(nn.ConvLSTMCell(4, (2, 2), name="cell"))(x)
    y = nn.RNN(nn.GRUCell(3, name="gru"))(y.reshape(*y.shape[:2], -1))
    return nn.RNN(nn.MGUCell(3, name="mgu"), reverse=True)(y)


class Doubled(nn.Dense):
  """Does something before and after the layer."""

  def __call__(self, inputs):
    return 2 * super().__call__(inputs[..., ::-1])


class Mixed(nn.Module):
  """Layers of ours and of Flax, subclasses, and what is not factored."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3,), feature_group_count=2, name="grouped")(x)
    x = nn.ConvTranspose(6, (3,), name="transposed")(x)
    x = nn.Einsum((6, 6), "btd,df->btf", name="einsum")(x)
    twice = maestro.nn.Dense(6, name="ours")
    x = nn.relu(twice(nn.relu(twice(inputs=x))))
    x = nn.jit(Doubled)(6, name="doubled")(inputs=x)
    weight = self.param("raw", nn.initializers.lecun_normal(), (6, 6))
    x = nn.relu(jnp.einsum("btd,df->btf", x, weight))
    return nn.Sequential([nn.DenseGeneral((2, 3), name="general"), nn.tanh])(x)


# ---------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------


def _numbers(*shape):
  rng = np.random.default_rng(shape)
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def _filled(x):
  """Numbers of which a layer's outputs are about as large as its inputs."""
  rng = np.random.default_rng(x.shape)
  y = rng.standard_normal(x.shape, np.float32)
  return jnp.asarray(y / x.shape[-2] ** 0.5 if x.ndim > 1 else 1 + 0.1 * y)


TOKENS = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)


@dataclasses.dataclass(frozen=True)
class Foreign:
  """A model, how it is called, and what of it can be factored.

  Attributes:
    model: as it is.
    inputs: of the model; those with axis 0 of 2 are a batch.
    factored: paths of the layers that are factored.
    dense: of those that are counted, but stay dense.
    rules: what is decomposed.
    options: of `apply`, as keyword arguments.
    rngs: names of streams of random numbers.
  """

  model: nn.Module
  inputs: tuple
  factored: tuple[str, ...]
  dense: tuple[str, ...] = ()
  rules: tuple[Rule, ...] = (Rule(),)
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rngs: tuple[str, ...] = ()

  @functools.cached_property
  def adapted(self):
    return maestro.factored(self.model)

  @functools.cached_property
  def layers(self):
    return maestro.layers(self.adapted, *self.inputs, **self.options)

  @functools.cached_property
  def variables(self):
    init = functools.partial(self.adapted.init, **self.options)
    shapes = jax.eval_shape(init, self.keys, *self.inputs)
    return jax.tree.map(_filled, shapes)

  @property
  def keys(self):
    names = ("params", *self.rngs)
    return {name: jax.random.key(i) for i, name in enumerate(names)}

  @functools.cached_property
  def params(self):
    """Of the shapes of decomposed ones, since to compile SVDs takes long."""
    shapes = jax.eval_shape(
      lambda p: lowrank.decompose(p, self.rules, self.layers),
      self.variables["params"],
    )
    return jax.tree.map(_filled, shapes)

  @functools.cached_property
  def full(self):
    return lowrank.full_ranks(self.params, self.layers)

  @functools.cached_property
  def half(self):
    """Ranks about half, which differ where they are stacked."""
    return jax.tree.map(
      lambda r: jnp.asarray(
        (np.array(r) + np.arange(r.size).reshape(r.shape)) // 2, jnp.int32
      ),
      self.full,
    )

  def outputs(self, model, params, ranks=None):
    variables = {**self.variables, "params": params}
    if ranks is not None:
      variables["ranks"] = ranks
    keys = {"rngs": self.keys} if self.rngs else {}
    return model.apply(variables, *self.inputs, **keys, **self.options)

  def loss(self, *args):
    """(a function of all outputs, the outputs) of a model."""
    outputs = self.outputs(*args)
    total = sum(
      jnp.sum(jnp.cos(jnp.arange(y.size).reshape(y.shape)) * y + y * y)
      for y in jax.tree.leaves(outputs)
    )
    return total, outputs


ATTENTION = ("key", "out", "query", "value")


def _under(path, *names):
  return tuple(f"{path}/{name}" for name in names)


def _gates(path, gates):
  return _under(path, *(f"{k}{g}" for k in "ih" for g in gates))


def _transformer(tied):
  blocks = ("encoder_0", "decoder")
  inner = [f"{b}/attention" for b in blocks] + ["decoder/cross"]
  found = [path for a in inner for path in _under(a, *ATTENTION)]
  found += [path for b in blocks for path in _under(b, "up", "down")]
  found += ["source"] if tied else ["source", "target", "head"]
  inputs = (TOKENS, TOKENS[:, ::-1])
  return Foreign(Transformer(tied), inputs, tuple(found), tuple(inner))


FOREIGN = {
  "resnet": Foreign(
    ResNet("batch"),
    (_numbers(2, 6, 6, 3),),
    (
      *("Dense_0", "conv_init"),
      *_under("ResNetBlock_0", "Conv_0", "Conv_1", "proj"),
    ),
    options={"train": False},
  ),
  "vae": Foreign(
    VAE(),
    (_numbers(2, 7), jax.random.key(5)),
    (
      *_under("encoder", "fc1", "fc2_mean", "fc2_logvar"),
      *_under("decoder", "fc1", "fc2"),
    ),
    rngs=("noise",),
  ),
  "actor_critic": Foreign(
    ActorCritic(),
    (jnp.arange(144, dtype=jnp.uint8).reshape(2, 6, 6, 2),),
    ("conv1", "hidden", "logits"),
    ("value",),
  ),
  "seq2seq": Foreign(
    Seq2seq(),
    (_numbers(2, 4, 6), jnp.abs(_numbers(2, 5, 6))),
    (
      *_gates("encoder", "ifgo"),
      *_gates("decoder/cell", "ifgo"),
      "decoder/projection",
    ),
    rngs=("lstm",),
  ),
  "transformer_tied": _transformer(True),
  "transformer": _transformer(False),
  "partitioned": Foreign(
    PartitionedDecoder(), (TOKENS,), ("embed", "layers/up", "layers/down")
  ),
  "vit": Foreign(
    ViT(),
    (_numbers(2, 4, 4, 3),),
    (
      *("embedding", "head", "blocks/up", "blocks/down"),
      *_under("blocks/attention", *ATTENTION),
    ),
    ("blocks/attention",),
    options={"train": True},
    rngs=("dropout",),
  ),
  "mixer": Foreign(
    Mixer(), (_numbers(2, 4, 4, 3),), ("stem", "mix_in", "mix_out", "head")
  ),
  "ensemble": Foreign(Ensemble(), (_numbers(2, 7),), ("own", "shared")),
  "bit": Foreign(
    BiT(),
    (_numbers(2, 5, 5, 3),),
    ("head",),
    ("root", "block"),
    rules=(Rule("root|block", decompose=False), Rule()),
  ),
  "conv_lstm": Foreign(
    ConvLSTM(),
    (_numbers(2, 3, 3, 3, 2),),
    ("cell/ih", "cell/hh", *_gates("gru", "rzn"), *_gates("mgu", "fn")),
  ),
  "mixed": Foreign(
    Mixed(),
    (_numbers(2, 5, 6),),
    ("grouped", "ours", "doubled", "general"),
    ("", "transposed", "einsum"),
  ),
}


@pytest.fixture(params=FOREIGN.values(), ids=FOREIGN.keys())
def foreign(request):
  return request.param


@pytest.fixture
def close_to(close):
  """Compares the values in trees, boxed or not."""
  return lambda a, b, t=1e-5: close(meta.unbox(a), meta.unbox(b), t)


# ---------------------------------------------------------------------------
# Equalities
# ---------------------------------------------------------------------------


def _counts(foreign, params):
  """Checks the count of MACs against the products in the jaxpr."""
  found = products(
    lambda params: foreign.outputs(foreign.adapted, params),
    (params,),
    [False] * len(jax.tree.leaves(params)),
  )
  counted = maestro.count_cost(foreign.layers, params).macs
  assert sum(product.real for product in found) == 2 * counted  # two examples
  assert counted > 0


@pytest.mark.quick(1)
def test_what_can_be_factored_is_listed_and_all_is_counted(foreign):
  resolved = lowrank.resolve(foreign.rules, foreign.layers)
  assert {p for p, r in resolved.items() if r} == set(foreign.factored)
  assert {p for p, r in resolved.items() if not r} == set(foreign.dense)
  held = trees.factored(foreign.params, foreign.layers)
  assert held.keys() == set(foreign.factored)
  _counts(foreign, foreign.variables["params"])


@pytest.mark.quick(3)
def test_ranks_are_mask_merge_and_the_model(foreign, jit, close_to):
  """Values and gradients, at ranks that are traced: one compilation.

  Then what is extracted: its values, and its costs.
  """
  traces = []

  @jit
  def adapted(params, ranks):
    traces.append(1)
    loss = lambda p: foreign.loss(foreign.adapted, p, ranks)  # noqa: E731
    return jax.grad(loss, has_aux=True)(params)

  @jit
  def plain(params, ranks):
    def loss(params):
      masked = lowrank.mask(params, ranks)
      return foreign.loss(foreign.model, lowrank.merge(masked, foreign.layers))

    return jax.grad(loss, has_aux=True)(params)

  shrunk = maestro.shrink(foreign.params, foreign.half, threshold=0.3)
  sampled = maestro.sampling.one_layer(jax.random.key(1), shrunk)
  for ranks in (foreign.full, foreign.half, sampled, shrunk):
    grads, y = adapted(foreign.params, ranks)
    wanted_grads, wanted = plain(foreign.params, ranks)
    close_to(y, wanted)
    close_to(_joined(grads), _joined(wanted_grads))
    close_to(grads, lowrank.mask(grads, ranks), 0.0)  # zero beyond the rank
  assert len(traces) == 1

  small = maestro.extract(foreign.params, shrunk, foreign.layers)
  run = jit(functools.partial(foreign.outputs, foreign.adapted))
  close_to(run(small), y)
  _counts(foreign, small)
  cost = maestro.count_cost(foreign.layers, small)
  assert cost.params == sum(x.size for x in jax.tree.leaves(small))


def _joined(tree):
  """All numbers of a tree, to be compared by the largest of them."""
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.quick(2)
def test_every_rank_is_read(foreign):
  variables = {**foreign.variables, "params": foreign.params}
  keys = {"rngs": foreign.keys} if foreign.rngs else {}
  args = (foreign.adapted, variables, foreign.half, *foreign.inputs)
  maestro.check_ranks(*args, **keys, **foreign.options)


# What these models say of their batch: len(x), and the lengths of two texts.
OF_ONE_SIZE = ("actor_critic", "seq2seq")


@pytest.mark.quick(2)
def test_it_is_exported_and_runs_without_its_code(foreign, tmp_path, close_to):
  """At ranks that were found, for any batch; by the model, too."""
  shrunk = maestro.shrink(foreign.params, foreign.half, threshold=0.3)
  keys = [
    jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in foreign.inputs
  ]
  arrays = [x for x, key in zip(foreign.inputs, keys, strict=True) if not key]
  kept = [x for x, key in zip(foreign.inputs, keys, strict=True) if key]

  def apply(params, *inputs):
    variables = {**foreign.variables, "params": params}
    rngs = {"rngs": foreign.keys} if foreign.rngs else {}
    return foreign.adapted.apply(
      variables, *inputs, *kept, **rngs, **foreign.options
    )

  out = tmp_path / "exported"
  one = foreign in [FOREIGN[name] for name in OF_ONE_SIZE]
  maestro.export_model(
    *(apply, foreign.params, shrunk, foreign.layers, tuple(arrays)),
    out=out,
    any_batch=not one,
  )
  small = maestro.extract(foreign.params, shrunk, foreign.layers)
  exported, variables = maestro.load(out)
  close_to(exported.apply(variables, *arrays), apply(small, *arrays))
  model, variables = maestro.load(out, model=foreign.adapted)
  close_to(apply(variables["params"], *arrays), apply(small, *arrays))
  assert model is foreign.adapted


# ---------------------------------------------------------------------------
# As a module
# ---------------------------------------------------------------------------


class ZeroHead(nn.Module):
  """A Vision Transformer whose head begins with zeros, as is usual."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(32, (2, 2), (2, 2), "VALID", name="patches")(x)
    x = x.reshape(x.shape[0], -1, 32)
    x += self.param("positions", nn.initializers.normal(0.2), (1, 16, 32))
    for i in range(2):
      y = nn.LayerNorm()(x)
      x += nn.MultiHeadDotProductAttention(4, name=f"attention{i}")(y, y)
      y = nn.gelu(nn.Dense(64, name=f"up{i}")(nn.LayerNorm()(x)))
      x += nn.Dense(32, name=f"down{i}")(y)
    x = nn.LayerNorm()(x).mean(axis=1)
    zeros = nn.initializers.zeros
    return nn.Dense(10, kernel_init=zeros, name="head")(x)


def test_a_head_of_zeros_learns_on_factors():
  """After 200 steps, all layers factored: the loss is that of the dense one."""
  digits = data.make("digits").train
  model = maestro.factored(ZeroHead())
  tx = optax.adamw(optax.linear_schedule(2e-3, 0.0, 200))
  x = jnp.asarray(digits.inputs)
  dense = model.init(jax.random.key(0), x[:1])["params"]
  layers = maestro.layers(model, x[:1])
  factored = maestro.decompose(dense, [Rule()], layers)
  # Patches, two blocks of four products and two layers, and the head.
  assert len(trees.factored(factored)) == 14

  def loss(params, rows):
    logits = model.apply({"params": params}, x[rows])
    labels = jnp.asarray(digits.targets)[rows]
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  @jax.jit
  def train(params):
    def step(carry, rows):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params, rows)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), value

    rows = jax.random.randint(jax.random.key(1), (200, 64), 0, len(x))
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), rows)
    return loss(params, jnp.arange(len(x))), losses

  (a, first), (b, _) = train(dense), train(factored)
  assert float(first[0]) > 2.3 and float(a) < 0.5
  assert float(b) <= 1.05 * float(a)


class Net(nn.Module):
  """Of one function of (module, input)."""

  function: Any

  @nn.compact
  def __call__(self, x):
    return self.function(x)


X = _numbers(2, 6)
ALL = (Rule(),)


def _decomposed(model, x=X, rules=ALL):
  """(layers, dense parameters, decomposed ones, ranks of 2) of a model."""
  layers = maestro.layers(model, x)
  dense = jax.tree.map(_filled, jax.eval_shape(model.init, KEY, x)["params"])
  params = maestro.decompose(dense, rules, layers)
  ranks = maestro.full_ranks(params, layers)
  return layers, dense, params, jax.tree.map(lambda r: 0 * r + 2, ranks)


KEY = jax.random.key(0)


@pytest.mark.quick(0)
def test_dense_it_is_the_model_with_its_random_numbers():
  model, inputs = ViT(), (_numbers(2, 4, 4, 3),)
  keys = {"params": KEY, "dropout": jax.random.key(1)}

  @jax.jit
  def run(keys):
    return [
      m.init_with_output(keys, *inputs, train=True)
      for m in (model, maestro.factored(model))
    ]

  plain, adapted = run(keys)
  jax.tree.map(np.testing.assert_array_equal, plain, adapted)


@pytest.mark.quick(1)
def test_a_decomposed_model_is_the_model(close):
  model = maestro.factored(Net(lambda x: nn.Dense(3)(nn.Dense(5)(x))))
  _, dense, params, _ = _decomposed(model)
  close(model.apply({"params": params}, X), model.apply({"params": dense}, X))


def test_it_is_one_class_with_the_models_fields_and_signature():
  model = maestro.factored(VAE(latents=3))
  assert isinstance(model, VAE)
  assert model.latents == 3
  assert model == maestro.factored(VAE(3))
  assert hash(model) == hash(maestro.factored(VAE(3)))
  assert type(maestro.factored(model)) is type(model)
  assert maestro.introspect.mode(maestro.factored(ViT()), train=True) == {
    "train": True
  }


@pytest.mark.parametrize(
  "copied",
  [copy.copy, copy.deepcopy, lambda x: Pickler.loads(Pickler.dumps(x))],
)
def test_it_can_be_copied_and_sent_to_a_process(copied):
  model = maestro.factored(VAE(latents=3, name="vae"))
  again = copied(model)
  assert type(again) is type(model)
  assert again == model
  assert again.name == "vae"


class Penalised(nn.Module):
  """Sums over its own parameters, all of them."""

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(5, name="fc")(x)
    weights = jax.tree.leaves(self.variables["params"])
    return y, sum(jnp.sum(w * w) for w in weights)


def test_ranks_are_no_parameters_to_the_model(close):
  model = maestro.factored(Penalised())
  _, _, params, ranks = _decomposed(model)
  _, found = model.apply({"params": params, "ranks": ranks}, X)
  close(found, sum(jnp.sum(w * w) for w in jax.tree.leaves(params)))
  variables = model.bind({"params": params, "ranks": ranks}).variables
  assert variables["ranks"] == ranks


@pytest.mark.quick(1)
def test_other_methods_and_bound_modules_read_factors(close):
  foreign = FOREIGN["vae"]
  variables = {"params": foreign.params, "ranks": foreign.half}
  masked = {"params": lowrank.mask(foreign.params, foreign.half)}
  merged = {"params": lowrank.merge(masked["params"], foreign.layers)}
  z = _numbers(2, 4)
  wanted = foreign.model.apply(merged, z, method="generate")
  adapted = foreign.adapted
  close(adapted.apply(variables, z, method="generate"), wanted)
  for method in (VAE.generate, foreign.model.generate, adapted.generate):
    close(adapted.apply(variables, z, method=method), wanted)
  close(
    adapted.apply(variables, z, method=lambda m, z: nn.sigmoid(m.decoder(z))),
    wanted,
  )
  close(adapted.bind(variables).generate(z), wanted)


def test_arguments_of_a_method_may_have_any_name(close):
  def method(module, x, *, function, m):
    return module(x) + function + m

  model = maestro.factored(Decoder())
  variables = model.init(KEY, X)
  given = {"function": 1.0, "m": 2.0}
  found = model.apply(variables, X, method=method, **given)
  close(found, Decoder().apply(variables, X) + 3)


def test_it_can_be_a_module_within_another(close):
  """Of a class, which takes its ranks below its own path."""

  def function(x):
    return nn.Dense(4, name="head")(maestro.factored(nn.Dense)(5, name="in")(x))

  model = Net(function)
  adapted = maestro.factored(model)
  layers, _, params, ranks = _decomposed(adapted, rules=(Rule("in"),))
  variables = {"params": params, "ranks": ranks}
  wanted = {"params": maestro.merge(maestro.mask(params, ranks), layers)}
  close(model.apply(variables, X), model.apply(wanted, X))
  close(adapted.apply(variables, X), model.apply(wanted, X))


def test_a_class_within_another_keeps_the_names_of_a_checkpoint():
  def net(block):
    return Net(lambda x: block(4)(nn.relu(block(6)(x)[0])))

  x = _numbers(2, 7)
  variables = jax.eval_shape(net(Encoder).init, KEY, x)
  assert variables["params"].keys() == {"Encoder_0", "Encoder_1"}
  ours = net(maestro.factored(Encoder)).init
  assert jax.eval_shape(ours, KEY, x) == variables


def test_mutable_parameters_come_back_as_they_went_in():
  model = maestro.factored(Net(lambda x: nn.BatchNorm(False)(nn.Dense(5)(x))))
  _, _, params, ranks = _decomposed(model)
  stats = {"BatchNorm_0": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}
  variables = {"params": params, "ranks": ranks, "batch_stats": stats}
  y, state = model.apply(variables, X, mutable=True)
  assert state.keys() == variables.keys()
  jax.tree.map(
    np.testing.assert_array_equal,
    {k: state[k] for k in ("params", "ranks")},
    {"params": params, "ranks": ranks},
  )
  again, state = model.apply(variables, X, mutable=["batch_stats"])
  np.testing.assert_array_equal(again, y)
  assert state.keys() == {"batch_stats"}


@pytest.mark.quick(1)
def test_frozen_half_precision_parameters(close):
  model = maestro.factored(
    Net(lambda x: nn.Dense(5, dtype=jnp.bfloat16, name="fc")(x))
  )
  layers, _, params, ranks = _decomposed(model)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  y = model.apply(FrozenDict(params=params, ranks=ranks), X)
  assert y.dtype == jnp.bfloat16
  masked = maestro.mask(FrozenDict(params), ranks)
  wanted = model.apply({"params": maestro.merge(masked, layers)}, X)
  close(y, wanted, 2e-2)


@pytest.mark.quick(1)
def test_a_kernel_beside_factors_is_added_once(close):
  model = maestro.factored(
    Net(lambda x: maestro.nn.Dense(5, name="b")(nn.Dense(4, name="a")(x)))
  )
  layers, dense, params, ranks = _decomposed(model)
  summed = {p: {**dense[p], **params[p]} for p in params}
  wanted = maestro.merge(maestro.mask(summed, ranks), layers)
  close(
    model.apply({"params": summed, "ranks": ranks}, X),
    model.apply({"params": wanted}, X),
  )


@pytest.mark.quick(0)
def test_batch_norm_over_an_axis_of_vmap(close):
  """Training, statistics and all, as replicas do it."""
  foreign = FOREIGN["resnet"]
  x = _numbers(3, 2, 6, 6, 3)

  def run(model, params, ranks=None):
    variables = {**foreign.variables, "params": params}
    variables |= {} if ranks is None else {"ranks": ranks}
    apply = functools.partial(model.apply, variables, mutable=["batch_stats"])
    return jax.vmap(apply, axis_name="batch")(x)

  masked = lowrank.mask(foreign.params, foreign.half)
  wanted = run(foreign.model, lowrank.merge(masked, foreign.layers))
  close(run(foreign.adapted, foreign.params, foreign.half), wanted, 5e-5)


# ---------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------


class OwnEinsum(nn.Dense):
  """Multiplies by its kernel in its own way."""

  @nn.compact
  def __call__(self, inputs):
    init = nn.initializers.lecun_normal()
    shape = (inputs.shape[-1], self.features)
    return jnp.einsum("bi,io->bo", inputs, self.param("kernel", init, shape))


class OwnParam(nn.Dense):
  """Reads its parameters in its own way."""

  def param(self, name, *args, **kwargs):
    return super().param(name, *args, **kwargs)


class OwnFactors(nn.Dense):
  """Names its own parameters as factors are named."""

  @nn.compact
  def __call__(self, inputs):
    u = self.param("u", nn.initializers.ones, (6, 1))
    v = self.param("v", nn.initializers.ones, (1, self.features))
    return super().__call__(inputs) + inputs @ u @ v


def _tied(x):
  embed = nn.Embed(6, 6, name="embed")
  return embed(jnp.arange(2)) @ embed.embedding.T + x


def _read(x):
  layer = nn.Dense(6, name="layer")
  return layer(x) @ layer.variables["params"]["kernel"]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
  ("function", "path"),
  [
    (lambda x: OwnEinsum(4, name="own")(x), "own"),
    (lambda x: nn.Dense(4, dot_general=jax.lax.dot_general, name="d")(x), "d"),
    (lambda x: OwnParam(4, name="read")(x), "read"),
  ],
)
@pytest.mark.parametrize("summed", [False, True])
def test_a_layer_that_cannot_follow_is_refused_by_name(function, path, summed):
  model = maestro.factored(Net(function))
  _, dense, params, ranks = _decomposed(model)
  if summed:  # its kernel is there, and its factors would be forgotten
    params = {path: {**dense[path], **params[path]}}
  for variables in ({}, {"ranks": ranks}):
    rule = rf"Rule\('{path}', decompose=False\)"
    with pytest.raises(LowRankError, match=f"layer '{path}'.*{rule}"):
      model.apply({"params": params, **variables}, X)
  rules = [Rule(path, decompose=False)]
  layers = maestro.layers(model, X)
  assert maestro.decompose(dense, rules, layers) == dense
  model.apply({"params": dense}, X)


def _transposed(x):
  layer = nn.map_variables(
    nn.Dense, "params", lambda p: jax.tree.map(jnp.transpose, p), init=True
  )
  return layer(6, name="transposed")(x)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("function", "path"),
  [
    (_transposed, "transposed"),
    (lambda x: StdConv(4, (1,), name="std")(x[:, None]), "std"),
    (
      lambda x: nn.WeightNorm(nn.Dense(4, name="norm"))(x),
      "norm",
    ),
    (
      lambda x: nn.SpectralNorm(nn.Dense(4, name="s"))(x, update_stats=False),
      "s",
    ),
    (_tied, "embed"),
    (_read, "layer"),
  ],
)
def test_a_kernel_that_is_used_otherwise_is_refused_by_name(function, path):
  model = maestro.factored(Net(lambda x: nn.Dense(3)(function(x))))
  with pytest.raises(LowRankError, match=f"layer '{path}'.*decompose=False"):
    _decomposed(model)
  _decomposed(model, rules=(Rule(path, decompose=False), Rule()))


@pytest.mark.parametrize(
  ("function", "path", "message"),
  [
    (_tied, "embed", r"\['embed'\].*outside.*Rule\('embed', decompose=False"),
    (_read, "layer", r"reads 'kernel'.*\['layer'\].*Rule\('layer', decompose"),
  ],
)
def test_a_weight_that_is_read_outside_is_explained(function, path, message):
  model = maestro.factored(Net(function))
  params = {path: {"u": jnp.ones((6, 2)), "v": jnp.ones((2, 6))}}
  if path == "layer":
    params[path]["bias"] = jnp.ones(6)
  with pytest.raises(LowRankError, match=message):
    model.apply({"params": params}, X)


@pytest.mark.parametrize("name", ["kernel", "embedding"])
def test_a_key_error_of_a_dense_model_stays_what_it_is(name):
  """It is the user's own, whatever is missing where."""
  model = maestro.factored(Net(lambda x: nn.Dense(3)(x) + {"a": 1}[name]))
  with pytest.raises(KeyError, match=name):  # which is no LowRankError
    model.init(KEY, X)
  params = {"Dense_0": {"kernel": jnp.ones((6, 3)), "bias": jnp.ones(3)}}
  with pytest.raises(KeyError, match=name):
    model.apply({"params": params}, X)


def test_own_parameters_of_the_same_names_are_refused():
  model = maestro.factored(Net(lambda x: OwnFactors(4, name="own")(x)))
  with pytest.raises(LowRankError, match=r"'own'.*OwnFactors.*`u` of its own"):
    maestro.layers(model, X)


def test_a_rule_that_only_matches_what_is_not_factorable_says_so():
  model = maestro.factored(
    Net(lambda x: nn.Dense(3)(nn.Einsum((6, 4), "bi,io->bo", name="e")(x)))
  )
  with pytest.raises(LowRankError, match=r"'e'.*cannot be factored"):
    _decomposed(model, rules=(Rule("e"), Rule()))
  _decomposed(model, rules=(Rule("e", decompose=False), Rule()))


@pytest.mark.parametrize(
  ("ranks", "message"),
  [
    ({"elsewhere": {"rank": 1}}, "'elsewhere' has no factors"),
    ({"Dense_0": {"rank": 7}}, r"rank 7 is outside \[0, 5\]"),
    ({"Dense_0": {"rank": 1.5}}, "not an integer"),
    ({"Dense_0": {"rank": jnp.ones(3, jnp.int32)}}, r"rank of shape \(3,\)"),
    ({"Dense_0": {"ranks": 1}}, "unexpected leaf 'ranks'"),
  ],
)
def test_ranks_that_do_not_fit_are_errors(ranks, message):
  model = maestro.factored(Net(lambda x: nn.Dense(5)(x)))
  _, _, params, _ = _decomposed(model)
  with pytest.raises(LowRankError, match=message):
    model.apply({"params": params, "ranks": ranks}, X)


@pytest.mark.quick(1)
def test_layers_of_nnx_run_and_stay_dense():
  model = maestro.factored(nnx.bridge.to_linen(nnx.Linear, 6, 4))
  params = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
  layers = maestro.layers(model, X)
  assert maestro.count_cost(layers, params).macs == 24
  assert model.apply({"params": params}, X).shape == (2, 4)
  with pytest.raises(LowRankError, match="cannot be factored"):
    maestro.decompose(params, ALL, layers)


def test_what_is_made_of_a_factored_class_is_refused():
  block = maestro.factored(Decoder)

  class Wider(block):
    pass

  for cls in (Wider, nn.remat(block)):
    with pytest.raises(LowRankError, match="make it of Decoder as it was"):
      maestro.factored(cls())

  class Plain(Decoder):  # of whose parent a factored class exists
    pass

  model = maestro.factored(Plain())
  assert isinstance(model, Plain)
  assert not isinstance(model, block)


def test_a_class_that_is_factored_can_be_forgotten():
  class Passing(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(x)

  jax.eval_shape(maestro.factored(Passing()).init, KEY, X)
  assert maestro.factored(Passing) is maestro.factored(Passing)
  known = weakref.ref(Passing)
  del Passing
  gc.collect()
  assert known() is None


def test_what_is_no_free_module_is_refused():
  with pytest.raises(LowRankError, match=r"nnx\.Module, got a function"):
    maestro.factored(lambda x: x)
  with pytest.raises(LowRankError, match=r"maestro.factored\(Dense\)"):
    Net(lambda x: maestro.factored(nn.Dense(4))(x)).init(KEY, X)
  with pytest.raises(LowRankError, match="belongs to no other"):
    maestro.factored(nn.Dense(4).bind({}))
