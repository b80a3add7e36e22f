"""Weights of PyTorch's: the same outputs here, and every misfit is named."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import maestro
from maestro import models, pytorch, trees
from maestro.errors import UserError
from maestro.introspect import layers as layers_of

try:
  import torch
except ImportError:  # it is optional
  torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not there")

SHORT = ((1, 8, 1, 1), (6, 16, 2, 2))  # stages of a MobileNetV2
# name: (network, shape of an input)
NETWORKS = {
  "linear_map": (models.LinearMap(5), (7,)),
  "mlp": (models.MLP(3, features=(6, 5)), (3, 2, 2)),
  "lenet": (models.LeNet(4), (28, 28, 1)),
  "resnet18": (models.ResNet18(5, width=2, stage_sizes=(1, 1)), (32, 32, 3)),
  "resnext50_32x4d": (
    models.ResNeXt50(5, width=4, stage_sizes=(1, 1), groups=2),
    (32, 32, 3),
  ),
  "mobilenet_v2": (
    models.MobileNetV2(5, multiplier=0.25, stages=SHORT),
    (32, 32, 3),
  ),
  "vgg19": (models.VGG19(5, width=1, hidden=(6, 7)), (224, 224, 3)),
  "vit": (
    models.ViT(5, layers=2, width=8, hidden=12, heads=2, patch=56),
    (224, 224, 3),
  ),
}


def _example(shape, batch=1):
  return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)


@functools.cache
def _variables(name):
  """Random variables of NumPy's: factors of many ranks, but each 4th dense."""
  model, shape = NETWORKS[name]
  x = _example(shape)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  rng = np.random.default_rng(0)

  def draw(shape):
    return rng.uniform(0.5, 1, shape).astype(np.float32)

  variables = jax.tree.map(lambda leaf: draw(leaf.shape), shapes)
  changes = {}
  for i, (path, spec) in enumerate(layers_of(model, x).items()):
    if i % 4 == 3 or spec.full_rank == 1:
      continue
    node = dict(trees.get(variables["params"], path))
    del node["kernel"]
    sizes = spec.factor_shapes(i % (spec.full_rank + 1))  # 0, too
    node["u"], node["v"] = map(draw, sizes)
    changes[path] = node
  return variables | {"params": trees.replace(variables["params"], changes)}


def _dense(name):
  model, shape = NETWORKS[name]
  shapes = jax.eval_shape(model.init, jax.random.key(0), _example(shape))
  return jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_is_the_identity(name):
  model, shape = NETWORKS[name]
  variables, x = _variables(name), _example(shape)
  told = name in ("mlp", "linear_map")  # else the size of images is known
  state = pytorch.to_state_dict(model, variables, x if told else None)
  found = maestro.from_torch(state, model, x)
  params = dict(variables["params"])
  whole = {}  # a rank of 0 is one component of zeros in PyTorch
  for path, node in trees.factored(params).items():
    if not node["u"].shape[-1]:
      there = trees.get(found["params"], path)
      assert there["u"].shape[-1] == 1 and not np.any(there["u"])
      whole[path] = dict(node) | {leaf: there[leaf] for leaf in "uv"}
  assert whole
  expected = variables | {"params": trees.replace(params, whole)}
  jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---------------------------------------------------------------------------
# Against PyTorch
# ---------------------------------------------------------------------------


def _norm_of(features):
  norm = torch.nn.BatchNorm2d(features)
  for x in (norm.weight.data, norm.running_var):
    x.copy_(torch.rand(features) + 0.5)
  for x in (norm.bias.data, norm.running_mean):
    x.copy_(0.3 * torch.randn(features))
  return norm


