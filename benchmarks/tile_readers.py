"""Other readers of slides, each used as its documentation says, for `benchmarks.tiles`.

Each reads a tile from the coarsest pyramid level that is fine enough, which costs it less than level 0 does. They are
no dependency of this project: those that are installed are measured, the others are named as absent.
"""

from __future__ import annotations

import importlib
import itertools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide

from preprocess.grid import TILE_PX, TileGrid

MAX_DIFFERENCE = 4.0
"""Largest mean difference of a reader's tiles from OpenSlide's, in grey levels.

JPEG decoders round differently. Means over blocks are compared, because readers place a corner that lies between two
pixels of a coarser level differently.
"""

BLOCK_PX = 16
"""Side of these blocks."""


class TileReader(ABC):
    """Reads regions of one slide.

    Attributes:
        module: The package's module.
        downsamples: Level-0 px per px of each level.
    """

    module: str
    downsamples: list[float]

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open a slide."""

    @abstractmethod
    def region(self, x_px: int, y_px: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """Return the RGB of a region, u8 [h, w, 3]; the corner is in level-0 px, the size in px of the level."""

    def tile(self, x_px: int, y_px: int, side_level0: int) -> np.ndarray:
        """Return a tile, u8 [256, 256, 3], from the coarsest level that is fine enough."""
        wanted = side_level0 / TILE_PX
        level = max((i for i, d in enumerate(self.downsamples) if d <= wanted * 1.001), default=0)
        side = round(side_level0 / self.downsamples[level])
        found = self.region(x_px, y_px, level, side, side)
        if side == TILE_PX:
            return found
        return cv2.resize(found, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)


class OpenSlideLevels(TileReader):
    """OpenSlide, the reference for the pixels of the others."""

    module = "openslide"

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(path)
        self.downsamples = list(self._slide.level_downsamples)

    def region(self, x_px: int, y_px: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """See `TileReader.region`."""
        found = self._slide.read_region((x_px, y_px), level, (width_px, height_px))
        return np.asarray(found.convert("RGB"))


class TiffSlideLevels(TileReader):
    """tiffslide."""

    module = "tiffslide"

    def __init__(self, path: Path) -> None:
        self._slide = _imported(self).TiffSlide(path)
        self.downsamples = list(self._slide.level_downsamples)

    def region(self, x_px: int, y_px: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """See `TileReader.region`."""
        return self._slide.read_region((x_px, y_px), level, (width_px, height_px), as_array=True)[..., :3]


class FastSlideLevels(TileReader):
    """fastslide, whose corners are in px of the level."""

    module = "fastslide"

    def __init__(self, path: Path) -> None:
        self._slide = _imported(self).FastSlide.from_file_path(path)
        self.downsamples = list(self._slide.level_downsamples)

    def region(self, x_px: int, y_px: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """See `TileReader.region`."""
        down = self.downsamples[level]
        corner = (round(x_px / down), round(y_px / down))
        return np.asarray(self._slide.read_region(corner, level, (width_px, height_px)).numpy())[..., :3]


class EozinLevels(TileReader):
    """eozin."""

    module = "eozin"

    def __init__(self, path: Path) -> None:
        self._slide = _imported(self).Eozin(str(path))
        self.downsamples = OpenSlideLevels(path).downsamples

    def region(self, x_px: int, y_px: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """See `TileReader.region`."""
        found = self._slide.read_region((x_px, y_px), level, (width_px, height_px))
        return np.asarray(found.convert("RGB") if hasattr(found, "convert") else found)[..., :3]


class MicrotomeLevels(TileReader):
    """microtome-wsi, which reads batches of the file's own tiles."""

    module = "microtome"

    def __init__(self, path: Path) -> None:
        self._slide = _imported(self).open(str(path))
        self._levels: list[dict[str, Any]] = self._slide.levels
        self.downsamples = [float(level["downsample"]) for level in self._levels]

    def region(self, x_px: int, y_px: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """See `TileReader.region`."""
        known, down = self._levels[level], self.downsamples[level]
        left, top = round(x_px / down), round(y_px / down)
        wide, tall = known["tile_width"], known["tile_height"]
        columns = range(left // wide, -(-(left + width_px) // wide))
        rows = range(top // tall, -(-(top + height_px) // tall))
        numbers = [row * known["tiles_across"] + column for row, column in itertools.product(rows, columns)]
        found = self._slide.read_batch(level, numbers, 1).reshape(len(rows), len(columns), tall, wide, 3)
        joined = found.swapaxes(1, 2).reshape(len(rows) * tall, len(columns) * wide, 3)
        at = (top - rows.start * tall, left - columns.start * wide)
        return np.ascontiguousarray(joined[at[0] : at[0] + height_px, at[1] : at[1] + width_px])


READERS: tuple[type[TileReader], ...] = (
    OpenSlideLevels, TiffSlideLevels, FastSlideLevels, EozinLevels, MicrotomeLevels,
)  # fmt: skip


def _imported(reader: TileReader) -> Any:
    return importlib.import_module(reader.module)


def open_readers(path: Path) -> tuple[dict[str, TileReader], dict[str, str]]:
    """Open a slide with each reader, and compare a tile of each magnification with OpenSlide's.

    Returns:
        The readers by name, and why others are left out.
    """
    found: dict[str, TileReader] = {}
    left_out: dict[str, str] = {}
    reference = OpenSlideLevels(path)
    for kind in READERS:
        try:
            reader = kind(path)
            for side in (512, 1024, 2048):
                ours, theirs = (_means(r.tile(1024, 1024, side)) for r in (reference, reader))
                if np.abs(ours - theirs).mean() > MAX_DIFFERENCE:
                    raise ValueError(f"its tiles of {side} px differ from OpenSlide's")
        except ImportError:
            left_out[kind.module] = "not installed"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a result too; a panic of Rust is no Exception
            left_out[kind.module] = f"{type(error).__name__}: {error}"
        else:
            found[kind.module] = reader
    return found, left_out


def _means(tile: np.ndarray) -> np.ndarray:
    """Return the means of a tile's blocks, f64 [h, w, 3]."""
    blocks = TILE_PX // BLOCK_PX
    return np.asarray(tile.reshape(blocks, BLOCK_PX, blocks, BLOCK_PX, 3).mean(axis=(1, 3)))


def read_tiles(reader: TileReader, grid: TileGrid, numbers: list[int]) -> int:
    """Read all tiles of some cells at each magnification; return their number."""
    count = 0
    for name in grid.names:
        side, factor = round(grid.scale * grid.cell_px / grid.factor(name)), grid.factor(name)
        for (column, row), j, i in itertools.product(grid.cells[numbers].tolist(), range(factor), range(factor)):
            tile = reader.tile((column * factor + i) * side, (row * factor + j) * side, side)
            count += tile.shape[0] // TILE_PX
    return count
