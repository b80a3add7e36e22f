"""Products with truncated factors: one signature, several implementations."""

from maestro.ops.dispatch import lowrank_conv, lowrank_dot
from maestro.ops.xla import convolution, unroll

__all__ = ["convolution", "lowrank_conv", "lowrank_dot", "unroll"]
