"""Products with truncated factors: one signature, several implementations."""

from maestro.ops.dispatch import lowrank_conv, lowrank_dot

__all__ = ["lowrank_conv", "lowrank_dot"]
