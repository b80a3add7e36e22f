"""Tests of pairs of sentences: files, arrays, order by length, bad input."""

import dataclasses
import gzip
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from maestro import data
from maestro.data import dataset
from maestro.data.dataset import END, START, UNKNOWN, example_lengths
from maestro.schema import ConfigError

DE = ["Ein Hund rennt.", "Der Hund &amp; ein Mann.", "Ein Mann.", "Ein Mann!"]
EN = ["A dog runs.", "The dog &amp; a man.", "A man.", "A man's dog!"]


def write(root, train=(DE, EN), val=(DE[:2], EN[:2]), test=(DE[2:], EN[2:])):
  """Writes the six files; returns the directory to point data_dir to."""
  folder = pathlib.Path(root) / "multi30k"
  folder.mkdir(parents=True, exist_ok=True)
  splits = {"train": train, "val": val, "test_2016_flickr": test}
  for stem, sides in splits.items():
    for language, lines in zip(("de", "en"), sides, strict=True):
      text = "".join(f"{line}\n" for line in lines)
      (folder / f"{stem}.{language}.gz").write_bytes(
        gzip.compress(text.encode())
      )
  return root


def small(root, **options):
  defaults = {"minimum_frequency": 2, "max_length": 8}
  return data.make("multi30k", data_dir=root, **(defaults | options))


def test_pairs_become_what_is_read_and_what_is_predicted(tmp_path):
  d = small(write(tmp_path))
  assert (len(d.train), len(d.val), len(d.test)) == (4, 2, 2)
  assert d.num_classes == len(d.vocabulary) and d.input_shape == (2, 8)
  for split, (de, en) in {
    "val": (DE[:2], EN[:2]),
    "test": (DE[2:], EN[2:]),
  }.items():
    s = getattr(d, split)
    assert s.inputs.dtype == s.targets.dtype == np.int32
    for x, y, source, target in zip(s.inputs, s.targets, de, en, strict=True):
      source, target = (
        d.vocabulary.encode(t.replace("&amp;", "&")) for t in (source, target)
      )

      def padded(ids, fill):
        return [*ids, *[fill] * (8 - len(ids))]

      np.testing.assert_array_equal(x[0], padded([*source, END], 0))
      np.testing.assert_array_equal(x[1], padded([START, *target], 0))
      np.testing.assert_array_equal(y, padded([*target, END], -1))
    assert s.references == tuple(en)
  assert d.vocabulary.decode(d.test.inputs[0, 0]) == "ein mann."
  assert d.vocabulary.decode(d.val.inputs[1, 1]) == "<unk> dog & a man."


def test_the_vocabulary_is_of_both_languages_and_of_training_only(tmp_path):
  d = small(write(tmp_path, val=(["Xa."] * 2, ["Xa."] * 2)))
  # "a" 4, "ein" 4, "man" 3, "mann" 3, "dog" 3, "hund" 2, "!" 2, "&" 2, "." 6
  assert {*d.vocabulary.tokens[4:]} == {
    *("\uffed.", "a", "ein", "mann", "man", "dog", "hund", "\uffed!", "&")
  }
  assert d.val.inputs[0, 0, 0] == UNKNOWN
  assert small(tmp_path, vocabulary_size=6).num_classes == 6
  with pytest.raises(data.DataError, match=r"config\.data\.vocabulary_size=99"):
    small(tmp_path, vocabulary_size=99)


def test_the_other_direction_has_the_same_vocabulary(tmp_path):
  one = small(write(tmp_path))
  two = small(tmp_path, source="en", target="de")
  assert one.vocabulary == two.vocabulary
  assert one.vocabulary.digest == two.vocabulary.digest
  np.testing.assert_array_equal(
    one.val.inputs[:, 1, 1:],
    two.val.inputs[:, 0, :-1] * (two.val.inputs[:, 0, :-1] != END),
  )
  with pytest.raises(data.DataError, match=r"config\.data\.target='de'"):
    small(tmp_path, target="de")


def test_tokens_stay_integers_on_the_device(tmp_path):
  d = small(write(tmp_path))
  out = jax.jit(d.preprocess)(d.val.inputs, jax.random.key(0))
  assert out.dtype == jnp.int32
  np.testing.assert_array_equal(out, d.val.inputs)


# --- what cannot be used ---


