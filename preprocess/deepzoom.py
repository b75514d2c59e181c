"""Pictures of a slide for viewers: deep-zoom tiles, patches and an overview."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from cfusion.errors import DataError
from preprocess.overview import read_overview
from preprocess.resample import area_average
from preprocess.slides import Overview, Slide

TILE_PX = 254
"""Side of a tile without its overlap; with it, inner tiles are 256 px."""

OVERLAP_PX = 1

DIRECT_PX = 2048
"""Largest side of the square that a tile is made from. On a slide without a pyramid, a coarser tile would need
hundreds of megapixels, so it is cut from the overview instead."""

OVERVIEW_PX = 8192
"""Longest side of the overview, unless that would be finer than the tiles cut from it."""

QUICK_PX = 50e6
"""Pixels that take about a second to read; only `prepare` makes an overview from more than this."""

MAX_PATCH_PX = 4096
"""Longest side of a patch, in level-0 px."""


class NotReadyError(DataError):
    """The picture is unavailable until `DeepZoom.prepare` has run."""


class DeepZoom:
    """Pictures of one slide. Thread-safe, with bounded memory for any slide pyramid.

    Attributes:
        slide: The open slide; `close` closes it.
        levels: Levels of the deep-zoom pyramid; the last is level 0 of the slide, and each coarser one is half the
            size.
    """

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self._generator = DeepZoomGenerator(cast(Any, _Source(slide)), TILE_PX, OVERLAP_PX)
        self.levels = int(self._generator.level_count)
        self._overview: Overview | None = None
        self._lock = threading.Lock()
        longest = max(slide.size_px)
        steps = (DIRECT_PX // TILE_PX * 2**i for i in range(32))
        self._overview_step = next(step for step in steps if longest <= step * OVERVIEW_PX)

    def close(self) -> None:
        """Close the slide."""
        self.slide.close()

    @property
    def is_ready(self) -> bool:
        """Whether every picture is available immediately; a large slide without a pyramid needs `prepare`."""
        width, height = self.slide.level_sizes_px[-1]
        return width * height <= QUICK_PX or self._overview is not None

    def prepare(self) -> Overview:
        """Read the complete slide to build the overview of a slide without a pyramid. Takes minutes."""
        with self._lock:
            if self._overview is None:
                self._overview = read_overview(self.slide, self._overview_step * self.slide.resolution.mpp)
            return self._overview

    def tile(self, level: int, column: int, row: int) -> Image.Image:
        """Return a tile of the pyramid, RGB, on the slide's background colour.

        Raises:
            IndexError: The pyramid has no such tile.
            DataError: The tile's region cannot be decoded.
            NotReadyError: The tile needs `prepare`, which takes long for this slide.
        """
        if not 0 <= level < self.levels:
            raise IndexError(f"level {level}: expected 0 to {self.levels - 1}")
        columns, rows = self._generator.level_tiles[level]
        if not (0 <= column < columns and 0 <= row < rows):
            raise IndexError(f"tile {column}, {row} of level {level}: expected below {columns}, {rows}")
        downsample = 2 ** (self.levels - 1 - level)
        area = self._area(downsample, TILE_PX + 2 * OVERLAP_PX)
        if downsample >= self._overview_step and area > DIRECT_PX**2:
            width, height = self._generator.get_tile_dimensions(level, (column, row))
            x, y = (i * TILE_PX - min(i, 1) * OVERLAP_PX for i in (column, row))
            return self._from_overview((x * downsample, y * downsample), (width, height), downsample)
        picture = self._generator.get_tile(level, (column, row)).convert("RGB")
        size = self._generator.get_tile_dimensions(level, (column, row))
        return picture if picture.size == size else picture.resize(size, Image.Resampling.BOX)

    def patch(self, x_px: int, y_px: int, side_px: float, pixels: int = 256) -> Image.Image:
        """Return a square of level 0, area-averaged to `pixels` a side, as an encoder sees a tile; RGB.

        Args:
            x_px: Left edge in level-0 px.
            y_px: Upper edge in level-0 px.
            side_px: Side in level-0 px.
            pixels: Side of the picture.

        Raises:
            DataError: The square is empty, too large, off the slide, or cannot be decoded.
        """
        width, height = self.slide.size_px
        if not (0 < side_px <= MAX_PATCH_PX and -side_px < x_px < width and -side_px < y_px < height):
            raise DataError(
                f"{self.slide.path.name}: a patch of {side_px:g} px at {x_px}, {y_px} cannot be shown.",
                f"The slide is {width} × {height} px; a side is at most {MAX_PATCH_PX} px.",
            )
        side = max(1, round(side_px))
        rgb = self.slide.composite(self.slide.read_rgba(x_px, y_px, side, side))
        return Image.fromarray(area_average(rgb, pixels, pixels))

    def still(self, longest_px: int) -> Image.Image:
        """Return the entire slide, its longer side at most `longest_px`; unreadable areas have the background colour.

        Raises:
            NotReadyError: The picture needs `prepare`, which takes long for this slide.
        """
        step = max(1.0, max(self.slide.size_px) / longest_px)
        small = self._area(step) <= DIRECT_PX**2 or step < self._overview_step
        overview = read_overview(self.slide, step * self.slide.resolution.mpp) if small else self._held_overview()
        picture = Image.fromarray(overview.rgb)
        picture.thumbnail((longest_px, longest_px), Image.Resampling.BOX)
        return picture

    def _area(self, downsample: float, side_px: float = math.inf) -> float:
        """Count the pixels to read for a picture of the slide, or of a square of it, at this downsample."""
        level = self._level_for(downsample)
        width, height = self.slide.level_sizes_px[level]
        side = side_px * downsample / self.slide.downsamples[level]
        return min(side, width) * min(side, height)

    def _level_for(self, downsample: float) -> int:
        """Return the coarsest level of the slide that is fine enough."""
        fine_enough = [i for i, d in enumerate(self.slide.downsamples) if d <= downsample * 1.001]
        return max(fine_enough, key=lambda i: self.slide.downsamples[i], default=0)

    def _held_overview(self) -> Overview:
        if not self.is_ready:
            raise NotReadyError(
                f"{self.slide.path.name}: the slide has no pyramid, and its overview has not been prepared yet."
            )
        return self.prepare()

    def _from_overview(self, corner_px: tuple[int, int], size: tuple[int, int], downsample: int) -> Image.Image:
        overview = self._held_overview()
        fx, fy = overview.px_level0
        height, width = overview.rgb.shape[:2]
        (x, y), (w, h) = corner_px, size
        box = (x / fx, y / fy, min((x + w * downsample) / fx, width), min((y + h * downsample) / fy, height))
        return Image.fromarray(overview.rgb).resize(size, Image.Resampling.BOX, box)


class _Source:
    """The interface that OpenSlide's generator expects, on top of `Slide`, which reopens a handle after an error."""

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self.dimensions = slide.size_px
        self.level_dimensions = slide.level_sizes_px
        self.level_downsamples = slide.downsamples
        self.properties: Mapping[str, str] = {
            "openslide.background-color": "".join(f"{channel:02x}" for channel in slide.background)
        }

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """Return the coarsest level that is at least as fine, as OpenSlide does."""
        return max((i for i, d in enumerate(self.level_downsamples) if d <= downsample * 1.001), default=0)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """Return the RGBA of a region; `location` in level-0 px, `size` in px of the level."""
        return Image.fromarray(np.ascontiguousarray(self._slide.read_rgba(*location, *size, level)), "RGBA")
