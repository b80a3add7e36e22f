"""Devices and how arrays lie on them. Open `mesh.py` first."""
