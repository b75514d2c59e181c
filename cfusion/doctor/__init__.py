"""Checks of this machine and of a world of processes."""
