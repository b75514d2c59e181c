"""Checks of this machine and of the processes that a launcher started."""
