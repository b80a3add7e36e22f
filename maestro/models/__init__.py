"""The models that a config can name."""

from maestro.models.lenet import LeNet
from maestro.models.linear import LinearAutoencoder, LinearMap
from maestro.models.mlp import MLP
from maestro.models.resnet import ResNet18, ResNet20, ResNet34
from maestro.models.vgg import VGG19

# MODELS[name](num_classes=..., **options).apply(variables, x) -> logits
MODELS = {
  "lenet": LeNet,
  "linear_autoencoder": LinearAutoencoder,
  "linear_map": LinearMap,
  "mlp": MLP,
  "resnet18": ResNet18,
  "resnet20": ResNet20,
  "resnet34": ResNet34,
  "vgg19": VGG19,
}
