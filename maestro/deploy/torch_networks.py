"""The networks as PyTorch's modules; imported only where PyTorch is there.

Their names are torchvision's where it has the network, of a ViT timm's. Every
layer is of the sizes that its weights have: a Linear or Conv2d, or for factors
two in a row.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from maestro import models
from maestro.models.vgg import STAGES


def network(model: Any, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
  """Returns a network of layers as large as a state dict says.

  Args:
    model: a network of `maestro.models` that `maestro.pytorch` has names of.
    shapes: {name: shape} of its state dict.
  """
  layers = Layers(shapes)
  if isinstance(model, models.ResNet18):
    return _resnet(layers, model)
  if isinstance(model, models.MobileNetV2):
    return _mobilenet(layers, model)
  if isinstance(model, models.VGG19):
    return _vgg(layers, model)
  if isinstance(model, models.ViT):
    return VisionTransformer(layers, model)
  if isinstance(model, models.LeNet):
    return _lenet(layers)
  if isinstance(model, models.MLP):
    count = len(model.features) + 1
    return _perceptron(layers, [f"fc{i}" for i in range(1, count + 1)])
  return _perceptron(layers, ["map"])


class Layers:
  """Makes layers by name, as large as a state dict says.

  Attributes:
    shapes: {name: shape} of the state dict.
  """

  def __init__(self, shapes: Mapping[str, Sequence[int]]):
    self.shapes = shapes

  def has(self, name: str) -> bool:
    """Whether the state dict has a layer, dense or factored."""
    return any(f"{name}{i}.weight" in self.shapes for i in ("", ".0"))

  def linear(self, name: str) -> nn.Module:
    """A Linear, or two of them."""
    if f"{name}.weight" not in self.shapes:
      return nn.Sequential(self.linear(f"{name}.0"), self.linear(f"{name}.1"))
    n_out, n_in = self.shapes[f"{name}.weight"]
    return nn.Linear(n_in, n_out, bias=f"{name}.bias" in self.shapes)

  def conv(
    self, name: str, stride: int = 1, padding: int = 0, groups: int = 1
  ) -> nn.Module:
    """A Conv2d, or one to the rank and one of a pixel."""
    if f"{name}.weight" not in self.shapes:
      return nn.Sequential(
        self.conv(f"{name}.0", stride, padding, groups),
        self.conv(f"{name}.1", groups=groups),
      )
    n_out, n_in, height, width = self.shapes[f"{name}.weight"]
    return nn.Conv2d(
      groups * n_in,
      n_out,
      (height, width),
      stride,
      padding,
      groups=groups,
      bias=f"{name}.bias" in self.shapes,
    )

  def depthwise(self, name: str, stride: int) -> nn.Module:
    """A 3x3 Conv2d of each channel alone."""
    return self.conv(name, stride, 1, self.shapes[f"{name}.weight"][0])

  def norm(self, name: str) -> nn.Module:
    """A BatchNorm2d."""
    return nn.BatchNorm2d(self.shapes[f"{name}.weight"][0], eps=1e-5)

  def layer_norm(self, name: str) -> nn.Module:
    """A LayerNorm over the last axis."""
    return nn.LayerNorm(self.shapes[f"{name}.weight"][0], eps=1e-6)


def _chain(**modules: nn.Module) -> nn.Sequential:
  return nn.Sequential(OrderedDict(modules))


def _perceptron(layers: Layers, names: Sequence[str]) -> nn.Module:
  modules: dict[str, nn.Module] = {"flatten": nn.Flatten()}
  for i, name in enumerate(names):
    if i:
      modules[f"relu{i}"] = nn.ReLU()
    modules[name] = layers.linear(name)
  return _chain(**modules)


def _lenet(layers: Layers) -> nn.Module:
  return _chain(
    conv1=layers.conv("conv1"),
    relu1=nn.ReLU(),
    pool1=nn.MaxPool2d(2),
    conv2=layers.conv("conv2"),
    relu2=nn.ReLU(),
    pool2=nn.MaxPool2d(2),
    flatten=nn.Flatten(),
    fc1=layers.linear("fc1"),
    relu3=nn.ReLU(),
    fc2=layers.linear("fc2"),
    relu4=nn.ReLU(),
    fc3=layers.linear("fc3"),
  )


class BasicBlock(nn.Module):
  """See `maestro.models.resnet.Block`."""

  def __init__(self, layers: Layers, name: str, stride: int):
    super().__init__()
    self.conv1 = layers.conv(f"{name}.conv1", stride, 1)
    self.bn1 = layers.norm(f"{name}.bn1")
    self.conv2 = layers.conv(f"{name}.conv2", 1, 1)
    self.bn2 = layers.norm(f"{name}.bn2")
    self.relu = nn.ReLU()
    self.downsample = _downsample(layers, name, stride)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[b, c, h, w] -> [b, features, h / stride, w / stride]."""
    y = self.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    return self.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
  """See `maestro.models.resnet.Bottleneck`."""

  def __init__(self, layers: Layers, name: str, stride: int, groups: int):
    super().__init__()
    self.conv1 = layers.conv(f"{name}.conv1")
    self.bn1 = layers.norm(f"{name}.bn1")
    self.conv2 = layers.conv(f"{name}.conv2", stride, 1, groups)
    self.bn2 = layers.norm(f"{name}.bn2")
    self.conv3 = layers.conv(f"{name}.conv3")
    self.bn3 = layers.norm(f"{name}.bn3")
    self.relu = nn.ReLU()
    self.downsample = _downsample(layers, name, stride)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[b, c, h, w] -> [b, features, h / stride, w / stride]."""
    y = self.relu(self.bn1(self.conv1(x)))
    y = self.relu(self.bn2(self.conv2(y)))
    y = self.bn3(self.conv3(y))
    return self.relu(y + self.downsample(x))


def _downsample(layers: Layers, name: str, stride: int) -> nn.Module:
  if not layers.has(f"{name}.downsample.0"):
    return nn.Identity()
  return nn.Sequential(
    layers.conv(f"{name}.downsample.0", stride),
    layers.norm(f"{name}.downsample.1"),
  )


def _resnet(layers: Layers, model: models.ResNet18) -> nn.Module:
  imagenet = model.stem == "imagenet"
  modules: dict[str, nn.Module] = {
    "conv1": layers.conv("conv1", *((2, 3) if imagenet else (1, 1))),
    "bn1": layers.norm("bn1"),
    "relu": nn.ReLU(),
  }
  if imagenet:
    modules["maxpool"] = nn.MaxPool2d(3, 2, 1)
  for i, blocks in enumerate(model.stage_sizes, 1):
    stage = []
    for j in range(blocks):
      name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
      if isinstance(model, models.ResNet50):
        stage.append(Bottleneck(layers, name, stride, model.groups))
      else:
        stage.append(BasicBlock(layers, name, stride))
    modules[f"layer{i}"] = nn.Sequential(*stage)
  return _chain(
    **modules,
    avgpool=nn.AdaptiveAvgPool2d(1),
    flatten=nn.Flatten(),
    fc=layers.linear("fc"),
  )


def _vgg(layers: Layers, model: models.VGG19) -> nn.Module:
  features: list[nn.Module] = []
  for convolutions, _ in STAGES:
    for _ in range(convolutions):
      features.append(layers.conv(f"features.{len(features)}", padding=1))
      features.append(layers.norm(f"features.{len(features)}"))
      features.append(nn.ReLU())
    features.append(nn.MaxPool2d(2))
  if model.hidden:
    parts: list[nn.Module] = []
    for _ in model.hidden:
      parts.append(layers.linear(f"classifier.{len(parts)}"))
      parts += [nn.ReLU(), nn.Dropout(model.dropout)]
    parts.append(layers.linear(f"classifier.{len(parts)}"))
    classifier = nn.Sequential(*parts)
  else:
    classifier = layers.linear("classifier")
  return _chain(
    features=nn.Sequential(*features),
    flatten=nn.Flatten(),
    classifier=classifier,
  )


class InvertedResidual(nn.Module):
  """See `maestro.models.mobilenet.InvertedResidual`."""

  def __init__(self, layers: Layers, name: str, expands: bool, stride: int):
    super().__init__()
    self.stride = stride
    parts: list[nn.Module] = []
    if expands:
      first = f"{name}.conv.0"
      parts.append(_conv_norm(layers.conv(f"{first}.0"), layers, first))
    middle = f"{name}.conv.{len(parts)}"
    depthwise = layers.depthwise(f"{middle}.0", stride)
    parts.append(_conv_norm(depthwise, layers, middle))
    parts.append(layers.conv(f"{name}.conv.{len(parts)}"))
    parts.append(layers.norm(f"{name}.conv.{len(parts)}"))
    self.conv = nn.Sequential(*parts)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[b, c, h, w] -> [b, features, h / stride, w / stride]."""
    y = self.conv(x)
    same = self.stride == 1 and x.shape[1] == y.shape[1]
    return x + y if same else y


