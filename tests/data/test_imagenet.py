"""ImageNet as tensorflow-datasets prepares it, on a set of ours."""

import sys

import jax
import numpy as np
import pytest

from experiments import photographs
from maestro import data
from maestro.data import imagenet, photos, stream
from maestro.data.dataset import Rows
from maestro.errors import UserError
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.training.durations import Clock
from maestro.training.feed import make_feed

TRAIN, TEST, VAL = 24, 12, 6
OPTIONS = {"val_examples": VAL, "size": 32, "workers": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Where a small set is; the 12th photograph to train on is broken."""
  path = tmp_path_factory.mktemp("imagenet")
  photographs.write(path, TRAIN, TEST, broken=2)
  return path


def labels(count, first):
  return [label for _, label in photographs.split(count, first, 0)]


def test_splits_are_read_without_tensorflow(root):
  d = data.make("imagenet2012", data_dir=root, **OPTIONS)
  assert "tensorflow" not in sys.modules
  assert d.num_classes == 1000 and d.input_shape == (32, 32, 3)
  sizes = [len(split) for split in (d.train, d.val, d.test)]
  assert sizes == [TRAIN - VAL, VAL, TEST]
  stored = labels(TRAIN, 0)
  assert d.train.targets[:].tolist() == stored[:-VAL]
  assert d.val.targets[:].tolist() == stored[-VAL:]
  assert d.test.targets[:].tolist() == labels(TEST, TRAIN)
  assert all(isinstance(split.inputs, Rows) for split in (d.train, d.test))
  content = photographs.encoded(TRAIN + 5, labels(TEST, TRAIN)[5])
  np.testing.assert_array_equal(
    d.test.inputs[5:6][0], photos.crop(content, photos.centre, 32)
  )


def test_training_sees_random_parts_of_the_same_photographs(root):
  d = data.make("imagenet2012", data_dir=root, **OPTIONS)
  rows = np.array([4, 0, 11])
  out = d.stream.examples(rows, np.array([7, 8, 9]), 5)
  stored = labels(TRAIN, 0)
  # The 12th is broken; the 13th stands for it.
  assert out["targets"].tolist() == [stored[4], stored[0], stored[12]]
  assert out["replaced"] == 1
  content = photographs.encoded(4, stored[4])
  np.testing.assert_array_equal(
    out["inputs"][0], photos.augmented(content, 32, (5, 7))
  )


def test_pixels_are_standardized_on_the_device(root):
  d = data.make("imagenet2012", data_dir=root, **OPTIONS)
  x = d.test.inputs[:2]
  out = jax.jit(d.preprocess)(x)
  mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
  np.testing.assert_allclose(out, (x / 255 - mean) / std, atol=1e-5)
  # What is random of them happens where they are read.
  again = jax.jit(d.preprocess)(x, jax.random.key(0))
  np.testing.assert_array_equal(out, again)


def test_the_real_sizes_are_known_without_files():
  d = data.outline("imagenet2012", size=160)
  assert (len(d.train), len(d.val), len(d.test)) == (1_271_167, 10_000, 50_000)
  assert d.input_shape == (160, 160, 3) and d.num_classes == 1000
  assert d.stream is not None
  small = data.outline("imagenet2012", train_examples=64, val_examples=8)
  assert (len(small.train), len(small.val)) == (64, 8)


def test_a_missing_set_says_what_to_fetch_and_run(tmp_path):
  with pytest.raises(data.DataError) as raised:
    data.make("imagenet2012", data_dir=tmp_path)
  for part in (
    str(tmp_path / "downloads" / "manual"),
    "ILSVRC2012_img_train.tar",
    "tfds.builder('imagenet2012', file_format='array_record',",
    "TFDS_DATA_DIR",
  ):
    assert part in str(raised.value)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_file_is_told_before_training(tmp_path, split):
  photographs.write(tmp_path, 12, 10)
  directory = tmp_path / "imagenet2012" / "5.1.0"
  (path,) = directory.glob(f"*-{split}.*")
  path.write_bytes(b"\0" * path.stat().st_size)
  with pytest.raises(data.DataError, match=r"damaged or incomplete.*Delete"):
    data.make("imagenet2012", data_dir=tmp_path, val_examples=2)


@pytest.mark.parametrize(
  ("options", "name"),
  [
    ({"val_examples": TRAIN}, "val_examples"),
    ({"train_examples": TRAIN}, "train_examples"),
    ({"size": 0}, "size"),
    ({"workers": -1}, "workers"),
    ({"crop": 3}, "crop"),
  ],
)
def test_options_are_checked(root, options, name):
  with pytest.raises(UserError, match=rf"config\.data.*{name}"):
    data.make("imagenet2012", data_dir=root, **(OPTIONS | options))


@pytest.mark.parametrize(("cores", "workers"), [(2, 0), (8, 1), (96, 12)])
def test_processes_follow_the_cores(cores, workers, monkeypatch):
  monkeypatch.setattr(photos, "cores", lambda: cores)
  assert imagenet._workers(None) == workers
  assert imagenet._workers(3) == 3


def test_other_files_or_another_choice_have_another_digest(root, tmp_path):
  photographs.write(tmp_path, TRAIN, TEST + 1)
  one, same, longer, other = (
    data.make("imagenet2012", data_dir=where, **(OPTIONS | more)).train.inputs
    for where, more in (
      (root, {}),
      (root, {"size": 16}),
      (root, {"train_examples": 5}),
      (tmp_path, {}),
    )
  )
  assert one.digest == same.digest
  assert len({one.digest, longer.digest, other.digest}) == 3


def test_without_grain_it_is_evaluated_on_but_not_trained_on(root, monkeypatch):
  monkeypatch.setattr(stream.importlib.util, "find_spec", lambda name: None)
  d = data.make("imagenet2012", data_dir=root, **OPTIONS)
  assert d.test.inputs[:2].shape == (2, 32, 32, 3)
  mesh = make_mesh(MeshShape(data=1))
  with pytest.raises(data.DataError, match="pip install"):
    make_feed(d, 0, Clock(4, 4, discover=8), mesh)
