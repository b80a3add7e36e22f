"""The models that a config can name."""

from maestro.models.lenet import LeNet
from maestro.models.linear import LinearAutoencoder, LinearMap
from maestro.models.mlp import MLP

# MODELS[name](num_classes=..., **options).apply(variables, x) -> logits
MODELS = {
  "lenet": LeNet,
  "linear_autoencoder": LinearAutoencoder,
  "linear_map": LinearMap,
  "mlp": MLP,
}
