"""Define the colour scale shared by overlays and GeoJSON: diverging around 0 for signed scores."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float

from cfusion.explanation.result import METHODS

_CLIP_PERCENTILE = 99.5
"""Scores above this percentile get the last colour, so that an outlier does not make all other tiles pale."""


@dataclass(frozen=True)
class Scale:
    """Colours of one method's scores.

    Attributes:
        map_name: A colour map of matplotlib.
        low: Score of the first colour.
        high: Score of the last colour; `low` is −`high` for signed scores.
        clipped: Whether a score is outside the scale.
    """

    map_name: str
    low: float
    high: float
    clipped: bool

    @classmethod
    def of(cls, method: str, scores: Float[np.ndarray, " tile"]) -> Scale:
        """Build the scale for the scores of a method; NaN is ignored."""
        size = np.abs(scores[np.isfinite(scores)])
        high = float(np.percentile(size, _CLIP_PERCENTILE, method="higher")) if size.size else 0.0
        high = high if high > 0 else 1.0
        signed = METHODS[method].signed
        return cls("RdBu_r" if signed else "viridis", -high if signed else 0.0, high, bool((size > high).any()))

    def colours(self, scores: Float[np.ndarray, " tile"]) -> Float[np.ndarray, "tile 4"]:
        """Return the RGBA of each score, in 0 … 1; transparent for NaN."""
        rgba = matplotlib.colormaps[self.map_name]((scores - self.low) / (self.high - self.low))
        rgba[~np.isfinite(scores)] = 0
        return np.asarray(rgba)
