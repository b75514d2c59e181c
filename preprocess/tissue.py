"""Where the tissue is: a mask of a slide's overview."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import disk

from preprocess.slides import Overview

METHOD = "chroma-otsu-1"
"""Name and version of the method, for the provenance of what is made with it."""

CHROMA_BOUNDS = (0.045, 0.12)
"""Limits of Otsu's threshold on chroma (max − min of RGB, 0 to 1): glass is below, well stained tissue above."""


def tissue_mask(overview: Overview, um_px: float, min_area_um2: float = 20_000.0) -> np.ndarray:
    """Tissue in an overview.

    Args:
        overview: Picture of the slide.
        um_px: µm per pixel of the overview.
        min_area_um2: Smaller pieces, and smaller holes, are dropped.

    Returns:
        bool [h, w]. Where the overview could not be read it is true: there the slide's own pixels decide.
    """
    smooth = ndimage.gaussian_filter(overview.rgb.astype(np.float32) / 255, (1, 1, 0))
    chroma = smooth.max(axis=2) - smooth.min(axis=2)
    valid = overview.scanned & ~overview.unread
    if not valid.any():
        return overview.unread.copy()
    threshold = float(np.clip(_otsu(chroma[valid]), *CHROMA_BOUNDS))
    mask = (chroma > threshold) & valid
    mask = ndimage.binary_closing(mask, disk(2))
    area_px = max(1, round(min_area_um2 / um_px**2))
    mask = _without_small(mask, area_px)
    mask = ~_without_small(~mask, area_px)
    return mask & overview.scanned | overview.unread


def _otsu(values: np.ndarray) -> float:
    return float(threshold_otsu(values)) if values.size and values.min() < values.max() else 1.0


def _without_small(mask: np.ndarray, area_px: int) -> np.ndarray:
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes >= area_px
    keep[0] = False
    return keep[labels]
