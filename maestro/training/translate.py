"""Translations of a split by beam search, and their BLEU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from maestro import decoding
from maestro.data import Dataset, Split
from maestro.data.bleu import bleu
from maestro.data.dataset import END, START, DataError, example_lengths
from maestro.data.text import require
from maestro.models.attention import unstack
from maestro.parallel import processes

WIDTH, ALPHA = 4, 0.6  # of the beam, as Vaswani et al. (2017), section 6.1


def make_translate(
  model: Any, dataset: Dataset, *, batch_size: int = 100
) -> Callable[[Any, Split], list[str]]:
  """Returns translate(variables, split) -> a text for each example.

  By a beam of 4, token by token, up to the length of the data set's arrays. A
  model of scanned blocks runs them one by one.

  Args:
    model: with `begin(source, length)` and `step(cache, tokens, at)`, as a
      `maestro.models.Transformer`.
    dataset: of translations, with a vocabulary.
    batch_size: sentences at a time.
  """
  vocabulary = dataset.vocabulary
  if vocabulary is None:
    raise DataError(f"data set {dataset.name!r} has no words to translate with")
  length, scan = dataset.input_shape[-1], model.scan
  one_by_one = model.clone(scan=False)

  @jax.jit
  def search(variables: Any, source: jax.Array) -> jax.Array:
    if scan:
      variables = {k: unstack(tree) for k, tree in variables.items()}
    apply = functools.partial(one_by_one.apply, variables)
    tokens, _ = decoding.beam(
      lambda cache, tokens, at: apply(cache, tokens, at, method="step"),
      apply(source, length, method="begin"),
      jnp.full(len(source), START, jnp.int32),
      end=END,
      max_length=length,
      width=WIDTH,
      alpha=ALPHA,
    )
    return tokens

  def translate(variables: Any, split: Split) -> list[str]:
    texts = [""] * len(split)
    # Of equal lengths, all of a batch ends early. The last one is filled up, so
    # that there is one program.
    order = np.argsort(example_lengths(split), kind="stable")
    for first in range(0, len(order), batch_size):
      rows = order[first : first + batch_size]
      filled = np.resize(rows, batch_size)
      found = search(variables, split.inputs[filled, 0])
      for i, ids in zip(rows, np.asarray(found), strict=False):
        texts[i] = vocabulary.decode(ids)
    return texts

  return translate


def make_score(
  evaluate: Callable[[Any, Split], dict[str, float]],
  model: Any,
  dataset: Dataset,
) -> Callable[[Any, Split], dict[str, float]]:
  """Returns `evaluate`, of translations with their BLEU beside the rest.

  Other data sets have none, nor has a machine without the package `sacrebleu`,
  which is said once.
  """
  if dataset.val.references is None or not hasattr(model, "begin"):
    return evaluate
  missing = ""
  try:
    require("sacrebleu", "BLEU")
  except DataError as error:
    missing = str(error)
  if not processes.alone():  # all translate together, or none
    remedy = "install it on all hosts, or on none"
    processes.agree("whether sacrebleu is there", missing or "yes", remedy)
  if missing:
    logging.warning("translations are not scored: %s", missing)
    return evaluate
  translate = make_translate(model, dataset)

  def score(variables: Any, split: Split) -> dict[str, float]:
    metrics = evaluate(variables, split)
    assert split.references is not None
    texts = translate(variables, split)
    return metrics | {"bleu": bleu(texts, split.references)}

  return score
