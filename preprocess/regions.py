"""Pixels of a slide for drawing: an overview, and regions at display size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cfusion.errors import DataError
from preprocess.overview import read_overview
from preprocess.slides import Slide, open_slide


class SlidePictures:
    """Pictures of one slide.

    Args:
        path: The slide.
        mpp_table: µm/px by name, for slides whose files have no resolution.
        default_mpp: µm/px if neither file nor table gives one.

    Attributes:
        size_px: Width and height of level 0.
    """

    def __init__(
        self, path: Path, mpp_table: Mapping[str, float] | None = None, default_mpp: float | None = None
    ) -> None:
        self._slide: Slide = open_slide(path, mpp_table, default_mpp)
        self.size_px = self._slide.size_px

    def overview(self, side_px: int) -> UInt8[np.ndarray, "y x 3"]:
        """Return the entire slide, its longer side at most `side_px`."""
        step = max(1.0, max(self.size_px) / side_px)
        return read_overview(self._slide, step * self._slide.resolution.mpp).rgb

    def region(self, x_px: int, y_px: int, side_px: int, out_px: int) -> UInt8[np.ndarray, "out out 3"]:
        """Return a square of level 0 at `out_px` × `out_px`, on the background colour if it cannot be read."""
        level = max(
            (i for i, down in enumerate(self._slide.downsamples) if down <= max(1.0, side_px / out_px) * 1.001),
            key=lambda i: self._slide.downsamples[i],
            default=0,
        )
        side = max(1, round(side_px / self._slide.downsamples[level]))
        try:
            rgb = self._slide.composite(self._slide.read_rgba(x_px, y_px, side, side, level))
        except DataError:
            rgb = np.full((side, side, 3), self._slide.background, np.uint8)
        return np.asarray(Image.fromarray(rgb).resize((out_px, out_px), Image.Resampling.BOX))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._slide.close()
