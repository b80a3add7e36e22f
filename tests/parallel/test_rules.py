"""Tests of where parameters lie: laws of the defaults, rules of a config."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from maestro.errors import UserError
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.parallel.rules import Placement, Rule
from maestro.trees import LayerSpec

MESHES = (
  MeshShape(data=8),
  MeshShape(data=1, fsdp=8),
  MeshShape(data=2, model=4),
  MeshShape(data=1, fsdp=2, model=4),
  MeshShape(data=1, fsdp=4, model=2),
)
LAYERS = {
  "dense": LayerSpec("dense", (24,), (16,), (), (), 1),
  "stacked": LayerSpec("dense", (16,), (40,), (8,), (), 1),
  "conv": LayerSpec("conv", (3, 3, 8), (16,), (), (), 4),
  "grouped": LayerSpec("conv", (3, 3, 8), (8,), (), (4,), 4),
  "heads": LayerSpec("dense", (16,), (4, 8), (), (), 1),
  "odd": LayerSpec("dense", (7,), (5,), (), (), 1),
}
FORBIDDEN = {  # axes that are never split: rank, stack, groups
  "u": lambda spec, n: {*range(len(spec.lead)), n - 1},
  "v": lambda spec, n: set(range(len(spec.lead) + 1)),
  "kernel": lambda spec, n: set(range(len(spec.stack))),
}


def names(axis):
  return () if axis is None else (axis,) if isinstance(axis, str) else axis


def trees_of(path, spec):
  u, v = spec.factor_shapes(spec.full_rank)
  return {
    f"{path}/u": u,
    f"{path}/v": v,
    f"{path}/kernel": spec.kernel_shape,
  }


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("path", LAYERS)
def test_the_defaults_split_features_and_never_ranks(path, shape):
  mesh, spec = make_mesh(shape), LAYERS[path]
  placement = Placement(mesh, LAYERS, smallest=1)
  for name, size in trees_of(path, spec).items():
    found = tuple(placement.spec(name, size))
    found += (None,) * (len(size) - len(found))
    used = [n for axis in found for n in names(axis)]
    assert len(used) == len(set(used))
    assert "data" not in used
    split = {i for i, axis in enumerate(found) if axis}
    assert not split & FORBIDDEN[name.rpartition("/")[2]](spec, len(size))
    for i in split:
      parts = math.prod(mesh.shape[n] for n in names(found[i]))
      assert size[i] % parts == 0
    # What a device holds is its part.
    sharding = jax.sharding.NamedSharding(mesh, P(*found))
    array = jax.device_put(np.zeros(size, np.float32), sharding)
    part = array.addressable_shards[0].data
    assert part.size * math.prod(mesh.shape[n] for n in used) == array.size


def test_a_chain_of_factored_layers_has_its_features_on_model():
  placement = Placement(make_mesh(MeshShape(data=2, model=4)), LAYERS)
  assert placement.spec("dense/u", (24, 16)) == P("model", None)
  assert placement.spec("dense/v", (16, 16)) == P(None, "model")
  assert placement.spec("dense/bias", (16,)) == P("model")
  assert placement.spec("conv/u", (3, 3, 8, 16)) == P(None, None, "model", None)
  assert placement.spec("stacked/v", (8, 16, 40)) == P(None, None, "model")
  assert placement.spec("heads/v", (16, 4, 8)) == P(None, None, "model")
  assert placement.spec("dense/kernel", (24, 16)) == P("model", None)
  assert placement.spec("stacked/kernel", (8, 16, 40)) == P(None, None, "model")
  assert placement.spec("conv/kernel", (3, 3, 8, 16)) == P(
    None, None, None, "model"
  )
  assert placement.spec("norm/scale", (16,)) == P(None)


def test_small_parameters_are_whole_on_every_device(capsys):
  placement = Placement(make_mesh(MeshShape(fsdp=8)), LAYERS, smallest=385)
  assert placement.spec("dense/u", (24, 16)) == P(None, None)
  assert placement.spec("dense/u", (32, 16)) == P("fsdp", None)
  assert placement.spec("other", (4, 1000)) == P(None, "fsdp")
  assert not capsys.readouterr().out
  for _ in range(2):  # what is large and does not divide is told, once
    assert placement.spec("odd/u", (77, 50)) == P(None, None)
  out = capsys.readouterr().out
  assert out.count("odd/u") == 1 and "by 8 over 'fsdp'" in out


def test_rules_hold_where_only_the_batch_is_split_too():
  mesh, rules = make_mesh(MeshShape(data=8)), (Rule("dense/u", ("data",)),)
  placement = Placement(mesh, LAYERS, rules)
  assert placement.spec("dense/u", (24, 16)) == P("data")
  assert placement.spec("conv/u", (3, 3, 8, 16)) == P(None, None, None, None)


def test_the_first_rule_that_matches_holds(capsys):
  rules = (
    Rule("dense/u", (None, "model")),
    Rule("dense/.*", ()),
    Rule(".*", ("fsdp",)),
  )
  placement = Placement(
    make_mesh(MeshShape(data=1, fsdp=2, model=4)), LAYERS, rules, smallest=1
  )
  assert placement.spec("dense/u", (24, 16)) == P(None, "model")
  assert placement.spec("dense/v", (16, 16)) == P()
  assert placement.spec("stacked/u", (8, 16, 16)) == P("fsdp")
  # What no longer divides is whole, and told once.
  assert placement.spec("dense/u", (24, 15)) == P()
  assert placement.spec("dense/u", (24, 13)) == P()
  assert capsys.readouterr().out.count("dense/u") == 1


@pytest.mark.parametrize(
  ("rule", "told"),
  [
    (Rule("dence/u"), r"placement\[0\].path: 'dence/u' matches no parameter"),
    (Rule("("), r"placement\[0\].path: '\(' is no regular expression"),
    (Rule("dense/u", ("modle",)), r"placement\[0\].axes: \('modle',\)"),
    (Rule("dense/u", ("data", "data")), r"each of .* once"),
    (Rule("odd/v", (None, None, "data")), r"are 3, but 'odd/v' has 2 axes"),
  ],
  ids=lambda x: x.path if isinstance(x, Rule) else None,
)
def test_rules_that_mean_nothing_are_refused(rule, told):
  params = {"dense": {"kernel": jnp.zeros((24, 16))}}
  placement = Placement(make_mesh(MeshShape()), LAYERS, (rule,))
  with pytest.raises(UserError, match=told):
    placement.check(params)
  Placement(make_mesh(MeshShape()), LAYERS, (Rule("dense/u"),)).check(params)


def test_rules_match_a_layer_that_is_the_whole_model():
  layers, params = {"": LAYERS["dense"]}, {"kernel": jnp.zeros((24, 16))}
  rules = (Rule("u", ("fsdp",)),)
  placement = Placement(make_mesh(MeshShape(fsdp=8)), layers, rules, 1)
  placement.check(params)
  assert placement.spec("u", (24, 16)) == P("fsdp")
  assert placement.spec("v", (16, 16)) == P(None, "fsdp")


@pytest.mark.parametrize("name", ["sgd", "adam", "lion"])
def test_what_an_optimizer_holds_lies_with_its_parameter(name):
  make = {"sgd": lambda r: optax.sgd(r, momentum=0.9)}.get(
    name, getattr(optax, name)
  )
  placement = Placement(
    make_mesh(MeshShape(data=1, fsdp=2, model=4)), LAYERS, smallest=1
  )
  shapes = trees_of("dense", LAYERS["dense"])
  params = {"dense": {k.split("/")[1]: jnp.ones(s) for k, s in shapes.items()}}
  tree = {"params": params, "opt_state": make(0.1).init(params)}
  put = placement.put(tree, params)
  wanted = {
    jax.tree_util.keystr(path): x.sharding.spec
    for path, x in jax.tree_util.tree_leaves_with_path(put["params"])
  }
  assert any(any(spec) for spec in wanted.values())
  seen = 0
  for path, x in jax.tree_util.tree_leaves_with_path(put["opt_state"]):
    for end, spec in wanted.items():
      if jax.tree_util.keystr(path).endswith(end):
        assert x.sharding.spec == spec
        seen += 1
  assert seen >= len(wanted)
