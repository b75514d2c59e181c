"""Define the colours of a method's scores, shared by page, viewer, GeoJSON and heatmap files."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Bool, Float

from cfusion.explanation.result import METHODS, Explanation

MAPS = {True: "RdBu_r", False: "viridis"}
"""Colour map of matplotlib for signed scores, around 0, and for others."""

FADED = (0.55, 0.55, 0.55, 0.25)
"""RGBA of a tile whose score may be noise."""

OPAQUE_FROM = 0.2
"""Share of a signed scale from which a colour is opaque. Below, it is the more transparent the nearer it is to 0, so
that tiles without effect do not cover the tissue with white."""

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
    def of(cls, explanation: Explanation, method: str) -> Scale:
        """Build the scale of a method, the same at all magnifications."""
        scores = np.concatenate([explanation.scores(name, method) for name in explanation.levels])
        size = np.abs(scores[np.isfinite(scores)])
        high = float(np.percentile(size, _CLIP_PERCENTILE, method="higher")) if size.size else 0.0
        high = high if high > 0 else 1.0
        signed = METHODS[method].signed
        return cls(MAPS[signed], -high if signed else 0.0, high, bool((size > high).any()))

    def colours(
        self, scores: Float[np.ndarray, " tile"], stands_out: Bool[np.ndarray, " tile"]
    ) -> Float[np.ndarray, "tile 4"]:
        """Return the RGBA of each score, in 0 … 1: pale grey where it may be noise, transparent for NaN and 0."""
        rgba = map_colours(self.map_name, (scores - self.low) / (self.high - self.low), signed=self.low < 0)
        rgba[~stands_out] = FADED
        rgba[~np.isfinite(scores)] = 0
        return rgba


def map_colours(name: str, places: Float[np.ndarray, " place"], *, signed: bool) -> Float[np.ndarray, "place 4"]:
    """Return the RGBA of places 0 … 1 on a colour map; on a signed one 0.5 is transparent."""
    rgba = np.array(matplotlib.colormaps[name](places))
    if signed:
        rgba[:, 3] *= np.clip(np.abs(2 * np.nan_to_num(places) - 1) / OPAQUE_FROM, 0, 1)
    return rgba
