"""Slides in DICOM that OpenSlide does not read, such as JPEG-LS or RLE tiles; the only module that calls wsidicom."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openslide
from PIL import Image

from cfusion.errors import MissingExtraError
from preprocess.slide_headers import slide_series


class DicomSlide(openslide.AbstractSlide):
    """A DICOM slide with the interface of OpenSlide, as far as this program uses it.

    Args:
        path: One of its files; the others are those of the same series in the folder.

    Raises:
        MissingExtraError: wsidicom is not installed.
        OpenSlideError: wsidicom cannot read the files either.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import wsidicom
        except ImportError as error:
            raise MissingExtraError(
                "wsidicom", "dicom", f"Reading {path.name}, which OpenSlide does not read,"
            ) from error
        series = slide_series(path.absolute().parent)
        own = series.get(path.name)
        files = [path.with_name(name) for name, uid in series.items() if uid == own] if own is not None else [path]
        self._lock = threading.Lock()
        try:
            self._slide: Any = wsidicom.WsiDicom.open(sorted(files))
            self._levels = [(level.level, (level.size.width, level.size.height)) for level in self._slide.levels]
            self._mpp = (self._slide.mpp.width, self._slide.mpp.height)
        except Exception as error:  # a damaged file ends in errors of many kinds
            raise openslide.OpenSlideError(f"wsidicom: {error}") from error

    @classmethod
    def detect_format(cls, filename: Any) -> str:
        """See OpenSlide."""
        return "dicom"

    def close(self) -> None:
        """Close the files."""
        self._slide.close()

    @property
    def level_count(self) -> int:
        """Number of levels."""
        return len(self._levels)

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level, in px."""
        return tuple(size for _, size in self._levels)

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 px per px of each level."""
        width, height = self._levels[0][1]
        return tuple((width / w + height / h) / 2 for _, (w, h) in self._levels)

    @property
    def properties(self) -> Mapping[str, str]:
        """Resolution and vendor under OpenSlide's names."""
        return {
            "openslide.vendor": "dicom", "openslide.level-count": str(len(self._levels)),
            "openslide.mpp-x": str(self._mpp[0]), "openslide.mpp-y": str(self._mpp[1]),
        }  # fmt: skip

    @property
    def associated_images(self) -> Mapping[str, Image.Image]:
        """None are read."""
        return {}

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """Return the coarsest level that is fine enough."""
        return max(i for i, d in enumerate(self.level_downsamples) if d <= max(1.0, downsample) * 1.001)

    def set_cache(self, cache: Any) -> None:
        """Nothing is cached."""

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """Read a region as RGBA; see OpenSlide. What lies outside the slide is transparent.

        Raises:
            OpenSlideError: It cannot be decoded.
        """
        number, (width, height) = self._levels[level]
        down = self.level_downsamples[level]
        x, y = (round(at / down) for at in location)
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + size[0], width), min(y + size[1], height)
        region = Image.new("RGBA", size)
        if left >= right or top >= bottom:
            return region
        try:
            with self._lock:
                found = self._slide.read_region((left, top), number, (right - left, bottom - top))
        except Exception as error:
            raise openslide.OpenSlideError(f"wsidicom: {error}") from error
        region.paste(found.convert("RGBA"), (left - x, top - y))
        return region
