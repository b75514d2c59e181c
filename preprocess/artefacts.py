"""Folds and blurred areas in the tissue of an overview, each measured against the slide's own tissue.

The limits were calibrated on synthetic artefacts only (`benchmarks.tissue`): strips of twice the density, and tissue
seen through Gaussian filters of 16 to 32 µm. The measure is coarse: at 8 µm per pixel a slightly unfocused scan
looks sharp.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from preprocess.pieces import without_gaps, without_small

ARTEFACTS = "relative-1"
"""Name and version of the method, for the provenance of its results."""

FOLD_DENSITY, FOLD_QUANTILE = 1.4, 75
"""A fold absorbs this many times as much as this percentile of the tissue, and is at least as saturated as it."""

BLURRED_SHARE = 0.12
"""Share of the tissue's median variance of the Laplacian below which an area is blurred."""

WINDOW_UM = 136.0
"""Side of the square in which that variance is taken."""

MIN_ARTEFACT_UM2 = 20_000.0
"""Smaller pieces are left in the tissue."""


@dataclass(frozen=True)
class Artefacts:
    """Artefacts in the tissue of a slide.

    Attributes:
        folds: Where the tissue is folded, bool [h, w].
        blurred: Where it is blurred, bool [h, w].
    """

    folds: np.ndarray
    blurred: np.ndarray

    def warnings(self, tissue: np.ndarray) -> list[str]:
        """State which share of the tissue was left out."""
        found = {"folded": self.folds, "blurred": self.blurred}
        return [
            f"{mask.sum() / max(1, tissue.sum()):.1%} of the tissue was left out as {name}"
            for name, mask in found.items()
            if mask.any()
        ]

    @property
    def mask(self) -> np.ndarray:
        """Both, bool [h, w]."""
        return self.folds | self.blurred


def find_artefacts(rgb: np.ndarray, tissue: np.ndarray, um_px: float) -> Artefacts:
    """Find folds and blurred areas.

    Args:
        rgb: Overview, u8 [h, w, 3].
        tissue: Its tissue, bool [h, w].
        um_px: µm per pixel.
    """
    if not tissue.any():
        return Artefacts(np.zeros_like(tissue), np.zeros_like(tissue))
    least_px = MIN_ARTEFACT_UM2 / um_px**2
    window_px = max(3, round(WINDOW_UM / um_px))
    folds = _grown(without_small(without_gaps(_folded(rgb, tissue)), least_px), 1) & tissue
    # A window at the edge of a blurred area contains sharp tissue, so the area found is smaller by a third of it.
    blurred = without_small(without_gaps(_blurred(rgb, tissue, window_px)), least_px)
    blurred = _grown(blurred, window_px // 3) & tissue & ~folds
    return Artefacts(folds, blurred)


def _folded(rgb: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    smooth = cv2.GaussianBlur(rgb.astype(np.float32), (0, 0), 1.5)
    density = -np.log10((smooth + 1) / 256).sum(axis=2)
    high, low = smooth.max(axis=2), smooth.min(axis=2)
    saturation = (high - low) / (high + 8)
    usual, colour = (np.percentile(values[tissue], FOLD_QUANTILE) for values in (density, saturation))
    return tissue & (density > FOLD_DENSITY * usual) & (saturation >= colour)


def _blurred(rgb: np.ndarray, tissue: np.ndarray, window_px: int) -> np.ndarray:
    """Find the tissue whose Laplacian varies little; its edge, where glass lies in the window, is left out."""
    laplacian = cv2.Laplacian(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32), cv2.CV_32F)
    inside = cv2.erode(tissue.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.float32)
    share = cv2.blur(inside, (window_px, window_px))
    mean, square = (
        cv2.blur(values * inside, (window_px, window_px)) / np.maximum(share, 1e-6)
        for values in (laplacian, laplacian * laplacian)
    )
    variance = square - mean * mean
    known = tissue & (share > 0.25)
    if not known.any():
        return known
    return known & (variance < BLURRED_SHARE * np.median(variance[known]))


def _grown(mask: np.ndarray, by_px: int) -> np.ndarray:
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * by_px + 1, 2 * by_px + 1))
    return cv2.dilate(mask.astype(np.uint8), disk) > 0
