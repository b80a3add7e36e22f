"""The models that a config can name."""

from maestro.models.gpt import GPT
from maestro.models.lenet import LeNet
from maestro.models.linear import LinearAutoencoder, LinearMap
from maestro.models.mlp import MLP
from maestro.models.mobilenet import MobileNetV2
from maestro.models.resnet import (
  ResNet18,
  ResNet20,
  ResNet34,
  ResNet50,
  ResNeXt50,
)
from maestro.models.transformer import Transformer
from maestro.models.vgg import VGG19
from maestro.models.vit import ViT

# MODELS[name](num_classes=..., **options).apply(variables, x) -> logits
MODELS = {
  "gpt": GPT,
  "lenet": LeNet,
  "linear_autoencoder": LinearAutoencoder,
  "linear_map": LinearMap,
  "mlp": MLP,
  "mobilenet_v2": MobileNetV2,
  "resnet18": ResNet18,
  "resnet20": ResNet20,
  "resnet34": ResNet34,
  "resnet50": ResNet50,
  "resnext50_32x4d": ResNeXt50,
  "transformer": Transformer,
  "vgg19": VGG19,
  "vit": ViT,
}
