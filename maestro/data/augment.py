"""Random crops and flips of image batches, as JAX functions on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pad_crop_flip(
  images: jax.Array, key: jax.Array, *, pad: int = 4
) -> jax.Array:
  """Shift each image by up to `pad` pixels and mirror every second one.

  Each image on its own: offsets uniform over 0 .. 2 pad on both axes, and a
  flip with probability 1/2. See `crop_flip`; the paper's recipe for CIFAR.

  Args:
    images: [n, h, w, c], raw pixels.
    key: JAX key; the result is a function of it.
    pad: width of the black border.
  """
  n = images.shape[0]
  key_offset, key_flip = jax.random.split(key)
  offsets = jax.random.randint(key_offset, (2, n), 0, 2 * pad + 1)
  flips = jax.random.bernoulli(key_flip, 0.5, (n,))
  return crop_flip(images, offsets[0], offsets[1], flips, pad=pad)


def crop_flip(
  images: jax.Array,
  tops: jax.Array,
  lefts: jax.Array,
  flips: jax.Array,
  *,
  pad: int,
) -> jax.Array:
  """Crop images of the same size from their zero-padded selves, then mirror.

    out[n, i, j] = padded[n, tops[n] + i, lefts[n] + j']
    j' = w - 1 - j where flips[n], else j

  Args:
    images: [n, h, w, c], any dtype. Zero is black in raw pixels: crop before
      they are standardized.
    tops: [n] int in 0 .. 2 pad; `pad` leaves the rows where they were.
    lefts: [n] int in 0 .. 2 pad.
    flips: [n] bool, left to right.
    pad: width of the border of zeros.

  Returns:
    [n, h, w, c], in the dtype of the images.
  """
  h, w = images.shape[1:3]
  border = ((0, 0), (pad, pad), (pad, pad), (0, 0))

  # One gather per image. Under vmap the batch stays an axis of its own, which
  # devices can split; indexed by an iota it would be gathered on all of them.
  def one(image, top, left, flip):
    columns = jnp.arange(w)
    columns = left + jnp.where(flip, w - 1 - columns, columns)
    return image[(top + jnp.arange(h))[:, None], columns[None]]

  return jax.vmap(one)(jnp.pad(images, border), tops, lefts, flips)