def test_training_pairs_that_do_not_fit_are_left_out_and_counted(
  tmp_path, monkeypatch
):
  told = []
  monkeypatch.setattr(
    logging, "warning", lambda m, *args: told.append(m % args)
  )
  empty, long = ["", "Hund " * 8], ["  ", "dog " * 8]
  de = [*DE, empty[0], DE[0], long[0], DE[0], "a " * 7]
  en = [*EN, EN[0], empty[1], EN[0], long[1], "a " * 7]
  d = small(write(tmp_path, train=(de, en)))
  assert d.left_out == 4 and len(d.train) == 5
  assert d.train.references == (*EN, "a " * 7)
  assert len(told) == 1 and "4 of 9" in told[0] and "max_length=8" in told[0]
  assert small(write(tmp_path)).left_out == 0 and len(told) == 1


def test_pairs_to_evaluate_on_are_not_left_out(tmp_path):
  write(tmp_path, val=(DE[:2], [EN[0], "dog " * 8]))
  with pytest.raises(
    data.DataError,
    match=r"val\.en\.gz, line 2: 8 tokens.*config\.data\.max_len",
  ):
    small(tmp_path)
  write(tmp_path, test=(["", *DE[:1]], EN[:2]))
  with pytest.raises(data.DataError, match=r"flickr\.de\.gz, line 1: 0 tokens"):
    small(tmp_path)


def test_unequal_files_are_told(tmp_path):
  write(tmp_path, train=(DE, EN[:3]))
  with pytest.raises(data.DataError, match=r"train.*4 lines in 'de' but 3"):
    small(tmp_path)


def test_all_too_long_is_told(tmp_path):
  long = ["a " * 9] * 2
  with pytest.raises(data.DataError, match="max_length=8 leaves nothing"):
    small(write(tmp_path, train=(long, long)))


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"max_length": 12}, r"lengths=\(12,\).*multiples of 8"),
    ({"lengths": (8, 4)}, r"lengths=\(8, 4\)"),
    ({"lengths": (8, 16)}, r"max_length=8"),
    ({"lengths": ()}, r"lengths=\(\)"),
    ({"max_length": 16, "lengths": (16, 16)}, r"increasing"),
    ({"train_examples": 5}, r"train_examples=5 .*has 4"),
  ],
)
def test_options_are_checked(tmp_path, options, words):
  with pytest.raises(data.DataError, match=rf"config\.data\..*{words}"):
    small(write(tmp_path), **options)


def test_a_language_that_is_not_there_is_told():
  with pytest.raises(ConfigError, match=r"config\.data\.source.*'fr'"):
    data.outline("multi30k", source="fr")


def test_missing_files_say_which_where_and_how_to_get_them(tmp_path):
  with pytest.raises(data.DataError) as told:
    small(tmp_path / "sets")
  text = str(told.value)
  for part in (
    *("train.de.gz", "test_2016_flickr.en.gz", "TFDS_DATA_DIR"),
    *(str(tmp_path / "sets" / "multi30k"), str(tmp_path / "multi30k")),
    "github.com/multi30k/dataset/raw/master/data/task1/raw",
  ):
    assert part in text
  write(tmp_path)
  (tmp_path / "multi30k" / "val.de.gz").unlink()
  with pytest.raises(data.DataError, match=r"^no val\.de\.gz in "):
    small(tmp_path)


@pytest.mark.parametrize(
  "raw",
  [b"text\n", gzip.compress(b"text\n" * 99)[:-9], gzip.compress(b"\xff")],
  # Not the bytes, which hold the time: all workers must name a test alike.
  ids=["plain text", "cut off", "not UTF-8"],
)
def test_damaged_files_are_told(tmp_path, raw):
  write(tmp_path)
  (tmp_path / "multi30k" / "train.en.gz").write_bytes(raw)
  with pytest.raises(data.DataError, match=r"train\.en\.gz.*damaged.*get it"):
    small(tmp_path)


def test_files_are_found_in_the_directory_or_beside_it(tmp_path, monkeypatch):
  write(tmp_path)
  for root in (tmp_path, tmp_path / "tfds"):
    assert len(small(root).train) == 4
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  assert len(small(None).train) == 4
  # What lies in the directory comes first.
  write(tmp_path / "tfds", train=(DE[:3], EN[:3]))
  assert len(small(None).train) == 3


