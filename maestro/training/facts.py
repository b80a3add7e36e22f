"""What a model must know of its data set, and whether it is still the same."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from maestro import data as data_lib
from maestro.errors import UserError
from maestro.runs import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a model must know of its data set; kept in a workdir's facts.json.

  Attributes:
    data: name of the data set.
    input_shape: of one preprocessed example.
    input_dtype: of preprocessed examples.
    num_classes: None for regression.
    normalization: {"mean": ..., "std": ...} of pixels in [0, 1]; None if
      inputs are taken as they are.
    train_examples: size of the training split.
    vocabulary: digest of the words or characters that tokens stand for, None
      if they stand for nothing.
  """

  data: str
  input_shape: tuple[int, ...]
  input_dtype: str
  num_classes: int | None
  normalization: Mapping[str, Any] | None
  train_examples: int
  vocabulary: str | None = None

  @classmethod
  def of(cls, dataset: data_lib.Dataset) -> "Facts":
    """Reads them from a data set."""
    inputs = dataset.train.inputs
    x = jax.eval_shape(
      dataset.preprocess,
      jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype),
    )
    options = getattr(dataset.preprocess, "keywords", {})
    scale = {k: options[k] for k in ("mean", "std") if k in options}
    words = dataset.vocabulary
    return cls(
      data=dataset.name,
      input_shape=tuple(x.shape[1:]),
      input_dtype=str(x.dtype),
      num_classes=dataset.num_classes,
      normalization=workdir_lib.plain(scale) or None,
      train_examples=len(dataset.train),
      vocabulary=None if words is None else words.digest,
    )

  @property
  def example(self) -> jax.ShapeDtypeStruct:
    """The abstract value of one preprocessed example, batch axis 1."""
    return jax.ShapeDtypeStruct((1, *self.input_shape), self.input_dtype)

  def check(self, found: "Facts", where: Any) -> None:
    """Raises UserError if what is found cannot be what a run has learned.

    Args:
      found: of the data that is there now.
      where: the run.
    """
    for key in ("input_shape", "num_classes", "vocabulary"):
      old, new = getattr(self, key), getattr(found, key)
      # Older runs do not say which vocabulary they have.
      if old != new and not (key == "vocabulary" and old is None):
        raise UserError(
          f"{where}: trained on {self.data!r} with {key}={old}, but the data"
          f" that is there has {key}={new}; point --data_dir,"
          " config.data.data_dir or TFDS_DATA_DIR to the files that it was"
          " trained on"
        )
