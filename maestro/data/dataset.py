"""The types that every data set of this package is made of."""

from __future__ import annotations

import abc
import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from maestro import streams
from maestro.errors import UserError

# The first tokens of every vocabulary that has special ones.
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
PAD, UNKNOWN, START, END = range(len(SPECIAL))

NO_TARGET = -1  # the target of a position that carries no loss

_POOL = 50  # batches that examples are sorted by length within


class DataError(UserError):
  """Say which data set or `config.data` key is wrong, and the remedy."""


class Rows(abc.ABC):
  """Stands for an array [n, ...] whose rows are read as they are needed.

  Attributes:
    shape: of the array.
    dtype: of the array.
    digest: tells rows of other content apart, as far as is cheap to know.
    unreadable: rows that were found to be so, for which something stands that
      says nothing: they count for nothing where a network is evaluated.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  digest: str
  unreadable: set[int]

  @abc.abstractmethod
  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """Reads a range of rows, or those of an array of numbers from 0."""

  def __len__(self) -> int:
    return self.shape[0]

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
    raise TypeError(f"an array of {self.shape} would be read whole")


class Examples(Protocol):
  """Reads training examples as they are needed; can be pickled."""

  def __call__(
    self, rows: np.ndarray, draws: np.ndarray, seed: int
  ) -> dict[str, np.ndarray]:
    """Returns {"inputs": [k, ...], "targets": [k, ...], "replaced": []}.

    A function of its arguments alone.

    Args:
      rows: [k] of the training split.
      draws: [k], numbers that no other example of the run has: with the seed,
        they decide how an example is augmented.
      seed: of the run.

    Returns:
      The examples as `Dataset.preprocess` takes them, and how many of them
      stand for others that could not be read.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Stream:
  """How a training split comes that is too large to lie on the devices.

  Attributes:
    examples: reads some of it, augmented.
    workers: processes that do so; 0 is threads of this one.
  """

  examples: Examples
  workers: int


