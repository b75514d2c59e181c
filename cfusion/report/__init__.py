"""The page, the tables and the figures that a run leaves."""
