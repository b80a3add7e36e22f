"""The encoder-decoder Transformer, for translation (Vaswani et al., 2017)."""

from typing import Any, Literal

import flax.linen as linen
import jax
import jax.numpy as jnp

from maestro import nn
from maestro.models.attention import Stack, causal, sinusoids
from maestro.schema import Count, Rate

PAD = 0  # the token that fills sentences up


class Transformer(linen.Module):
  """Encoder and decoder: tokens int [b, 2, t] -> logits [b, t, num_classes].

  Row 0 of an example is the sentence to translate, row 1 what the decoder
  reads: a start token and the translation. Logits at position i are for the
  token after i, from those up to i; both are filled up with PAD, where logits
  are 0 and nothing is attended to. Source and target have one vocabulary and a
  table each; the target's is the output projection, too.

  With the defaults and 9,521 words, the network of the paper's Multi30k
  experiment: 53,890,048 parameters.

  Attributes:
    num_classes: size of the vocabulary.
    layers: blocks of the encoder, and of the decoder.
    width: of embeddings and blocks.
    hidden: width within the feed-forward parts.
    heads: of each attention.
    dropout: rate on embeddings, and on what each part of a block adds.
    norm: "post", as published, or "pre", which needs no warm-up.
    scan: whether the blocks are a scan, with stacked parameters.
    dtype: of the computation; None is float32. Parameters stay float32.
  """

  num_classes: Count
  layers: Count = 6
  width: Count = 512
  hidden: Count = 2048
  heads: Count = 8
  dropout: Rate = 0.1
  norm: Literal["post", "pre"] = "post"
  scan: bool = False
  dtype: str | None = None

  def setup(self):
    options = {
      "width": self.width,
      "heads": self.heads,
      "hidden": self.hidden,
      "dropout": self.dropout,
      "norm": self.norm,
      "dtype": self.dtype,
    }

    def embed():
      init = linen.initializers.normal(self.width**-0.5)
      return nn.Embed(
        self.num_classes, self.width, dtype=self.dtype, embedding_init=init
      )

    def norm():
      return linen.LayerNorm(epsilon=1e-6, dtype=self.dtype)

    self.source_embed, self.target_embed = embed(), embed()
    self.encoder = Stack(self.layers, options, self.scan)
    self.decoder = Stack(self.layers, options | {"crossed": True}, self.scan)
    self.encoder_norm, self.decoder_norm = norm(), norm()
    self.drop = linen.Dropout(self.dropout)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    source, target = x[:, 0], x[:, 1]
    memory, seen = self.encode(source, train)
    y = self._read(self.target_embed, self.decoder_norm, target, 0, train)
    y = self.decoder(y, causal(y.shape[1]), memory, seen, train=train)
    return self._logits(y, target)

  def encode(
    self, source: jax.Array, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """Sentences [b, s] -> (memory [b, s, width], its mask [b, 1, 1, s])."""
    seen = (source != PAD)[:, None, None]
    x = self._read(self.source_embed, self.encoder_norm, source, 0, train)
    x = self.encoder(x, seen, train=train)
    return (self.encoder_norm(x) if self.norm == "pre" else x), seen

  def begin(self, source: jax.Array, length: int) -> Any:
    """Returns a cache, to translate sentences [b, s] by up to `length` tokens.

    All of its leaves have the batch as axis 0.
    """
    memory, seen = self.encode(source)
    cache = self.decoder.begin(memory, (len(source), length))
    return {"blocks": cache, "seen": seen}

  def step(
    self, cache: Any, tokens: jax.Array, at: jax.Array
  ) -> tuple[jax.Array, Any]:
    """Reads token `at` [b] of each translation -> (logits [b, V], cache)."""
    target = tokens[:, None]
    y = self._read(self.target_embed, self.decoder_norm, target, at, False)
    y, blocks = self.decoder.step(y, cache["blocks"], at, cache["seen"])
    return self._logits(y, target)[:, 0], cache | {"blocks": blocks}

  def _read(self, embed, norm, tokens, at, train) -> jax.Array:
    """Embeds tokens [b, t], the first of which is the `at`-th."""
    x = embed(tokens) * jnp.asarray(self.width**0.5, self.dtype)
    x += sinusoids(x.shape[1], self.width, at)[None].astype(x.dtype)
    x = self.drop(x, deterministic=not train)
    return norm(x) if self.norm == "post" else x

  def _logits(self, y: jax.Array, target: jax.Array) -> jax.Array:
    y = self.decoder_norm(y) if self.norm == "pre" else y
    # Padding predicts nothing: no logits, hence no gradients, whatever reads.
    y = jnp.where((target != PAD)[..., None], y, 0)
    return self.target_embed.attend(y)
