"""Multi30k: pairs of English and German sentences about pictures."""

from __future__ import annotations

import html
import os
import pathlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from absl import logging

from maestro.data import text, text_files
from maestro.data.dataset import (
  END,
  NO_TARGET,
  PAD,
  START,
  DataError,
  Dataset,
  Split,
  tokens,
)
from maestro.schema import Count

_SPLITS = {"train": "train", "val": "val", "test": "test_2016_flickr"}
_PAIRS = {"train": 29_000, "val": 1014, "test": 1000}
_VOCABULARY = 9716  # at the default options
_UNIT = 8  # all lengths are multiples of it

_SOURCE = (
  'mkdir -p "{folder}" && cd "{folder}" && for f in train val'
  " test_2016_flickr; do for l in de en; do curl -fLO"
  " https://github.com/multi30k/dataset/raw/master/data/task1/raw/$f.$l.gz;"
  " done; done"
)

Language = Literal["de", "en"]


class _Pair(NamedTuple):
  """A pair of sentences, tokenized, and the target as it was written."""

  source: list[str]
  target: list[str]
  reference: str

  def fault(self, max_length: int) -> int | None:
    """Returns which sentence is empty or too long, if one is."""
    for i, words in enumerate((self.source, self.target)):
      if not 0 < len(words) < max_length:
        return i
    return None


def multi30k(
  *,
  data_dir: str | os.PathLike | None = None,
  source: Language = "de",
  target: Language = "en",
  lowercase: bool = True,
  minimum_frequency: Count = 3,
  vocabulary_size: Count | None = None,
  max_length: Count = 48,
  lengths: Sequence[Count] | None = None,
  train_examples: Count | None = None,
) -> Dataset:
  """Load Multi30k (task 1, 2016): 29,000 / 1,014 / 1,000 pairs of sentences.

  Both languages share one vocabulary: the words of `text.tokenize` in the
  training text. HTML's entities, as in "Q&amp;A", are read as what they mean.
  Pairs with an empty sentence, or one longer than `max_length`, are left out of
  the training split, counted in `Dataset.left_out` and told by a warning.

  Args:
    data_dir: Directory that holds multi30k/, or lies beside it, with the files
      {train,val,test_2016_flickr}.{de,en}.gz. None: the environment variable
      TFDS_DATA_DIR, else ~/tensorflow_datasets.
    source: The language to translate from.
    target: The language to translate to.
    lowercase: Whether all letters become small ones.
    minimum_frequency: How often a word has to occur in the training text of
      both languages together, to be in the vocabulary.
    vocabulary_size: Keep so many of the most frequent words, with the four
      special tokens; None is all.
    max_length: Tokens of the longest sentence with its </s>; a multiple of 8.
    lengths: At which a batch may run: increasing multiples of 8, the last of
      them `max_length`. None: 16, 24, 32 and `max_length`.
    train_examples: Train on the first so many pairs, for short runs; None is
      all. The vocabulary stays that of all.

  Returns:
    Inputs [n, 2, max_length] int32: source tokens, </s>, <pad>; and what the
    decoder reads, <s>, target tokens, <pad>. Targets [n, max_length] int32:
    target tokens, </s>, then -1.

  Raises:
    DataError: If files are missing, damaged or of unequal numbers of lines, if
      a sentence to evaluate on is empty or too long, or an option is out of
      range.
  """
  lengths = _check(source, target, max_length, lengths)
  names = [f"{s}.{x}.gz" for s in _SPLITS.values() for x in (source, target)]
  folder = text_files.find("multi30k", names, data_dir=data_dir, source=_SOURCE)
  pairs = {
    split: _read(folder, stem, (source, target), lowercase)
    for split, stem in _SPLITS.items()
  }
  vocabulary = text.count_words(
    (words for p in pairs["train"] for words in (p.source, p.target)),
    minimum_frequency=minimum_frequency,
    size=vocabulary_size,
    lowercase=lowercase,
  )
  train = [p for p in pairs["train"] if p.fault(max_length) is None]
  left_out = len(pairs["train"]) - len(train)
  if left_out:
    logging.warning(
      "multi30k: %d of %d training pairs are left out: a sentence is empty, or"
      " longer than config.data.max_length=%d with its </s>",
      *(left_out, len(pairs["train"]), max_length),
    )
  if not train:
    raise DataError(
      f"config.data.max_length={max_length} leaves nothing of {folder} to train"
      " on; choose a larger number"
    )
  for split in ("val", "test"):
    for i, pair in enumerate(pairs[split]):
      if (fault := pair.fault(max_length)) is not None:
        raise DataError(
          f"{folder / _SPLITS[split]}.{(source, target)[fault]}.gz, line"
          f" {i + 1}: {len(pair[fault])} tokens; a sentence to evaluate on must"
          f" have 1 to {max_length - 1}: raise config.data.max_length, or mend"
          " that line"
        )
  if train_examples is not None and train_examples > len(train):
    raise DataError(
      f"config.data.train_examples={train_examples} is too many:"
      f" 'multi30k' has {len(train)}"
    )
  return Dataset(
    name="multi30k",
    train=_split(train[:train_examples], vocabulary, max_length),
    val=_split(pairs["val"], vocabulary, max_length),
    test=_split(pairs["test"], vocabulary, max_length),
    num_classes=len(vocabulary),
    preprocess=tokens,
    vocabulary=vocabulary,
    lengths=lengths,
    left_out=left_out,
  )