def test_lines_end_with_line_feeds_only(tmp_path):
  write(tmp_path, train=([*DE, "Ein\u2028Hund.\x85"], [*EN, "A dog.\r"]))
  d = small(tmp_path)
  assert d.vocabulary.decode(d.train.inputs[4, 0]) == "ein hund."
  assert d.vocabulary.decode(d.train.targets[4]) == "a dog."


# --- order by length ---


def of_lengths(lengths, full=48, steps=(16, 32, 48)):
  """A data set whose training examples have given lengths."""
  n = len(lengths)
  inputs = np.zeros((n, 2, full), np.int32)
  targets = np.full((n, full), -1, np.int32)
  for i, k in enumerate(lengths):
    inputs[i, 0, :k] = 4
    inputs[i, 1, : k - 1], targets[i, : k - 1] = 5, 5
  split = data.Split(inputs, targets)
  return data.Dataset(
    name="made",
    train=split,
    val=split,
    test=split,
    num_classes=6,
    preprocess=dataset.tokens,
    lengths=steps,
  )


RANDOM = of_lengths(np.random.default_rng(0).integers(2, 49, 1003))


def test_an_example_is_as_long_as_its_longest_row():
  assert list(example_lengths(of_lengths([3, 48, 7]).train)) == [3, 48, 7]
  split = data.Split(
    np.array([[[4, 0, 0, 0], [2, 5, 0, 0]]] * 2, np.int32),
    np.array([[5, 5, 3, -1], [3, -1, -1, -1]], np.int32),
  )
  assert list(example_lengths(split)) == [3, 2]


@pytest.mark.parametrize("batch_size", [8, 1003, 2000])
def test_the_order_by_length_is_a_permutation(batch_size):
  order = RANDOM.order(3, 5, batch_size)
  assert order.dtype == jnp.int32
  np.testing.assert_array_equal(np.sort(order), np.arange(1003))
  # The incomplete last batch is the end of the epoch's order, unsorted.
  rest = 1003 % batch_size
  if rest:
    plain = data.epoch_order(3, 5, 1003)
    np.testing.assert_array_equal(order[-rest:], plain[-rest:])


def test_the_order_by_length_depends_on_seed_and_epoch_alone():
  orders = {
    tuple(np.asarray(RANDOM.order(seed, epoch, 8)).tolist())
    for seed in range(3)
    for epoch in range(3)
  }
  assert len(orders) == 9
  again = RANDOM.order(2, 1, 8)
  np.testing.assert_array_equal(again, RANDOM.order(jnp.int32(2), 1, 8))
  other = dataclasses.replace(RANDOM, name="other")
  np.testing.assert_array_equal(again, other.order(2, 1, 8))


def test_batches_hold_similar_lengths_and_come_in_no_order():
  lengths = example_lengths(RANDOM.train)
  batches = lengths[np.asarray(RANDOM.order(0, 0, 10))][:1000].reshape(-1, 10)
  plain = lengths[np.asarray(data.epoch_order(0, 0, 1003))][:1000]
  spread = np.ptp(batches, axis=1)
  # A pool is 500 examples of 47 lengths: a batch spans one or two.
  assert spread.max() <= 3
  assert np.ptp(plain.reshape(-1, 10), axis=1).mean() > 30
  # No pool after the other, no length after the other.
  steps = np.abs(np.diff(batches.mean(1)))
  assert steps.mean() > 10


def test_an_order_by_length_is_pinned():
  # A change of these numbers breaks resuming: old runs would see other batches.
  d = of_lengths([5, 9, 3, 30, 4, 8, 40, 3, 3, 7])
  np.testing.assert_array_equal(
    d.order(0, 0, 3), [5, 1, 3, 8, 2, 7, 4, 0, 9, 6]
  )


def test_other_sets_keep_their_order():
  digits = data.make("digits")
  np.testing.assert_array_equal(
    digits.order(7, 3, 128), data.epoch_order(7, 3, 1077)
  )
  traced = jax.jit(lambda e: digits.order(7, e, 128))(3)
  np.testing.assert_array_equal(traced, data.epoch_order(7, 3, 1077))


@pytest.mark.parametrize("lengths", [(), (16, 8, 48), (48, 48), (16,), (0, 48)])
def test_lengths_are_checked(lengths):
  with pytest.raises(data.DataError, match=r"'made': lengths="):
    dataclasses.replace(RANDOM, lengths=lengths)


# --- tokens in range ---


