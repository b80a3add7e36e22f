"""The models that a config can name: MODELS[name](num_classes=..., **options)."""

from maestro.models.lenet import LeNet
from maestro.models.linear import LinearAutoencoder, LinearMap
from maestro.models.mlp import MLP

MODELS = {
  "lenet": LeNet,
  "linear_autoencoder": LinearAutoencoder,
  "linear_map": LinearMap,
  "mlp": MLP,
}
