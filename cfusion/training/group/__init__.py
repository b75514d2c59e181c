"""Training of many folds, seeds and models from one read of the shards per epoch."""