@pytest.mark.parametrize(
  ("part", "at", "value", "words"),
  [
    ("targets", (1, 2), -2, r"targets\[1, 2\] is -2, no token in \[-1, "),
    ("targets", (0, 0), 99, r"targets\[0, 0\] is 99"),
    ("inputs", (1, 0, 3), -1, r"inputs\[1, 0, 3\] is -1, no token in \[0, "),
    ("inputs", (1, 1, 0), 13, r"inputs\[1, 1, 0\] is 13"),
  ],
)
def test_tokens_outside_the_vocabulary_are_told(
  tmp_path, part, at, value, words
):
  d = small(write(tmp_path))
  assert d.num_classes == 13 and d.val.targets.min() == -1
  arrays = {"inputs": d.val.inputs.copy(), "targets": d.val.targets.copy()}
  arrays[part][at] = value
  with pytest.raises(data.DataError, match=f"'multi30k', val.*{words}"):
    dataclasses.replace(d, val=data.Split(**arrays))


def test_each_example_has_a_reference(tmp_path):
  d = small(write(tmp_path))
  few = dataclasses.replace(d.val, references=("A dog.",))
  with pytest.raises(
    data.DataError, match=r"val.*: 2 examples but 1 references"
  ):
    dataclasses.replace(d, val=few)


def test_a_vocabulary_of_another_size_is_told(tmp_path):
  with pytest.raises(data.DataError, match=r"num_classes=12 .*of 13 tokens"):
    dataclasses.replace(small(write(tmp_path)), num_classes=12)


# --- sizes without files, and the whole set ---


def test_an_outline_has_the_sizes_of_its_options():
  o = data.outline(
    "multi30k", vocabulary_size=9521, max_length=24, train_examples=64
  )
  assert o.train.inputs.shape == (64, 2, 24) and o.num_classes == 9521
  assert o.lengths == (16, 24) and not any(o.train.inputs.strides)
  assert o.train.inputs.dtype == o.train.targets.dtype == np.int32
  with pytest.raises(data.DataError, match=r"config\.data\.vocabulary_size"):
    data.outline("multi30k", minimum_frequency=2)


@pytest.fixture(scope="module")
def whole():
  if not os.environ.get("TFDS_DATA_DIR"):
    pytest.skip("TFDS_DATA_DIR is not set")
  root = pathlib.Path(os.environ["TFDS_DATA_DIR"])
  if not any((r / "multi30k").is_dir() for r in (root, root.parent)):
    pytest.skip("no multi30k in TFDS_DATA_DIR or beside it")
  return data.make("multi30k")


def test_whole_multi30k(whole):
  splits = (whole.train, whole.val, whole.test)
  assert [len(s) for s in splits] == [29_000, 1014, 1000]
  assert whole.left_out == 0 and whole.num_classes == 9716
  assert whole.lengths == (16, 24, 32, 48)
  # With </s>: 45, 41 and 37, 35 tokens.
  assert [example_lengths(s).max() for s in splits] == [46, 38, 36]
  # Of the targets' words, without </s>.
  words = [int((s.targets >= 0).sum()) - len(s) for s in splits]
  assert words == [380_200, 13_426, 13_058]
  unknown = [float((s.targets == UNKNOWN).sum()) for s in splits]
  np.testing.assert_allclose(
    np.divide(unknown, words), [0.0159, 0.0239, 0.0210], atol=5e-5
  )
  outline = data.outline("multi30k")
  assert outline.num_classes == whole.num_classes
  assert outline.lengths == whole.lengths
  for name in ("train", "val", "test"):
    for part in ("inputs", "targets"):
      a, b = (getattr(getattr(d, name), part) for d in (outline, whole))
      assert (a.shape, a.dtype) == (b.shape, b.dtype)
  assert whole.vocabulary.decode(whole.train.targets[0]) == (
    "two young, white males are outside near many bushes."
  )


def test_the_order_of_multi30k_saves_half_of_its_padding(whole):
  lengths = example_lengths(whole.train)
  order = np.asarray(whole.order(0, 0, 256))[: 29_000 // 256 * 256]
  longest = lengths[order].reshape(-1, 256).max(axis=1)
  runs = np.asarray(whole.lengths)[np.searchsorted(whole.lengths, longest)]
  # 48 without order; sentences have 14.7 tokens.
  assert runs.mean() < 20
