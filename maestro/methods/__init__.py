"""Methods as choices of pieces. Open `table.py` first."""

from maestro.methods.table import METHODS, Method

__all__ = ["METHODS", "Method"]
