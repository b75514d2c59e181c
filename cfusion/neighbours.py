"""Nearest tiles by place in the tissue: exact, sparse, and the same on every machine.

A graph of a slide is a table [tile, k] of rows; the k-d tree never holds more than a few candidates of a tile.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, Integer, Real
from scipy.spatial import cKDTree

_CANDIDATES = 1 << 22
"""Maximum candidates compared at once, which matters only if very many tiles share a place."""


def nearest_tiles(
    coords: Real[np.ndarray, "tile 2"], k: int, slides: Integer[np.ndarray, " tile"] | None = None
) -> Int64[np.ndarray, "tile k"]:
    """Find the k nearest other tiles of each tile, nearest first; equally near ones in the order of their rows.

    Args:
        coords: Place of each tile, in any unit; compared without rounding if they are integers.
        k: Number of neighbours.
        slides: The slide of each tile, whose tiles are neighbours only of each other; None: all are of one.

    Returns:
        Rows of the neighbours; −1 at the end where a slide has k tiles or fewer.
    """
    found = np.full((len(coords), k), -1, np.int64)
    for rows in [np.arange(len(coords))] if slides is None else rows_by_slide(slides):
        near = _nearest(coords[rows], min(k, len(rows) - 1))
        found[rows, : near.shape[1]] = rows[near]
    return found


def rows_by_slide(slides: Integer[np.ndarray, " tile"]) -> list[Int64[np.ndarray, " row"]]:
    """Return the rows of each slide, in ascending order of the slides."""
    return [np.flatnonzero(slides == slide) for slide in np.unique(slides)]


def spatial_edges(coords: Real[np.ndarray, "tile 2"], k: int) -> Int64[np.ndarray, "2 edge"]:
    """List the edges from each tile to its k nearest others, or to all others if there are fewer.

    Args:
        coords: Place of each tile, in any unit.
        k: Number of neighbours.

    Returns:
        Row 0: the tile; row 1: its neighbour. Tiles in order, each tile's neighbours nearest first, equally near ones
        in the order of their rows.
    """
    near = nearest_tiles(coords, k)
    return np.stack([np.repeat(np.arange(len(near)), k), near.ravel()])[:, near.ravel() >= 0]


def _nearest(coords: np.ndarray, k: int) -> np.ndarray:
    if k < 1:
        return np.empty((len(coords), 0), np.int64)
    tree, out = cKDTree(coords), np.empty((len(coords), k), np.int64)
    todo, width = np.arange(len(coords)), min(len(coords), 2 * k + 4)
    while len(todo):
        unsure = []
        for rows in np.array_split(todo, -(-len(todo) * width // _CANDIDATES)):
            out[rows], sure = _sorted_candidates(tree, coords, rows, k, width)
            unsure.append(rows[~sure])
        todo, width = np.concatenate(unsure), min(len(coords), 2 * width)
    return out


def _sorted_candidates(
    tree: cKDTree, coords: np.ndarray, rows: np.ndarray, k: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return k neighbours of some tiles, and whether none as near as the last of them was left out."""
    found = tree.query(coords[rows], k=width)[1].astype(np.int64)
    # The tree may return any of equally near tiles, so distances are computed again and ties broken by row.
    distance = ((coords[found] - coords[rows][:, None]) ** 2).sum(axis=2)
    distance[found == rows[:, None]] = -1
    order = np.lexsort((found, distance), axis=1)
    found, distance = (np.take_along_axis(table, order, axis=1) for table in (found, distance))
    return found[:, 1 : k + 1], (distance[:, k] < distance[:, -1]) | (width == len(coords))
