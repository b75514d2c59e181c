"""Ink of pens on a slide, distinguished from stains by shape and evenness as well as by colour.

A blue or green that covers a pen's hues can also be haematoxylin, collagen in Masson's stain or toluidine blue. But ink
is even and drawn in strokes of one width; a stain follows the tissue, so it is mottled, branched and full of holes.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy import ndimage
from skimage.measure import label, regionprops

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

STRONG = 140
"""Saturation, of 255, from which an even line of any hue is ink."""

EVEN = 3.0
"""Largest median deviation of grey values, of 255, within 3 × 3 px of even ink; tissue has 4 to 20."""

WIDTH_SPREAD, EVEN_WIDTH_SPREAD = 0.25, 0.3
"""Largest relative spread of the width of a stroke, and of an even one; pens have up to 0.2, most tissue 0.4 to 1."""

MAX_HOLES = 1.0
"""Largest number of holes per 1000 px of ink; tissue has 1 to 10."""

MIN_LENGTH = 6.0
"""Smallest length of a line of any hue, in widths."""

BLACK = 20
"""Value, of 255, below which a colour is noise."""

CORE_PX = 2.5
"""Distance from the edge at which evenness is measured, so that the edge itself is not."""


def pen_mask(rgb: np.ndarray, um_px: float) -> np.ndarray:
    """Find ink in a picture of a slide, with a margin; bool [h, w].

    Ink is certain where its colour is strong, and extends as far as its hue continues without a break.

    Args:
        rgb: u8 [h, w, 3], with white glass.
        um_px: µm per pixel.
    """
    hue, saturation, value = cv2.split(cv2.cvtColor(cv2.GaussianBlur(rgb, (3, 3), 0), cv2.COLOR_RGB2HSV))
    deviation = grey_deviation(rgb)
    min_px = MIN_INK_UM2 / um_px**2
    ink = np.zeros(hue.shape, bool)
    for (low, high), sure, possible, (darkest, lightest) in INKS.values():
        fits = (hue >= low) & (hue <= high) | (hue.astype(np.int16) + 180 <= high)
        fits &= (value >= darkest) & (value <= lightest)
        region = _reached(fits & (saturation >= sure), fits & (saturation >= possible))
        if lightest < 255:  # dark pixels that keep a colour are dense nuclei and folds; that of black ones is noise
            region &= (saturation <= 110) | (value <= BLACK)
        ink |= _drawn(region, deviation, min_px)
    lines = (saturation >= STRONG) & (deviation <= EVEN)
    ink |= ndimage.binary_dilation(_drawn(lines, deviation, min_px, MIN_LENGTH), iterations=2)
    return ndimage.binary_dilation(ink, iterations=max(1, round(PEN_MARGIN_UM / um_px)))


def grey_deviation(rgb: np.ndarray) -> np.ndarray:
    """Return the standard deviation of grey values within 3 × 3 px, f32 [h, w]."""
    grey = rgb.astype(np.float32).mean(axis=2)
    mean = cv2.blur(grey, (3, 3))
    return np.sqrt(np.maximum(cv2.blur(grey * grey, (3, 3)) - mean * mean, 0))


def _drawn(region: np.ndarray, deviation: np.ndarray, min_px: float, min_length: float = 0.0) -> np.ndarray:
    """Keep the pieces of a region that were drawn: strokes of one width, or even areas without holes."""
    labels = label(region, connectivity=2)
    width = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    ridge = region & (width >= ndimage.maximum_filter(width, 3) - 1e-6)
    kept = np.zeros(labels.max() + 1, bool)
    for piece in regionprops(labels):
        if piece.area < min_px:
            continue
        inside, widths = piece.image, width[piece.slice]
        core = inside & (widths >= min(CORE_PX, 0.75 * widths[inside].max()))
        even = np.median(deviation[piece.slice][core]) <= EVEN
        of_ridge = widths[inside & ridge[piece.slice]]
        stroke = of_ridge.std() <= (EVEN_WIDTH_SPREAD if even else WIDTH_SPREAD) * of_ridge.mean()
        solid = 1 - piece.euler_number <= MAX_HOLES * piece.area / 1000 + 1
        long = piece.area >= min_length * (2 * np.median(of_ridge)) ** 2
        kept[piece.label] = solid and long and (stroke or even if not min_length else stroke and even)
    return kept[labels]


def _reached(seeds: np.ndarray, region: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(region, np.ones((3, 3)))
    hit = np.zeros(count + 1, bool)
    hit[labels[seeds]] = True
    hit[0] = False
    return hit[labels]
