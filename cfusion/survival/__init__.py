"""Survival statistics, apart from any model: bins, losses, scores, comparisons."""
