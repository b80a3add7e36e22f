"""At which ranks kernels are decomposed, and when: rules that read spectra."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated

import numpy as np

from maestro.schema import Count, Range, Ratio, Weight
from maestro.trees import ratio

Spectra = Mapping[str, np.ndarray]  # {path: singular values [*lead, R]}


# ---------------------------------------------------------------------------
# Rank rules: (now, limits, initial, options) -> {path: real number}
#
# now() and initial() give the spectra of the kernels and of those that training
# started from, at random; limits are the largest ranks. What a rule returns is
# rounded up, or, with a budget, scaled to it and then rounded.
# ---------------------------------------------------------------------------


def full(now, limits: Mapping[str, int], initial) -> dict[str, int]:
  """Keeps the ranks that config.rules give, by default the full ones."""
  del now, initial
  return dict(limits)


def fraction(
  now, limits: Mapping[str, int], initial, *, fraction: Ratio
) -> dict[str, Fraction]:
  """Keeps a fraction of every layer's components."""
  del now, initial
  part = ratio(fraction)
  return {path: part * rank for path, rank in limits.items()}


def constant(
  now, limits: Mapping[str, int], initial, *, rank: Count
) -> dict[str, int]:
  """Gives every layer one rank, or its full rank where that is less."""
  del now, initial
  return {path: min(rank, limit) for path, limit in limits.items()}


def energy(
  now: Callable[[], Spectra],
  limits: Mapping[str, int],
  initial,
  *,
  lost: Annotated[float, Range("[0, 1)")] = 0.02,
) -> dict[str, int]:
  """Keeps the fewest components that lose at most a part of ||K||_F^2.

  r = min{r: sum_{k >= r} s_k^2 <= lost * sum_k s_k^2}
  """
  del initial
  ranks = {}
  for path, s in now().items():
    square = s.astype(np.float64) ** 2
    tail = np.cumsum(square[..., ::-1], axis=-1)[..., ::-1]
    # A component stays if without it, and those after it, too much is lost.
    count = np.max(np.sum(tail > lost * tail[..., :1], axis=-1), initial=1)
    ranks[path] = min(int(count), limits[path])
  return ranks


def stable_rank(
  now: Callable[[], Spectra],
  limits: Mapping[str, int],
  initial: Callable[[], Spectra],
) -> dict[str, float]:
  """Scales stable ranks such that the random start has its full rank.

    r = full rank * stable(K) / stable(K at the start)

  The scaled stable rank of Cuttlefish (Wang et al., MLSys 2023). Rounding, and
  the bounds by 1 and by config.rules, are ours.
  """
  start, ranks = stable_ranks(initial()), {}
  for path, value in stable_ranks(now()).items():
    size = now()[path].shape[-1]
    scaled = size * value / start[path] if start[path] else 0.0
    ranks[path] = min(max(scaled, 1.0), limits[path])
  return ranks


def stable_ranks(spectra: Spectra) -> dict[str, float]:
  """Returns sum_k s_k^2 / max_k s_k^2, the largest of a stacked layer."""
  found = {}
  for path, s in spectra.items():
    square = s.astype(np.float64) ** 2
    top = np.max(square, axis=-1)
    ratio = np.sum(square, axis=-1) / np.where(top > 0, top, 1.0)
    found[path] = float(np.max(ratio))
  return found


RANK_RULES = {
  "full": full,
  "fraction": fraction,
  "constant": constant,
  "energy": energy,
  "stable_rank": stable_rank,
}


# ---------------------------------------------------------------------------
# Switches: (before, now, options) -> bool, of an epoch's stable ranks
# ---------------------------------------------------------------------------


def settled(
  before: Mapping[str, float],
  now: Mapping[str, float],
  *,
  tolerance: Weight = 0.1,
) -> bool:
  """True once no stable rank moves by more than `tolerance` in an epoch.

  Cuttlefish's rule ends its dense warm-up when the derivative of all layers'
  stable ranks is small. Differences of one epoch, and of plain stable ranks
  rather than scaled ones, are ours.
  """
  return bool(before) and all(
    abs(now[path] - before[path]) <= tolerance for path in now
  )


SWITCHES = {"stable_ranks": settled}