def _conv_norm(conv: nn.Module, layers: Layers, name: str) -> nn.Module:
  return nn.Sequential(conv, layers.norm(f"{name}.1"), nn.ReLU6())


def _mobilenet(layers: Layers, model: models.MobileNetV2) -> nn.Module:
  stem = layers.conv("features.0.0", 2, 1)
  features = [_conv_norm(stem, layers, "features.0")]
  for expansion, _, blocks, stride in model.stages:
    for i in range(blocks):
      name = f"features.{len(features)}"
      own = 1 if i else stride
      features.append(InvertedResidual(layers, name, expansion > 1, own))
  last = f"features.{len(features)}"
  features.append(_conv_norm(layers.conv(f"{last}.0"), layers, last))
  return _chain(
    features=nn.Sequential(*features),
    avgpool=nn.AdaptiveAvgPool2d(1),
    flatten=nn.Flatten(),
    classifier=nn.Sequential(
      nn.Dropout(model.dropout), layers.linear("classifier.1")
    ),
  )


class Attention(nn.Module):
  """See `maestro.models.attention.Attention`; timm's, where it is dense."""

  def __init__(self, layers: Layers, name: str, heads: int):
    super().__init__()
    self.heads = heads
    stacked = layers.has(f"{name}.qkv")
    self.inputs = ("qkv",) if stacked else ("q", "k", "v")
    for part in self.inputs:
      self.add_module(part, layers.linear(f"{name}.{part}"))
    self.proj = layers.linear(f"{name}.proj")

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[b, t, width] -> [b, t, width]."""
    parts = [self.get_submodule(part)(x) for part in self.inputs]
    parts = torch.cat(parts, dim=-1).chunk(3, dim=-1)
    q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.proj(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
  """See `maestro.models.attention.Block`."""

  def __init__(self, layers: Layers, name: str, heads: int):
    super().__init__()
    self.norm1 = layers.layer_norm(f"{name}.norm1")
    self.attn = Attention(layers, f"{name}.attn", heads)
    self.norm2 = layers.layer_norm(f"{name}.norm2")
    self.mlp = _chain(
      fc1=layers.linear(f"{name}.mlp.fc1"),
      act=nn.GELU(),
      fc2=layers.linear(f"{name}.mlp.fc2"),
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[b, t, width] -> [b, t, width]."""
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
  """See `maestro.models.ViT`."""

  def __init__(self, layers: Layers, model: models.ViT):
    super().__init__()
    self.patch_embed = _chain(proj=layers.conv("patch_embed.proj", model.patch))
    self.cls_token = nn.Parameter(torch.empty(*layers.shapes["cls_token"]))
    self.pos_embed = nn.Parameter(torch.empty(*layers.shapes["pos_embed"]))
    blocks = [
      TransformerBlock(layers, f"blocks.{i}", model.heads)
      for i in range(model.layers)
    ]
    self.blocks = nn.Sequential(*blocks)
    self.norm = layers.layer_norm("norm")
    self.head = layers.linear("head")

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[b, 3, h, w] -> [b, num_classes]."""
    x = self.patch_embed(x).flatten(2).transpose(1, 2)
    token = self.cls_token.expand(x.shape[0], -1, -1)
    x = torch.cat([token, x], dim=1) + self.pos_embed
    return self.head(self.norm(self.blocks(x)[:, 0]))
