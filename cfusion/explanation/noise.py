"""Decide which tiles of a slide the models of a run agree on.

A tile's score is tested with a t-test over the models of the folds: the models agree on it if the 95% interval of
their mean excludes the score of a tile without effect. Each model's scores are first divided by their root mean square
over the tiles, because the risks of one fold may spread a hundred times as much as those of another; that fold would
decide the mean, and its distance from the others would look like disagreement.

Models of a cross-validation share most of their training patients, so models that learnt only noise agree on part of it
too, and no test over the models can tell this apart from signal. Whether there is a signal is therefore a question to
the held-out patients (`cfusion.apply.ranking`); only where the run ranks these better than chance is a tile coloured.

A slide has thousands of tiles, and 5% of those without effect seem to have one. The count is compared with that share
(`more_than_noise`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64
from scipy.special import stdtr

LEVEL = 0.05
"""Share of the tiles without effect on which models seem to agree."""


def p_values(departure: Float64[np.ndarray, "model tile"]) -> Float32[np.ndarray, " tile"]:
    """Return the two-sided p-value that the models' mean score of a tile is that of a tile without effect.

    Args:
        departure: Each model's score minus that of a tile without effect; two models or more.
    """
    size = np.sqrt((departure**2).mean(axis=1, keepdims=True))
    scaled = departure / np.where(size > 0, size, 1.0)
    mean, error = scaled.mean(axis=0), scaled.std(axis=0, ddof=1) / np.sqrt(len(scaled))
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(mean == 0, 0.0, np.abs(mean) / error)
    return np.asarray(2 * stdtr(len(departure) - 1, -statistic), np.float32)


def more_than_noise(count: int, tiles: int) -> bool:
    """Return whether models agree on more tiles of a slide than chance would give."""
    return count > LEVEL * tiles


__all__ = ["LEVEL", "more_than_noise", "p_values"]
