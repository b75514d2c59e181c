"""Tissue detection: a mask of a slide's overview, found by colour."""

from __future__ import annotations

import cv2
import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from preprocess.slides import Overview

METHOD = "saturation-otsu-2"
"""Name and version of the method, for the provenance of its results."""

SATURATION_BOUNDS = (0.035, 0.10)
"""Limits of Otsu's threshold on HSV saturation: glass lies below, the palest stroma to keep lies above."""

MIN_TISSUE_UM2 = 20_000.0
"""Smaller pieces are dirt. The limit is a little more than one 20x tile, so a needle biopsy fragment stays."""

MAX_HOLE_UM2 = 60_000.0
"""Smaller holes are lumina and fat, and count as tissue."""

MIN_INK_UM2 = 10_000.0
"""Smaller specks of an ink's colour are pigment or dirt."""

PEN_MARGIN_UM = 48.0
"""Margin around ink that is dropped with it: its rim is blurred and pale."""

INKS = {
    "green": ((35, 105), 70, 25, (0, 255)),
    "blue": ((100, 119), 140, 60, (0, 255)),
    "red": ((174, 184), 175, 120, (60, 255)),
    "black": ((0, 179), 0, 0, (0, 60)),
}
"""Inks as (hue, sure saturation, possible saturation, value), in OpenCV's units: hue in 2°, the others of 255.

H&E lies between violet and pink (hue 125 to 175); blood is redder than eosin but paler than ink. A hue beyond 179
wraps.
"""


def tissue_mask(overview: Overview, um_px: float) -> np.ndarray:
    """Find the tissue in an overview.

    The glass is made white, ink is left out, and Otsu's threshold splits the HSV saturation of the rest. Limits on
    the threshold avoid splitting a slide that is all tissue or all glass.

    Args:
        overview: Picture of the slide.
        um_px: µm per pixel of the overview.

    Returns:
        bool [h, w]. True where no level of the slide can be read: there the cells are listed as unreadable.
    """
    readable = overview.scanned & ~overview.lost
    if not readable.any():
        return overview.lost.copy()
    picture = _on_white_glass(overview.rgb, readable)
    ink = pen_mask(picture, um_px)
    saturation = _saturation(picture)
    valid = readable & ~ink
    threshold = float(np.clip(_otsu(saturation[valid]), *SATURATION_BOUNDS))
    mask = (saturation > threshold) & valid
    mask = ndimage.binary_closing(np.pad(mask, 2), iterations=2)[2:-2, 2:-2] & valid
    mask = _without_small(mask, MIN_TISSUE_UM2 / um_px**2)
    mask |= _small_holes(mask, MAX_HOLE_UM2 / um_px**2)
    return mask & overview.scanned & ~ink | overview.lost


def pen_mask(rgb: np.ndarray, um_px: float) -> np.ndarray:
    """Find ink in a picture of a slide, with a margin; bool [h, w].

    Ink is certain where its colour is strong, and extends as far as its hue continues without a break.
    """
    hue, saturation, value = cv2.split(cv2.cvtColor(cv2.GaussianBlur(rgb, (3, 3), 0), cv2.COLOR_RGB2HSV))
    ink = np.zeros(hue.shape, bool)
    for (low, high), sure, possible, (darkest, lightest) in INKS.values():
        fits = (hue >= low) & (hue <= high) | (hue.astype(np.int16) + 180 <= high)
        fits &= (value >= darkest) & (value <= lightest)
        ink |= _reached(fits & (saturation >= sure), fits & (saturation >= possible))
    ink &= ~_black_stain(ink, value, saturation)
    ink = _without_small(ink, MIN_INK_UM2 / um_px**2)
    return ndimage.binary_dilation(ink, iterations=max(1, round(PEN_MARGIN_UM / um_px)))


def _black_stain(ink: np.ndarray, value: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """Find dark pixels that keep a colour: dense nuclei and folds, not black ink."""
    return ink & (value <= INKS["black"][3][1]) & (saturation > 110)


def _reached(seeds: np.ndarray, region: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(region, np.ones((3, 3)))
    hit = np.zeros(count + 1, bool)
    hit[labels[seeds]] = True
    hit[0] = False
    return hit[labels]


def _on_white_glass(rgb: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """Make the glass white, if there is any: the brightest twentieth, if that is near white."""
    bright = rgb[readable].max(axis=1) if readable.any() else np.zeros(1)
    glass = np.median(rgb[readable][bright >= np.percentile(bright, 95)], axis=0).astype(np.float32)
    if glass.min() < 180 or glass.max() - glass.min() > 30:
        return rgb
    return np.clip(rgb * (255 / glass), 0, 255).astype(np.uint8)


def _saturation(rgb: np.ndarray) -> np.ndarray:
    """Compute the HSV saturation, 0 to 1, of the smoothed picture; dark areas are damped, being only noise."""
    smooth = cv2.GaussianBlur(rgb, (0, 0), 1.2).astype(np.float32)
    high, low = smooth.max(axis=2), smooth.min(axis=2)
    return (high - low) / (high + 8)


def _otsu(values: np.ndarray) -> float:
    return float(threshold_otsu(values)) if values.size and values.min() < values.max() else 1.0


def _small_holes(mask: np.ndarray, area_px: float) -> np.ndarray:
    """Find background enclosed by tissue, in pieces below `area_px`; areas at the picture's edge are not holes."""
    labels, count = ndimage.label(~mask)
    hole = np.bincount(labels.ravel(), minlength=count + 1) < area_px
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    hole[edge] = False
    hole[0] = False
    return hole[labels]


def _without_small(mask: np.ndarray, area_px: float) -> np.ndarray:
    labels, count = ndimage.label(mask)
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= area_px
    keep[0] = False
    return keep[labels]
