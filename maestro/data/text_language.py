"""Texts for language models: windows of tokens, and the tokens after them."""

from __future__ import annotations

import os

import numpy as np

from maestro.data import text_files
from maestro.data.dataset import (
  END,
  NO_TARGET,
  PAD,
  DataError,
  Dataset,
  Split,
  tokens,
)
from maestro.data.text import Characters, train_byte_pairs
from maestro.schema import Count

# Tokens of the published texts: Tiny Shakespeare's characters, and WikiText-2's
# byte pairs at the default size of the vocabulary.
_SHAKESPEARE = {"train": 1_003_854, "val": 55_770, "test": 55_770}
_CHARACTERS = 65
_WIKITEXT2 = {"train": 2_579_304, "val": 259_792, "test": 292_680}
_WIKITEXT2_SIZE = 8192

_FILES = {"train": "train.txt.gz", "val": "valid.txt.gz", "test": "test.txt.gz"}


def tinyshakespeare(
  *,
  data_dir: str | os.PathLike | None = None,
  length: Count = 256,
  stride: Count | None = None,
  train_examples: Count | None = None,
) -> Dataset:
  r"""Load Tiny Shakespeare: 1,115,394 characters of 65 kinds.

  The first 90 % train, the next 5 % validate and the last 5 % test, as in
  tensorflow-datasets' tiny_shakespeare. The vocabulary is the characters of all
  three, by their code points.

  Args:
    data_dir: Directory that holds tinyshakespeare/input.txt, or lies beside
      tinyshakespeare/. None: the environment variable TFDS_DATA_DIR, else
      ~/tensorflow_datasets.
    length: Characters of a window.
    stride: Characters between the beginnings of two training windows, at most
      `length`, which is the default: they do not overlap. Those to evaluate on
      never do.
    train_examples: Train on the first so many windows, for short runs; None is
      all.

  Returns:
    Inputs and targets [n, length] int32. Each character of a split is a target
    (once, without overlaps); what stands before the first is \n. The last
    window is padded with id 0, targets -1.

  Raises:
    DataError: If the file is missing, damaged or too short, or an option is out
      of range.
  """
  folder = text_files.find(
    "tinyshakespeare",
    ["input.txt"],
    data_dir=data_dir,
    source=(
      'mkdir -p "{folder}" && curl -fL -o "{folder}/input.txt"'
      " https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
      "tinyshakespeare/input.txt"
    ),
  )
  whole = text_files.read(folder / "input.txt")
  n = int(len(whole) * 0.9)
  m = n + int((len(whole) - n) * 0.5)
  vocabulary = Characters(tuple(sorted({"\n", *whole})))
  (before,) = vocabulary.encode("\n")

  def split(text, step):
    where = f"a split of {folder / 'input.txt'}"
    return _windows(where, vocabulary.encode(text), before, length, step)

  stride = _check_stride(stride, length)
  return _dataset(
    "tinyshakespeare",
    vocabulary,
    {
      "train": split(whole[:n], stride),
      "val": split(whole[n:m], length),
      "test": split(whole[m:], length),
    },
    train_examples,
  )


def wikitext2(
  *,
  data_dir: str | os.PathLike | None = None,
  length: Count = 256,
  vocabulary_size: Count = _WIKITEXT2_SIZE,
  train_examples: Count | None = None,
) -> Dataset:
  r"""Load WikiText-2 (Merity et al., 2016) as byte pairs of its training text.

  Needs the package `tokenizers`. Each line ends with </s>, which is also what
  stands before the first; the text's own <unk> is the token <unk>. The splits
  to evaluate on have `Split.words`, the words and ends of lines by which
  perplexity is usually counted: 217,646 and 245,569.

  Args:
    data_dir: Directory that holds wikitext-2/, or lies beside it, with the
      files {train,valid,test}.txt.gz. None: the environment variable
      TFDS_DATA_DIR, else ~/tensorflow_datasets.
    length: Tokens of a window; windows do not overlap.
    vocabulary_size: Tokens of the vocabulary, at least 260.
    train_examples: Train on the first so many windows, for short runs; None is
      all.

  Returns:
    Inputs and targets [n, length] int32. Each token of a split is a target
    once; the last window is padded with <pad>, targets -1.

  Raises:
    DataError: If files are missing, damaged or empty, `tokenizers` is not
      installed, or an option is out of range.
  """
  folder = text_files.find(
    "wikitext-2",
    list(_FILES.values()),
    data_dir=data_dir,
    source=(
      'mkdir -p "{folder}" && cd "{folder}" && for f in train valid test; do'
      " curl -fL https://raw.githubusercontent.com/pytorch/examples/"
      "77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/"
      "wikitext-2/$f.txt | gzip -n > $f.txt.gz; done"
    ),
  )
  texts = {k: text_files.read(folder / name) for k, name in _FILES.items()}
  vocabulary = train_byte_pairs(texts["train"], size=vocabulary_size)

  def split(name, text):
    where = f"{folder / _FILES[name]}"
    return _windows(where, vocabulary.encode(text), END, length, length)

  splits = {name: split(name, text) for name, text in texts.items()}
  for name in ("val", "test"):
    words = len(texts[name].split()) + texts[name].count("\n")
    splits[name] = Split(splits[name].inputs, splits[name].targets, words)
  return _dataset("wikitext2", vocabulary, splits, train_examples)


