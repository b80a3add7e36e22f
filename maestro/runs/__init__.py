"""What a run leaves on disk. Open `workdir.py` first."""
