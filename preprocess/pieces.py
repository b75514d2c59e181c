"""Connected pieces of a mask."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def without_gaps(mask: np.ndarray) -> np.ndarray:
    """Close gaps of up to 4 px, bool [h, w]."""
    return ndimage.binary_closing(np.pad(mask, 2), iterations=2)[2:-2, 2:-2]


def without_small(mask: np.ndarray, area_px: float) -> np.ndarray:
    """Keep the pieces of at least `area_px` px, bool [h, w]."""
    labels, count = ndimage.label(mask)
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= area_px
    keep[0] = False
    return keep[labels]
