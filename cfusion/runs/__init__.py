"""Runs: one configuration trained over all folds, scored, tracked and reproduced."""
