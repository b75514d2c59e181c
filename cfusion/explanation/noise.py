"""Decide which scores of a slide's tiles stand out from their spread over folds.

The models of a cross-validation share most of their training patients, so they agree with each other more than models
of new cohorts would: with 5 folds, two models share three quarters of their patients. The standard error is therefore
that of the delete-d jackknife (Shao and Wu, Annals of Statistics 17, 1989): the spread over the models times the square
root of the ratio of the patients that trained a model to those it left out; with K folds the ratio is K − 1. A score
stands out if its 95% t-interval, with one degree of freedom less than there are models, excludes the score of a tile
without effect.

A slide has thousands of tiles, and 5% of those without effect stand out. A correction that bounds the share of noise
among the tiles that stand out (Benjamini and Hochberg) asks for p-values that five models hardly give, and hides nearly
everything. Instead, the count is compared with what noise gives (`more_than_noise`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import stdtr

LEVEL = 0.05
"""Share of the tiles without effect that stand out."""


def training_ratio(patients: Sequence[frozenset[str] | None]) -> float | None:
    """Return the ratio of the patients that trained a model to those it left out, from the patients of every model.

    None for one model, or if no model left out a patient: there is then no spread to compare with. Models that do not
    record their patients count as the folds of one cross-validation.
    """
    if len(patients) < 2:
        return None
    known = [names for names in patients if names is not None]
    if len(known) < len(patients):
        return float(len(patients) - 1)
    everyone = len(frozenset().union(*known))
    seen = float(np.mean([len(names) for names in known]))
    return seen / (everyone - seen) if seen < everyone else None


def stands_out(
    departure: Float[np.ndarray, " tile"], sd: Float[np.ndarray, " tile"], models: int, ratio: float
) -> Bool[np.ndarray, " tile"]:
    """Return which tiles' scores differ from those of a tile without effect by more than chance.

    Args:
        departure: Mean over models of the score, minus the score of a tile without effect; NaN: not scored.
        sd: Standard deviation over models, as `numpy.std` computes it.
        models: Number of models.
        ratio: See `training_ratio`.
    """
    found = np.zeros(len(departure), bool)
    scored = np.isfinite(departure) & np.isfinite(sd)
    size, error = np.abs(departure[scored]).astype(float), sd[scored].astype(float) * np.sqrt(ratio)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(size > 0, size / error, 0.0)
    found[scored] = 2 * stdtr(models - 1, -statistic) <= LEVEL
    return found


def more_than_noise(count: int, tiles: int) -> bool:
    """Return whether more tiles of a slide stand out than noise would give."""
    return count > LEVEL * tiles


__all__ = ["LEVEL", "more_than_noise", "stands_out", "training_ratio"]
