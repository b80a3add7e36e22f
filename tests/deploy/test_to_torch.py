"""Exports as modules of PyTorch's: the same outputs, at every size."""

import dataclasses
import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

import maestro
from maestro import models, pytorch, trees
from maestro.deploy import artifact, choose, export, network, verify
from maestro.errors import UserError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = export.Options(repeats=0, stablehlo=False, keep_statistics=True)
SHORT = ((1, 8, 1, 1), (6, 16, 2, 2))  # stages of a MobileNetV2
# name: (options, shape of an input)
NETWORKS = {
  "linear_map": ({"features": 6}, (9,)),
  "mlp": ({"features": (16, 12)}, (4, 3, 2)),
  "lenet": ({}, (28, 28, 1)),
  "resnet18": ({"width": 4, "stage_sizes": (1, 1)}, (8, 8, 3)),
  "resnet50": (
    {"width": 4, "stage_sizes": (1, 1), "stem": "imagenet"},
    (16, 16, 3),
  ),
  "resnext50_32x4d": (
    {"width": 8, "stage_sizes": (1,), "groups": 2, "group_width": 4},
    (16, 16, 3),
  ),
  "mobilenet_v2": ({"multiplier": 0.25, "stages": SHORT}, (16, 16, 3)),
  "vgg19": ({"width": 4}, (32, 32, 3)),
  "vit": (
    {"patch": 4, "layers": 2, "width": 12, "hidden": 24, "heads": 3},
    (8, 8, 3),
  ),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, jit):
  """Compiles quickly to slow code; exports are not compared with their runs."""
  monkeypatch.setattr(jax, "jit", jit)
  monkeypatch.setattr(verify, "make_outputs", lambda *_: lambda *_: np.ones(1))


def _run(name):
  """A run that was never trained: random factors, random statistics."""
  options, shape = NETWORKS[name]
  cls = models.MODELS[name]
  classes = {"num_classes": 5} if name != "linear_map" else {}
  model = cls(**options, **classes)
  x = jax.ShapeDtypeStruct((1, *shape), "float32")
  layers = maestro.layers(model, x)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if path[-1].key in ("scale", "var"):
      return np.exp(0.3 * noise)
    if path[-1].key == "kernel":
      noise /= np.float32(np.sqrt(np.prod(leaf.shape[:-1]) / 2))
    return noise

  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  changes = {}
  for path, spec in layers.items():
    if spec.full_rank > 1:
      node = dict(trees.get(variables["params"], path))
      del node["kernel"]
      u, v = map(rng.standard_normal, spec.factor_shapes(spec.full_rank))
      node["u"] = (u / np.sqrt(spec.n_in)).astype(np.float32)
      node["v"] = (v / np.sqrt(spec.full_rank)).astype(np.float32)
      changes[path] = node
  params = trees.replace(variables["params"], changes)
  run = network.as_run(
    model,
    variables | {"params": params},
    x,
    settings=network.Settings(model={"name": name, **options}),
  )
  facts = dataclasses.replace(run.facts, num_classes=5)
  return dataclasses.replace(run, facts=facts)


