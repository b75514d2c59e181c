"""One grid of cells for all magnifications.

A cell is one tile of the coarsest magnification; it contains 4 tiles of the next and 16 of the one after. All cells
lie on one global grid with its origin at the slide's corner, so a tile's parent is the tile that contains it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cfusion.errors import ConfigError
from cfusion.types import magnification_name

TILE_PX = 256
"""Side of a tile, in pixels at the tile's magnification."""

GRID_VERSION = "cells-1"
"""Name and version of the grid, for provenance."""


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a slide that contain tissue.

    Attributes:
        magnifications: Finest first.
        scale: Level-0 px per px of the finest magnification.
        tiles: Per magnification name, i64 [N, 2]: column and row of each tile on its magnification's own grid, in
            rows from the top.
        cells: i64 [C, 2]: column and row of each kept cell, in rows from the top.
    """

    magnifications: tuple[float, ...]
    scale: float
    tiles: dict[str, np.ndarray]
    cells: np.ndarray

    @property
    def names(self) -> list[str]:
        """Names of the magnifications, finest first."""
        return [magnification_name(m) for m in self.magnifications]

    def factor(self, name: str) -> int:
        """Return the number of tiles of magnification `name` along the side of a cell."""
        return 2 ** (len(self.magnifications) - 1 - self.names.index(name))

    @property
    def cell_px(self) -> int:
        """Side of a cell in px of the finest magnification."""
        return TILE_PX * self.factor(self.names[0])

    def edge_px_level0(self, index: np.ndarray | int, name: str) -> np.ndarray:
        """Return the level-0 px of the grid line `index` of magnification `name`."""
        step = TILE_PX * self.factor(self.names[0]) / self.factor(name) * self.scale
        return np.rint(np.asarray(index) * step).astype(np.int64)

    def coords(self, name: str) -> np.ndarray:
        """Return the top-left corners of the tiles in level-0 px, i32 [N, 2]."""
        return self.edge_px_level0(self.tiles[name], name).astype(np.int32)

    def parents(self, name: str) -> np.ndarray:
        """Return, for each tile, the row of its parent in the next coarser magnification, i32 [N]."""
        coarser = self.names[self.names.index(name) + 1]
        rows = {(int(c), int(r)): i for i, (c, r) in enumerate(self.tiles[coarser])}
        return np.array([rows[int(c) // 2, int(r) // 2] for c, r in self.tiles[name]], np.int32)

    def without_cells(self, bad: Sequence[int]) -> TileGrid:
        """Return the grid without these cells (by number) and their tiles."""
        keep = np.ones(len(self.cells), bool)
        keep[list(bad)] = False
        tiles = {n: t[keep[self.cell_of(n)]] for n, t in self.tiles.items()}
        return TileGrid(self.magnifications, self.scale, tiles, self.cells[keep])

    def cell_of(self, name: str) -> np.ndarray:
        """Return the number of the cell that contains each tile, i64 [N]."""
        rows = {(int(c), int(r)): i for i, (c, r) in enumerate(self.cells)}
        factor = self.factor(name)
        return np.array([rows[int(c) // factor, int(r) // factor] for c, r in self.tiles[name]], np.int64)


def make_grid(
    mask: np.ndarray,
    size_px: tuple[int, int],
    scale: float,
    magnifications: Sequence[float],
    min_tissue: float = 0.25,
) -> TileGrid:
    """Lay the grid over a slide and keep the tiles that contain tissue.

    A tile of the finest magnification is kept if at least `min_tissue` of its area is tissue. A coarser tile is kept
    if one of its children is, so every child has a parent and every parent a child.

    Args:
        mask: bool [h, w] over the entire slide.
        size_px: Width and height of the slide's level 0.
        scale: Level-0 px per px of the finest magnification.
        magnifications: Finest first, each half the one before.
        min_tissue: Share of a tile's area.
    """
    check_halving(magnifications)
    factor = 2 ** (len(magnifications) - 1)
    cell_px = TILE_PX * factor * scale
    columns, rows = (max(1, int(np.ceil(side / cell_px - 1e-9))) for side in size_px)
    share = _shares(mask, size_px, TILE_PX * scale, columns * factor, rows * factor)
    keep = share >= min_tissue
    kept = {magnification_name(magnifications[0]): keep}
    for magnification in magnifications[1:]:
        keep = np.logical_or.reduce(keep.reshape(keep.shape[0] // 2, 2, keep.shape[1] // 2, 2), axis=(1, 3))
        kept[magnification_name(magnification)] = keep
    cells = np.argwhere(keep)[:, ::-1]
    tiles = {name: np.argwhere(flags)[:, ::-1] for name, flags in kept.items()}
    return TileGrid(tuple(magnifications), scale, tiles, cells)


def check_halving(magnifications: Sequence[float]) -> None:
    """Check that each magnification is half the one before.

    Raises:
        ConfigError: They are not, or the list is empty.
    """
    halves = all(a == 2 * b for a, b in itertools.pairwise(magnifications))
    if not magnifications or not halves:
        raise ConfigError(f"magnifications are {list(magnifications)}, expected each to be half the one before.")


def _shares(mask: np.ndarray, size_px: tuple[int, int], tile_px: float, columns: int, rows: int) -> np.ndarray:
    """Compute the exact share of true area in each of rows × columns tiles; area outside the slide counts as false."""
    px_x, px_y = size_px[0] / mask.shape[1], size_px[1] / mask.shape[0]
    area = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    area[1:, 1:] = mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    edges_y = np.minimum(np.arange(rows + 1) * tile_px / px_y, mask.shape[0])
    edges_x = np.minimum(np.arange(columns + 1) * tile_px / px_x, mask.shape[1])
    lined = _interpolate(_interpolate(area, edges_y, 0), edges_x, 1)
    sums = np.diff(np.diff(lined, axis=0), axis=1)
    return sums * px_x * px_y / tile_px**2


def _interpolate(values: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    low = np.minimum(at.astype(np.int64), values.shape[axis] - 2)
    weight = at - low
    weight = weight[:, None] if axis == 0 else weight[None, :]
    return np.take(values, low, axis) * (1 - weight) + np.take(values, low + 1, axis) * weight
