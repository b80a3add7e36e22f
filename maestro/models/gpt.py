"""A decoder-only Transformer: a language model (Radford et al., 2019)."""

from typing import Any, Literal

import flax.linen as linen
import jax
import jax.numpy as jnp

from maestro import nn
from maestro.errors import UserError
from maestro.models.attention import Stack, causal
from maestro.schema import Count, Rate


class GPT(linen.Module):
  """Blocks with causal attention: tokens int [b, t] -> logits [b, t, V].

  Logits at position i are for token i + 1, from those up to i. Layer norm
  stands before each part, GELU between the feed-forward layers; the table of
  tokens is the output projection, too.

  Attributes:
    num_classes: V, size of the vocabulary.
    length: the longest input.
    layers: blocks.
    width: of embeddings and blocks; feed-forward parts are four times as wide.
    heads: of each attention.
    dropout: rate on embeddings, and on what each part of a block adds.
    scan: whether the blocks are a scan, with stacked parameters.
    dtype: of the computation; None is float32. Parameters stay float32.
    positions: "table", learned and added to the embeddings, or "rotary": each
      attention turns its queries and keys (Su et al., 2021).
  """

  num_classes: Count
  length: Count = 256
  layers: Count = 6
  width: Count = 384
  heads: Count = 6
  dropout: Rate = 0.1
  scan: bool = False
  dtype: str | None = None
  positions: Literal["table", "rotary"] = "table"

  def setup(self):
    init = linen.initializers.normal(0.02)
    self.embed = nn.Embed(
      self.num_classes, self.width, dtype=self.dtype, embedding_init=init
    )
    if self.positions == "table":
      shape = (self.length, self.width)
      self.table = self.param("positions", init, shape)
    options = {
      "width": self.width,
      "heads": self.heads,
      "hidden": 4 * self.width,
      "activation": "gelu",
      "rotary": self.positions == "rotary",
      "dropout": self.dropout,
      "dtype": self.dtype,
    }
    self.blocks = Stack(self.layers, options, self.scan)
    self.norm = linen.LayerNorm(epsilon=1e-6, dtype=self.dtype)
    self.drop = linen.Dropout(self.dropout)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    length = x.shape[1]
    if length > self.length:
      raise UserError(
        f"config.model.length: {self.length} positions, but inputs of {length}"
        " tokens; raise it, or lower config.data.length"
      )
    y = self.embed(x)
    if self.positions == "table":
      y += self.table[None, :length].astype(y.dtype)
    y = self.drop(y, deterministic=not train)
    y = self.blocks(y, causal(length), train=train)
    return self.embed.attend(self.norm(y))

  def begin(self, rows: int) -> Any:
    """Returns a cache for so many texts, each of up to `length` tokens."""
    return self.blocks.begin(None, (rows, self.length))

  def step(
    self, cache: Any, tokens: jax.Array, at: jax.Array
  ) -> tuple[jax.Array, Any]:
    """Reads token `at` [b] of each text -> (logits [b, V], cache)."""
    y = self.embed(tokens[:, None])
    if self.positions == "table":
      row = jax.lax.dynamic_slice_in_dim(self.table, at, 1)
      y += jnp.asarray(row, y.dtype)[None]
    y, cache = self.blocks.step(y, cache, at)
    return self.embed.attend(self.norm(y))[:, 0], cache
