"""Speed and memory, as ratios against a stated peer in the same run."""
