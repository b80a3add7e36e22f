"""Tables and figures of finished runs. Open `tables.py` first."""
