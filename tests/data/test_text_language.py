"""Tests of texts for language models: each token is a target once."""

import gzip
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import data
from maestro.data.dataset import END, PAD, SPECIAL, UNKNOWN
from maestro.data.text import BytePairs, train_byte_pairs
from maestro.schema import ConfigError

# 368 characters: 331 to train, 18 and 19 to evaluate on.
PLAY = "First:\nSpeak, speak. Zounds!\n\nAll:\nWe know't. " * 8
# 16 words and 4 ends of lines.
LINES = (
  " \n = The cat = \n \n"
  " the cat <unk> the na\u00efve hat , the cat @-@ hat . \n"
)


def shakespeare(root, text=PLAY, **options):
  folder = pathlib.Path(root) / "tinyshakespeare"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "input.txt").write_text(text, encoding="utf-8")
  return data.make("tinyshakespeare", data_dir=root, **options)


def wikitext(root, train=LINES * 40, valid=LINES, test=LINES * 2, **options):
  pytest.importorskip("tokenizers", reason="pip install '.[text]'")
  folder = pathlib.Path(root) / "wikitext-2"
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in {"train": train, "valid": valid, "test": test}.items():
    raw = gzip.compress(text.encode())
    (folder / f"{name}.txt.gz").write_bytes(raw)
  defaults = {"length": 16, "vocabulary_size": 270}
  return data.make("wikitext2", data_dir=root, **(defaults | options))


def text_of(vocabulary, ids):
  return "".join(vocabulary.tokens[i] for i in ids)


# --- windows ---