def outline_tinyshakespeare(
  *,
  length: Count = 256,
  stride: Count | None = None,
  train_examples: Count | None = None,
) -> Dataset:
  """Return a data set of zeros that has the sizes of `tinyshakespeare`.

  It takes no files and no memory.
  """
  stride = _check_stride(stride, length)
  splits = {
    name: _zeros(n, length, stride if name == "train" else length)
    for name, n in _SHAKESPEARE.items()
  }
  return _dataset("tinyshakespeare", _CHARACTERS, splits, train_examples)


def outline_wikitext2(
  *,
  length: Count = 256,
  vocabulary_size: Count = _WIKITEXT2_SIZE,
  train_examples: Count | None = None,
) -> Dataset:
  """Return a data set of zeros that has the sizes of `wikitext2`.

  It takes no files and no memory. How many windows there are is known of the
  default `vocabulary_size` only, and is the same here for all others.
  """
  splits = {name: _zeros(n, length, length) for name, n in _WIKITEXT2.items()}
  return _dataset("wikitext2", vocabulary_size, splits, train_examples)


def _check_stride(stride, length) -> int:
  if stride is not None and stride > length:
    raise DataError(
      f"config.data.stride={stride} must be at most"
      f" config.data.length={length}: what lies between two windows would never"
      " be trained on"
    )
  return stride or length


def _count(n, length, stride) -> int:
  """Returns how many windows hold n tokens."""
  return -(-max(n - length, 0) // stride) + 1


def _windows(where, ids, before, length, stride) -> Split:
  """Returns the windows of a text, each token after the one before it.

  Args:
    where: the text's name, for errors.
    ids: of its tokens.
    before: the token that is taken to stand before them.
    length: of a window.
    stride: between the beginnings of two windows.
  """
  n = len(ids)
  if not n:
    raise DataError(f"{where} holds no text; get the file again")
  text = np.array([before, *ids], np.int32)
  starts = stride * np.arange(_count(n, length, stride))
  at = starts[:, None] + np.arange(length)
  there, at = at < n, np.minimum(at, n - 1)
  return Split(
    np.where(there, text[at], np.int32(PAD)),
    np.where(there, text[at + 1], np.int32(NO_TARGET)),
  )


def _zeros(n, length, stride) -> Split:
  zero = np.zeros((), np.int32)
  x = np.broadcast_to(zero, (_count(n, length, stride), length))
  return Split(x, x)


def _dataset(name, vocabulary, splits, train_examples) -> Dataset:
  """Returns the data set of a vocabulary, or of its size."""
  train = splits["train"]
  if train_examples is not None:
    if train_examples > len(train):
      raise DataError(
        f"config.data.train_examples={train_examples} is too many: {name!r} has"
        f" {len(train)} windows"
      )
    train = Split(train.inputs[:train_examples], train.targets[:train_examples])
  known = not isinstance(vocabulary, int)
  return Dataset(
    name=name,
    train=train,
    val=splits["val"],
    test=splits["test"],
    num_classes=len(vocabulary) if known else vocabulary,
    preprocess=tokens,
    vocabulary=vocabulary if known else None,
  )
