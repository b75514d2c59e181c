"""Positions of tiles: columns and rows on each magnification's grid, the slides of a case next to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int


def bag_positions(
    coords: Sequence[Mapping[str, Int[np.ndarray, "_ 2"]]], sides: Sequence[Mapping[str, float]]
) -> dict[str, Int[np.ndarray, "_ 2"]]:
    """Compute the column and row of every tile of a bag, per magnification name.

    A slide's grid starts at its first cell (tile of the coarsest magnification) with a tile. The next slide starts in
    the column of cells after its last, so that parents stay above their children.

    Args:
        coords: Per slide, per magnification name, top-left corners in level-0 px.
        sides: Per slide, per magnification name, side of a tile in level-0 px.
    """
    placed: dict[str, list[np.ndarray]] = {name: [] for name in coords[0]}
    column = 0
    for corners, side in zip(coords, sides, strict=True):
        cell = max(side[name] for name in corners)
        # Corners are integer px, rounded from a grid whose step may be fractional: one px more never reaches the next
        # tile.
        origin = [
            np.floor((min(xy[:, axis].min() for xy in corners.values()) + 1) / cell) * cell - 1 for axis in (0, 1)
        ]
        end = 0
        for name, xy in corners.items():
            grid = ((xy - origin) * (1 / side[name])).astype(np.int64)
            per_cell = round(cell / side[name])
            end = max(end, int(grid[:, 0].max()) // per_cell + 1)
            grid[:, 0] += column * per_cell
            placed[name].append(grid)
        column += end
    return {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in placed.items()}
