"""Tests the networks: exact costs, shapes, dtypes and bad options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import introspect as nn
from maestro import lowrank, models, sampling, trees
from maestro.cost import count as cost
from maestro.errors import UserError
from maestro.lowrank import Rule

CIFAR, IMAGENET = (1, 32, 32, 3), (1, 224, 224, 3)
RESNET, VGG = models.ResNet18(10), models.VGG19(10)
RESNET_LARGE = models.ResNet18(1000, stem="imagenet")


def abstract(model, shape):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  return nn.layers(model, x), variables, x


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("model", "shape", "params", "macs"),
  [
    (RESNET, CIFAR, 11_173_962, 555_422_720),
    (models.ResNet34(10), CIFAR, 21_282_122, 1_159_402_496),
    # torchvision's resnet18 and resnet34 have as many parameters.
    (RESNET_LARGE, IMAGENET, 11_689_512, 1_814_073_344),
    (
      models.ResNet34(1000, stem="imagenet"),
      IMAGENET,
      21_797_672,
      3_663_761_408,
    ),
    (VGG, CIFAR, 20_040_522, 398_136_320),
    # He et al.: 0.27M, and 40.55M; 2,752 and 262,144 more in shortcuts.
    (models.ResNet20(10), CIFAR, 269_722 + 2_752, 40_551_040 + 262_144),
  ],
)
def test_dense_networks_cost_what_the_paper_says(model, shape, params, macs):
  layers, variables, _ = abstract(model, shape)
  found = cost.count_cost(layers, variables["params"])
  assert (found.params, found.macs) == (params, macs)


@pytest.mark.quick(1)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(
  ("model", "shape"), [(RESNET, CIFAR), (VGG, CIFAR), (RESNET_LARGE, IMAGENET)]
)
def test_factored_networks_cost_what_their_shapes_say(model, shape, fraction):
  layers, variables, _ = abstract(model, shape)
  dense = variables["params"]
  full_ranks = trees.unflatten_ranks(
    {path: spec.full_rank for path, spec in layers.items()}
  )

  def cut(params):
    params = lowrank.decompose(params, [Rule()], layers)
    ranks = jax.tree.map(lambda r: max(int(r * fraction), 1), full_ranks)
    return lowrank.truncate(params, ranks)

  full_ranks = {path: {"rank": spec.full_rank} for path, spec in layers.items()}
  found = cost.count_cost(layers, jax.eval_shape(cut, dense))
  params = sum(np.prod(x.shape) for x in jax.tree.leaves(dense))
  macs = 0
  for spec in layers.values():
    kernel = spec.n_in * spec.n_out
    r = max(int(spec.full_rank * fraction), 1)
    params += r * (spec.n_in + spec.n_out) - kernel
    macs += spec.positions * r * (spec.n_in + spec.n_out)
  assert (found.params, found.macs) == (params, macs)


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  ("model", "size"),
  [
    (models.ResNet18(7, width=4), 32),
    (models.ResNet18(7, width=4, stem="imagenet"), 64),
    (models.VGG19(7, width=4), 32),
  ],
)
def test_ranks_reach_every_layer(model, size):
  layers, variables, x = abstract(model, (2, size, size, 3))
  variables["params"] = jax.eval_shape(
    lambda p: lowrank.decompose(p, [Rule()], layers), variables["params"]
  )
  rng = np.random.default_rng(0)
  variables, x = jax.tree.map(
    lambda a: 0.5 * rng.normal(size=a.shape).astype(np.float32), (variables, x)
  )
  variables["batch_stats"] = jax.tree.map(np.square, variables["batch_stats"])
  full = lowrank.full_ranks(variables["params"], layers)
  nn.check_ranks(model, variables, full, x)
  ranks = sampling.independent(jax.random.key(2), full)

  @jax.jit
  def outputs(variables, ranks):
    masked = variables | {"params": lowrank.mask(variables["params"], ranks)}
    return (
      model.apply(variables | {"ranks": ranks}, x),
      model.apply(masked, x),
      model.apply(variables, x),
    )

  sampled, masked, whole = outputs(variables, ranks)
  assert sampled.shape == (2, 7)
  scale = np.max(np.abs(masked))
  assert np.allclose(sampled, masked, rtol=1e-4, atol=1e-4 * scale)
  assert not np.allclose(sampled, whole, rtol=1e-2, atol=1e-2 * scale)


@pytest.mark.parametrize("model", [models.ResNet18, models.VGG19])
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(model):
  net = model(10, width=4, dtype="bfloat16")
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  assert {str(v.dtype) for v in jax.tree.leaves(variables)} == {"float32"}
  assert jax.eval_shape(net.apply, variables, x).dtype == jnp.bfloat16


def test_an_unknown_stem_is_named():
  with pytest.raises(UserError, match=r"config\.model\.stem: 'cifar100'"):
    abstract(models.ResNet18(10, stem="cifar100"), CIFAR)
