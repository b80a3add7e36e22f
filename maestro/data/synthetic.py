"""Linear maps of known rank, where the best ranks and factors are theorems."""

from __future__ import annotations

from typing import Literal

import numpy as np

from maestro.data.dataset import DataError, Dataset, Split, identity
from maestro.schema import Count, Natural, Weight


def linear(
  *,
  in_features: Count = 9,
  out_features: Count = 6,
  rank: Count = 3,
  examples: Count | None = None,
  inputs: Literal["ball", "identity", "orthonormal"] = "ball",
  target: Literal["map", "input"] = "map",
  noise: Weight = 0.0,
  seed: Natural = 0,
) -> Dataset:
  """Draw inputs x and targets y = x A (or y = x, an autoencoder).

  A [in_features, out_features] is `make_map(in_features, out_features, rank,
  seed=seed)`. Inputs on the unit ball make the best rank-k model A's truncated
  SVD; `target="input"` makes it the PCA of the inputs.

  Args:
    in_features: Width of x.
    out_features: Width of y; unused with `target="input"`.
    rank: Rank of A; unused with `target="input"`.
    examples: Number of points in each split. None: 1024 on the ball, else
      `in_features`, which is also the most that can be orthonormal.
    inputs: "ball": uniform on the unit ball, fresh points for each split;
      "identity": the rows of the identity; "orthonormal": random orthonormal
      points. The last two are one set of points, the same for all splits.
    target: "map": y = x A; "input": y = x.
    noise: Standard deviation of Gaussian noise added to every target.
    seed: Seed of the map, the points and the noise.

  Returns:
    Inputs [n, in_features] float32, targets [n, out_features or in_features]
    float32, no classes.

  Raises:
    DataError: If an option is out of range.
  """
  if examples is None:
    examples = 1024 if inputs == "ball" else in_features
  if inputs == "orthonormal" and examples > in_features:
    raise DataError(
      f"config.data.examples={examples} must be at most"
      f" config.data.in_features={in_features} for orthonormal inputs"
    )
  if inputs == "identity" and examples != in_features:
    raise DataError(
      f"config.data.examples={examples} must be left out or equal"
      f" config.data.in_features={in_features}: identity inputs are its rows"
    )

  matrix = (
    make_map(in_features, out_features, rank, seed=seed)
    if target == "map"
    else np.eye(in_features, dtype=np.float32)
  )

  def split(stream):
    # One random stream a split (0 is the map's), so that no draw shifts
    # another when an option changes.
    rng = np.random.default_rng((seed, stream))
    if inputs == "ball":
      x = _unit_ball(rng, examples, in_features)
    elif inputs == "identity":
      x = np.eye(in_features)
    else:
      x = np.linalg.qr(rng.normal(size=(in_features, examples)))[0].T
    x = x.astype(np.float32)
    y = x @ matrix
    return Split(x, (y + noise * rng.normal(size=y.shape)).astype(np.float32))

  train = split(1)
  fresh = inputs == "ball"
  return Dataset(
    name="linear",
    train=train,
    val=split(2) if fresh else train,
    test=split(3) if fresh else train,
    num_classes=None,
    preprocess=identity,
  )


def make_map(
  in_features: int, out_features: int, rank: int, *, seed: int = 0
) -> np.ndarray:
  """Return A [in_features, out_features] float32 of a rank, spectral norm 1.

  A is the product of two Gaussian matrices, [in_features, rank] and
  [rank, out_features], divided by its largest singular value.

  Raises:
    DataError: If rank is not in [1, min(in_features, out_features)].
  """
  if not 1 <= rank <= min(in_features, out_features):
    raise DataError(
      f"config.data.rank={rank} must be in [1, min(in_features, out_features)]"
      f" = [1, {min(in_features, out_features)}]"
    )
  rng = np.random.default_rng((seed, 0))
  u = rng.normal(size=(in_features, rank))
  v = rng.normal(size=(rank, out_features))
  return (u @ v / np.linalg.norm(u @ v, ord=2)).astype(np.float32)


def _unit_ball(rng, n, d):
  """Draw n points [n, d] uniformly from the unit ball."""
  x = rng.normal(size=(n, d))
  # The volume within radius r grows as r^d, so the radius is u^(1/d).
  radius = rng.uniform(size=(n, 1)) ** (1 / d)
  return x * radius / np.linalg.norm(x, axis=1, keepdims=True)
