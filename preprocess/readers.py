"""Readers of level-0 pixels."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from preprocess.slides import Slide


class Reader(Protocol):
    """Reads level-0 pixels of one slide; safe from several threads."""

    name: str

    def region(self, x_px: int, y_px: int, width_px: int, height_px: int) -> np.ndarray:
        """RGB of a region of level 0, u8 [height, width, 3], on the slide's background colour.

        Raises:
            DataError: It cannot be decoded.
        """
        ...


class OpenSlideReader:
    """Reads through OpenSlide: every format, the reference for the other reader."""

    name = "openslide"

    def __init__(self, slide: Slide) -> None:
        self._slide = slide

    def region(self, x_px: int, y_px: int, width_px: int, height_px: int) -> np.ndarray:
        """See `Reader.region`."""
        return self._slide.composite(self._slide.read_rgba(x_px, y_px, width_px, height_px))
