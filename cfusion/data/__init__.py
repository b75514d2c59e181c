"""Bags: the feature store, shards, who reads what, and the loader."""
