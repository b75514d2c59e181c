"""Training of many folds, seeds and models that share one read of the shards per epoch."""
