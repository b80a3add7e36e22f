"""Tests of crops and flips: against plain NumPy, their law, determinism."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maestro.data import augment, image
from maestro.parallel.mesh import MeshShape, make_mesh

KEY = jax.random.key(7)


def reference(images, tops, lefts, flips, pad):
  """Pad, slice and reverse one image after the other."""
  n, h, w, c = images.shape
  out = np.empty_like(images)
  for i in range(n):
    padded = np.zeros((h + 2 * pad, w + 2 * pad, c), images.dtype)
    padded[pad : pad + h, pad : pad + w] = images[i]
    crop = padded[tops[i] : tops[i] + h, lefts[i] : lefts[i] + w]
    out[i] = crop[:, ::-1] if flips[i] else crop
  return out


def pixels(n, h=32, w=32, c=3):
  # From 1: a black pixel can only come from the border.
  rng = np.random.default_rng(0)
  return rng.integers(1, 256, (n, h, w, c), dtype=np.uint8)


def every_case(pad):
  side = 2 * pad + 1
  grid = np.meshgrid(range(side), range(side), [False, True], indexing="ij")
  return [x.ravel() for x in grid]


@pytest.mark.parametrize(("h", "w", "pad"), [(32, 32, 4), (5, 7, 2), (3, 4, 0)])
def test_crop_flip_equals_numpy_at_every_offset(h, w, pad):
  cases = every_case(pad)
  images = pixels(len(cases[0]), h, w)
  out = jax.jit(functools.partial(augment.crop_flip, pad=pad))(images, *cases)
  assert out.dtype == jnp.uint8
  np.testing.assert_array_equal(out, reference(images, *cases, pad))


def test_the_middle_offset_is_the_image_itself():
  images = pixels(2)
  four = np.full(2, 4)
  out = augment.crop_flip(images, four, four, np.array([False, True]), pad=4)
  np.testing.assert_array_equal(out[0], images[0])
  np.testing.assert_array_equal(out[1], images[1, :, ::-1])


def drawn(images, pad, n):
  """Which (top, left, flip) each augmented copy of one image was made with."""
  copies = np.repeat(images, n, axis=0)
  out = np.asarray(augment.pad_crop_flip(copies, KEY, pad=pad))
  cases = every_case(pad)
  table = reference(np.repeat(images, len(cases[0]), 0), *cases, pad)
  names = {crop.tobytes(): i for i, crop in enumerate(table)}
  assert len(names) == len(table)  # each case looks different
  return np.array([names[crop.tobytes()] for crop in out]), cases


@pytest.mark.quick(1)
def test_every_crop_and_flip_is_equally_likely():
  n, pad = 16_200, 4
  index, cases = drawn(pixels(1, 10, 10, 1), pad, n)
  counts = np.bincount(index, minlength=162)
  assert counts.min() > 0
  # Chi-square of 162 equal cells: mean 161, standard deviation 17.9.
  chi2 = np.sum((counts - n / 162) ** 2) / (n / 162)
  assert abs(chi2 - 161) < 4 * 17.9
  # The margins too: 9 rows, 9 columns, 2 flips.
  for case in cases:
    margin = np.bincount(case[index].astype(int))
    expected = n / len(margin)
    spread = np.sqrt(expected * (1 - 1 / len(margin)))
    assert np.abs(margin - expected).max() < 4.5 * spread


@pytest.mark.quick(1)
def test_examples_draw_on_their_own():
  # Neighbours in a batch share an offset as often as by chance: 1 in 9.
  n = 9_000
  index, (tops, lefts, flips) = drawn(pixels(1, 10, 10, 1), 4, n)
  for case, chance in ((tops, 1 / 9), (lefts, 1 / 9), (flips, 1 / 2)):
    values = case[index]
    same = np.mean(values[1:] == values[:-1])
    assert abs(same - chance) < 5 * np.sqrt(chance * (1 - chance) / n)
  # Rows, columns and flips do not follow one another.
  values = np.stack([tops[index], lefts[index], flips[index]]).astype(float)
  assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 5 / np.sqrt(n)


@pytest.mark.quick(1)
def test_the_key_decides_and_jit_changes_nothing():
  images = pixels(64)
  one = augment.pad_crop_flip(images, KEY)
  chex.assert_trees_all_equal(one, augment.pad_crop_flip(images, KEY))
  chex.assert_trees_all_equal(one, jax.jit(augment.pad_crop_flip)(images, KEY))
  other = augment.pad_crop_flip(images, jax.random.key(8))
  same = (np.asarray(one) == np.asarray(other)).all(axis=(1, 2, 3))
  assert same.mean() < 0.2  # 1 in 162 is expected


@pytest.mark.quick(1)
def test_a_split_batch_is_cropped_without_communication():
  mesh = make_mesh(MeshShape(data=4))
  split = NamedSharding(mesh, PartitionSpec("data"))
  images = jax.device_put(pixels(8), split)

  @functools.partial(jax.jit, out_shardings=split)
  def f(images, key):
    return augment.pad_crop_flip(images, key)

  program = f.lower(images, KEY).compile().as_text()
  for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
    assert word not in program
  np.testing.assert_array_equal(
    f(images, KEY), augment.pad_crop_flip(pixels(8), KEY)
  )


# --- within preprocessing ---

PREPROCESS = functools.partial(
  image.standardize,
  mean=(0.5, 0.25, 0.125),
  std=(0.5, 0.25, 2.0),
  augmentation=augment.pad_crop_flip,
)


@pytest.mark.quick(1)
def test_only_a_key_augments():
  images = pixels(16)
  plain = jax.jit(PREPROCESS)(images)
  assert plain.dtype == jnp.float32 and plain.shape == images.shape
  mean, std = np.array([0.5, 0.25, 0.125]), np.array([0.5, 0.25, 2.0])
  np.testing.assert_allclose(plain, (images / 255 - mean) / std, atol=2e-6)
  assert not np.allclose(plain, PREPROCESS(images, KEY))


def test_the_border_is_black_before_standardization():
  images = pixels(64)
  out = np.asarray(jax.jit(PREPROCESS)(images, KEY))
  raw = augment.pad_crop_flip(images, KEY)
  np.testing.assert_allclose(out, jax.jit(PREPROCESS)(raw), atol=1e-6)
  border = (np.asarray(raw) == 0).all(-1)
  assert border.any()
  # Black standardized, which is not zero.
  np.testing.assert_allclose(
    out[border], np.broadcast_to([-1, -1, -0.0625], out[border].shape)
  )


def test_preprocessing_is_the_same_under_jit_and_for_a_key():
  images = pixels(16)
  one = jax.jit(PREPROCESS)(images, KEY)
  assert one.dtype == jnp.float32 and one.shape == images.shape
  np.testing.assert_allclose(one, PREPROCESS(images, KEY), atol=1e-6)
  chex.assert_trees_all_equal(one, jax.jit(PREPROCESS)(images, KEY))
