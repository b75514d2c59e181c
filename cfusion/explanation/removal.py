"""Compute the risk of a bag without some of its tiles, for many subsets in batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import nn

from cfusion.errors import DataError
from cfusion.types import BagBatch, SlideFeatures, magnification_value

TOKEN_BUDGET = 16_384
"""Maximum number of tiles in one forward pass; a larger bag gets its own pass."""

Keep = dict[str, Bool[np.ndarray, " tile"]]
"""Per magnification name, which tiles of a bag are kept."""


class Lineage:
    """Which finer tiles are inside a tile, and so are removed with it.

    Args:
        slide: The slide, with the parents of its tiles. Without parents, only the tile itself is removed.
        reads: Magnifications of the bag.

    Attributes:
        counts: Number of tiles of each stored magnification.
        cells: The coarsest magnification whose tiles contain tiles of every magnification of the bag. The bag may lack
            this magnification.
    """

    def __init__(self, slide: SlideFeatures, reads: Sequence[str]) -> None:
        stored = sorted(slide.features, key=magnification_value, reverse=True)
        self.counts = {name: len(slide.features[name]) for name in stored}
        self._ancestor: dict[tuple[str, str], np.ndarray] = {}
        self._reads = tuple(reads)
        for fine in reads:
            row = np.arange(self.counts[fine])
            self._ancestor[fine, fine] = row
            for level, coarser in itertools.pairwise(stored[stored.index(fine) :]):
                if level not in slide.parents:
                    break
                row = slide.parents[level][row]
                self._ancestor[fine, coarser] = row
        placed = [name for name in stored if len(slide.coords.get(name, ()))]
        above_all = [name for name in placed if all((fine, name) in self._ancestor for fine in reads)]
        self.cells = above_all[-1] if above_all else min(reads, key=magnification_value)

    def without(self, name: str, removed: Bool[np.ndarray, " tile"]) -> Keep:
        """Return the tiles kept after removing tiles of magnification `name` and the finer tiles inside them."""
        return {
            fine: ~removed[self._ancestor[fine, name]]
            if (fine, name) in self._ancestor
            else np.ones(self.counts[fine], bool)
            for fine in self._reads
        }


def is_bag(keep: Keep) -> bool:
    """Return whether every magnification keeps at least one tile, which a model needs."""
    return all(flags.any() for flags in keep.values())


@torch.inference_mode()
def risks_without(
    model: nn.Module,
    bag: BagBatch,
    keeps: Sequence[Callable[[], Keep]],
    on_done: Callable[[int], None] = lambda count: None,
) -> Float[np.ndarray, " subset"]:
    """Compute the risk of one bag for each of several subsets of its tiles.

    Memory is bounded: subsets are created when needed, and a forward pass has at most `TOKEN_BUDGET` tiles or one bag.

    Args:
        model: Model in evaluation mode.
        bag: One bag without padding.
        keeps: Functions that create the subsets.
        on_done: Called with the number of newly finished subsets.

    Returns:
        f64; NaN for a subset that leaves a magnification empty.

    Raises:
        DataError: A risk is not finite.
    """
    risks = np.full(len(keeps), np.nan)
    for first, chunk in _chunks(bag, keeps):
        valid = [(first + i, keep) for i, keep in enumerate(chunk) if is_bag(keep)]
        if valid:
            batch = _select(bag, valid[0][1]) if len(valid) == 1 else _masked(bag, [keep for _, keep in valid])
            found = model(batch).risk.double().cpu().numpy()
            if not np.isfinite(found).all():
                raise DataError(f"bag {', '.join(bag.case_ids)}: a risk is not finite.", "Check its features.")
            risks[[number for number, _ in valid]] = found
        on_done(len(chunk))
    return risks


def _chunks(bag: BagBatch, keeps: Sequence[Callable[[], Keep]]) -> Iterator[tuple[int, list[Keep]]]:
    tiles = sum(features.shape[1] for features in bag.features.values())
    size = max(1, TOKEN_BUDGET // tiles)
    for first in range(0, len(keeps), size):
        yield first, [make() for make in keeps[first : first + size]]


def _select(bag: BagBatch, keep: Keep) -> BagBatch:
    device = next(iter(bag.features.values())).device
    rows = {name: torch.from_numpy(np.flatnonzero(flags)).to(device) for name, flags in keep.items()}
    features, positions, slides = (
        tables and {name: tables[name][:, index] for name, index in rows.items()}
        for tables in (bag.features, bag.positions, bag.slides)
    )
    return BagBatch(features or {}, None, positions, bag.case_ids, slides)


def _masked(bag: BagBatch, keeps: Sequence[Keep]) -> BagBatch:
    count = len(keeps)
    device = next(iter(bag.features.values())).device
    masks = {name: torch.from_numpy(np.stack([keep[name] for keep in keeps])).to(device) for name in bag.features}
    features, positions, slides = (
        tables and {name: table.expand(count, *table.shape[1:]) for name, table in tables.items()}
        for tables in (bag.features, bag.positions, bag.slides)
    )
    return BagBatch(features or {}, masks, positions, bag.case_ids, slides)
