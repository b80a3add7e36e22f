"""Smaller networks out of a trained one. Open `export.py` first."""
