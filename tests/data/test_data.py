"""Tests of maestro.data: orders, splits, reading, and errors that help."""

import dataclasses
import json
import os
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import data
from maestro.data import image, prepared, synthetic
from maestro.errors import UserError
from maestro.schema import ConfigError

# --- epoch_order ---


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_epoch_order_is_a_permutation(size):
  order = data.epoch_order(3, 5, size)
  assert order.dtype == jnp.int32
  np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_epoch_order_depends_on_seed_and_epoch():
  orders = {
    tuple(np.asarray(data.epoch_order(seed, epoch, 50)).tolist())
    for seed in range(3)
    for epoch in range(4)
  }
  assert len(orders) == 12


def test_epoch_order_is_the_same_under_jit():
  order = jax.jit(data.epoch_order, static_argnums=2)
  chex.assert_trees_all_equal(order(3, 5, 100), data.epoch_order(3, 5, 100))


def test_epoch_order_is_pinned():
  # A change of these numbers breaks resuming: old runs would see other batches.
  with jax.default_prng_impl("rbg"):  # Must not matter.
    first = data.epoch_order(0, 0, 10)
    other = data.epoch_order(7, 3, 1000)[:8]
  np.testing.assert_array_equal(first, [0, 8, 2, 4, 1, 7, 9, 5, 3, 6])
  np.testing.assert_array_equal(other, [968, 609, 775, 268, 542, 466, 39, 515])


# --- make ---


def test_make_names_the_nearest_data_set():
  with pytest.raises(ConfigError, match=r"did you mean 'mnist'\?.*linear"):
    data.make("mnits")


def test_make_names_the_unknown_option():
  with pytest.raises(
    ConfigError,
    match=r"config\.data\.val_example: .*'val_examples'\?.*data_dir",
  ):
    data.make("mnist", val_example=3)
  with pytest.raises(ConfigError, match=r"config\.data\.rank: unknown key"):
    data.make("digits", rank=3)


def test_make_takes_none_as_default():
  assert len(data.make("linear", examples=None, seed=None).train) == 1024


# --- digits ---


def test_digits_splits():
  digits = data.make("digits")
  splits = (digits.train, digits.val, digits.test)
  assert [len(split) for split in splits] == [1077, 360, 360]
  assert digits.input_shape == (8, 8, 1)
  assert digits.num_classes == 10
  for split in splits:
    assert split.inputs.dtype == np.float32
    assert split.targets.dtype == np.int32
    assert split.inputs.min() == 0 and split.inputs.max() == 1
  # Stratified: each class has its share of each split, to within one example.
  counts = np.stack([np.bincount(s.targets, minlength=10) for s in splits])
  share = counts.sum(0) * (counts.sum(1, keepdims=True) / counts.sum())
  assert np.abs(counts - share).max() <= 1
  # Disjoint: no two of the 1,797 images are equal.
  images = np.concatenate([s.inputs.reshape(-1, 64) for s in splits])
  assert len(np.unique(images, axis=0)) == 1797


def test_digits_are_the_same_each_time_and_not_preprocessed():
  one, two = data.make("digits"), data.make("digits", data_dir="/unused")
  np.testing.assert_array_equal(one.val.inputs, two.val.inputs)
  out = jax.jit(one.preprocess)(one.val.inputs, jax.random.key(0))
  np.testing.assert_array_equal(out, one.val.inputs)


# --- image sets, on small ones written here ---

TRAIN, TEST = 20, 5


