"""Pairs each tile of the finest magnification with the tiles that contain it at the coarser ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cfusion.errors import DataError
from cfusion.models.bag import TileView
from cfusion.models.families import side_ratio
from cfusion.types import BagBatch


def check_nested(names: Sequence[str]) -> None:
    """Check that each tile lies within one tile of every coarser magnification.

    Args:
        names: Magnification names, finest first.

    Raises:
        ConfigError: The finest is not an integer multiple of another, or one is of entire slides.
    """
    for name in names[1:]:
        side_ratio(name, names[0])


def rows_above(batch: BagBatch, finer: str, coarser: str) -> Int[Tensor, "bag tile"]:
    """Find the row at `coarser` of the tile that contains each tile at `finer`; any row where padded.

    On this program's grid the column and row of a tile, divided by the ratio of the magnifications, are those of its
    parent. Bags without coordinates are paired in the order of their tiles if they have equally many at both.

    Raises:
        DataError: A tile has none, or there are no coordinates and the numbers of tiles differ.
    """
    if batch.positions is None:
        return _rows_in_order(batch, finer, coarser)
    side = side_ratio(coarser, finer)
    below, above = batch.positions[finer].div(side, rounding_mode="floor"), batch.positions[coarser]
    corner = torch.minimum(below.amin(dim=(0, 1)), above.amin(dim=(0, 1)))
    below, above = below - corner, above - corner
    columns = torch.maximum(below[..., 0].max(), above[..., 0].max()) + 1
    wanted, held = (places[..., 0] + columns * places[..., 1] for places in (below, above))
    real = torch.ones_like(wanted, dtype=torch.bool)
    if batch.masks is not None:
        real = batch.masks[finer]
        held = held.masked_fill(~batch.masks[coarser], torch.iinfo(held.dtype).max)
    held, order = held.sort(dim=1)
    found = torch.searchsorted(held, wanted).clamp_max(held.shape[1] - 1)
    orphans = real & (held.gather(1, found) != wanted)
    if orphans.any():
        bag = int(orphans.any(dim=1).nonzero()[0])
        raise DataError(
            f"Bag {batch.name(bag)}: {int(orphans[bag].sum())} of {int(real[bag].sum())} tiles at {finer} lie in no "
            f"tile at {coarser}; the model pairs each tile with the one that contains it.",
            "Preprocess the slides with this program, which places all magnifications on one grid.",
        )
    return order.gather(1, found)


def _rows_in_order(batch: BagBatch, finer: str, coarser: str) -> Int[Tensor, "bag tile"]:
    bags, tiles = batch.features[finer].shape[:2]
    counts = [
        torch.full((bags,), batch.features[name].shape[1]) if batch.masks is None else batch.masks[name].sum(dim=1)
        for name in (finer, coarser)
    ]
    unequal = (counts[0] != counts[1]).nonzero().flatten().tolist()
    if unequal or (batch.masks is not None and not torch.equal(batch.masks[finer], batch.masks[coarser])):
        bag = unequal[0] if unequal else 0
        raise DataError(
            f"Bag {batch.name(bag)} has no coordinates, {int(counts[0][bag])} tiles at {finer} and "
            f"{int(counts[1][bag])} at {coarser}; the model pairs each tile with the one that contains it.",
            "Use shards with coordinates, or equally many tiles in the same order at every magnification.",
        )
    return torch.arange(tiles, device=batch.features[finer].device).expand(bags, tiles)


def paired(tiles: Float[Tensor, "bag coarse dim"], rows: Int[Tensor, "bag tile"]) -> Float[Tensor, "bag tile dim"]:
    """Repeat the coarser tiles so that each finer tile has its own."""
    return tiles.gather(1, rows[..., None].expand(-1, -1, tiles.shape[2]))


def paired_view(block: str, bag: BagBatch, names: Sequence[str], summaries: int) -> TileView:
    """Describe how to read a pooling over the finest tiles that is the NUMBER-th of a list, `pools.NUMBER`.

    Its keys stand for tiles of the magnification of that number in `names`, finest first.
    """
    number = int(block.rpartition(".")[2])
    if not number:
        return TileView(names[0], summaries)
    (rows,) = rows_above(bag, names[0], names[number])
    return TileView(names[number], summaries, tiles=bag.features[names[number]].shape[1], rows=rows)
