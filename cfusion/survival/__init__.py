"""Survival statistics that do not depend on a model: bins, losses, scores, comparisons."""