def write_images(root, name="mnist", version="3.0.1", shape=(28, 28, 1)):
  """Write a small data set as tensorflow-datasets would; return its images."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module
  from PIL import Image

  directory = pathlib.Path(root) / name / version
  directory.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=shape),
      "label": tfds.features.ClassLabel(num_classes=10),
    }
  )
  features.save_config(directory)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (TRAIN + TEST, *shape), dtype=np.uint8)
  splits = {"train": images[:TRAIN], "test": images[TRAIN:]}
  for split, members in splits.items():
    writer = array_record_module.ArrayRecordWriter(
      str(directory / f"{name}-{split}.array_record-00000-of-00001"),
      "group_size:1",
    )
    for i, pixels in enumerate(members):
      pixels = pixels[..., 0] if shape[-1] == 1 else pixels
      example = {"image": Image.fromarray(pixels), "label": i % 10}
      writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
  info = {
    "name": name,
    "version": version,
    "fileFormat": "array_record",
    "splits": [
      {
        "name": split,
        "shardLengths": [str(len(members))],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
      for split, members in splits.items()
    ],
  }
  (directory / "dataset_info.json").write_text(json.dumps(info))
  return images


IMAGE_SETS = {
  "cifar10": (32, 32, 3),
  "fashion_mnist": (28, 28, 1),
  "mnist": (28, 28, 1),
}


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_images_are_read_without_tensorflow(tmp_path, name):
  images = write_images(tmp_path, name, shape=IMAGE_SETS[name])
  small = data.make(name, data_dir=tmp_path, val_examples=4)
  assert "tensorflow" not in sys.modules
  assert small.name == name and small.num_classes == 10
  # Validation is the end of the stored train split.
  np.testing.assert_array_equal(small.train.inputs, images[: TRAIN - 4])
  np.testing.assert_array_equal(small.val.inputs, images[TRAIN - 4 : TRAIN])
  np.testing.assert_array_equal(small.test.inputs, images[TRAIN:])
  np.testing.assert_array_equal(small.test.targets, [0, 1, 2, 3, 4])
  assert small.train.inputs.dtype == np.uint8
  assert small.train.targets.dtype == np.int32


def test_data_dir_beats_the_environment(tmp_path, monkeypatch):
  write_images(tmp_path)
  options = {"val_examples": 4}
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  assert len(data.make("mnist", **options).test) == TEST
  with pytest.raises(data.DataError, match="elsewhere"):
    data.make("mnist", data_dir=tmp_path / "elsewhere", **options)
  monkeypatch.delenv("TFDS_DATA_DIR")
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(data.DataError, match="tensorflow_datasets"):
    data.make("mnist", **options)
  write_images(tmp_path / "tensorflow_datasets")
  assert len(data.make("mnist", **options).test) == TEST


def test_the_newest_version_is_read(tmp_path):
  for version in ("3.0.9", "3.0.10"):
    write_images(tmp_path, version=version)
  (tmp_path / "mnist" / "3.0.11.incompleteA1B2").mkdir()
  assert prepared.find("mnist", tmp_path).name == "3.0.10"


def test_a_missing_set_says_where_it_looked_and_how_to_get_it(tmp_path):
  with pytest.raises(data.DataError) as raised:
    data.make("fashion_mnist", data_dir=tmp_path)
  for part in (
    "'fashion_mnist'",
    str(tmp_path),
    "config.data.data_dir",
    "TFDS_DATA_DIR",
    "tfds.builder('fashion_mnist', file_format='array_record',",
    "pip install tensorflow-cpu tensorflow-datasets",
  ):
    assert part in str(raised.value)


@pytest.mark.parametrize(
  "file", ["dataset_info.json", "features.json", "mnist-test.*"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "overwritten"])
def test_a_damaged_set_says_so(tmp_path, file, damage):
  write_images(tmp_path)
  (path,) = (tmp_path / "mnist" / "3.0.1").glob(file)
  if damage == "missing":
    path.unlink()
  elif damage == "empty":
    path.write_bytes(b"")
  else:
    path.write_bytes(b"\0" * path.stat().st_size)
  with pytest.raises(data.DataError, match=r"damaged or incomplete.*Delete"):
    data.make("mnist", data_dir=tmp_path, val_examples=4)


def test_a_format_without_random_access_names_the_remedy(tmp_path):
  write_images(tmp_path)
  info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(data.DataError, match=r"(?s)random-access.*array_record"):
    data.make("mnist", data_dir=tmp_path, val_examples=4)


@pytest.mark.parametrize("val_examples", [0, -1, 0.1, TRAIN, TRAIN + 1])
def test_val_examples_are_checked(tmp_path, val_examples):
  write_images(tmp_path)
  with pytest.raises(UserError, match=r"config\.data\.val_examples[=:]"):
    data.make("mnist", data_dir=tmp_path, val_examples=val_examples)


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_train_examples_are_the_first(tmp_path, name):
  images = write_images(tmp_path, name, shape=IMAGE_SETS[name])
  small = data.make(
    name, data_dir=tmp_path, val_examples=4, train_examples=TRAIN - 4
  )
  assert len(small.train) == TRAIN - 4
  small = data.make(name, data_dir=tmp_path, val_examples=4, train_examples=7)
  np.testing.assert_array_equal(small.train.inputs, images[:7])
  np.testing.assert_array_equal(small.train.targets, range(7))
  # The other splits stay as they are.
  np.testing.assert_array_equal(small.val.inputs, images[TRAIN - 4 : TRAIN])
  assert len(small.test) == TEST


@pytest.mark.parametrize("train_examples", [0, -1, 2.5, True, TRAIN - 3])
def test_train_examples_are_checked(tmp_path, train_examples):
  write_images(tmp_path, "cifar10", shape=(32, 32, 3))
  with pytest.raises(UserError, match=r"config\.data\.train_examples[=:]"):
    data.make(
      "cifar10",
      data_dir=tmp_path,
      val_examples=4,
      train_examples=train_examples,
    )


@pytest.mark.quick(1)
def test_only_cifar10_augments_and_only_with_a_key(tmp_path):
  for name, shape in IMAGE_SETS.items():
    images = write_images(tmp_path, name, shape=shape)
    small = data.make(name, data_dir=tmp_path, val_examples=4)
    plain = small.preprocess(images)
    assert plain.shape == images.shape and plain.dtype == jnp.float32
    again = small.preprocess(images, jax.random.key(0))
    assert np.array_equal(plain, again) == (name != "cifar10")


def test_standardize():
  pixels = np.array([[0, 255]], np.uint8)
  out = jax.jit(lambda x: image.standardize(x, mean=0.25, std=0.5))(pixels)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, [[-0.5, 1.5]], rtol=1e-6)


# --- sizes without files ---


def same_sizes(outline, whole):
  """Checks an outline against the data set that it is of."""
  assert (outline.name, outline.num_classes) == (whole.name, whole.num_classes)
  for name in ("train", "val", "test"):
    ours, real = getattr(outline, name), getattr(whole, name)
    for part in ("inputs", "targets"):
      a, b = getattr(ours, part), getattr(real, part)
      assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", ["digits", "linear"])
def test_an_outline_of_a_set_without_files_is_the_set(name):
  same_sizes(data.outline(name), data.make(name))


def test_an_outline_needs_no_files_and_no_memory(tmp_path):
  outline = data.outline(
    "cifar10", data_dir=tmp_path, val_examples=500, train_examples=100
  )
  sizes = [len(x) for x in (outline.train, outline.val, outline.test)]
  assert sizes == [100, 500, 10_000]
  assert outline.train.inputs.shape == (100, 32, 32, 3)
  assert outline.train.inputs.strides == (0, 0, 0, 0)
  with pytest.raises(data.DataError, match="train_examples=55001"):
    data.outline("mnist", val_examples=5000, train_examples=55_001)
  with pytest.raises(ConfigError, match="val_examples"):
    data.outline("mnist", val_example=3)


def test_an_outline_is_preprocessed_as_the_set_is(tmp_path):
  write_images(tmp_path, shape=(28, 28, 1))
  whole = data.make("mnist", data_dir=tmp_path, val_examples=4)
  assert data.outline("mnist").preprocess is whole.preprocess


# --- image sets, whole ---


def whole_set(name):
  root = os.environ.get("TFDS_DATA_DIR")
  if not root:
    pytest.skip("TFDS_DATA_DIR is not set")
  if not (pathlib.Path(root) / name).is_dir():
    pytest.skip(f"TFDS_DATA_DIR has no {name}")
  whole = data.make(name)
  same_sizes(data.outline(name), whole)
  return whole


@pytest.mark.quick(0)
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_whole_image_sets(name):
  whole = whole_set(name)
  splits = (whole.train, whole.val, whole.test)
  assert [len(split) for split in splits] == [55_000, 5_000, 10_000]
  for split in splits:
    assert split.inputs.shape[1:] == whole.input_shape == (28, 28, 1)
    assert split.inputs.dtype == np.uint8
    # Near balance; MNIST's test split has 892 to 1,135 of a class.
    assert np.bincount(split.targets).min() > 0.85 * len(split) / 10
  # The constants are the train split's: standardized pixels say so.
  out = jax.jit(whole.preprocess)(whole.train.inputs)
  assert out.dtype == jnp.float32
  assert abs(out.mean()) < 0.01 and abs(out.std() - 1) < 0.01


@pytest.mark.quick(0)
def test_whole_cifar10():
  whole = whole_set("cifar10")
  splits = (whole.train, whole.val, whole.test)
  assert [len(split) for split in splits] == [45_000, 5_000, 10_000]
  for split in splits:
    assert split.inputs.shape[1:] == whole.input_shape == (32, 32, 3)
    assert split.inputs.dtype == np.uint8
  # 6,000 images of each class: the rule of the last 5,000 keeps near balance.
  counts = [np.bincount(split.targets) for split in splits]
  np.testing.assert_array_equal(sum(counts), np.full(10, 6000))
  assert counts[1].min() >= 450 and counts[1].max() <= 550
  # The means are the train split's. The recipe's deviations are smaller than
  # those over all pixels, 0.247 on average: they are means over images.
  raw = whole.train.inputs[::10] / np.float32(255)
  np.testing.assert_allclose(
    raw.mean((0, 1, 2)), (0.4914, 0.4822, 0.4465), atol=5e-3
  )
  np.testing.assert_allclose(
    raw.std((1, 2)).mean(0), (0.2023, 0.1994, 0.2010), atol=5e-3
  )
  out = jax.jit(whole.preprocess)(whole.train.inputs[::10])
  assert np.abs(out.mean((0, 1, 2))).max() < 0.03


# --- linear ---


def test_linear_map_has_its_rank_and_unit_norm():
  for seed in range(5):
    values = np.linalg.svd(synthetic.make_map(9, 6, 3, seed=seed))[1]
    assert abs(values[0] - 1) < 1e-6
    assert values[2] > 1e-3 and values[3] < 1e-6


def test_linear_targets_are_the_map_of_the_inputs():
  linear = data.make("linear", seed=3)
  matrix = synthetic.make_map(9, 6, 3, seed=3)
  assert linear.num_classes is None and linear.input_shape == (9,)
  for split in (linear.train, linear.val, linear.test):
    assert split.inputs.dtype == split.targets.dtype == np.float32
    np.testing.assert_allclose(split.targets, split.inputs @ matrix, atol=1e-6)
  assert not np.allclose(linear.train.inputs, linear.val.inputs)
  other = data.make("linear", seed=4)
  assert not np.allclose(linear.train.inputs, other.train.inputs)


def test_linear_ball_is_uniform():
  d, n = 9, 20_000
  train = data.make("linear", in_features=d, examples=n).train
  norms = np.linalg.norm(train.inputs, axis=1)
  assert norms.max() <= 1 + 1e-6
  # E|x|^2 = d / (d + 2); no direction is preferred.
  assert abs(np.mean(norms**2) - d / (d + 2)) < 5e-3
  np.testing.assert_allclose(
    train.inputs.T @ train.inputs / n, np.eye(d) / (d + 2), atol=5e-3
  )


def test_linear_fixed_points():
  eye = data.make("linear", inputs="identity")
  np.testing.assert_array_equal(eye.train.inputs, np.eye(9))
  np.testing.assert_array_equal(eye.train.targets, synthetic.make_map(9, 6, 3))
  assert eye.train is eye.val is eye.test
  auto = data.make(
    "linear",
    in_features=10,
    inputs="orthonormal",
    examples=3,
    target="input",
  )
  x = auto.train.inputs
  np.testing.assert_allclose(x @ x.T, np.eye(3), atol=1e-6)
  np.testing.assert_array_equal(auto.train.targets, x)


def test_linear_noise_has_its_scale():
  clean = data.make("linear")
  noisy = data.make("linear", noise=0.5)
  np.testing.assert_array_equal(clean.train.inputs, noisy.train.inputs)
  residual = noisy.train.targets - clean.train.targets
  assert abs(residual.std() - 0.5) < 0.02


@pytest.mark.parametrize(
  ("options", "key"),
  [
    ({"inputs": "sphere"}, "inputs"),
    ({"target": "output"}, "target"),
    ({"rank": 7}, "rank"),
    ({"rank": 0}, "rank"),
    ({"in_features": 0}, "in_features"),
    ({"examples": 0}, "examples"),
    ({"inputs": "identity", "examples": 8}, "examples"),
    ({"inputs": "orthonormal", "examples": 10}, "examples"),
    ({"noise": -1.0}, "noise"),
    ({"noise": float("nan")}, "noise"),
    ({"seed": -1}, "seed"),
  ],
)
def test_linear_options_are_checked(options, key):
  with pytest.raises(UserError, match=rf"config\.data\.{key}[=:]"):
    data.make("linear", **options)


@pytest.mark.parametrize(
  "key", ["pythonClassName", "python_class_name", "type"]
)
def test_a_data_set_chooses_nothing_to_import(key, tmp_path, monkeypatch):
  directory = tmp_path / "mnist" / "3.0.1"
  directory.mkdir(parents=True)
  (tmp_path / "payload.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(str(tmp_path))
  features = {
    "pythonClassName": "tensorflow_datasets.core.features.features_dict."
    "FeaturesDict",
    "featuresDict": {"features": {"image": {key: "payload.Image"}}},
  }
  (directory / "features.json").write_text(json.dumps(features))
  (directory / "dataset_info.json").write_text("{}")
  with pytest.raises(data.DataError, match=r"payload\.Image.*not imported"):
    image.mnist(data_dir=str(tmp_path))


# --- what no training can use ---


def planted(split, part, index, value):
  """Digits with one value replaced."""
  digits = data.make("digits")
  splits = {name: getattr(digits, name) for name in ("train", "val", "test")}
  arrays = {
    "inputs": splits[split].inputs.copy(),
    "targets": splits[split].targets.copy(),
  }
  arrays[part][index] = value
  return dataclasses.replace(digits, **{split: data.Split(**arrays)})


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(
  ("part", "index", "value", "words"),
  [
    ("inputs", (3, 1, 2, 0), np.nan, r"inputs\[3, 1, 2, 0\] is nan"),
    ("inputs", (0, 0, 0, 0), np.inf, r"inputs\[0, 0, 0, 0\] is inf"),
    ("targets", 5, 10, r"targets\[5\] is 10, no class in \[0, 10\)"),
    ("targets", 7, -1, r"targets\[7\] is -1"),
  ],
)
def test_data_that_cannot_be_trained_on_is_told(
  split, part, index, value, words
):
  with pytest.raises(data.DataError, match=f"'digits', {split}.*{words}"):
    planted(split, part, index, value)


def test_inputs_and_targets_go_together():
  digits = data.make("digits")
  few = data.Split(digits.val.inputs, digits.val.targets[:3])
  with pytest.raises(data.DataError, match="360 inputs but 3 targets"):
    dataclasses.replace(digits, val=few)
