"""Exported programs hold each platform's own form of a convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import introspect, lowrank
from maestro.deploy import stablehlo
from maestro.models import LeNet, ResNet18

NETWORKS = {
  "resnet18": (ResNet18(num_classes=10, width=4), (8, 8, 3), 20),
  "images of 32 x 32": (ResNet18(num_classes=10, width=4), (32, 32, 3), 20),
  "lenet": (LeNet(num_classes=10), (28, 28, 1), 2),
}


def _make(name):
  """Returns (model, variables, abstract inputs, number of convolutions)."""
  model, shape, convolutions = NETWORKS[name]
  example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), example)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: jnp.asarray(1 + 0.1 * rng.random(x.shape), x.dtype), shapes
  )
  return model, variables, example, convolutions


@pytest.fixture(params=NETWORKS)
def network(request):
  return _make(request.param)


def _convolutions(path):
  module = jax.export.deserialize(bytearray(path.read_bytes())).mlir_module()
  return module.count("stablehlo.convolution")


@pytest.mark.quick(3)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_every_convolution(
  network, platform, tmp_path, monkeypatch
):
  model, variables, example, convolutions = network
  monkeypatch.setattr(stablehlo, "PLATFORMS", (platform,))
  stablehlo.write(tmp_path / "hlo", model, variables, example)
  assert _convolutions(tmp_path / "hlo") == convolutions


@pytest.mark.quick(0)
def test_factors_get_a_convolution_each(tmp_path, monkeypatch):
  model, variables, example, _ = _make("resnet18")
  layers = introspect.layers(model, example)
  params = lowrank.decompose(variables["params"], [lowrank.Rule()], layers)
  ranks = jax.tree.map(lambda r: (r + 7) // 8, lowrank.full_ranks(params))
  small = lowrank.truncate(params, ranks)
  monkeypatch.setattr(stablehlo, "PLATFORMS", ("tpu",))
  stablehlo.write(
    tmp_path / "hlo", model, variables | {"params": small}, example
  )
  assert _convolutions(tmp_path / "hlo") == 20


@pytest.mark.quick(1)
def test_a_cpu_gets_products_where_they_win(tmp_path, monkeypatch):
  model, variables, example, convolutions = _make("resnet18")
  monkeypatch.setattr(stablehlo, "PLATFORMS", ("cpu",))
  stablehlo.write(tmp_path / "hlo", model, variables, example)
  assert _convolutions(tmp_path / "hlo") < convolutions


@pytest.mark.quick(0)
def test_all_platforms_share_one_program(network, tmp_path):
  model, variables, example, convolutions = network
  record = stablehlo.write(tmp_path / "hlo", model, variables, example)
  assert record["platforms"] == ["cpu", "cuda", "tpu"]
  assert _convolutions(tmp_path / "hlo") >= convolutions
  x = np.random.default_rng(1).normal(size=(3, *example.shape[1:]))
  x = x.astype(np.float32)
  found = stablehlo.read(tmp_path / "hlo")(x)
  expected = model.apply(variables, x, train=False)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
