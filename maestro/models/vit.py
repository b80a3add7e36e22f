"""Vision Transformers (Dosovitskiy et al., 2021)."""

import flax.linen as linen
import jax
import jax.numpy as jnp

from maestro import nn
from maestro.errors import UserError
from maestro.models.attention import Stack
from maestro.schema import Count, Rate


class ViT(linen.Module):
  """Blocks on patches of an image: [b, h, w, c] -> logits [b, num_classes].

  A class token is added to the patches, and read out at the end. The defaults
  are S/16: 22,050,664 parameters with 1,000 classes and 224 x 224 pixels.

  Attributes:
    num_classes: number of logits.
    patch: rows and columns of a patch; those of the image are multiples of it.
    layers: blocks.
    width: of embeddings and blocks.
    hidden: width within the feed-forward parts.
    heads: of each attention.
    dropout: rate on embeddings, and on what each part of a block adds.
    scan: whether the blocks are a scan, with stacked parameters.
    dtype: of the computation; None follows the inputs. Parameters stay float32.
  """

  num_classes: Count
  patch: Count = 16
  layers: Count = 12
  width: Count = 384
  hidden: Count = 1536
  heads: Count = 6
  dropout: Rate = 0.0
  scan: bool = False
  dtype: str | None = None

  @linen.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    if x.ndim != 4:
      raise ValueError(f"ViT takes images [b, h, w, c], not {x.shape}")
    if x.shape[1] % self.patch or x.shape[2] % self.patch:
      raise UserError(
        f"config.model.patch: images of {x.shape[1]} x {x.shape[2]} pixels"
        f" cannot be cut into patches of {self.patch} x {self.patch}"
      )
    window = (self.patch, self.patch)
    x = nn.Conv(
      self.width, window, window, "VALID", dtype=self.dtype, name="patches"
    )(x)
    x = x.reshape((len(x), -1, self.width))
    init = linen.initializers.normal(0.02)
    token = self.param("token", linen.initializers.zeros, (1, 1, self.width))
    token = jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    x += self.param("positions", init, (1, *x.shape[1:])).astype(x.dtype)
    x = linen.Dropout(self.dropout)(x, deterministic=not train)
    options = {
      "width": self.width,
      "heads": self.heads,
      "hidden": self.hidden,
      "activation": "gelu",
      "dropout": self.dropout,
      "dtype": self.dtype,
    }
    x = Stack(self.layers, options, self.scan, name="blocks")(
      x, None, train=train
    )
    x = linen.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, 0])
    return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
