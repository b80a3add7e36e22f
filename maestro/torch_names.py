"""How PyTorch knows each network: torchvision's names, and timm's of a ViT."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from maestro.errors import UserError
from maestro.models import (
  MLP,
  VGG19,
  LeNet,
  LinearAutoencoder,
  LinearMap,
  MobileNetV2,
  ResNet18,
  ViT,
)
from maestro.models.vgg import STAGES


class WeightsError(UserError):
  """Weights are not those of a network, or cannot be read."""


def _same(model: Any, path: str) -> str:
  del model
  return path


def _resnet(model: ResNet18, path: str) -> str:
  del model
  if block := re.fullmatch(r"stage(\d+)_block(\d+)/(\w+)", path):
    stage, index, name = block.groups()
    shortcuts = {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}
    inner = shortcuts.get(name, name.replace("norm", "bn"))
    return f"layer{stage}.{int(index) - 1}.{inner}"
  return {"stem": "conv1", "stem_norm": "bn1", "classifier": "fc"}[path]


def _vgg(model: VGG19, path: str) -> str:
  if found := re.fullmatch(r"(conv|norm)(\d+)_(\d+)", path):
    stage, index = int(found[2]), int(found[3])
    # Before it are convolutions, each with norm and ReLU, and a pool a stage.
    before = sum(n for n, _ in STAGES[: stage - 1]) + index - 1
    return f"features.{3 * before + stage - 1 + (found[1] == 'norm')}"
  if not model.hidden:
    return path
  # Each hidden layer is followed by ReLU and dropout.
  hidden = path.removeprefix("hidden")
  index = int(hidden) - 1 if hidden.isdigit() else len(model.hidden)
  return f"classifier.{3 * index}"


def _mobilenet(model: MobileNetV2, path: str) -> str:
  growths = [e for e, _, blocks, _ in model.stages for _ in range(blocks)]
  plain, norm = path.removesuffix("_norm"), int(path.endswith("_norm"))
  if found := re.fullmatch(r"block(\d+)/(\w+)", plain):
    index, layers = int(found[1]), ["expand", "depthwise", "project"]
    place = layers[growths[index - 1] == 1 :].index(found[2])
    # A norm is beside its convolution, or behind the last one.
    inner = f"{place + norm}" if found[2] == "project" else f"{place}.{norm}"
    return f"features.{index}.conv.{inner}"
  if plain == "classifier":
    return "classifier.1"
  index = {"stem": 0, "head": len(growths) + 1}[plain]
  return f"features.{index}.{norm}"


_VIT = {
  "attention_norm": "norm1",
  "feed_forward_norm": "norm2",
  "attention/query": "attn.q",
  "attention/key": "attn.k",
  "attention/value": "attn.v",
  "attention/out": "attn.proj",
  "feed_forward/up": "mlp.fc1",
  "feed_forward/down": "mlp.fc2",
}


def _vit(model: ViT, path: str) -> str:
  if model.scan:
    raise WeightsError(
      "a ViT whose blocks are a scan has no names in PyTorch; make it with"
      " scan=False, and `maestro.models.attention.unstack` its variables"
    )
  if block := re.fullmatch(r"blocks/layers_(\d+)/(.+)", path):
    return f"blocks.{block[1]}.{_VIT[block[2]]}"
  return {"patches": "patch_embed.proj"}.get(path, path)


def _vit_stacks(model: ViT) -> dict[str, tuple[str, ...]]:
  attentions = [f"blocks.{i}.attn" for i in range(model.layers)]
  return {
    f"{name}.qkv": tuple(f"{name}.{part}" for part in "qkv")
    for name in attentions
  }


@dataclasses.dataclass(frozen=True)
class Names:
  """How PyTorch knows a network.

  Attributes:
    of: (model, path of a module) -> its name.
    image: model -> an input's shape; None if it must be told.
    flattened: (model, shape of an input) -> (path of the layer that sees an
      image as a vector, its channels); None if none does.
    leaves: {name of a parameter of the network itself: its name there}.
    stacks: model -> {layer there: the layers here that it has one above the
      other}, where these are dense.
  """

  of: Callable[[Any, str], str]
  image: Callable[[Any], tuple[int, ...] | None] = lambda model: None
  flattened: Callable[[Any, tuple[int, ...]], tuple[str, int] | None] = (
    lambda model, shape: None
  )
  leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stacks: Callable[[Any], Mapping[str, tuple[str, ...]]] = lambda model: {}


NAMES: dict[type, Names] = {
  LinearAutoencoder: Names(_same),
  LinearMap: Names(_same),
  MLP: Names(
    _same,
    flattened=lambda model, shape: (
      ("fc1", shape[-1]) if len(shape) == 3 else None
    ),
  ),
  LeNet: Names(
    _same,
    image=lambda model: (28, 28, 1),
    flattened=lambda model, shape: ("fc1", 16),
  ),
  ResNet18: Names(_resnet, image=lambda model: (32, 32, 3)),  # and its kin
  MobileNetV2: Names(_mobilenet, image=lambda model: (32, 32, 3)),
  VGG19: Names(
    _vgg,
    image=lambda model: (224, 224, 3) if model.hidden else (32, 32, 3),
    flattened=lambda model, shape: (
      "hidden1" if model.hidden else "classifier",
      STAGES[-1][1] * model.width,
    ),
  ),
  ViT: Names(
    _vit,
    image=lambda model: (224, 224, 3),
    leaves={"token": "cls_token", "positions": "pos_embed"},
    stacks=_vit_stacks,
  ),
}


def names_of(model: Any) -> Names:
  """How PyTorch knows a network; raises WeightsError if it does not."""
  kind = next((k for k in NAMES if isinstance(model, k)), None)
  if kind is None:
    raise WeightsError(
      f"{type(model).__name__} has no names in PyTorch; maestro/torch_names.py"
      f" has those of {', '.join(k.__name__ for k in NAMES)}"
    )
  return NAMES[kind]
