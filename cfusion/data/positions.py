"""Where tiles lie: columns and rows on each magnification's own grid, a case's slides side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from cfusion.data.shards import ShardDataset


def has_positions(dataset: ShardDataset, slide_id: str, names: Sequence[str]) -> bool:
    """Whether a slide has coordinates, and the size of a tile, at all the given magnifications."""
    sample = dataset.sample(slide_id)
    return all(f"coords_{name}.npy" in sample.members and name in sample.tile_px_level0 for name in names)


def bag_positions(
    dataset: ShardDataset, slide_ids: Sequence[str], names: Sequence[str]
) -> dict[str, Int[np.ndarray, "tile 2"]]:
    """Column and row of every tile of a bag, per magnification name.

    A slide's grid starts at its first cell with tissue; the next slide starts in the column behind its last. The
    gap is counted in tiles of the coarsest magnification, so parents stay above their children.
    """
    placed: dict[str, list[np.ndarray]] = {name: [] for name in names}
    column = 0
    for slide_id in slide_ids:
        sides = dataset.sample(slide_id).tile_px_level0
        cell = max(sides[name] for name in names)
        coords = {n: c.astype(np.float64) for n, c in dataset.read(slide_id, [f"coords_{n}" for n in names]).items()}
        lowest = np.min([xy.min(axis=0) for xy in coords.values()], axis=0)
        origin = np.floor(lowest / cell + 1e-6) * cell
        end = 0
        for name in names:
            grid = np.floor((coords[f"coords_{name}"] - origin) / sides[name] + 1e-6).astype(np.int64)
            per_cell = round(cell / sides[name])
            end = max(end, -(-(int(grid[:, 0].max()) + 1) // per_cell))
            grid[:, 0] += column * per_cell
            placed[name].append(grid)
        column += end
    return {name: np.concatenate(parts) for name, parts in placed.items()}
