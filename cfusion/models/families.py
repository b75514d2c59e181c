"""Families of tiles: those under one tile of a coarser magnification, found from positions on the grids."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cfusion.errors import ConfigError, DataError
from cfusion.models.graph import require_positions
from cfusion.types import BagBatch, magnification_value


def side_ratio(coarse: str, fine: str) -> int:
    """Return how many tiles of a magnification lie along the side of a tile of a coarser one.

    Raises:
        ConfigError: The ratio is not an integer.
    """
    ratio = magnification_value(fine) / max(magnification_value(coarse), 1e-9)
    if abs(ratio - round(ratio)) > 1e-6 or ratio > 1e6:
        raise ConfigError(
            f"{fine} and {coarse}: expected magnifications of which one is an integer multiple of the other.",
            "Change data.magnifications.",
        )
    return round(ratio)


def children_of(batch: BagBatch, coarse: str, fine: str) -> Int[Tensor, "bag parent child"]:
    """Find the tiles of a magnification that lie in each tile of a coarser one.

    Args:
        batch: Bags.
        coarse: The coarser magnification.
        fine: The finer one.

    Returns:
        Rows of the children in the bag, row by row of the parent's square; −1 where the bag has no such tile.

    Raises:
        DataError: A magnification has no positions, or two of its tiles have the same.
    """
    side = side_ratio(coarse, fine)
    parents, tiles = require_positions(batch, coarse), require_positions(batch, fine)
    bags, count, _ = parents.shape
    shape = torch.stack([grid.amax(dim=(0, 1)) + 1 for grid in (parents, tiles // side)]).amax(dim=0)
    bag = torch.arange(bags, device=tiles.device)[:, None]

    def cells(places: Tensor, name: str) -> Tensor:
        cell = (bag * shape[1] + places[..., 1]) * shape[0] + places[..., 0]
        return cell[_real(batch, name)]

    held, order = cells(parents, coarse).sort(stable=True)
    wanted = cells(tiles // side, fine)
    found = torch.searchsorted(held, wanted).clamp_max(len(held) - 1)
    row = torch.arange(bags * count, device=tiles.device).view(bags, count)[_real(batch, coarse)][order]
    has_parent = held[found] == wanted
    slot, child = _slots(tiles, side)[_real(batch, fine)], _rows(batch, fine)
    place = row[found[has_parent]] * side**2 + slot[has_parent]
    table = torch.full((bags * count * side**2,), -1, device=tiles.device)
    _check_single(place, count * side**2, batch, fine)
    table[place] = child[has_parent]
    return table.view(bags, count, side**2)


def regions_of(batch: BagBatch, name: str, side: int) -> Int[Tensor, "bag region slot"]:
    """Group tiles into squares of the grid that hold at least one of them.

    Args:
        batch: Bags.
        name: Magnification.
        side: Number of tiles along the side of a square.

    Returns:
        Rows of the tiles in the bag, row by row of the square; −1 where the bag has no such tile. Squares with
        none follow after a bag's own.

    Raises:
        DataError: The tiles have no positions, or two of them have the same.
    """
    positions, real = require_positions(batch, name), _real(batch, name)
    bags, tiles, _ = positions.shape
    place = positions // side
    width, height = (place[..., axis].max() + 1 for axis in (0, 1))
    slide = torch.zeros_like(positions[..., 0]) if batch.slides is None else batch.slides[name]
    bag = torch.arange(bags, device=positions.device)[:, None].expand(-1, tiles)
    cell = ((bag * (slide.max() + 1) + slide) * height + place[..., 1]) * width + place[..., 0]
    unique, region = cell[real].unique(return_inverse=True)
    of_bag = unique // ((slide.max() + 1) * height * width)
    counts = of_bag.bincount(minlength=bags)
    rank = (torch.arange(len(unique), device=unique.device) - (counts.cumsum(0) - counts)[of_bag])[region]
    most = int(counts.max())
    index = (bag[real] * most + rank) * side**2 + _slots(positions, side)[real]
    _check_single(index, most * side**2, batch, name)
    table = torch.full((bags * most * side**2,), -1, device=positions.device)
    table[index] = _rows(batch, name)
    return table.view(bags, most, side**2)


def _real(batch: BagBatch, name: str) -> Bool[Tensor, "bag tile"]:
    if batch.masks is not None:
        return batch.masks[name]
    return torch.ones(batch.features[name].shape[:2], dtype=torch.bool, device=batch.features[name].device)


def _rows(batch: BagBatch, name: str) -> Int[Tensor, " tile"]:
    real = _real(batch, name)
    return torch.arange(real.shape[1], device=real.device).expand_as(real)[real]


def _slots(positions: Int[Tensor, "bag tile 2"], side: int) -> Int[Tensor, "bag tile"]:
    within = positions % side
    return within[..., 1] * side + within[..., 0]


def _check_single(place: Int[Tensor, " tile"], of_bag: int, batch: BagBatch, name: str) -> None:
    found, times = place.unique(return_counts=True)
    if len(twice := found[times > 1]):
        raise DataError(
            f"Two {name} tiles of bag {batch.name(int(twice[0]) // of_bag)} are at the same position; overlapping "
            "tiles do not form families.",
            "Extract the slides on this program's grid.",
        )
