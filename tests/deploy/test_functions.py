"""Any function of parameters: exported, reloaded, run without its code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro.deploy import artifact, files, functions, slices
from maestro.deploy.directory import (
  CONFIG,
  METADATA,
  STABLEHLO,
  WEIGHTS,
  ArtifactError,
)
from maestro.deploy.functions import FunctionError
from maestro.deploy.verify import DifferenceError
from maestro.errors import UserError


class Foreign(nn.Module):
  """Two inputs, one of them a dict; a dict and a tuple come out."""

  @nn.compact
  def __call__(self, batch, *, scale):
    x = nn.Embed(6, 8, name="embed")(batch["tokens"])
    x = nn.RNN(nn.GRUCell(8, name="cell"))(x)
    x = nn.BatchNorm(use_running_average=True, name="norm")(x)
    y = (
      nn.Dense(6, name="head")(x * scale[None, None]) + batch["offset"][:, None]
    )
    return {"logits": y, "states": (x[:, -1], x[:, 0])}


MODEL = maestro.factored(Foreign())


def _batch(n):
  rng = np.random.default_rng(n)
  return {
    "tokens": rng.integers(0, 6, (n, 3)).astype(np.int32),
    "offset": rng.standard_normal((n, 6)).astype(np.float32),
  }


SCALE = np.full((8,), 0.5, np.float32)


@pytest.fixture(scope="module")
def trained():
  """(apply, params, ranks, layers), with batch statistics of its own."""
  batch = _batch(2)
  layers = maestro.layers(MODEL, batch, scale=SCALE)
  variables = jax.jit(MODEL.init)(jax.random.key(0), batch, scale=SCALE)
  stats = {"norm": {"mean": jnp.arange(8) / 9, "var": 1 + jnp.arange(8) / 9}}
  params = jax.jit(
    lambda p: maestro.decompose(p, [maestro.Rule("embed|cell.*|head")], layers)
  )(variables["params"])
  ranks = jax.tree.map(lambda r: r // 3, maestro.full_ranks(params, layers))

  def apply(params, batch, *, scale):
    variables = {"params": params, "batch_stats": stats}
    return MODEL.apply(variables, batch, scale=scale)

  return apply, params, ranks, layers


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
  out = tmp_path_factory.mktemp("exports") / "small"
  config = maestro.export_model(
    *trained, (_batch(2),), {"scale": SCALE}, out=out
  )
  return out, config


@pytest.mark.quick(1)
def test_it_runs_at_any_batch_without_its_code(trained, exported, close):
  apply, params, ranks, _ = trained
  model, variables = maestro.load(exported[0])
  masked = maestro.mask(params, ranks)
  for n in (1, 5):
    wanted = apply(masked, _batch(n), scale=SCALE)
    found = model.apply(variables, _batch(n), scale=SCALE)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    close(found, wanted)


@pytest.mark.quick(1)
def test_its_weights_are_what_is_extracted_and_run_in_the_model(
  trained, exported, close
):
  apply, params, ranks, layers = trained
  model, variables = maestro.load(exported[0], model=MODEL)
  assert model is MODEL
  small = maestro.extract(params, ranks, layers)
  close(variables, {"params": small})
  wanted = apply(small, _batch(3), scale=SCALE)
  close(apply(variables["params"], _batch(3), scale=SCALE), wanted)


def test_the_config_says_what_it_costs(trained, exported):
  _, params, ranks, layers = trained
  _, config = exported
  (size,) = config["profiles"]
  small = maestro.extract(params, ranks, layers)
  assert size["params"] == sum(x.size for x in jax.tree.leaves(small))
  assert size["macs"] == maestro.count_cost(layers, small).macs
  assert size["macs"] < config["dense"]["macs"]
  assert max(size["difference"].values()) < 1e-5
  assert size["ranks"]["head"] == 2
  inputs = config["function"]["inputs"]
  assert "tokens: int32[n, 3]" in inputs
  assert "scale=float32[8]" in inputs


def test_its_weights_are_marked_as_those_of_any_export(exported):
  with files.Reader(exported[0] / WEIGHTS) as reader:
    assert reader.metadata == METADATA


@pytest.mark.quick(0)
def test_a_size_that_is_not_there_is_told(exported):
  with pytest.raises(ArtifactError, match="holds no profile that small"):
    maestro.load(exported[0], budget="macs:0.01")
  maestro.load(exported[0], budget="macs:1.0")


@pytest.mark.parametrize("name", [WEIGHTS, STABLEHLO])
def test_an_altered_byte_is_found(exported, tmp_path, name):
  for path in exported[0].iterdir():
    data = bytearray(path.read_bytes())
    if path.name == name:
      data[-1] ^= 1
    (tmp_path / path.name).write_bytes(data)
  with pytest.raises(ArtifactError, match=f"{name} is altered"):
    maestro.load(tmp_path)


def test_who_reads_networks_says_that_it_is_none(exported):
  out, _ = exported
  for read in (artifact.read, slices.read):
    with pytest.raises(
      ArtifactError, match=r"was made by maestro\.export_model"
    ):
      read(out)


def test_other_arguments_are_told(exported):
  model, variables = maestro.load(exported[0])
  with pytest.raises(FunctionError, match=r"tokens: int32\[n, 3\]"):
    model.apply(variables, _batch(2))
  wrong = {**_batch(2), "offset": np.ones((2, 7), np.float32)}
  with pytest.raises(FunctionError, match="an exported function of"):
    model.apply(variables, wrong, scale=SCALE)


def test_a_later_export_takes_its_place_and_nothing_elses(
  trained, exported, tmp_path
):
  out = tmp_path / "out"
  out.mkdir()
  (out / "thesis.tex").write_text("")
  with pytest.raises(UserError, match=r"thesis\.tex"):
    maestro.export_model(*trained, (_batch(2),), {"scale": SCALE}, out=out)
  assert {path.name for path in exported[0].iterdir()} == {
    *(CONFIG, WEIGHTS, STABLEHLO)
  }


ONES = (np.ones((2, 4), np.float32),)


def _function(apply=None, example=ONES, **options):
  """Arguments of an export of one layer."""
  model = maestro.factored(nn.Dense(5))
  x = jnp.ones((2, 4))
  layers = maestro.layers(model, x)
  params = {"u": jnp.ones((4, 2)), "v": jnp.ones((2, 5)), "bias": jnp.ones(5)}
  apply = apply or (lambda p, x: model.apply({"params": p}, x))
  return (apply, params, {"rank": 1}, layers, example), options


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    (
      _function(example=(np.ones((2, 4)), False)),
      FunctionError,
      r"example\[0\]\[1\]: False is no array; what does not change",
    ),
    (
      _function(example=(*ONES, jax.random.key(0))),
      FunctionError,
      r"example\[0\]\[1\]: a random key \(key<.*jax\.random\.key_data",
    ),
    (
      _function(lambda p, x: nn.Dense(5).apply({"params": p}, x)),
      FunctionError,
      r"does not run on factors.*maestro\.factored",
    ),
    (
      _function(lambda p, x: jnp.sum(x) * p["u"].shape[-1]),
      DifferenceError,
      "the extracted network differs from the masked one",
    ),
    (
      _function(lambda p, x: x.reshape(4, 2) @ jnp.ones((2, 1))),
      FunctionError,
      r"another batch size.*any_batch=False",
    ),
    (
      _function(lambda p, x: x.reshape(len(x), -1)),
      FunctionError,
      r"x\.shape\[0\] is known, but not len\(x\)",
    ),
    (
      _function(lambda p, x: x + jnp.ones((2, 4))),
      FunctionError,
      r"cannot be lowered.*any batch size.*any_batch=False",
    ),
  ],
)
def test_what_cannot_be_exported_writes_nothing(
  arguments, error, message, tmp_path
):
  args, options = arguments
  with pytest.raises(error, match=message):
    maestro.export_model(*args, out=tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


def test_abstract_tokens_are_any_that_all_tables_have(tmp_path):
  def apply(params, tokens):
    raise RuntimeError(tokens)

  layers = {
    "wide": maestro.LayerSpec("embed", (90,), (4,)),
    "head": maestro.LayerSpec("dense", (4,), (2,)),
    "narrow": maestro.LayerSpec("embed", (9,), (4,)),
  }
  tokens = jax.ShapeDtypeStruct((6, 50), jnp.int32)
  with pytest.raises(RuntimeError) as found:
    maestro.export_model(apply, {}, {}, layers, (tokens,), out=tmp_path / "out")
  (drawn,) = found.value.args
  assert drawn.shape == (6, 50)
  assert set(np.unique(drawn)) == set(range(9))


def test_one_size_alone_and_an_abstract_example(tmp_path):
  args, _ = _function(
    lambda p, x, n: (x.reshape(4, 2) * n, p["bias"]),
    (
      jax.ShapeDtypeStruct((2, 4), jnp.float32),
      jax.ShapeDtypeStruct((), jnp.int32),
    ),
  )
  maestro.export_model(*args, out=tmp_path / "out", any_batch=False)
  model, variables = maestro.load(tmp_path / "out")
  assert isinstance(model, functions.ExportedFunction)
  x = np.arange(8, dtype=np.float32).reshape(2, 4)
  y, bias = model.apply(variables, x, np.int32(3))
  np.testing.assert_array_equal(y, 3 * x.reshape(4, 2))
  np.testing.assert_array_equal(bias, np.ones(5))
