"""Networks that no run of maestro has trained, for what a run can be cut to."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maestro import introspect, lowrank
from maestro.deploy import card
from maestro.errors import UserError
from maestro.training import build, opened
from maestro.trees import Tree


@dataclasses.dataclass(frozen=True)
class Settings:
  """What deploying reads of a run's config.

  Attributes:
    loss: of `maestro.training.losses.LOSSES`, to measure and to evaluate.
    batch_size: examples of a forward pass over data.
    batch_norm_examples: for the statistics of batch norm; None for all.
    model: of a module of `maestro.models`, "" is its own name and options, in
      an export, too; one of another class is loaded with `model=`.
  """

  loss: str = "cross_entropy"
  batch_size: int = 256
  batch_norm_examples: int | None = None
  model: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: {"name": ""}
  )

  @property
  def micro_batch(self) -> int:
    """Examples that run at a time: nothing is accumulated."""
    return self.batch_size


def as_run(
  model: Any,
  variables: Mapping[str, Tree],
  inputs: Any,
  *,
  ranks: Tree | None = None,
  settings: Settings = Settings(),
) -> opened.Run:
  """Takes a network in memory for a run: to allocate, evaluate and export it.

    params = maestro.decompose(variables["params"], rules, layers)
    run = as_run(model, variables | {"params": params}, x)
    half = choose_ranks(run, "macs:0.5", rule="energy")
    export(run, "half", [Size("half", half)])

  Args:
    model: a Flax module of maestro's layers. It may be told that it trains by
      `train`, `training`, `deterministic` or nothing, and return any pytree.
    variables: {"params": ...} with factors and, where it has them,
      {"batch_stats": ...}.
    inputs: an example of what it is applied to, or its abstract value; the
      first axis is the batch.
    ranks: the current ranks; None is all that is stored.
    settings: what a run's config would say.

  Raises:
    UserError: other variables, which an export would lose; or a model that
      does not take such inputs.
  """
  if other := sorted(set(variables) - {"params", "batch_stats", "ranks"}):
    raise UserError(
      f"variables: {other[0]!r} is neither params nor batch_stats, and would"
      " not be exported; make it part of either, or leave it out if a call does"
      " without"
    )
  if not hasattr(inputs, "shape") or not np.shape(inputs):
    raise UserError(
      "inputs: one array is needed, whose first axis is the batch; wrap a model"
      " of several inputs in one that takes them side by side"
    )
  facts = build.Facts(
    data=card.OWN_DATA,
    input_shape=tuple(inputs.shape[1:]),
    input_dtype=str(inputs.dtype),
    num_classes=None,
    normalization=None,
    train_examples=0,
  )
  params, told = variables["params"], introspect.mode(model, train=False)
  layers = introspect.layers(model, facts.example, **told)
  return opened.Run(
    workdir=pathlib.Path(type(model).__name__),
    config=settings,  # pyright: ignore[reportArgumentType]
    facts=facts,
    model=model,
    layers=layers,
    step=0,
    params=jax.device_get(params),
    batch_stats=jax.device_get(variables.get("batch_stats", {})),
    ranks=jax.device_get(
      lowrank.full_ranks(params, layers) if ranks is None else ranks
    ),
  )
