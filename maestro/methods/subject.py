"""What a method works on: a network, and what its layers see of data."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from maestro.cost.count import Cost
from maestro.introspect import mode
from maestro.methods import calibrate, fisher
from maestro.trees import Layers, Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """The network that a method works on.

  Attributes:
    model: the Flax module.
    layers: of the model.
    dense: cost of the dense network.
    shapes: its parameters' abstract values.
    initial: returns the random dense parameters of the run's seed.
    batches: (how many examples) -> batches of preprocessed training examples.
    key: of random factors.
    calibration: key of what calibration draws.
    classifies: whether outputs are logits.
  """

  model: Any
  layers: Layers
  dense: Cost
  shapes: Tree
  initial: Callable[[], Tree]
  batches: Callable[[int], Iterable[jax.Array]]
  key: jax.Array
  calibration: jax.Array
  classifies: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
  """What layers of a network see of training data.

  Attributes:
    subject: the network.
    paths: the layers.
    params: its parameters.
    batch_stats: its batch statistics, {} without.
  """

  subject: Subject
  paths: Sequence[str]
  params: Tree
  batch_stats: Tree

  def _given(self, examples: int) -> tuple:
    s, variables = self.subject, {"params": self.params}
    if self.batch_stats:
      variables["batch_stats"] = self.batch_stats
    layers = {path: s.layers[path] for path in self.paths}
    return s.model, variables, s.batches(examples), layers

  def inputs(self, examples: int) -> dict[str, jax.Array]:
    """Second moments of inputs on so many examples."""
    told = mode(self.subject.model, train=False)
    return calibrate.second_moments(*self._given(examples), **told)

  def both(self, examples: int) -> dict[str, fisher.Moments]:
    """Moments on both sides of kernels on so many examples."""
    s, told = self.subject, mode(self.subject.model, train=False)
    return fisher.moments(
      *self._given(examples), key=s.calibration, centred=s.classifies, **told
    )
