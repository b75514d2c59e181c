"""From a cell's level-0 pixels to its tiles at every magnification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from PIL import Image

from preprocess.grid import TILE_PX, Grid


def cell_tiles(
    region: np.ndarray, grid: Grid, wanted: Mapping[str, np.ndarray], resample: Literal["area", "bicubic"]
) -> dict[str, np.ndarray]:
    """Cut a cell into the wanted tiles of each magnification.

    Args:
        region: u8 [h, w, 3], the cell's level-0 pixels.
        grid: The slide's grid.
        wanted: Per magnification name, i64 [N, 2]: column and row of tiles within the cell.
        resample: `area`: exact averages of level-0 pixels; `bicubic`: PIL's default filter on each tile's own pixels.

    Returns:
        Per magnification name, u8 [N, 256, 256, 3].
    """
    tiles = {}
    for name, places in wanted.items():
        factor = grid.factor(name)
        if resample == "bicubic" and region.shape[0] != TILE_PX * factor:
            tiles[name] = _bicubic_tiles(region, factor, places)
        else:
            tiles[name] = _cut(area_average(region, TILE_PX * factor), places)
    return tiles


def area_average(region: np.ndarray, side_px: int) -> np.ndarray:
    """Shrink a square region to `side_px` by exact area averages, rounded once; u8 [side, side, 3].

    Whole factors are averages of whole pixels; others weigh the pixels that an edge cuts by the part inside.
    """
    height, width = region.shape[:2]
    if height == width == side_px:
        return region
    if height == width and height % side_px == 0:
        return np.asarray(Image.fromarray(region).reduce(height // side_px))
    return _average(_average(region, side_px, 0), side_px, 1).astype(np.uint8)


def _average(values: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Means over `count` equal stretches of an axis; u8 in gives f32, f32 in gives the rounded result."""
    length = values.shape[axis]
    kind = np.int32 if values.dtype == np.uint8 else np.float64
    total = np.zeros([n + 1 if i == axis else n for i, n in enumerate(values.shape)], kind)
    inner = (slice(1, None),) if axis == 0 else (slice(None), slice(1, None))
    np.cumsum(values, axis=axis, dtype=kind, out=total[inner])
    at = np.arange(count + 1) * (length / count)
    low = np.minimum(at.astype(np.int64), length - 1)
    weight = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    edges = np.take(total, low, axis) + weight * np.take(values, low, axis)
    mean = np.diff(edges, axis=axis) * (count / length)
    return np.rint(mean) if axis == 1 else mean


def _cut(picture: np.ndarray, places: np.ndarray) -> np.ndarray:
    tiles = np.empty((len(places), TILE_PX, TILE_PX, 3), np.uint8)
    for tile, (column, row) in zip(tiles, places, strict=True):
        tile[:] = picture[row * TILE_PX : (row + 1) * TILE_PX, column * TILE_PX : (column + 1) * TILE_PX]
    return tiles


def _bicubic_tiles(region: np.ndarray, factor: int, places: np.ndarray) -> np.ndarray:
    tiles = np.empty((len(places), TILE_PX, TILE_PX, 3), np.uint8)
    edges = np.rint(np.arange(factor + 1) * (region.shape[0] / factor)).astype(int)
    for tile, (column, row) in zip(tiles, places, strict=True):
        own = region[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        tile[:] = np.asarray(Image.fromarray(own).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC))
    return tiles
