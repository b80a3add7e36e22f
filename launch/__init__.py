"""Launchers of runs of many processes, and what looks at their hosts."""
