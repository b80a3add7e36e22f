"""Tests networks for ImageNet's sizes: exact costs, and equal forms."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import introspect as nn
from maestro import lowrank, models, products, trees
from maestro.cost.count import count_cost
from maestro.errors import UserError
from maestro.lowrank import Rule

ROOT = pathlib.Path(__file__).parents[2]
IMAGENET = {
  "resnet50": models.ResNet50(1000),
  "resnext50_32x4d": models.ResNeXt50(1000),
  "mobilenet_v2": models.MobileNetV2(1000),
}
SMALL = {
  "resnet50": models.ResNet50(7, width=4, stage_sizes=(1, 1)),
  "resnext50_32x4d": models.ResNeXt50(
    7, width=4, stage_sizes=(2,), groups=2, group_width=4
  ),
  "mobilenet_v2": models.MobileNetV2(
    7, stages=((1, 8, 1, 1), (3, 8, 2, 2)), multiplier=0.5
  ),
  "vgg19": models.VGG19(7, width=2, hidden=(12, 10)),
}


@functools.cache
def _abstract(model, size):
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  return nn.layers(model, x), variables, x


def _jaxpr_macs(model, variables, x):
  found = products.products(
    lambda v, x: model.apply(v, x),
    (variables, x),
    [False] * len(jax.tree.leaves((variables, x))),
  )
  return sum(p.macs for p in found)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("model", "params", "gmacs"),
  [
    # What torchvision says of its networks: parameters, and 10^9 MACs.
    (IMAGENET["resnet50"], 25_557_032, 4.089),
    (IMAGENET["resnext50_32x4d"], 25_028_904, 4.230),
    (IMAGENET["mobilenet_v2"], 3_504_872, 0.301),
    (models.VGG19(1000, hidden=(4096, 4096)), 143_678_248, 19.632),
  ],
  ids=[*IMAGENET, "vgg19"],
)
def test_networks_cost_what_is_published(model, params, gmacs):
  layers, variables, x = _abstract(model, 224)
  cost = count_cost(layers, variables["params"])
  assert cost.params == params
  assert round(cost.macs / 1e9, 3) == gmacs
  assert f"{params:,}" in " ".join(type(model).__doc__.split())
  assert f"{cost.macs:,}" in type(model).__doc__
  assert cost.macs == _jaxpr_macs(model, variables, x)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("name", "fraction"),
  [
    ("resnet50", 0.5),
    ("resnext50_32x4d", 0.25),
    ("mobilenet_v2", 0.1),
    *(
      pytest.param(name, fraction, marks=pytest.mark.slow)
      for name, fractions in (
        ("resnet50", (0.25, 0.1)),
        ("resnext50_32x4d", (0.5, 0.1)),
        ("mobilenet_v2", (0.5, 0.25)),
      )
      for fraction in fractions
    ),
  ],
)
def test_factored_networks_cost_what_a_trace_of_them_says(name, fraction):
  model = IMAGENET[name]
  layers, variables, x = _abstract(model, 224)
  profile = {
    path: max(int(spec.full_rank * fraction), 1)
    for path, spec in layers.items()
    if spec.full_rank > 1
  }

  changes = {}
  for path, rank in profile.items():
    node = dict(trees.get(variables["params"], path))
    kernel = node.pop("kernel")
    shapes = layers[path].factor_shapes(rank)
    node["u"], node["v"] = (
      jax.ShapeDtypeStruct(shape, kernel.dtype) for shape in shapes
    )
    changes[path] = node
  params = trees.replace(variables["params"], changes)
  found = count_cost(layers, params)
  size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  by_hand = sum(
    spec.positions
    * int(np.prod(spec.lead))
    * (
      profile[path] * (spec.n_in + spec.n_out)
      if path in profile
      else spec.n_in * spec.n_out
    )
    for path, spec in layers.items()
  )
  assert (found.params, found.macs) == (size, by_hand)
  assert found.macs == _jaxpr_macs(model, variables | {"params": params}, x)


def test_depthwise_layers_stay_dense_and_grouped_ones_have_many_ranks():
  layers, variables, _ = _abstract(IMAGENET["mobilenet_v2"], 224)
  factored = jax.eval_shape(
    lambda p: lowrank.decompose(p, [Rule()], layers), variables["params"]
  )
  dense = set(layers) - set(trees.factored(factored, layers))
  assert dense == {f"block{i}/depthwise" for i in range(1, 18)}
  layers, _, _ = _abstract(IMAGENET["resnext50_32x4d"], 224)
  spec = layers["stage1_block1/conv2"]
  assert (spec.lead, spec.n_in, spec.n_out) == ((32,), 36, 4)


def test_the_partial_set_is_the_last_stage():
  path = ROOT / "configs" / "resnet_od.py"
  spec = importlib.util.spec_from_file_location("resnet_od", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  layers, variables, _ = _abstract(IMAGENET["resnet50"], 224)

  def cut(arg):
    rules = [Rule(**rule) for rule in module.get_config(arg).rules]
    params = jax.eval_shape(
      lambda p: lowrank.decompose(p, rules, layers), variables["params"]
    )
    paths = set(trees.factored(params, layers))
    ranks = {path: layers[path].full_rank // 4 for path in paths}
    ranks = trees.unflatten_ranks(ranks)
    return paths, count_cost(layers, params, ranks)

  full, _ = cut("")
  assert full == set(layers)
  partial, cost = cut("partial")
  assert partial == {path for path in layers if path.startswith("stage4")}
  assert len(partial) == 10
  # Pufferfish's, as the paper compares with: 15.2M.
  assert round(cost.params / 1e6, 1) == 15.2


def _factors(model, size):
  """(layers, variables of factors, dense variables of the same function)."""
  layers, variables, _ = _abstract(model, size)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if path[-1].key in ("scale", "var"):
      return np.exp(0.3 * noise)
    return noise * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))

  dense = jax.tree_util.tree_map_with_path(draw, variables)
  factored, kernels = {}, {}
  for path, spec in layers.items():
    node = trees.get(dense["params"], path)
    if spec.full_rank == 1:
      continue
    shape_u, shape_v = spec.factor_shapes(spec.full_rank)
    u = rng.standard_normal(shape_u, np.float32) / np.sqrt(spec.n_in)
    v = rng.standard_normal(shape_v, np.float32) / np.sqrt(spec.full_rank)
    rest = {name: x for name, x in node.items() if name != "kernel"}
    factored[path] = rest | {"u": u, "v": v}
    product = np.matmul(
      u.reshape((*spec.lead, spec.n_in, -1)),
      v.reshape((*spec.lead, -1, spec.n_out)),
    )
    kernels[path] = rest | {"kernel": trees.to_kernel(product, spec)}
  return layers, *(
    dense | {"params": trees.replace(dense["params"], changes)}
    for changes in (factored, kernels)
  )


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  "name", ["resnet50", "resnext50_32x4d", "mobilenet_v2"]
)
def test_all_forms_of_a_network_are_equal(name, jit, close):
  model = SMALL[name]
  layers, variables, dense = _factors(model, 16)
  full = jax.device_get(lowrank.full_ranks(variables["params"], layers))
  rng = np.random.default_rng(1)
  some = jax.tree.map(
    lambda r: np.asarray(rng.integers(1, r + 1), np.int32), full
  )
  x = rng.standard_normal((2, 16, 16, 3), np.float32)
  nn.check_ranks(model, variables, full, x)

  @jit
  def outputs(variables, dense, ranks):
    def apply(params, **rest):
      return model.apply(variables | {"params": params} | rest, x)

    params = variables["params"]
    masked = lowrank.mask(params, ranks)
    return {
      "dense": apply(dense["params"]),
      "full": apply(params),
      "mask": apply(masked),
      "ranks": apply(params, ranks=ranks),
      "merge": apply(lowrank.merge(masked, layers)),
      "truncate": apply(lowrank.truncate(params, some)),
      "extract": apply(lowrank.extract(params, some, layers)),
    }

  found = outputs(variables, dense, some)
  assert found["dense"].shape == (2, 7)
  close(found["full"], found["dense"], 2e-5)
  gap = np.max(np.abs(found["mask"] - found["full"]))
  assert gap > 1e-2 * np.max(np.abs(found["full"]))
  for form in ("ranks", "merge", "truncate", "extract"):
    close(found[form], found["mask"], 2e-5)


def test_ranks_of_groups_shrink_to_the_components_that_are_left(jit, close):
  model = SMALL["resnext50_32x4d"]
  layers, _, dense = _factors(model, 16)

  @jit
  def shrunk(params):
    factored = lowrank.decompose(params, [Rule()], layers)
    full = lowrank.full_ranks(factored, layers)
    halves = jax.tree.map(lambda r: (r + 1) // 2, full)
    masked = lowrank.mask(factored, halves)
    merged = lowrank.merge(factored, layers)
    return halves, lowrank.shrink(masked, full, 1e-6), merged

  halves, ranks, merged = jax.device_get(shrunk(dense["params"]))
  jax.tree.map(np.testing.assert_array_equal, ranks, halves)
  assert ranks["stage1_block1"]["conv2"]["rank"].shape == (2,)
  close(merged, dense["params"], 2e-5)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_keeps_parameters_whole(name):
  model = SMALL[name].clone(dtype="bfloat16")
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  assert {str(v.dtype) for v in jax.tree.leaves(variables)} == {"float32"}
  apply = functools.partial(
    model.apply,
    train=True,
    rngs={"dropout": jax.random.key(0)},
    mutable=["batch_stats"],
  )
  y, changed = jax.eval_shape(apply, variables, x)
  assert y.dtype == jnp.bfloat16 and y.shape == (2, 7)
  assert changed["batch_stats"] == variables["batch_stats"]


@pytest.mark.parametrize(
  ("model", "match"),
  [
    (models.ResNet50(7, width=8, groups=3), r"model\.groups: 3 .*group_width"),
    (models.MobileNetV2(7, stages=((1, 8, 1),)), r"model\.stages: .*stride"),
  ],
)
def test_options_that_make_no_network_are_refused(model, match):
  with pytest.raises(UserError, match=match):
    _abstract(model, 32)
