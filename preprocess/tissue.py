"""Tissue detection: a mask of a slide's overview, found by colour relative to the slide's own glass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from preprocess.artefacts import Artefacts
from preprocess.ink import grey_deviation, pen_mask
from preprocess.pieces import without_gaps, without_small
from preprocess.settings import MIN_PIECE_UM2
from preprocess.slides import Overview

METHOD = "glass-relative-4"
"""Name and version of the method, for the provenance of its results."""

SATURATION_BOUNDS = (0.022, 0.10)
"""Limits of the threshold on HSV saturation: glass lies below, the palest stroma to keep lies above."""

SATURATION_NOISE = 0.008
"""Saturation of glass that is noise; it keeps the logarithm of saturation from spreading the glass."""

LEAST_SPREAD = 1e-3
"""Range of this logarithm below which a slide has one colour, and no threshold."""

MOTTLED, LEAST_SATURATION = 1.7, 0.012
"""Deviation of grey values, of 255, within 3 × 3 px above which an area is no glass, if it is at least so saturated."""

GREY_SHARE, GREY_MOTTLED = 0.35, 0.7
"""Grey areas next to coloured tissue belong to it from this share of its darkness on, if they are so mottled."""

FAINTEST = 1.5
"""Darkness, of 255, that is noise of the glass."""

PALE_AREA = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
"""Smallest area of pale tissue next to a strong stain, in px: more than the blurred rim of the strong stain."""

SMOOTHING_PX = 1.2
"""Standard deviation of the filter against noise."""

MAX_HOLE_UM2 = 60_000.0
"""Smaller holes are lumina and fat, and count as tissue."""

BLANK_SIDE_PX = 12
"""Smallest side of a rectangle of pure white, or pure black, that was not scanned."""

RAGGED_PX, STRAIGHT = 5, 0.6
"""Width of what is cut off their ragged edges, and the smallest share of their outline that is straight."""

DARKEST_GLASS, MAX_TINT, MAX_YELLOW = 165, 30, 70
"""Glass is at least this bright in every channel, and tinted by at most so much; yellowed mounting medium by more."""

INK_WARNING = 0.25
"""Share of what is not glass from which ink is reported: a stain may have been taken for it."""


@dataclass(frozen=True)
class Tissue:
    """Tissue of a slide.

    Attributes:
        mask: bool [h, w]. True where no level of the slide can be read: there the cells are listed as unreadable.
        ink: Ink of pens, with its margin, bool [h, w].
        scanned: Where the slide has pixels, bool [h, w].
        warnings: What is unusual and may have been misread.
    """

    mask: np.ndarray
    ink: np.ndarray
    scanned: np.ndarray
    warnings: tuple[str, ...] = ()

    @property
    def tissue_percent(self) -> float:
        """Share of the scanned area that is tissue, in percent."""
        return 100 * float(self.mask.sum() / max(1, self.scanned.sum()))

    @property
    def ink_percent(self) -> float:
        """Share of the scanned area that is ink, in percent."""
        return 100 * float(self.ink.sum() / max(1, self.scanned.sum()))


def find_tissue(overview: Overview, um_px: float, min_piece_um2: float = MIN_PIECE_UM2) -> Tissue:
    """Find the tissue in an overview.

    The glass is made white, and ink is left out. The rest is split by its HSV saturation, see `_stained`. Limits on the
    threshold avoid splitting a slide that is all tissue or all glass.

    Args:
        overview: Picture of the slide.
        um_px: µm per pixel of the overview.
        min_piece_um2: Area of the smallest piece of tissue, in µm².
    """
    scanned = overview.scanned & ~blank(overview.rgb)
    readable = scanned & ~overview.lost
    if not readable.any():
        return Tissue(overview.lost.copy(), np.zeros_like(readable), scanned)
    glass = _glass(overview.rgb, readable)
    picture = overview.rgb if glass is None else np.clip(overview.rgb * (255 / glass), 0, 255).astype(np.uint8)
    ink = pen_mask(picture, um_px) & readable
    valid = readable & ~ink
    mask = _stained(picture, valid)
    if glass is not None:
        mask = _with_grey(picture, mask, valid)
    mask = without_gaps(mask) & valid
    mask = without_small(mask, min_piece_um2 / um_px**2)
    mask |= _small_holes(mask, MAX_HOLE_UM2 / um_px**2)
    mask = mask & scanned & ~ink | overview.lost
    return Tissue(mask, ink, scanned, tuple(_warnings(glass, mask, ink)))


def without_artefacts(tissue: Tissue, artefacts: Artefacts) -> Tissue:
    """Leave artefacts out of the tissue, and say how much that is."""
    warnings = (*tissue.warnings, *artefacts.warnings(tissue.mask))
    return replace(tissue, mask=tissue.mask & ~artefacts.mask, warnings=warnings)


def tissue_mask(overview: Overview, um_px: float) -> np.ndarray:
    """Return the mask of `find_tissue`, bool [h, w]."""
    return find_tissue(overview, um_px).mask


def blank(rgb: np.ndarray) -> np.ndarray:
    """Find what a scanner left out and filled with white or black, bool [h, w].

    It is made of rectangles, so its outline is straight; overexposed glass, as white, follows the tissue.
    """
    found = np.zeros(rgb.shape[:2], bool)
    for value in (0, 255):
        pure = (rgb == value).all(axis=2).astype(np.uint8)
        pure = cv2.morphologyEx(pure, cv2.MORPH_OPEN, np.ones((RAGGED_PX, RAGGED_PX), np.uint8))
        large = cv2.erode(pure, np.ones((BLANK_SIDE_PX, BLANK_SIDE_PX), np.uint8)) > 0
        labels, _ = ndimage.label(pure)
        for number in np.unique(labels[large]):
            piece = labels == number
            if _straight_share(piece) >= STRAIGHT:
                found |= piece
    return found


def _straight_share(piece: np.ndarray) -> float:
    """Return the share of a piece's outline, without the picture's edge, that is in straight pieces; 1 of none."""
    runs = []
    for mask in (piece, piece.T):
        # An edge lies between two rows; along them it is straight.
        for edge in (mask[1:] & ~mask[:-1], mask[:-1] & ~mask[1:]):
            padded = np.pad(edge, ((0, 0), (1, 1))).astype(np.int8)
            steps = np.diff(padded, axis=1)
            runs.append(np.nonzero(steps < 0)[1] - np.nonzero(steps > 0)[1])
    lengths = np.concatenate(runs)
    return float(lengths[lengths >= BLANK_SIDE_PX].sum() / lengths.sum()) if lengths.size else 1.0


def _warnings(glass: np.ndarray | None, mask: np.ndarray, ink: np.ndarray) -> list[str]:
    found = []
    if glass is None:
        found.append("no glass was found")
    elif np.ptp(glass) > MAX_TINT:
        found.append(f"the glass is tinted (RGB {', '.join(f'{v:.0f}' for v in glass)})")
    share = ink.sum() / max(1, (mask | ink).sum())
    if share > INK_WARNING:
        found.append(f"{share:.0%} of what is not glass was taken for ink of a pen")
    return found


def _glass(rgb: np.ndarray, readable: np.ndarray) -> np.ndarray | None:
    """Return the colour of the glass, f32 [3]: the brightest twentieth, if that is near white or yellowed."""
    # Smoothed, because the brightest of noisy pixels have a tint of their noise.
    smooth = cv2.GaussianBlur(rgb, (0, 0), SMOOTHING_PX)[readable].astype(np.float32)
    bright = smooth.mean(axis=1)
    glass = np.median(smooth[bright >= np.percentile(bright, 95)], axis=0)
    red, green, blue = (float(v) for v in glass)
    # Eosin and haematoxylin take more green than blue; only yellowed glass takes more blue.
    yellow = red >= green >= blue and red - green <= MAX_TINT
    if glass.min() < DARKEST_GLASS or np.ptp(glass) > (MAX_YELLOW if yellow else MAX_TINT):
        return None
    return glass


def _saturation(rgb: np.ndarray) -> np.ndarray:
    """Compute the HSV saturation, 0 to 1, of the smoothed picture; dark areas are damped, being only noise."""
    smooth = cv2.GaussianBlur(rgb.astype(np.float32), (0, 0), SMOOTHING_PX)
    high, low = smooth.max(axis=2), smooth.min(axis=2)
    return (high - low) / (high + 8)


def _stained(picture: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Find the stained pixels, bool [h, w]: by Otsu's threshold on the logarithm of saturation, and pale areas.

    On a logarithmic scale a pale stain is as far from glass as a strong one is from it. Where a slide has both, the
    threshold lies between the two stains; what is pale but mottled over an area is tissue, too.
    """
    saturation = _saturation(picture)
    logarithm = np.log(saturation[valid] + SATURATION_NOISE)
    spread = logarithm.size and np.ptp(logarithm) > LEAST_SPREAD
    threshold = np.exp(threshold_otsu(logarithm)) - SATURATION_NOISE if spread else 1.0
    mask: np.ndarray = (saturation > np.clip(threshold, *SATURATION_BOUNDS)) & valid
    mottled = _mottled(picture)
    pale = (saturation > LEAST_SATURATION) & (mottled > MOTTLED)
    pale |= (saturation > SATURATION_BOUNDS[0]) & (mottled > GREY_MOTTLED)
    pale &= valid & ~mask
    return mask | (cv2.morphologyEx(pale.astype(np.uint8), cv2.MORPH_OPEN, PALE_AREA) > 0)


def _with_grey(picture: np.ndarray, stained: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Add to the stained pixels the grey ones that are connected with them, bool [h, w].

    Two dyes of complementary colours make a grey that saturation misses. It is as dark as stained tissue, and mottled,
    unlike a shadow.
    """
    if not stained.any():
        return stained
    darkness = 255 - cv2.GaussianBlur(picture.astype(np.float32), (0, 0), SMOOTHING_PX).mean(axis=2)
    least = max(FAINTEST, GREY_SHARE * float(np.median(darkness[stained])))
    grey = (darkness > least) & (_mottled(picture) > GREY_MOTTLED) & valid
    return ndimage.binary_propagation(stained, mask=stained | grey)


def _mottled(picture: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(grey_deviation(picture), (0, 0), 2)


def _small_holes(mask: np.ndarray, area_px: float) -> np.ndarray:
    """Find background enclosed by tissue, in pieces below `area_px`; areas at the picture's edge are not holes."""
    labels, count = ndimage.label(~mask)
    hole = np.bincount(labels.ravel(), minlength=count + 1) < area_px
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    hole[edge] = False
    hole[0] = False
    return hole[labels]