def _vanished(run):
  """The path of one layer."""
  flat = trees.flatten_ranks(run.ranks)
  return sorted(flat)[len(flat) // 2]


def _sizes(run):
  """All of it, and a third of each rank, but one layer's, which is 0."""
  flat = trees.flatten_ranks(run.ranks)
  third = {path: -(-rank // 3) for path, rank in flat.items()}
  third[_vanished(run)] = np.zeros_like(flat[_vanished(run)])
  return [
    export.Size(name, trees.unflatten_ranks(ranks))
    for name, ranks in (("all", flat), ("third", third))
  ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """Returns get(name) -> the directory of an export of two sizes."""
  made = {}

  def get(name):
    if name not in made:
      run, out = _run(name), tmp_path_factory.mktemp("export") / name
      export.export(
        run, out, _sizes(run), options=OPTIONS, log=lambda line: None
      )
      made[name] = out
    return made[name]

  return get


def _images(x):
  """Arrays as PyTorch lays them out."""
  x = np.moveaxis(x, -1, 1) if x.ndim == 4 else x
  return torch.from_numpy(np.ascontiguousarray(x))


QUICK = {"linear_map", "mlp", "lenet", "resnet18", "resnext50_32x4d", "vit"}


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  "name",
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in NETWORKS
  ],
)
def test_every_size_computes_the_same(name, exported, jit, close, monkeypatch):
  directory = exported(name)
  shape = NETWORKS[name][1]
  x = np.random.default_rng(1).standard_normal((3, *shape), np.float32)
  found, wanted = {}, {}
  for size in ("all", "third"):
    loaded = artifact.read(directory, profile=size)
    with monkeypatch.context() as patch:  # to read it once
      patch.setattr(artifact, "read", lambda *_, loaded=loaded, **__: loaded)
      module = maestro.to_torch(directory, profile=size)
    assert not module.training
    kinds = {type(m) for m in module.modules() if not list(m.children())}
    assert {k.__module__.partition(".")[0] for k in kinds} == {"torch"}
    with torch.no_grad():
      found[size] = module(_images(x)).numpy()
    apply = jit(lambda v, model=loaded.model: model.apply(v, x))
    wanted[size] = np.asarray(apply(loaded.variables))
    example = jax.ShapeDtypeStruct(x.shape, x.dtype)
    again = maestro.from_torch(module.state_dict(), loaded.model, example)
    sizes = [sum(p.numel() for p in module.parameters())]
    sizes += [sum(p.size for p in jax.tree.leaves(again["params"]))]
    assert sizes[0] == sizes[1]
    params = dict(loaded.variables["params"])
    assert bool(trees.factored(params)) == (size == "third")
    if size == "third":  # rank 0 is a component of zeros in PyTorch
      path = _vanished(_run(name))
      node = trees.get(again["params"], path)
      assert not np.any(node["u"]) and not np.any(node["v"])
      params = trees.replace(params, {path: node})
    expected = loaded.variables | {"params": params}
    jax.tree.map(np.testing.assert_array_equal, again, expected)
  close(found, wanted, 1e-4)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - QUICK))
def test_every_network_is_one_of_layers_as_large_as_its_weights(name):
  from maestro.deploy import torch_networks  # needs PyTorch

  options, shape = NETWORKS[name]
  model = models.MODELS[name](num_classes=5, **options)
  x = jax.ShapeDtypeStruct((1, *shape), "float32")
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: np.ones(leaf.shape), variables)
  state = pytorch.to_state_dict(model, variables, x)
  shapes = {key: x.shape for key, x in state.items()}
  with torch.device("meta"):
    module = torch_networks.network(model, shapes)
    assert module(_images(np.ones(x.shape, np.float32)).to("meta")).shape == (
      1,
      5,
    )
  state = module.state_dict()
  counters = {key for key in state if key.endswith("num_batches_tracked")}
  assert {k: v.shape for k, v in state.items() if k not in counters} == shapes


def test_budgets_are_those_of_load(exported):
  directory = exported("lenet")
  sizes = [
    sum(p.numel() for p in maestro.to_torch(directory, **asked).parameters())
    for asked in ({"budget": "params:0.6"}, {"profile": "third"}, {})
  ]
  assert sizes[0] == sizes[1] < sizes[2]
  with pytest.raises(UserError, match="holds no profile 'half'"):
    maestro.to_torch(directory, profile="half")


def test_a_module_is_exported_by_pytorch(exported):
  name = "resnext50_32x4d"
  module = maestro.to_torch(exported(name), profile="third")
  rng = np.random.default_rng(2)
  x = rng.standard_normal((4, *NETWORKS[name][1]), np.float32)
  batch = torch.export.Dim("batch")
  program = torch.export.export(
    module, (_images(x[:2]),), dynamic_shapes=({0: batch},)
  )
  with torch.no_grad():
    wanted = module(_images(x))
    found = program.module()(_images(x))
  assert torch.equal(found, wanted)


