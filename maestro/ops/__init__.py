"""Products with truncated factors: one signature, several implementations."""

from maestro.ops.cpu import convolution, unroll
from maestro.ops.dispatch import lowrank_conv, lowrank_dot

__all__ = ["convolution", "lowrank_conv", "lowrank_dot", "unroll"]
