"""Methods as choices of pieces. Open `table.py` first, then `bind.py`."""