def test_what_the_documentation_shows_runs(exported, monkeypatch):
  text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
  code = text.partition("## In PyTorch")[2].split("```python\n")[1]
  code = code.split("```")[0].replace("macs:0.4", "macs:0.9")
  directory = exported("lenet")
  monkeypatch.chdir(directory.parent)
  names = {"images": torch.ones(2, 1, 28, 28)}
  exec(code.replace("lenet_any", directory.name), names)
  assert names["logits"].shape == (2, 5)
  assert torch.equal(
    names["program"].module()(names["images"]), names["logits"]
  )


@pytest.mark.parametrize(
  "model", [models.LinearMap(6), models.LinearAutoencoder()]
)
def test_a_linear_map_of_more_than_vectors_is_refused(tmp_path, model):
  x = np.ones((1, 3, 6), np.float32)
  params = {"map": {"kernel": np.eye(6, dtype=np.float32)}}
  run = network.as_run(model, {"params": params}, x)
  out = tmp_path / "map"
  export.export(run, out, options=OPTIONS, log=lambda line: None)
  with pytest.raises(UserError, match=r"on inputs \[b, 3, 6\] maps their last"):
    maestro.to_torch(out)


def test_without_pytorch_the_remedy_is_told(exported, monkeypatch):
  directory = exported("linear_map")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(UserError, match="pip install torch"):
    maestro.to_torch(directory)


@pytest.mark.quick(0)
def test_weights_of_pytorch_come_back_smaller(tmp_path, jit, close):
  """The chain of docs/from_torch.md, for which no run was trained."""
  model = models.ResNet18(num_classes=5, width=4, stage_sizes=(1, 1))
  x = np.random.default_rng(1).standard_normal((2, 8, 8, 3), np.float32)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  start = jax.tree.map(
    lambda s: rng.uniform(0.1, 0.5, s.shape).astype(s.dtype), shapes
  )
  weights = pytorch.to_state_dict(model, start, x)
  variables = maestro.from_torch(weights, model)
  layers = maestro.layers(model, x)
  params = maestro.decompose(variables["params"], [maestro.Rule()], layers)
  run = network.as_run(model, variables | {"params": params}, x)
  ranks = choose.choose_ranks(run, "params:0.7", rule="energy")
  sizes = [export.Size("small", ranks)]
  export.export(
    run, tmp_path / "out", sizes, options=OPTIONS, log=lambda line: None
  )
  again, small = maestro.load(tmp_path / "out")
  assert again == model
  module = maestro.to_torch(tmp_path / "out")
  with torch.no_grad():
    found = module(_images(x)).numpy()
  masked = {**variables, "params": maestro.mask(params, ranks)}
  apply = jit(model.apply)
  close(found, np.asarray(apply(masked, x)), 1e-4)
  close(found, np.asarray(apply(small, x)), 1e-4)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_network_says_how_it_is_made_again(name):
  cls = models.MODELS[name]
  fields = cls.__dataclass_fields__
  given = {k: 7 for k in ("num_classes", "features") if k in fields}
  given |= {"features": (9, 7)} if name == "mlp" else {}
  run = types.SimpleNamespace(
    model=cls(**given), config=network.Settings(), facts=None
  )
  record = json.loads(json.dumps(export._architecture(run)))
  assert record[0] == name
  made = artifact._make_model({"name": name, "options": record[1]})
  assert made == run.model


def test_a_network_of_the_users_own_is_refused(tmp_path):
  class Own(models.LinearMap):
    pass

  run = _run("linear_map")
  plain = network.as_run(Own(6), {"params": run.params}, run.facts.example)
  out = tmp_path / "own"
  export.export(plain, out, options=OPTIONS, log=lambda line: None)
  with pytest.raises(UserError, match="is not one of this maestro's"):
    maestro.to_torch(out)
