"""Overview of a slide: a small picture of all of it, as complete as its level 0."""

from __future__ import annotations

import logging
import math

import numpy as np
from PIL import Image

from cfusion.errors import DataError
from preprocess.slides import Overview, Slide

logger = logging.getLogger(__name__)

MAX_BLOCK_PX = 2048
"""Side of the blocks in which an overview is read; bounds memory on a slide with one level."""

MIN_BLOCK_PX = 256
"""Minimum size of a block that is split because it cannot be read."""

FILL_SIDE = 32
"""Side, in px of the overview, of the squares that are read from a finer level."""

FILL_PROBES = 8
"""Pixels of level 0 that are looked at before such a square is read."""

MAX_SPLITS = 400
"""Maximum number of blocks split per overview; a slide with more broken blocks is not worth the reads."""


def read_overview(slide: Slide, um_px: float = 8.0) -> Overview:
    """Read an entire slide at about `um_px` µm per pixel, from the coarsest level that is fine enough."""
    step = max(1.0, um_px / slide.resolution.mpp)
    fine_enough = [i for i, d in enumerate(slide.downsamples) if d <= step * 1.001]
    level = max(fine_enough, key=lambda i: slide.downsamples[i], default=0)
    width, height = (max(1, math.ceil(side / step)) for side in slide.size_px)
    overview = _read_level(slide, level, width, height)
    _fill_from_finer(slide, level, overview)
    return overview


def _read_level(slide: Slide, level: int, width: int, height: int) -> Overview:
    level_width, level_height = slide.level_sizes_px[level]
    overview = Overview(
        np.empty((height, width, 3), np.uint8),
        np.zeros((height, width), bool),
        np.zeros((height, width), bool),
        (slide.size_px[0] / width, slide.size_px[1] / height),
    )
    fx, fy = level_width / width, level_height / height
    side = max(1, int(MAX_BLOCK_PX / max(fx, fy)))
    blocks = [
        (left, top, min(left + side, width), min(top + side, height))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    splits = MAX_SPLITS
    while blocks:
        left, top, right, bottom = block = blocks.pop()
        try:
            _read_block(slide, level, (fx, fy), block, overview)
        except DataError as error:
            # A block with a broken tile is read in quarters, so that only the tile is lost.
            if splits and max((right - left) * fx, (bottom - top) * fy) > MIN_BLOCK_PX:
                splits -= 1
                x, y = (left + right + 1) // 2, (top + bottom + 1) // 2
                quarters = [(a, c, b, d) for a, b in ((left, x), (x, right)) for c, d in ((top, y), (y, bottom))]
                blocks += [q for q in quarters if q[0] < q[2] and q[1] < q[3]]
                continue
            logger.warning("%s", error)
            overview.rgb[top:bottom, left:right] = slide.background
            overview.unread[top:bottom, left:right] = True
    return overview


def _fill_from_finer(slide: Slide, level: int, overview: Overview) -> None:
    """Read from finer levels what an overview's level lacks: level 0 decides what is on a slide.

    A coarse level can have holes where level 0 has pixels, and tiles that cannot be decoded. Squares with such pixels
    are read from the next finer level; holes only where a probe of level 0 finds a pixel.
    """
    height, width = overview.scanned.shape
    down = slide.downsamples
    finer = sorted((i for i in range(len(down)) if down[i] < down[level]), key=lambda i: -down[i])
    for top in range(0, height, FILL_SIDE):
        for left in range(0, width, FILL_SIDE):
            square = (left, top, min(left + FILL_SIDE, width), min(top + FILL_SIDE, height))
            rows, columns = slice(top, square[3]), slice(left, square[2])
            lost, scanned = overview.lost[rows, columns], overview.scanned[rows, columns]
            lacks = lost | ~scanned
            if not lacks.any() or not (lost.any() or _has_pixels(slide, overview, left, top, lacks)):
                continue
            for other in finer:
                _fill_square(slide, other, square, overview)
                if not (overview.lost[rows, columns] | ~overview.scanned[rows, columns]).any():
                    break


def _has_pixels(slide: Slide, overview: Overview, left: int, top: int, lacks: np.ndarray) -> bool:
    """Return whether level 0 has pixels at some of the places, relative to (left, top), that an overview lacks."""
    places = np.argwhere(lacks)[:: max(1, lacks.sum() // FILL_PROBES)]
    for row, column in places.tolist():
        x, y = ((at + 0.5) * px for at, px in zip((left + column, top + row), overview.px_level0, strict=True))
        try:
            if slide.read_rgba(int(x), int(y), 1, 1)[..., 3].any():
                return True
        except DataError:
            return True
    return False


def _fill_square(slide: Slide, level: int, square: tuple[int, int, int, int], overview: Overview) -> None:
    """Read a square (left, top, right, bottom) of an overview from `level`, and take what the overview lacks."""
    left, top, right, bottom = square
    height, width = overview.scanned.shape
    shape = (bottom - top, right - left)
    piece = Overview(np.empty((*shape, 3), np.uint8), np.zeros(shape, bool), np.zeros(shape, bool), overview.px_level0)
    factor = (slide.level_sizes_px[level][0] / width, slide.level_sizes_px[level][1] / height)
    try:
        _read_block(slide, level, factor, square, piece, (left, top))
    except DataError:
        return
    rows, columns = slice(top, bottom), slice(left, right)
    take = piece.scanned & (overview.lost[rows, columns] | ~overview.scanned[rows, columns])
    overview.rgb[rows, columns][take] = piece.rgb[take]
    overview.scanned[rows, columns][take] = True
    # What this level can decode, also as not scanned, is not lost.
    overview.filled[rows, columns] = True


def _read_block(
    slide: Slide,
    level: int,
    factor: tuple[float, float],
    block: tuple[int, int, int, int],
    overview: Overview,
    origin: tuple[int, int] = (0, 0),
) -> None:
    """Read the pixels `block` (left, top, right, bottom) of an overview that begins at `origin`.

    `factor` px of `level` make one.
    """
    (left, top, right, bottom), (fx, fy) = block, factor
    x0, y0 = math.floor(left * fx), math.floor(top * fy)
    x1, y1 = math.ceil(right * fx), math.ceil(bottom * fy)
    down = slide.downsamples[level]
    rgba = slide.read_rgba(round(x0 * down), round(y0 * down), x1 - x0, y1 - y0, level)
    box = (left * fx - x0, top * fy - y0, min(right * fx, x1) - x0, min(bottom * fy, y1) - y0)
    size = (right - left, bottom - top)
    picture = Image.fromarray(slide.composite(rgba)).resize(size, Image.Resampling.BOX, box)
    alpha = Image.fromarray(np.ascontiguousarray(rgba[..., 3])).resize(size, Image.Resampling.BOX, box)
    rows, columns = slice(top - origin[1], bottom - origin[1]), slice(left - origin[0], right - origin[0])
    overview.rgb[rows, columns] = np.asarray(picture)
    overview.scanned[rows, columns] = np.asarray(alpha) > 127
