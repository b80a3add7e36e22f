"""Attention and the blocks of Transformers (Vaswani et al., 2017)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp

from maestro import nn
from maestro.errors import UserError

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "relu": jax.nn.relu,
}
_INIT = linen.initializers.xavier_uniform()


class Attention(linen.Module):
  """Scaled dot-product attention of several heads.

  Each of its four products has ranks of its own: query, key, value, out.

  Attributes:
    width: of its inputs and outputs, a multiple of `heads`.
    heads: of width / heads features each.
    rotary: whether queries and keys are turned by their positions (`rotate`).
    dtype: of the computation.
  """

  width: int
  heads: int
  rotary: bool = False
  dtype: str | None = None

  def setup(self):
    if self.width % self.heads:
      raise UserError(
        f"config.model.heads: {self.heads} heads do not divide"
        f" config.model.width={self.width}"
      )
    if self.rotary and self.width // self.heads % 2:
      raise UserError(
        "config.model.positions: 'rotary' turns pairs of features; heads of"
        f" {self.width // self.heads} have an odd one: change"
        f" config.model.width={self.width} or config.model.heads={self.heads}"
      )
    dense = functools.partial(
      nn.Dense, self.width, kernel_init=_INIT, dtype=self.dtype
    )
    self.query, self.key, self.value = dense(), dense(), dense()
    self.out = dense()

  def memory(
    self, source: jax.Array | None, at: Any = 0
  ) -> dict[str, jax.Array]:
    """What can be attended to: [b, s, width] -> k, v of [b, s, heads, d].

    The first of `source` is the `at`-th token.
    """
    assert source is not None  # a crossed block is given one
    return {
      "k": self._turn(self._split(self.key(source)), at),
      "v": self._split(self.value(source)),
    }

  def __call__(
    self,
    x: jax.Array,
    memory: dict[str, jax.Array],
    mask: jax.Array | None,
    at: Any = 0,
  ) -> jax.Array:
    """Attends from x [b, t, width] to what `memory` gave, [b, t, width].

    mask: bool [b or 1, 1, t or 1, s], where True is attended to.
    at: position of the first of x.
    """
    q = self._turn(self._split(self.query(x)), at)
    y = jax.nn.dot_product_attention(q, memory["k"], memory["v"], mask=mask)
    return self.out(y.reshape(x.shape))

  def _turn(self, x: jax.Array, at: Any) -> jax.Array:
    return rotate(x, at) if self.rotary else x

  def _split(self, x: jax.Array) -> jax.Array:
    return x.reshape((*x.shape[:-1], self.heads, -1))


class FeedForward(linen.Module):
  """Two dense layers with an activation between them."""

  width: int
  hidden: int
  activation: str = "relu"
  dropout: float = 0.0
  dtype: str | None = None

  def setup(self):
    dense = functools.partial(nn.Dense, kernel_init=_INIT, dtype=self.dtype)
    self.up, self.down = dense(self.hidden), dense(self.width)
    self.drop = linen.Dropout(self.dropout)

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = ACTIVATIONS[self.activation](self.up(x))
    return self.down(self.drop(x, deterministic=not train))


class Block(linen.Module):
  """Self-attention, attention to a memory if it has one, and feed-forward.

  Each is x + f(norm(x)), or norm(x + f(x)) with norm="post".

  Attributes:
    width: of its inputs and outputs.
    heads: of the attention.
    hidden: width between the two layers of the feed-forward part.
    crossed: whether it attends to a memory, as a decoder of translations does.
    rotary: whether its self-attention knows positions by `rotate`.
    activation: a key of ACTIVATIONS.
    norm: "pre" or "post", where layer norm stands.
    dropout: rate on what each part adds.
    epsilon: of layer norm.
    dtype: of the computation.
  """

  width: int
  heads: int
  hidden: int
  crossed: bool = False
  rotary: bool = False
  activation: str = "relu"
  norm: str = "pre"
  dropout: float = 0.0
  epsilon: float = 1e-6
  dtype: str | None = None

  def setup(self):
    attention = functools.partial(
      Attention, self.width, self.heads, dtype=self.dtype
    )
    norm = functools.partial(
      linen.LayerNorm, epsilon=self.epsilon, dtype=self.dtype
    )
    self.attention = attention(rotary=self.rotary)
    self.attention_norm = norm()
    if self.crossed:
      self.cross, self.cross_norm = attention(), norm()
    self.feed_forward = FeedForward(
      self.width,
      self.hidden,
      self.activation,
      dropout=self.dropout,
      dtype=self.dtype,
    )
    self.feed_forward_norm = norm()
    self.drop = linen.Dropout(self.dropout)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    source: jax.Array | None = None,
    source_mask: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> jax.Array:
    """Maps x [b, t, width] to [b, t, width]; source is [b, s, width]."""

    def attend(y):
      return self.attention(y, self.attention.memory(y), mask)

    def cross(y):
      return self.cross(y, self.cross.memory(source), source_mask)

    x = self._add(x, attend, self.attention_norm, train)
    if self.crossed:
      x = self._add(x, cross, self.cross_norm, train)
    return self._feed(x, train)

  def begin(self, source: jax.Array | None, shape: tuple[int, ...]) -> Any:
    """A cache for `step`: what it attends to, of b rows of up to t tokens.

    Args:
      source: [b, s, width] that a crossed block attends to.
      shape: (b, t).
    """
    zeros = jnp.zeros(
      (*shape, self.heads, self.width // self.heads), self.dtype or jnp.float32
    )
    cache = {"own": {"k": zeros, "v": zeros}}
    if self.crossed:
      cache["source"] = self.cross.memory(source)
    return cache

  def step(
    self,
    x: jax.Array,
    cache: Any,
    at: jax.Array,
    source_mask: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Runs token `at` alone: x [b, 1, width], as `__call__` with all before.

    Returns its output [b, 1, width] and the cache with it.
    """
    own, new = cache["own"], {}

    def attend(y):
      new.update(
        {
          k: jax.lax.dynamic_update_slice_in_dim(own[k], a, at, 1)
          for k, a in self.attention.memory(y, at).items()
        }
      )
      seen = jnp.arange(own["k"].shape[1]) <= at
      return self.attention(y, new, seen[None, None, None], at)

    def cross(y):
      return self.cross(y, cache["source"], source_mask)

    x = self._add(x, attend, self.attention_norm, False)
    if self.crossed:
      x = self._add(x, cross, self.cross_norm, False)
    return self._feed(x, False), cache | {"own": new}

  def _feed(self, x: jax.Array, train: bool) -> jax.Array:
    feed = functools.partial(self.feed_forward, train=train)
    return self._add(x, feed, self.feed_forward_norm, train)

  def _add(
    self, x: jax.Array, f: Callable, norm: Callable, train: bool
  ) -> jax.Array:
    if self.norm == "pre":
      return x + self.drop(f(norm(x)), deterministic=not train)
    return norm(x + self.drop(f(x), deterministic=not train))


