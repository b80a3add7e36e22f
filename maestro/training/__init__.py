"""A run, from its config to results.json. Open `loop.py` first."""
