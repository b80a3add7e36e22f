"""Tests Transformers: exact costs, forms that agree, token by token, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import introspect as nn
from maestro import lowrank, models, sampling
from maestro.cost import count as cost
from maestro.errors import UserError
from maestro.lowrank import Rule
from maestro.models.attention import rotate, unstack

WORDS = 11
SMALL = {"layers": 2, "width": 8, "heads": 2}
TRANSFORMER = functools.partial(models.Transformer, WORDS, hidden=12, **SMALL)
GPT = functools.partial(models.GPT, WORDS, length=9, **SMALL)
VIT = functools.partial(models.ViT, 5, patch=4, hidden=12, **SMALL)
TOKENS = jnp.asarray(
  [
    [[4, 5, 6, 3, 0, 0, 0], [2, 7, 8, 9, 10, 0, 0]],
    [[9, 8, 7, 6, 5, 3, 0], [2, 4, 0, 0, 0, 0, 0]],
  ]
)
IMAGES = jnp.asarray(
  np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32
)
NETWORKS = {
  "transformer": (TRANSFORMER(), TOKENS),
  "pre-norm": (TRANSFORMER(norm="pre"), TOKENS),
  "scanned transformer": (TRANSFORMER(scan=True), TOKENS),
  "gpt": (GPT(), TOKENS[:, 1]),
  "rotary gpt": (GPT(positions="rotary"), TOKENS[:, 1]),
  "scanned gpt": (GPT(scan=True), TOKENS[:, 1]),
  "vit": (VIT(), IMAGES),
  "scanned vit": (VIT(scan=True), IMAGES),
}


@functools.cache
def made(name):
  """Returns (model, inputs, layers, random variables), dense."""
  model, x = NETWORKS[name]
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), shapes
  )
  return model, x, nn.layers(model, x), variables["params"]


@functools.cache
def factored(name):
  """Returns (factors of all layers, their full ranks, ranks below these)."""
  _, _, layers, dense = made(name)
  params = lowrank.decompose(dense, [Rule()], layers)
  full = lowrank.full_ranks(params, layers)
  return params, full, sampling.independent(jax.random.key(3), full)


@pytest.mark.quick(1)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  ("model", "x", "params", "macs"),
  [
    (
      models.Transformer(9521),  # the paper's, on Multi30k
      jax.ShapeDtypeStruct((1, 2, 16), jnp.int32),
      53_890_048,
      # Kernels of 6 + 6 blocks, the projection; products of activations.
      16 * (6 * (12 + 16) * 512**2 + 9521 * 512) + 3 * 6 * 2 * 16**2 * 512,
    ),
    (
      models.GPT(50257, 1024, 12, 768, 12),  # GPT-2, the small one
      jax.ShapeDtypeStruct((1, 64), jnp.int32),
      124_439_808,
      64 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 2 * 64**2 * 768,
    ),
    (
      models.ViT(1000),  # timm's vit_small_patch16_224 has as many
      jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
      22_050_664,
      196 * 768 * 384
      + 12 * (197 * 12 * 384**2 + 2 * 197**2 * 384)
      + 384 * 1000,
    ),
  ],
)
def test_networks_cost_what_is_published(model, x, params, macs, scan):
  model = model.clone(scan=scan)
  layers = nn.layers(model, x)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  found = cost.count_cost(layers, shapes)
  assert (found.params, found.macs) == (params, macs)


@pytest.mark.quick(1)
def test_products_of_activations_stand_on_lines_of_their_own():
  layers = nn.layers(TRANSFORMER(), TOKENS)
  other = {p: s.positions for p, s in layers.items() if s.kind == "other"}
  blocks = ("encoder/layers_0", "encoder/layers_1")
  decoders = ("decoder/layers_0", "decoder/layers_1")
  want = {f"{b}/attention" for b in blocks + decoders}
  want |= {f"{b}/cross" for b in decoders}
  assert other == dict.fromkeys(want, 2 * 7 * 7 * 8)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_factored_networks_cost_what_their_shapes_say(name, fraction):
  _, _, layers, dense = made(name)
  params = jax.eval_shape(
    lambda p: lowrank.decompose(p, [Rule()], layers), dense
  )
  ranks = lowrank.full_ranks(params, layers)
  ranks = jax.tree.map(
    lambda r: np.maximum(np.asarray(r) * fraction, 1).astype(np.int32), ranks
  )
  cut = jax.eval_shape(lambda p: lowrank.truncate(p, ranks), params)
  found = cost.count_cost(layers, cut)
  assert found.params == sum(x.size for x in jax.tree.leaves(cut))
  macs = 0
  for spec in layers.values():
    if spec.kind == "other":
      macs += spec.positions
      continue
    r = max(int(spec.full_rank * fraction), 1)
    n = int(np.prod(spec.stack, dtype=int))
    macs += n * spec.positions * r * (spec.n_in + spec.n_out)
    macs += n * spec.lookups * r * spec.n_out  # of rows, before they are used
  assert found.macs == macs


# What a scan does is tested against the blocks one by one, below.
@pytest.mark.quick(0)
@pytest.mark.parametrize(
  "name", ["scanned transformer", "pre-norm", "gpt", "rotary gpt", "vit"]
)
def test_every_form_of_ranks_is_the_same_network(name, close):
  model, x, layers, dense = made(name)
  params, full, ranks = factored(name)
  nn.check_ranks(model, {"params": params}, full, x)

  @jax.jit
  def outputs(params, ranks):
    masked = lowrank.mask(params, ranks)
    return (
      model.apply({"params": dense}, x),
      model.apply({"params": params}, x),
      model.apply({"params": params, "ranks": ranks}, x),
      model.apply({"params": masked}, x),
    )

  whole, again, sampled, masked = outputs(params, ranks)
  scale = float(np.max(np.abs(whole)))
  close(again, whole, 2e-5)
  close(sampled, masked, 2e-5)
  small = lowrank.extract(params, ranks, layers)
  close(model.apply({"params": small}, x), masked, 2e-5)
  assert np.max(np.abs(sampled - whole)) > 1e-2 * scale


@pytest.mark.quick(0)
@pytest.mark.parametrize("name", ["transformer", "gpt", "vit"])
def test_a_scan_of_blocks_is_the_blocks(name, close):
  loop, x, _, _ = made(name)
  scanned, _, _, _ = made(f"scanned {name}")
  params, _, ranks = factored(f"scanned {name}")

  def loss(model, params, ranks):
    y = model.apply({"params": params, "ranks": ranks}, x)
    return jnp.sum(jnp.tanh(y)), y

  @functools.partial(jax.jit, static_argnums=0)
  def both(model, params, ranks):
    return jax.value_and_grad(loss, 1, has_aux=True)(model, params, ranks)

  (_, y), grads = both(scanned, params, ranks)
  (_, want), want_grads = both(loop, unstack(params), unstack(ranks))
  close(y, want)
  # Some are zero but for rounding: a key's bias changes no attention.
  most = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(want_grads))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * most),
    unstack(grads),
    want_grads,
  )


@pytest.mark.quick(0)
@pytest.mark.parametrize("name", ["pre-norm", "gpt", "rotary gpt"])
def test_token_by_token_is_all_at_once(name, close):
  model, x, _, _ = made(name)
  params, _, ranks = factored(name)
  variables = {"params": params, "ranks": ranks}
  want = model.apply(variables, x)
  read = x[:, 1] if x.ndim == 3 else x
  given = (x[:, 0], x.shape[-1]) if x.ndim == 3 else (len(x),)
  cache = model.apply(variables, *given, method="begin")
  step = jax.jit(functools.partial(model.apply, method="step"))
  for at in range(read.shape[1]):
    logits, cache = step(variables, cache, read[:, at], at)
    known = np.asarray(read[:, at] != 0) if x.ndim == 3 else slice(None)
    close(logits[known], want[known, at], 2e-5)


def test_a_scan_refuses_to_go_token_by_token():
  model, x, _, dense = made("scanned gpt")
  with pytest.raises(UserError, match="unstack"):
    model.apply({"params": dense}, len(x), method="begin")


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["transformer", "gpt"])
def test_nothing_is_seen_of_what_comes_later(name):
  model, x, _, params = made(name)
  want = model.apply({"params": params}, x)
  at = 3
  changed = x.at[..., -1, at + 1 :].set(6) if x.ndim == 3 else x
  changed = changed if x.ndim == 3 else x.at[:, at + 1 :].set(6)
  found = model.apply({"params": params}, changed)
  row = np.asarray(x[0, 1] if x.ndim == 3 else x[0])
  assert np.all(row[: at + 1] != 0)
  np.testing.assert_array_equal(found[0, : at + 1], want[0, : at + 1])
  assert np.any(found[0, at + 1 :] != want[0, at + 1 :])


def test_rotated_products_know_how_far_and_not_where(close):
  q, k = np.random.default_rng(0).normal(size=(2, 6))
  at = np.arange(9)

  def product(i, j):
    turned = [
      rotate(jnp.asarray(x, jnp.float32)[None, None, None], p)[0, 0, 0]
      for x, p in ((q, i), (k, j))
    ]
    return float(turned[0] @ turned[1])

  # Features i and i + 3 as complex numbers, equation 34.
  rates = 10_000.0 ** (-np.arange(3) / 3)
  pairs = (q[:3] + 1j * q[3:]) * np.conj(k[:3] + 1j * k[3:])
  want = [np.sum(pairs * np.exp(-1j * n * rates)).real for n in at]
  close([product(0, n) for n in at], want)
  close([product(n, 2 * n) for n in at], want)
  many = jnp.broadcast_to(jnp.asarray(q, jnp.float32), (1, 9, 1, 6))
  close(rotate(many)[:, 4:], rotate(many[:, 4:], 4))


@pytest.mark.quick(0)
def test_padding_changes_nothing_and_has_no_logits(close):
  model, x, _, params = made("transformer")
  want = model.apply({"params": params}, x)
  longer = jnp.pad(x, [(0, 0), (0, 0), (0, 4)])
  found = model.apply({"params": params}, longer)
  close(found[:, :7], want, 1e-5)
  assert not np.any(found[:, 7:])
  assert not np.any(np.asarray(want)[np.asarray(x[:, 1] == 0)])


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["transformer", "gpt", "vit"])
def test_dropout_is_of_training_alone(name):
  model, x, _, params = made(name)
  model = model.clone(dropout=0.5)
  keys = [{"dropout": jax.random.key(i)} for i in (0, 0, 1)]
  a, b, c = (
    model.apply({"params": params}, x, train=True, rngs=k) for k in keys
  )
  np.testing.assert_array_equal(a, b)
  assert np.any(a != c)
  y = model.apply({"params": params}, x)
  want = NETWORKS[name][0].apply({"params": params}, x)
  np.testing.assert_array_equal(y, want)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["transformer", "gpt", "vit"])
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(name):
  model, x, _, _ = made(name)
  model = model.clone(dtype="bfloat16")
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  assert {str(v.dtype) for v in jax.tree.leaves(variables)} == {"float32"}
  assert jax.eval_shape(model.apply, variables, x).dtype == jnp.bfloat16


def test_options_that_do_not_fit_are_named():
  with pytest.raises(UserError, match=r"model\.heads: 3 heads do not divide"):
    nn.layers(models.GPT(WORDS, width=8, heads=3), TOKENS[:, 1])
  with pytest.raises(UserError, match=r"model\.length: 5 positions"):
    nn.layers(models.GPT(WORDS, 5, **SMALL), TOKENS[:, 1])
  with pytest.raises(UserError, match=r"model\.positions: 'rotary'.* of 3"):
    odd = models.GPT(WORDS, width=6, heads=2, positions="rotary")
    nn.layers(odd, TOKENS[:, 1])
  with pytest.raises(UserError, match=r"model\.patch: images of 8 x 8"):
    nn.layers(VIT(patch=3), IMAGES)