# eq=False: comparing arrays has no single truth value; identity is enough.
@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Hold one split of a data set in host memory, or what reads it.

  Attributes:
    inputs: [n, ...], in the stored dtype (uint8 for images, int32 for tokens);
      may be `Rows`, like the targets.
    targets: [n] int32 class labels, [n, d] float32 regression targets, or
      [n, length] int32 tokens, -1 where there is none to predict: such a
      position carries no loss.
    words: Of a language model's text: its words and ends of lines, by which
      nats a word are counted, whatever its tokens are. None: not counted.
    references: Of sentences: the targets as they were written, to compare
      translations with; no word of them is <unk>. None: there are none.
  """

  inputs: Any
  targets: Any
  words: int | None = None
  references: tuple[str, ...] | None = None

  def __len__(self) -> int:
    return len(self.inputs)

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """What training reads: {"inputs": ..., "targets": ...}."""
    return {"inputs": self.inputs, "targets": self.targets}


@dataclasses.dataclass(frozen=True)
class Vocabulary(abc.ABC):
  """Maps text to the tokens of a data set, and back.

  Attributes:
    tokens: Token i is what id i stands for; `SPECIAL` come first, if the kind
      of vocabulary has special ones.

  Raises:
    DataError: If a token stands twice, or special ones are not the first.
  """

  tokens: tuple[str, ...]
  special: ClassVar[bool] = True

  def __post_init__(self):
    if len({*self.tokens}) < len(self.tokens):
      [(twice, _)] = collections.Counter(self.tokens).most_common(1)
      raise DataError(f"a vocabulary holds {twice!r} twice; leave one out")
    if self.special and self.tokens[: len(SPECIAL)] != SPECIAL:
      raise DataError(
        f"a vocabulary begins with {self.tokens[: len(SPECIAL)]}; it must"
        f" begin with {SPECIAL}"
      )

  def __len__(self) -> int:
    return len(self.tokens)

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without <s> and </s> around it."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids up to the first </s>, if there is one.

    Padding and <s> are left out.

    Raises:
      DataError: If an id is not in the vocabulary.
    """

  def until_end(self, ids: Sequence[int]) -> list[str]:
    """Returns the tokens of ids up to </s>, without <pad> and <s>.

    Raises:
      DataError: If an id is not in the vocabulary.
    """
    out = []
    for i in map(int, ids):
      if not 0 <= i < len(self.tokens):
        raise DataError(
          f"token {i} is not in the vocabulary of {len(self.tokens)}; is it the"
          " one of the data that the model was trained on?"
        )
      if self.special and i == END:
        break
      if not self.special or i not in (PAD, START):
        out.append(self.tokens[i])
    return out

  @property
  def digest(self) -> str:
    """16 hexadecimal digits that tell vocabularies of other content apart."""
    content = [type(self).__name__, dataclasses.asdict(self)]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Hold the three splits of a data set and the way to its model inputs.

  Attributes:
    name: Key of `maestro.data.DATASETS`.
    train: Split to fit.
    val: Split to choose hyperparameters, ranks and checkpoints on.
    test: Split to report, once.
    num_classes: Number of classes, or of tokens; None for regression targets.
    preprocess: Pure JAX function `(inputs, key=None) -> float32 inputs` on a
      batch, to be run on device. A key is given in training only and asks for
      augmentation. Tokens stay int32.
    vocabulary: Of text; None for all other data, and in an outline, which
      knows no text.
    lengths: Of padded text: the increasing lengths at which a batch may run,
      the last of which is that of the arrays. <pad> (0) is then no token of a
      sentence.
    left_out: Examples of the training split that could not be used.
    stream: Reads the training split while it is trained on. None: it lies on
      the devices.
  """

  name: str
  train: Split
  val: Split
  test: Split
  num_classes: int | None
  preprocess: Callable[..., jax.Array]
  vocabulary: Vocabulary | None = None
  lengths: tuple[int, ...] | None = None
  left_out: int = 0
  stream: Stream | None = None

  def __post_init__(self):
    where = f"data set {self.name!r}"
    if self.vocabulary is not None and len(self.vocabulary) != self.num_classes:
      raise DataError(
        f"{where}: num_classes={self.num_classes} but a vocabulary of"
        f" {len(self.vocabulary)} tokens"
      )
    if self.lengths is not None:
      rising = list(self.lengths) == sorted({*self.lengths} - {0})
      if not rising or self.lengths[-1:] != self.input_shape[-1:]:
        raise DataError(
          f"{where}: lengths={self.lengths} must increase and end with that of"
          f" the inputs, {self.input_shape[-1]}"
        )
    for name in ("train", "val", "test"):
      self._check(name, getattr(self, name))

  def _check(self, name: str, split: Split) -> None:
    where = f"data set {self.name!r}, {name} split"
    if len(split.inputs) != len(split.targets):
      raise DataError(
        f"{where}: {len(split.inputs)} inputs but {len(split.targets)} targets"
      )
    if split.references is not None and len(split.references) != len(split):
      raise DataError(
        f"{where}: {len(split)} examples but {len(split.references)} references"
      )
    if isinstance(split.inputs, Rows) and name == "train" and not self.stream:
      raise DataError(
        f"{where}: inputs are read as they are needed, so a Dataset needs a"
        " stream= that reads them for training (docs/imagenet.md)"
      )
    for part in ("inputs", "targets"):
      x = getattr(split, part)
      if isinstance(x, Rows):
        continue  # each row is what its reader makes of it
      x = np.asarray(x)
      if x.dtype.kind in "fc" and not np.all(np.isfinite(x)):
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise DataError(
          f"{where}: {part}{list(at)} is {x[at]}; leave that example out"
        )
    if isinstance(split.targets, Rows):
      return
    targets = np.asarray(split.targets)
    if self.num_classes is None and targets.dtype.kind not in "fc":
      raise DataError(
        f"{where}: targets of {targets.dtype} are classes or tokens, of which"
        " num_classes must say how many; vectors to regress on are floats"
      )
    if self.num_classes is None or not len(targets):
      return
    one = targets.ndim == 1  # a class an example, not a token a position
    self._check_range(where, "targets", targets, 0 if one else NO_TARGET)
    if self.vocabulary is not None and not isinstance(split.inputs, Rows):
      self._check_range(where, "inputs", np.asarray(split.inputs), 0)

  def _check_range(
    self, where: str, part: str, x: np.ndarray, least: int
  ) -> None:
    """Raises unless all of x is in [least, num_classes)."""
    assert self.num_classes is not None
    bad = np.flatnonzero((x < least) | (x >= self.num_classes))
    if bad.size:
      at = [int(i) for i in np.unravel_index(bad[0], x.shape)]
      kind = "class" if x.ndim == 1 else "token"
      raise DataError(
        f"{where}: {part}{at} is {x[tuple(at)]}, no {kind} in"
        f" [{least}, {self.num_classes})"
      )

  @property
  def input_shape(self) -> tuple[int, ...]:
    """The shape of one example, without the batch axis."""
    return self.train.inputs.shape[1:]

  def order(
    self, seed: int | jax.Array, epoch: int | jax.Array, batch_size: int
  ) -> jax.Array:
    """Returns the order of an epoch's training examples, int32 [n].

    A pure function of (seed, epoch). Without `lengths` it is `epoch_order`.
    With them batches hold examples of similar lengths: what `epoch_order` gives
    is sorted by length within pools of 50 batches, and the batches are then
    shuffled. The incomplete last batch, if any, stays last and is any examples.

    Args:
      seed: of the run.
      epoch: counted from 0.
      batch_size: examples in a batch; only an order by length depends on it.
    """
    n = len(self.train)
    shuffled = epoch_order(seed, epoch, n)
    if self.lengths is None:
      return shuffled
    order = np.asarray(shuffled)
    whole = n - n % batch_size
    lengths = example_lengths(self.train)[order[:whole]]
    pools = np.arange(whole) // (_POOL * batch_size)
    # Stable: of equal lengths, the order is the epoch's.
    batches = order[np.lexsort((lengths, pools))].reshape(-1, batch_size)
    key = jax.random.fold_in(streams.stream(seed, "batches"), epoch)
    batches = batches[np.asarray(jax.random.permutation(key, len(batches)))]
    return jnp.asarray(np.concatenate([batches.reshape(-1), order[whole:]]))


def epoch_order(
  seed: int | jax.Array, epoch: int | jax.Array, size: int
) -> jax.Array:
  """Return the order of an epoch's examples: a permutation [size], int32.

  A pure function of (seed, epoch), so that every host and every resumed run
  sees the same order. Only `size` has to be static under `jit`.
  """
  key = streams.order(seed, epoch)
  return jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32))


def example_lengths(split: Split) -> np.ndarray:
  """Returns the length of each example of padded text, int32 [n].

  That is where the last token is that is no padding, over all rows of an
  example: the least length at which it may run.
  """
  # Padding comes last in each row, so that counting finds the end.
  inputs = split.inputs.reshape(len(split), -1, split.inputs.shape[-1])
  inputs = np.count_nonzero(inputs != PAD, axis=-1).max(axis=-1)
  targets = np.count_nonzero(split.targets != NO_TARGET, axis=-1)
  return np.maximum(inputs, targets).astype(np.int32)


def identity(inputs: jax.Array, key: jax.Array | None = None) -> jax.Array:
  """Return the inputs [n, ...] as float32, otherwise unchanged."""
  del key  # No augmentation.
  return jnp.asarray(inputs, jnp.float32)


def tokens(inputs: jax.Array, key: jax.Array | None = None) -> jax.Array:
  """Return tokens [n, ...] as int32, otherwise unchanged."""
  del key  # No augmentation.
  return jnp.asarray(inputs, jnp.int32)