class Stack(linen.Module):
  """Blocks one after the other, as `layers_0`, `layers_1`, ... or as a scan.

  As a scan, one block is compiled, whose parameters and ranks are stacked, and
  all of whose layers have one rank each. Both are one function: `unstack`.

  Attributes:
    depth: how many.
    options: keyword arguments of `Block`.
    scan: whether as a scan.
  """

  depth: int
  options: Mapping[str, Any]
  scan: bool = False

  def setup(self):
    if self.scan:
      self.layers = Block(**self.options)
    else:
      self.layers = [Block(**self.options) for _ in range(self.depth)]

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    source: jax.Array | None = None,
    source_mask: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> jax.Array:
    """As of `Block`."""
    if not self.scan:
      for block in self._blocks():
        x = block(x, mask, source, source_mask, train=train)
      return x

    def body(block, x, _):
      return block(x, mask, source, source_mask, train=train), None

    scan = linen.scan(
      body,
      variable_axes={"params": 0, "ranks": 0, "captured": 0},
      split_rngs={"params": True, "dropout": True},
      length=self.depth,
    )
    return scan(self.layers, x, None)[0]

  def begin(self, source: jax.Array | None, shape: tuple[int, ...]) -> list:
    """A cache for `step`, see `Block.begin`."""
    return [block.begin(source, shape) for block in self._blocks()]

  def step(
    self,
    x: jax.Array,
    cache: list,
    at: jax.Array,
    source_mask: jax.Array | None = None,
  ) -> tuple[jax.Array, list]:
    """Runs token `at` alone, see `Block.step`."""
    new = []
    for block, before in zip(self._blocks(), cache, strict=True):
      x, after = block.step(x, before, at, source_mask)
      new.append(after)
    return x, new

  def _blocks(self) -> list[Block]:
    if self.scan:
      raise UserError(
        "token by token, blocks run one by one: `unstack` the variables, and"
        " make the model with scan=False"
      )
    assert isinstance(self.layers, list | tuple)
    return list(self.layers)


def unstack(tree: Any) -> Any:
  """Turns variables of a scan into those of `layers_0`, `layers_1`, ...

    {"layers": {"a": [n, ...]}}  ->  {"layers_0": {"a": [...]}, ...}

  Works for parameters, ranks, and whatever else mirrors the modules.
  """
  if not isinstance(tree, Mapping):
    return tree
  new = {}
  for name, node in tree.items():
    if name != "layers":
      new[name] = unstack(node)
      continue
    n = len(jax.tree.leaves(node)[0])
    for i in range(n):
      new[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], node)
  return new


def rotate(x: jax.Array, start: Any = 0) -> jax.Array:
  """Turns features [b, t, heads, d] by the positions of t, from `start` on.

  Features i and i + d / 2 are a plane's, turned by position / 10000^(2 i / d):
  products of queries and keys then depend on how far these are apart (rotary
  embedding, Su et al., 2021, equation 34).
  """
  angles = _angles(x.shape[1], x.shape[-1], start)[None, :, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.astype(x.dtype)


def sinusoids(length: int, width: int, start: Any = 0) -> jax.Array:
  """Positional encoding [length, width] of section 3.5, from `start` on."""
  angles = _angles(length, width, start)
  table = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return table.reshape((length, -1))[:, :width]


def _angles(length: int, width: int, start: Any) -> jax.Array:
  """Position times 10000^(-2 i / width): [length, width / 2, rounded up]."""
  at = jnp.asarray(start + jnp.arange(length), jnp.float32)
  rates = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  return jnp.outer(at, rates)


def causal(length: int) -> jax.Array:
  """Mask [1, 1, length, length] by which a token sees those up to itself."""
  return jnp.tril(jnp.ones((length, length), bool))[None, None]
