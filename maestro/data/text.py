"""Rules that divide text into words, and the vocabularies of words.

  A man's T-Shirt (red).  ->  a man ￭'s t ￭-￭ shirt (￭ red ￭) ￭.

The mark ￭ says where no space was, so that nothing but case, the kind of white
space and of quotation marks is lost.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from maestro.data.dataset import (
  END,
  SPECIAL,
  UNKNOWN,
  DataError,
  Vocabulary,
)

_GLUE = "\uffed"  # the halfwidth black square of OpenNMT's tokeniser

_WORD = re.compile(
  r"""(?P<word>
    \d+ (?:[.,:]\d+)+ \w*     # 1,000.5  10:30  2.0er
  | (?:[^\W\d_]\.){2,}        # u.s.  z.b.
  | \w+ (?:'\w+)*             # straße  3rd  rock'n'roll
  )
  | \.{2,} | -{2,}            # ...  --
  | \S""",
  re.VERBOSE,
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll))", re.IGNORECASE)
_SAME = str.maketrans(
  {
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u0060", "'"),
    _GLUE: "\u25a0",  # what Unicode holds to be the same sign
  }
)


def normalize(text: str, *, lowercase: bool) -> str:
  """Returns what `tokenize` keeps of a text.

  In Unicode's composed form (NFC), with single spaces between what any white
  space divided, and " and ' for all quotation marks.
  """
  text = text.lower() if lowercase else text
  text = unicodedata.normalize("NFC", text).translate(_SAME)
  return " ".join(text.split())


def tokenize(text: str, *, lowercase: bool = True) -> list[str]:
  """Divides text into words, numbers and signs; `detokenize` undoes it.

  Words are of Unicode letters, digits and underscores; a number keeps its
  points, commas and colons; initials keep their points ("u.s."). Signs stand
  alone, hyphens within words too. English clitics are divided from their words
  ("man 's", "do n't"), other apostrophes within words are not.

  Args:
    text: a sentence; ends of lines are white space.
    lowercase: whether all letters become small ones.

  Returns:
    Tokens without white space. One that touches the token before it without a
    space begins with ￭, unless it is a word after a sign; then that ends with
    ￭. `detokenize(tokenize(x))` is `normalize(x)`, for all text.
  """
  text = normalize(text, lowercase=lowercase)
  tokens: list[str] = []
  end, after_word = 0, False
  for match in _WORD.finditer(text):
    is_word = match["word"] is not None
    pieces = [(match[0], is_word)]
    if "'" in match[0] and is_word and (clitic := _CLITIC.fullmatch(match[0])):
      pieces = [(clitic[1], True), (clitic[2], False)]
    for piece, is_word in pieces:
      if tokens and match.start() == end:
        if after_word or not is_word:
          piece = _GLUE + piece
        else:
          tokens[-1] += _GLUE
      tokens.append(piece)
      # The second piece touches the first.
      end, after_word = match.start(), is_word
    end = match.end()
  return tokens


def detokenize(tokens: Iterable[str]) -> str:
  """Joins tokens of `tokenize` with spaces where there is no ￭."""
  text = " ".join(tokens)
  return (
    text.replace(f" {_GLUE}", "").replace(f"{_GLUE} ", "").replace(_GLUE, "")
  )


@dataclasses.dataclass(frozen=True)
class Words(Vocabulary):
  """The words of `tokenize`; all others are <unk>.

  Attributes:
    tokens: <pad>, <unk>, <s>, </s>, then words.
    lowercase: As of `tokenize`.
  """

  lowercase: bool = True

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text's tokens, without <s> and </s> around them."""
    return self.ids(tokenize(text, lowercase=self.lowercase))

  def ids(self, words: Iterable[str]) -> list[int]:
    """Returns the ids of what `tokenize` gave."""
    return [self._ids.get(word, UNKNOWN) for word in words]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids up to the first </s>, if there is one."""
    return detokenize(self.until_end(ids))

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {token: i for i, token in enumerate(self.tokens)}


@dataclasses.dataclass(frozen=True)
class Characters(Vocabulary):
  """One token a character, and no special ones."""

  special: ClassVar[bool] = False

  def encode(self, text: str) -> list[int]:
    """Returns one id a character.

    Raises:
      DataError: If a character is not in the vocabulary.
    """
    try:
      return [self._ids[character] for character in text]
    except KeyError as error:
      raise DataError(
        f"the character {error.args[0]!r} is not in the vocabulary of"
        f" {len(self)}; leave it out"
      ) from error

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of all ids."""
    return "".join(self.until_end(ids))

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {token: i for i, token in enumerate(self.tokens)}


def count_words(
  texts: Iterable[Sequence[str]],
  *,
  minimum_frequency: int,
  size: int | None,
  lowercase: bool,
) -> Words:
  """Makes the vocabulary of the words of some texts.

  The most frequent come first, equally frequent ones by their code points.

  Args:
    texts: tokens of `tokenize`.
    minimum_frequency: how often a word has to occur, in all texts together.
    size: keep so many of the most frequent, with the four special ones; None
      is all.
    lowercase: with which the texts were tokenized.

  Raises:
    DataError: If there are fewer than `size`.
  """
  counts = collections.Counter(word for words in texts for word in words)
  words = [w for w, n in counts.items() if n >= minimum_frequency]
  words.sort(key=lambda word: (-counts[word], word))
  tokens = (*SPECIAL, *words)
  if size is not None and not len(SPECIAL) < size <= len(tokens):
    raise DataError(
      f"config.data.vocabulary_size={size} must be in ({len(SPECIAL)},"
      f" {len(tokens)}]: the text has {len(words)} words that occur at least"
      f" config.data.minimum_frequency={minimum_frequency} times"
    )
  return Words(tokens[:size], lowercase)


@dataclasses.dataclass(frozen=True)
class BytePairs(Vocabulary):
  r"""Pieces of words by byte-pair encoding (Sennrich et al., 2016), on bytes.

  Words are what white space divides; each is encoded with one space before it.
  The word <unk> is one token, and so is the end of a line, </s>. No text is
  unknown: a byte that no merge holds is a token of its own.

  Attributes:
    tokens: <pad>, <unk>, <s>, </s>, then pieces, in which a printable character
      stands for each byte.
    merges: Pairs of pieces that become one, the first first.
  """

  merges: tuple[tuple[str, str], ...] = ()

  def encode(self, text: str) -> list[int]:
    r"""Returns the ids of a text's words, with </s> for each \n."""
    lines = [line.split() for line in text.split("\n")]
    # Each distinct word once: text repeats its words.
    words = sorted({word for line in lines for word in line})
    encoded = self._encoder.encode_batch(words, add_special_tokens=False)
    ids = {w: x.ids for w, x in zip(words, encoded, strict=True)}
    ids[SPECIAL[UNKNOWN]] = [UNKNOWN]
    out = []
    for i, line in enumerate(lines):
      if i:
        out.append(END)
      for word in line:
        out += ids[word]
    return out

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids up to the first </s>: the end of the line."""
    decoder = require("tokenizers", "a vocabulary of byte pairs")
    pieces = [
      f"{_SPACE}{x}" if x == SPECIAL[UNKNOWN] else x
      for x in self.until_end(ids)
    ]
    return decoder.decoders.ByteLevel().decode(pieces).removeprefix(" ")

  @functools.cached_property
  def _encoder(self) -> Any:
    tokenizers = require("tokenizers", "a vocabulary of byte pairs")
    ids = {token: i for i, token in enumerate(self.tokens)}
    encoder = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab=ids, merges=list(self.merges))
    )
    encoder.pre_tokenizer = _bytes_of(tokenizers)
    return encoder


_SPACE = "\u0120"  # how byte-level encoding writes a space


def _bytes_of(tokenizers: Any) -> Any:
  return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)


def train_byte_pairs(text: str, *, size: int) -> BytePairs:
  """Makes the byte pairs of a text; the same text gives the same ones.

  Args:
    text: to train on.
    size: tokens of the vocabulary: 4 special ones, 256 bytes, and merges.

  Raises:
    DataError: If `size` is below 260, or more than the text has merges for, or
      the package `tokenizers` is not installed.
  """
  tokenizers = require("tokenizers", "a vocabulary of byte pairs")
  least = len(SPECIAL) + 256
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = _bytes_of(tokenizers)
  if size >= least:
    trained.train_from_iterator(
      (
        " ".join(word for word in line.split() if word not in SPECIAL)
        for line in text.split("\n")
      ),
      tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
      ),
    )
  found = trained.get_vocab()
  if size != len(found):
    raise DataError(
      f"config.data.vocabulary_size={size} must be in [{least},"
      f" {max(least, len(found))}]: bytes and special tokens are {least}, and"
      " the text has no more merges than that"
    )
  model = json.loads(trained.to_str())["model"]
  return BytePairs(
    tuple(sorted(found, key=found.__getitem__)),
    tuple((a, b) for a, b in model["merges"]),
  )


def require(package: str, what: str) -> Any:
  """Returns an optional package.

  Args:
    package: its name.
    what: what needs it, for the error.

  Raises:
    DataError: If it is not installed.
  """
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise DataError(
      f"{what} needs the package {package!r}: pip install"
      " 'maestro-lowrank[text]'"
    ) from error
