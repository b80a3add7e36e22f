"""Weights as int8 with a scale for each channel, symmetric about zero.

  x[c] ~ s[c] q[c],  s[c] = max |x[c]| / 127,  q[c] in -127 ... 127

The channels of a factor are its components: a row of the rank axis has a scale
of its own, so the first rows with their scales are the smaller network, exactly
as they are in float32. Those of a dense weight are its outputs, of an embedding
its tokens. In float32 a number is off by at most s[c] / 2; in a shorter dtype,
by the rounding of s[c] and of the product to it besides.
"""

from collections.abc import Sequence

import numpy as np

from maestro.trees import LayerSpec


def quantize(
  x: np.ndarray, reduced: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (q, s), int8 of the shape of x and its scales.

  Args:
    x: of a floating dtype, finite.
    reduced: the axes within a channel; of size 1 in s, whose dtype is x's.
  """
  largest = np.max(
    np.abs(x.astype(np.float32)),
    axis=tuple(reduced),
    keepdims=True,
    initial=0.0,
  )
  s = (largest / 127).astype(x.dtype)
  # Zero channels, and those whose scale is below what the dtype can hold.
  safe = np.where(s > 0, s, 1).astype(np.float32)
  q = np.clip(np.rint(x.astype(np.float32) / safe), -127, 127)
  return np.where(s > 0, q, 0).astype(np.int8), s


def dequantize(q: np.ndarray, s: np.ndarray) -> np.ndarray:
  """Returns s q in the dtype of s."""
  return (q.astype(np.float32) * s.astype(np.float32)).astype(s.dtype)


def factor_axes(spec: LayerSpec, ndim: int) -> range:
  """Axes within a component of a factor [R, *lead, ...]."""
  return range(1 + len(spec.lead), ndim)


def weight_axes(spec: LayerSpec) -> range | None:
  """Axes within a channel of a layer's dense weight; None if it has none."""
  if spec.kind == "other":
    return None
  if spec.kind == "embed":
    return range(1, len(spec.kernel_shape))
  lead = spec.stack if spec.kind == "conv" else spec.lead
  return range(len(lead), len(lead) + len(spec.inputs))
