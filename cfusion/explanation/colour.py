"""One colour scale for the pictures, the GeoJSON and the page: diverging around 0 for scores with a sign."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float

from cfusion.explanation.result import METHODS

_CLIP_PERCENTILE = 99.5
"""Scores beyond it have the last colour, so that one tile does not bleach all others."""


@dataclass(frozen=True)
class Scale:
    """Colours of one method's scores.

    Attributes:
        map_name: A colour map of matplotlib.
        low: Score of the first colour.
        high: Score of the last colour; `low` is −`high` where scores have a sign.
        clipped: Whether some score lies beyond.
    """

    map_name: str
    low: float
    high: float
    clipped: bool

    @classmethod
    def of(cls, method: str, scores: Float[np.ndarray, " tile"]) -> Scale:
        """The scale for these scores of a method; NaN is passed over."""
        size = np.abs(scores[np.isfinite(scores)])
        high = float(np.percentile(size, _CLIP_PERCENTILE, method="higher")) if size.size else 0.0
        high = high if high > 0 else 1.0
        signed = METHODS[method].signed
        return cls("RdBu_r" if signed else "viridis", -high if signed else 0.0, high, bool((size > high).any()))

    def colours(self, scores: Float[np.ndarray, " tile"]) -> Float[np.ndarray, "tile 4"]:
        """RGBA in 0 … 1 of each score; transparent for NaN."""
        rgba = matplotlib.colormaps[self.map_name]((scores - self.low) / (self.high - self.low))
        rgba[~np.isfinite(scores)] = 0
        return np.asarray(rgba)
