"""What a network costs, and ranks for a budget. Open `count.py` first."""