def _conv_of(n_in, n_out, k, stride=1, groups=1, bias=False):
  conv = torch.nn.Conv2d
  return conv(n_in, n_out, k, stride, k // 2, groups=groups, bias=bias)


def _residual_of(n_in, width, n_out, stride, groups):
  """As torchvision: a Bottleneck, or a BasicBlock for groups=0."""

  class Block(torch.nn.Module):
    def __init__(self):
      super().__init__()
      if groups:
        self.conv1 = _conv_of(n_in, width, 1)
        self.conv2 = _conv_of(width, width, 3, stride, groups)
        self.conv3, self.bn3 = _conv_of(width, n_out, 1), _norm_of(n_out)
      else:
        self.conv1 = _conv_of(n_in, width, 3, stride)
        self.conv2 = _conv_of(width, width, 3)
      self.bn1, self.bn2 = _norm_of(width), _norm_of(width)
      self.downsample = None
      if stride > 1 or n_in != n_out:
        self.downsample = torch.nn.Sequential(
          _conv_of(n_in, n_out, 1, stride), _norm_of(n_out)
        )

    def forward(self, x):
      y = torch.relu(self.bn1(self.conv1(x)))
      y = self.bn2(self.conv2(y))
      if groups:
        y = self.bn3(self.conv3(torch.relu(y)))
      return torch.relu(y + (self.downsample(x) if self.downsample else x))

  return Block()


def _torch_resnet(sizes, *, width, groups, group_width=64, cifar=False):
  """As torchvision: a ResNet with 64 -> width; groups=0 has basic blocks."""

  class Network(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1 = _conv_of(3, width, 3 if cifar else 7, 1 if cifar else 2)
      self.bn1, n = _norm_of(width), width
      for i, blocks in enumerate(sizes):
        planes = width * 2**i
        inner = int(planes * group_width / 64) * groups if groups else planes
        n_out, layer = planes * (4 if groups else 1), torch.nn.Sequential()
        for j in range(blocks):
          stride = 2 if i and not j else 1
          layer.append(_residual_of(n, inner, n_out, stride, groups))
          n = n_out
        setattr(self, f"layer{i + 1}", layer)
      self.fc = torch.nn.Linear(n, 5)

    def forward(self, x):
      x = torch.relu(self.bn1(self.conv1(x)))
      if not cifar:
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
      for i in range(len(sizes)):
        x = getattr(self, f"layer{i + 1}")(x)
      return self.fc(torch.flatten(x.mean((2, 3)), 1))

  return Network()


def _torch_vgg(width, hidden, classes, size):
  """As torchvision: vgg19_bn with 64 -> width and 4096 -> hidden, if any."""

  class Network(torch.nn.Module):
    def __init__(self):
      super().__init__()
      n, layers = 3, []
      for count, features in zip((2, 2, 4, 4, 4), (1, 2, 4, 8, 8), strict=True):
        for _ in range(count):
          layers += [_conv_of(n, features * width, 3, bias=True)]
          n = features * width
          layers += [_norm_of(n), torch.nn.ReLU()]
        layers.append(torch.nn.MaxPool2d(2, 2))
      self.features = torch.nn.Sequential(*layers)
      n *= size**2
      self.classifier = torch.nn.Linear(n, classes)
      if hidden:
        linear, relu = torch.nn.Linear, torch.nn.ReLU
        self.classifier = torch.nn.Sequential(
          *(linear(n, hidden), relu(), torch.nn.Dropout()),
          *(linear(hidden, hidden), relu(), torch.nn.Dropout()),
          linear(hidden, classes),
        )

    def forward(self, x):
      return self.classifier(torch.flatten(self.features(x), 1))

  return Network()


def _torch_mobilenet(multiplier, settings):
  """As torchvision: mobilenet_v2 of some inverted residual settings."""

  def width(v):
    new = max(8, int(v * multiplier + 4) // 8 * 8)
    return new + 8 if new < 0.9 * v * multiplier else new

  def layer(*args, **options):
    conv = _conv_of(*args, **options)
    norm, relu = _norm_of(conv.out_channels), torch.nn.ReLU6()
    return torch.nn.Sequential(conv, norm, relu)

  class Inverted(torch.nn.Module):
    def __init__(self, n_in, n_out, stride, growth):
      super().__init__()
      self.adds, inner = stride == 1 and n_in == n_out, n_in * growth
      parts = [layer(n_in, inner, 1)] if growth > 1 else []
      parts += [layer(inner, inner, 3, stride, groups=inner)]
      parts += [_conv_of(inner, n_out, 1), _norm_of(n_out)]
      self.conv = torch.nn.Sequential(*parts)

    def forward(self, x):
      return x + self.conv(x) if self.adds else self.conv(x)

  class Network(torch.nn.Module):
    def __init__(self):
      super().__init__()
      n, parts = width(32), [layer(3, width(32), 3, 2)]
      for t, c, count, s in settings:
        for i in range(count):
          parts.append(Inverted(n, width(c), 1 if i else s, t))
          n = width(c)
      self.features = torch.nn.Sequential(*parts, layer(n, 1280, 1))
      self.classifier = torch.nn.Sequential(
        torch.nn.Dropout(0.2), torch.nn.Linear(1280, 5)
      )

    def forward(self, x):
      return self.classifier(self.features(x).mean((2, 3)))

  return Network()


def _torch_vit(width, layers, heads, patch, size, classes=5):
  """As timm: a VisionTransformer with a class token."""

  class Attention(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.qkv = torch.nn.Linear(width, 3 * width)
      self.proj = torch.nn.Linear(width, width)

    def forward(self, x):
      b, t, _ = x.shape
      qkv = self.qkv(x).reshape(b, t, 3, heads, width // heads)
      q, k, v = qkv.permute(2, 0, 3, 1, 4)
      weights = (q * (width // heads) ** -0.5) @ k.transpose(-2, -1)
      y = weights.softmax(dim=-1) @ v
      return self.proj(y.transpose(1, 2).reshape(b, t, width))

  class Mlp(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.fc1 = torch.nn.Linear(width, 4 * width)
      self.fc2 = torch.nn.Linear(4 * width, width)

    def forward(self, x):
      return self.fc2(torch.nn.functional.gelu(self.fc1(x)))

  def norm():
    made = torch.nn.LayerNorm(width, eps=1e-6)
    made.weight.data.copy_(torch.rand(width) + 0.5)
    made.bias.data.copy_(0.3 * torch.randn(width))
    return made

  class Block(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.attn = norm(), Attention()
      self.norm2, self.mlp = norm(), Mlp()

    def forward(self, x):
      x = x + self.attn(self.norm1(x))
      return x + self.mlp(self.norm2(x))

  class Patches(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.proj = torch.nn.Conv2d(3, width, patch, patch)

    def forward(self, x):
      return self.proj(x).flatten(2).transpose(1, 2)

  class Network(torch.nn.Module):
    def __init__(self):
      super().__init__()
      n = (size // patch) ** 2 + 1
      self.patch_embed = Patches()
      self.cls_token = torch.nn.Parameter(torch.randn(1, 1, width))
      self.pos_embed = torch.nn.Parameter(torch.randn(1, n, width))
      self.blocks = torch.nn.Sequential(*(Block() for _ in range(layers)))
      self.norm = norm()
      self.head = torch.nn.Linear(width, classes)

    def forward(self, x):
      x = self.patch_embed(x)
      x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
      x = self.norm(self.blocks(x + self.pos_embed))
      return self.head(x[:, 0])

  return Network()


SMALL_VIT = {"layers": 2, "width": 12, "hidden": 48, "heads": 3, "patch": 4}
PUBLISHED = (
  *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
  *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
# name: (how PyTorch has it, network, size of images)
TWINS = {
  "resnet18": (
    lambda: _torch_resnet((1, 2), width=4, groups=0),
    models.ResNet18(5, width=4, stem="imagenet", stage_sizes=(1, 2)),
    32,
  ),
  "resnet18_cifar": (
    lambda: _torch_resnet((1, 1), width=4, groups=0, cifar=True),
    models.ResNet18(5, width=4, stage_sizes=(1, 1)),
    16,
  ),
  "resnet50": (
    lambda: _torch_resnet((2, 1), width=4, groups=1),
    models.ResNet50(5, width=4, stage_sizes=(2, 1)),
    32,
  ),
  "resnext50_32x4d": (
    lambda: _torch_resnet((1, 1), width=8, groups=4, group_width=16),
    models.ResNeXt50(5, width=8, stage_sizes=(1, 1), groups=4, group_width=2),
    32,
  ),
  "mobilenet_v2": (
    lambda: _torch_mobilenet(0.5, SHORT),
    models.MobileNetV2(5, multiplier=0.5, stages=SHORT),
    32,
  ),
  "vgg19_bn": (
    lambda: _torch_vgg(2, 6, 5, 2),
    models.VGG19(5, width=2, hidden=(6, 6)),
    64,  # so that the order of a vector of pixels matters
  ),
  "vit": (
    lambda: _torch_vit(12, 2, 3, 4, 16),
    models.ViT(5, **SMALL_VIT),
    16,
  ),
}
LARGE = {
  "resnet18": (
    lambda: _torch_resnet((2, 2, 2, 2), width=64, groups=0),
    models.ResNet18(5, stem="imagenet"),
    64,
  ),
  "resnet34": (
    lambda: _torch_resnet((3, 4, 6, 3), width=64, groups=0),
    models.ResNet34(5, stem="imagenet"),
    64,
  ),
  "resnet50": (
    lambda: _torch_resnet((3, 4, 6, 3), width=64, groups=1),
    models.ResNet50(5),
    64,
  ),
  "resnext50_32x4d": (
    lambda: _torch_resnet((3, 4, 6, 3), width=64, groups=32, group_width=4),
    models.ResNeXt50(5),
    64,
  ),
  "mobilenet_v2": (
    lambda: _torch_mobilenet(1.0, PUBLISHED),
    models.MobileNetV2(5),
    64,
  ),
  "vgg19_bn": (
    lambda: _torch_vgg(64, 4096, 1000, 7),
    models.VGG19(1000, hidden=(4096, 4096)),
    224,
  ),
  "vit": (
    lambda: _torch_vit(384, 12, 6, 16, 224, 1000),
    models.ViT(1000),
    224,
  ),
}


@pytest.mark.quick(1)
@needs_torch
@pytest.mark.parametrize(
  ("build", "model", "size"),
  [
    *(pytest.param(*twin, id=name) for name, twin in TWINS.items()),
    *(
      pytest.param(*twin, id=f"{name}-large", marks=pytest.mark.slow)
      for name, twin in LARGE.items()
    ),
  ],
)
def test_outputs_are_those_of_pytorch(build, model, size, jit, close):
  with torch.random.fork_rng():
    torch.manual_seed(0)
    module = build().eval()
  x = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
  with torch.no_grad():
    wanted = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
  given = dict(module.named_parameters()) | dict(module.named_buffers())
  variables = maestro.from_torch(given, model, x)
  found = jit(lambda v: model.apply(v, x))(variables)
  close(found, wanted, 1e-5)
  state = pytorch.to_state_dict(model, variables, x)
  for name, value in module.state_dict().items():
    if not name.endswith("num_batches_tracked"):
      np.testing.assert_array_equal(state.pop(name), value.numpy())
  assert not state


@needs_torch
def test_tensors_of_half_precision_become_whole(close):
  model, shape = NETWORKS["linear_map"]
  weight = torch.arange(35.0).reshape(5, 7) / 64
  for dtype in (torch.bfloat16, torch.float16, torch.float64):
    state = {"map.weight": torch.nn.Parameter(weight.to(dtype))}
    found = maestro.from_torch(state, model, _example(shape))
    kernel = found["params"]["map"]["kernel"]
    assert kernel.dtype == jnp.float32
    close(kernel, weight.numpy().T, 0.0)


# ---------------------------------------------------------------------------
# Files and refusals
# ---------------------------------------------------------------------------


def test_a_file_is_read(tmp_path):
  model, shape = NETWORKS["mlp"]
  x = _example(shape)
  state = pytorch.to_state_dict(model, _variables("mlp"), x)
  variables = maestro.from_torch(state, model, x)
  path = tmp_path / "mlp.safetensors"
  half = {name: a.astype(jnp.bfloat16) for name, a in state.items()}
  for tensors, exact in ((state, True), (half, False)):
    safetensors.numpy.save_file(tensors, path)
    found = maestro.from_torch(path, model, x)
    gap = jax.tree.map(
      lambda a, b: np.max(np.abs(a - b), initial=0), found, variables
    )
    assert (max(jax.tree.leaves(gap)) == 0) == exact
    assert max(jax.tree.leaves(gap)) < 0.01


@pytest.mark.parametrize(
  ("name", "content", "match"),
  [
    ("weights.pth", b"", r"only \.safetensors.*save_file"),
    ("none.safetensors", None, "cannot read .*No such file"),
    ("text.safetensors", b"no header at all", "no safetensors file"),
  ],
)
def test_a_file_that_cannot_be_read_is_refused(name, content, match, tmp_path):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  model, shape = NETWORKS["linear_map"]
  with pytest.raises(UserError, match=match):
    maestro.from_torch(tmp_path / name, model, _example(shape))


def test_all_misfits_are_named_at_once():
  model = NETWORKS["resnet18"][0]
  state = pytorch.to_state_dict(model, _dense("resnet18"))
  del state["bn1.running_var"], state["layer2.0.conv2.weight"]
  state["head.weight"] = state["head.bias"] = np.zeros(3)
  state["fc.weight"] = state["fc.weight"].T
  state["conv1.weight"] = np.moveaxis(state["conv1.weight"], (0, 1), (3, 2))
  state["layer1.0.bn1.bias"] = np.zeros(9)
  state["layer1.0.bn1.num_batches_tracked"] = np.asarray(3)
  with pytest.raises(UserError) as caught:
    maestro.from_torch(state, model)
  text = str(caught.value)
  for part in (
    "does not fit ResNet18: ",
    "missing: bn1.running_var [2], layer2.0.conv2.weight [4, 4, 3, 3];",
    "unknown: head.bias, head.weight;",
    "conv1.weight is [3, 3, 3, 2], which is transposed, and must be [2, 3, 3,",
    "fc.weight is [4, 5], which is transposed, and must be [5, 4]",
    "layer1.0.bn1.bias is [9] and must be [2]",
    "[out, in / groups, h, w]",
  ):
    assert part in text
  assert "num_batches" not in text and "\n" not in text


def test_a_prefix_of_all_names_is_seen():
  model = NETWORKS["lenet"][0]
  state = pytorch.to_state_dict(model, _variables("lenet"))
  wrapped = {f"module.{name}": x for name, x in state.items()}
  with pytest.raises(UserError, match=r"All names begin with 'module\.'"):
    maestro.from_torch(wrapped, model)
  with pytest.raises(UserError, match="unknown: epoch, state_dict") as caught:
    maestro.from_torch({"state_dict": state, "epoch": 3}, model)
  assert "begin with" not in str(caught.value)


def test_a_module_in_place_of_its_state_is_refused():
  with pytest.raises(UserError, match=r"a list is no mapping.*state_dict\(\)"):
    maestro.from_torch([np.ones(3)], NETWORKS["lenet"][0])


def test_factors_must_fit_each_other():
  model, shape = NETWORKS["linear_map"]
  state = {"map.0.weight": np.ones((3, 7)), "map.1.weight": np.ones((5, 2))}
  with pytest.raises(UserError, match=r"map\.1\.weight is \[5, 2\].*\[5, 3\]"):
    maestro.from_torch(state, model, _example(shape))


def test_inputs_that_the_network_does_not_take_are_refused():
  model = NETWORKS["mlp"][0]
  with pytest.raises(UserError, match="MLP takes inputs of any shape; give"):
    maestro.from_torch({}, model)
  with pytest.raises(UserError, match=r"missing: fc1\.bias"):
    maestro.from_torch({}, model, _example((4,)))
  with pytest.raises(UserError, match=r"does not run on \(1, 4\)"):
    maestro.from_torch({}, NETWORKS["lenet"][0], _example((4,)))


def test_a_network_without_names_is_refused():
  class Mine(flax.linen.Module):
    pass

  with pytest.raises(
    UserError, match=r"Mine has no names in PyTorch; .*ResNet"
  ):
    maestro.from_torch({}, Mine())