def test_each_character_follows_from_those_before_it(tmp_path):
  d = shakespeare(tmp_path, length=16)
  assert d.num_classes == len(d.vocabulary) == len({*PLAY})
  n, m = 331, 331 + 18
  texts = {"train": PLAY[:n], "val": PLAY[n:m], "test": PLAY[m:]}
  for name, text in texts.items():
    split = getattr(d, name)
    assert split.inputs.dtype == split.targets.dtype == np.int32
    assert split.inputs.shape == (-(-len(text) // 16), 16)
    real = split.targets >= 0
    assert text_of(d.vocabulary, split.targets[real]) == text
    assert text_of(d.vocabulary, split.inputs[real]) == f"\n{text}"[:-1]
    # What is left of the last window is no text.
    assert real.reshape(-1)[: len(text)].all()
    assert not split.inputs[~real].any() and (split.targets[~real] == -1).all()


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_training_windows_overlap_by_their_stride(tmp_path, stride):
  d = shakespeare(tmp_path, length=16, stride=stride)
  n = 331
  assert len(d.train) == -(-(n - 16) // stride) + 1
  before = f"\n{PLAY}"
  for i in (0, 1, len(d.train) - 1):
    k = min(16, n - i * stride)
    here = slice(i * stride, i * stride + k)
    assert text_of(d.vocabulary, d.train.inputs[i, :k]) == before[here]
    assert text_of(d.vocabulary, d.train.targets[i, :k]) == PLAY[here]
  # Up to the end of the text, and no further than that needs.
  assert d.train.targets[:-1].min() >= 0 and k > 16 - stride
  assert i * stride + k == n
  plain = shakespeare(tmp_path, length=16)
  np.testing.assert_array_equal(d.val.targets, plain.val.targets)


def test_a_window_may_be_longer_than_the_text(tmp_path):
  d = shakespeare(tmp_path, length=512)
  assert d.train.inputs.shape == d.val.inputs.shape == (1, 512)
  assert (d.val.targets >= 0).sum() == 18


def test_tokens_are_not_changed_on_the_device(tmp_path):
  d = shakespeare(tmp_path, length=16)
  out = jax.jit(d.preprocess)(d.val.inputs, jax.random.key(0))
  assert out.dtype == jnp.int32
  np.testing.assert_array_equal(out, d.val.inputs)
  np.testing.assert_array_equal(
    d.order(1, 2, 8), data.epoch_order(1, 2, len(d.train))
  )


def test_short_runs_take_the_first_windows(tmp_path):
  d = shakespeare(tmp_path, length=16, train_examples=3)
  whole = shakespeare(tmp_path, length=16)
  np.testing.assert_array_equal(d.train.inputs, whole.train.inputs[:3])
  with pytest.raises(data.DataError, match=r"train_examples=99 .*has 21 win"):
    shakespeare(tmp_path, length=16, train_examples=99)


@pytest.mark.parametrize(
  ("options", "error", "words"),
  [
    ({"length": 16, "stride": 17}, data.DataError, "stride=17 .*length=16"),
    ({"length": 0}, ConfigError, "length: 0 is out"),
    ({"stride": 0}, ConfigError, "stride: 0 is out"),
    ({"text": "ab"}, data.DataError, r"input\.txt holds no text"),
  ],
)
def test_what_does_not_fit_is_told(tmp_path, options, error, words):
  with pytest.raises(error, match=words):
    shakespeare(tmp_path, **options)


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("tinyshakespeare", ["no input.txt in", "char-rnn/master/data"]),
    ("wikitext2", ["train.txt.gz, valid.txt.gz, test", "word_language_model"]),
  ],
)
def test_missing_files_say_how_to_get_them(tmp_path, name, parts):
  with pytest.raises(data.DataError) as told:
    data.make(name, data_dir=tmp_path)
  assert all(part in str(told.value) for part in parts)


def test_damaged_text_is_told(tmp_path):
  folder = tmp_path / "tinyshakespeare"
  folder.mkdir()
  (folder / "input.txt").write_bytes(b"abc\xff")
  with pytest.raises(data.DataError, match=r"input\.txt.*UnicodeDecodeError"):
    data.make("tinyshakespeare", data_dir=tmp_path)


# --- byte pairs ---


def test_lines_end_with_a_token_and_words_are_counted(tmp_path):
  d = wikitext(tmp_path)
  assert d.num_classes == len(d.vocabulary) == 270
  real = d.val.targets >= 0
  stream = d.val.targets[real]
  assert (stream == END).sum() == 4 and (stream == UNKNOWN).sum() == 1
  assert stream[0] == END and d.val.inputs[0, 0] == END
  np.testing.assert_array_equal(d.val.inputs[real][1:], stream[:-1])
  assert (d.val.inputs[~real] == PAD).all()
  assert (d.train.words, d.val.words, d.test.words) == (None, 20, 40)
  lines = np.split(stream, np.flatnonzero(stream == END) + 1)
  assert [d.vocabulary.decode(line) for line in lines] == [
    *("", "= The cat =", ""),
    *("the cat <unk> the na\u00efve hat , the cat @-@ hat .", ""),
  ]


def test_byte_pairs_know_all_text(tmp_path):
  vocabulary = wikitext(tmp_path).vocabulary
  text = "A <unk> of \u6f22\u5b57 <s> \U0001f600 </s> zz"
  ids = vocabulary.encode(text)
  assert vocabulary.decode(ids) == text and ids.count(UNKNOWN) == 1
  assert not {*ids} & {PAD, END}
  assert vocabulary.encode(" a\t b ") == vocabulary.encode("a b")
  assert vocabulary.encode("a\n\nb") == [
    *vocabulary.encode("a"),
    END,
    END,
    *vocabulary.encode("b"),
  ]
  assert vocabulary.decode(vocabulary.encode("a cat\nb")) == "a cat"
  assert vocabulary.encode("") == [] and vocabulary.decode([]) == ""


def test_merges_are_learnt_from_training_text_alone(tmp_path):
  one = wikitext(tmp_path)
  two = wikitext(tmp_path, valid="zzz zzz\n" * 99)
  assert one.vocabulary == two.vocabulary
  assert one.vocabulary.digest == two.vocabulary.digest
  assert one.vocabulary.tokens[:4] == SPECIAL
  assert len(one.vocabulary.merges) == 270 - 260
  # The most frequent pair is the first; <unk> is no text to merge.
  assert "\u0120the" in one.vocabulary.tokens
  assert not any("unk" in a + b for a, b in one.vocabulary.merges)
  other = BytePairs(one.vocabulary.tokens, one.vocabulary.merges[::-1])
  assert other.digest != one.vocabulary.digest


@pytest.mark.parametrize("size", [259, 5000])
def test_a_size_that_a_text_does_not_give_is_told(size):
  pytest.importorskip("tokenizers", reason="pip install '.[text]'")
  with pytest.raises(
    data.DataError, match=rf"vocabulary_size={size} must be in \[260, "
  ):
    train_byte_pairs(LINES, size=size)


def test_a_text_that_is_empty_is_told(tmp_path):
  with pytest.raises(data.DataError, match=r"valid\.txt\.gz holds no text"):
    wikitext(tmp_path, valid="")


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(data.DataError, match=r"'tokenizers': pip install '.*tex"):
    train_byte_pairs(LINES, size=300)


# --- sizes without files, and the whole sets ---


def same_sizes(outline, whole):
  assert (outline.name, outline.num_classes) == (whole.name, whole.num_classes)
  for name in ("train", "val", "test"):
    for part in ("inputs", "targets"):
      a, b = (getattr(getattr(d, name), part) for d in (outline, whole))
      assert (a.shape, a.dtype) == (b.shape, b.dtype)
      assert not any(a.strides)


def whole_set(name, folder, **options):
  if not os.environ.get("TFDS_DATA_DIR"):
    pytest.skip("TFDS_DATA_DIR is not set")
  root = pathlib.Path(os.environ["TFDS_DATA_DIR"])
  if not any((r / folder).is_dir() for r in (root, root.parent)):
    pytest.skip(f"no {folder} in TFDS_DATA_DIR or beside it")
  whole = data.make(name, **options)
  same_sizes(data.outline(name, **options), whole)
  return whole


@pytest.mark.parametrize(
  "options", [{}, {"length": 100, "stride": 33, "train_examples": 5000}]
)
def test_whole_tinyshakespeare(options):
  whole = whole_set("tinyshakespeare", "tinyshakespeare", **options)
  splits = (whole.train, whole.val, whole.test)
  assert whole.num_classes == 65
  counts = [int((split.targets >= 0).sum()) for split in splits]
  assert counts[1:] == [55_770, 55_770]
  if not options:
    assert sum(counts) == 1_115_394
    assert [len(split) for split in splits] == [3922, 218, 218]
    assert whole.vocabulary.decode(whole.train.targets[0, :15]) == (
      "First Citizen:\n"
    )


@pytest.mark.quick(0)
def test_whole_wikitext2():
  pytest.importorskip("tokenizers", reason="pip install '.[text]'")
  whole = whole_set("wikitext2", "wikitext-2")
  splits = (whole.train, whole.val, whole.test)
  # The paper's words and ends of lines, and what they are here.
  assert [split.words for split in splits] == [None, 217_646, 245_569]
  counts = [int((split.targets >= 0).sum()) for split in splits]
  assert counts == [2_579_304, 259_792, 292_680]
  assert [int((s.targets == END).sum()) for s in splits] == [36_718, 3760, 4358]
  unknown = [int((split.targets == UNKNOWN).sum()) for split in splits]
  assert unknown == [54_625, 11_718, 15_218]
  assert [len(split) for split in splits] == [10_076, 1015, 1144]
