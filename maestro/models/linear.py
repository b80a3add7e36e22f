"""Linear networks, on which the method has closed-form answers."""

import flax.linen as linen
import jax

from maestro import nn
from maestro.schema import Count


class LinearMap(linen.Module):
  """One dense layer without bias: [b, n] -> [b, features].

  Ordered dropout on its factors finds the truncated SVD of the map at every
  rank at once, if the inputs are uniform on the unit ball.

  Attributes:
    features: number of outputs.
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  features: Count
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    del train
    return nn.Dense(
      self.features, use_bias=False, dtype=self.dtype, name="map"
    )(x)


class LinearAutoencoder(linen.Module):
  """A linear map from the inputs back to themselves: [b, n] -> [b, n].

  Trained on target = input, its factors are an encoder u and a decoder v whose
  components are the principal components of the data.

  Attributes:
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    del train
    return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="map")(
      x
    )
