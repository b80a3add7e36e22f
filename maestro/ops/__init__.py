"""Products with truncated factors: one signature, several implementations."""

from maestro.ops.cpu import convolution, unroll
from maestro.ops.dispatch import follows_rank, lowrank_conv, lowrank_dot, prefer
from maestro.ops.precise import jit_precise

__all__ = [
  "convolution",
  "follows_rank",
  "jit_precise",
  "lowrank_conv",
  "lowrank_dot",
  "prefer",
  "unroll",
]
