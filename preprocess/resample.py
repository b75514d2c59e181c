"""Resample a cell's level-0 pixels to its tiles at every magnification."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from PIL import Image

from preprocess.grid import TILE_PX, TileGrid

cv2.setNumThreads(1)  # cells already run in parallel


def area_average(picture: np.ndarray, width_px: int, height_px: int, out: np.ndarray | None = None) -> np.ndarray:
    """Shrink a picture by exact area averages, rounded once.

    A pixel on an edge counts by the part inside, so any ratio ≥ 1 works.

    Args:
        picture: u8 [h, w, 3].
        width_px: Width of the result.
        height_px: Height of the result.
        out: u8 [height_px, width_px, 3] to write to.

    Returns:
        u8 [height_px, width_px, 3]; `picture` itself if the size does not change.
    """
    if picture.shape[:2] == (height_px, width_px):
        if out is None:
            return picture
        out[:] = picture
        return out
    return cv2.resize(picture, (width_px, height_px), dst=out, interpolation=cv2.INTER_AREA)


def area_tiles(finest: np.ndarray, grid: TileGrid, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cut a cell into tiles; each magnification is the area average of the one before.

    Args:
        finest: u8 [cell, cell, 3], the cell at the finest magnification.
        grid: The slide's grid.
        wanted: Per magnification name, i64 [N, 2]: column and row of tiles within the cell.

    Returns:
        Per magnification name, u8 [N, 256, 256, 3].
    """
    tiles = {}
    for name in grid.names:
        side_px = TILE_PX * grid.factor(name)
        finest = area_average(finest, side_px, side_px)
        pictures = [
            finest[row * TILE_PX : (row + 1) * TILE_PX, column * TILE_PX : (column + 1) * TILE_PX]
            for column, row in wanted[name]
        ]
        tiles[name] = np.stack(pictures)
    return tiles


def bicubic_tiles(region: np.ndarray, grid: TileGrid, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cut a cell into tiles; each is `PIL.Image.resize` of its level-0 pixels with PIL's default filter.

    Arguments and result are those of `area_tiles`, but `region` is u8 [h, w, 3] at level 0.
    """
    tiles = {}
    for name, places in wanted.items():
        edges = np.rint(np.arange(grid.factor(name) + 1) * (len(region) / grid.factor(name))).astype(int)
        pictures = []
        for column, row in places:
            own = region[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
            image = Image.fromarray(np.ascontiguousarray(own)).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
            pictures.append(np.asarray(image))
        tiles[name] = np.stack(pictures)
    return tiles