def outline(
  *,
  source: Language = "de",
  target: Language = "en",
  lowercase: bool = True,
  minimum_frequency: Count = 3,
  vocabulary_size: Count | None = None,
  max_length: Count = 48,
  lengths: Sequence[Count] | None = None,
  train_examples: Count | None = None,
) -> Dataset:
  """Return a data set of zeros that has the sizes of `multi30k`.

  It takes no files and no memory. What is left out is not known: the training
  split has all pairs.

  Raises:
    DataError: If the size of the vocabulary is not known: of options other than
      the default it is only with `vocabulary_size`.
  """
  lengths = _check(source, target, max_length, lengths)
  if vocabulary_size is None:
    if not lowercase or minimum_frequency != 3:
      raise DataError(
        "config.data.vocabulary_size: tell the number of words, which without"
        " the text is known only of lowercase=True and minimum_frequency=3"
      )
    vocabulary_size = _VOCABULARY
  zero = np.zeros((), np.int32)

  def zeros(n):
    return Split(
      np.broadcast_to(zero, (n, 2, max_length)),
      np.broadcast_to(zero, (n, max_length)),
    )

  n = _PAIRS["train"]
  return Dataset(
    name="multi30k",
    train=zeros(n if train_examples is None else min(n, train_examples)),
    val=zeros(_PAIRS["val"]),
    test=zeros(_PAIRS["test"]),
    num_classes=vocabulary_size,
    preprocess=tokens,
    lengths=lengths,
  )


def _check(source, target, max_length, lengths) -> tuple[int, ...]:
  """Returns the lengths at which batches run; raises if options clash."""
  if source == target:
    raise DataError(
      f"config.data.target={target!r} must be another language than"
      f" config.data.source={source!r}"
    )
  if lengths is None:
    lengths = (*(n for n in (16, 24, 32) if n < max_length), max_length)
  lengths = tuple(lengths)
  rising = list(lengths) == sorted({*lengths})
  whole = all(n % _UNIT == 0 for n in (*lengths, max_length))
  if not rising or not whole or lengths[-1:] != (max_length,):
    raise DataError(
      f"config.data.lengths={lengths} must be increasing multiples of {_UNIT},"
      f" the last of them config.data.max_length={max_length}"
    )
  return lengths


def _read(
  folder: pathlib.Path, stem: str, languages: tuple[str, str], lowercase: bool
) -> list[_Pair]:
  """Returns the pairs of a split."""
  lines = [text_files.lines(folder / f"{stem}.{x}.gz") for x in languages]
  if len(lines[0]) != len(lines[1]):
    raise DataError(
      f"{folder / stem}.*.gz: {len(lines[0])} lines in {languages[0]!r} but"
      f" {len(lines[1])} in {languages[1]!r}; line i of one must be the"
      " translation of line i of the other, so get both again"
    )

  def words(line):
    return text.tokenize(html.unescape(line), lowercase=lowercase)

  return [_Pair(words(x), words(y), y) for x, y in zip(*lines, strict=True)]


def _split(
  pairs: Sequence[_Pair], vocabulary: text.Words, length: int
) -> Split:
  """Returns the arrays of pairs of which each fits."""
  inputs = np.full((len(pairs), 2, length), PAD, np.int32)
  targets = np.full((len(pairs), length), NO_TARGET, np.int32)
  for i, pair in enumerate(pairs):
    x = [*vocabulary.ids(pair.source), END]
    y = [*vocabulary.ids(pair.target), END]
    inputs[i, 0, : len(x)] = x
    inputs[i, 1, : len(y)] = [START, *y[:-1]]
    targets[i, : len(y)] = y
  return Split(inputs, targets, references=tuple(p.reference for p in pairs))
