"""What training sees of a bag: a random part of its tiles and of its channels, the same for the same seed."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from cfusion.data.shards import ShardDataset

Rows = dict[str, Int[np.ndarray, " tile"]]
"""Per magnification name, ascending rows of a bag, whose slides follow each other."""


def _random(seed: int, epoch: int, purpose: int, key: str, n: int) -> np.ndarray:
    """Raw random integers that depend on nothing else: not on threads, ranks or the order of bags."""
    sequence = np.random.SeedSequence([seed, epoch, purpose, zlib.crc32(key.encode())])
    return np.random.PCG64(sequence).random_raw(n)


def kept_channels(dim: int, drop: float, *, seed: int, epoch: int, key: str) -> Bool[np.ndarray, " dim"]:
    """Channels that feature dropout leaves to a bag; at least one."""
    raw = _random(seed, epoch, 1, key, dim)
    kept = raw >= np.uint64(drop * 2.0**64)
    kept[int(np.argmax(raw))] = True
    return kept


def sample_tiles(
    dataset: ShardDataset,
    slide_ids: Sequence[str],
    names: Sequence[str],
    max_tiles: int,
    *,
    seed: int,
    epoch: int,
    key: str,
) -> Rows:
    """Draw at most `max_tiles` tiles of the finest magnification of a bag, and what belongs to them.

    Whole families are drawn, that is all tiles under one tile of the coarsest magnification; the last family is cut
    to meet `max_tiles`. Of coarser magnifications the ancestors of drawn tiles stay. Where the source has no parents,
    each magnification is drawn from on its own, in the same proportion.

    Args:
        dataset: The shards.
        slide_ids: The bag's slides.
        names: Magnifications to read, finest first.
        max_tiles: Most tiles at the finest of `names`.
        seed: Seed of the run.
        epoch: Each epoch draws anew.
        key: The bag's own name.
    """
    total = sum(dataset.tiles(slide)[names[0]] for slide in slide_ids)
    levels = dataset.index.magnifications[dataset.index.magnifications.index(names[0]) :]
    if all(dataset.has(slide, f"parent_{name}") for slide in slide_ids for name in levels[:-1]):
        families = [_ancestors(dataset, slide, levels) for slide in slide_ids]
        return _draw_families(families, names, levels, max_tiles, _random(seed, epoch, 0, key, 2 * total))
    rows = {}
    for number, name in enumerate(names):
        size = sum(dataset.tiles(slide)[name] for slide in slide_ids)
        count = max_tiles if number == 0 else max(1, round(size * max_tiles / total))
        rows[name] = np.sort(np.argsort(_random(seed, epoch, 2 + number, key, size), kind="stable")[:count])
    return rows


def _ancestors(dataset: ShardDataset, slide_id: str, levels: Sequence[str]) -> dict[str, np.ndarray]:
    """For each tile of the finest level, the row of the tile above it at every level."""
    steps = dataset.read(slide_id, [f"parent_{name}" for name in levels[:-1]])
    rows = {levels[0]: np.arange(dataset.tiles(slide_id)[levels[0]])}
    for finer, coarser in itertools.pairwise(levels):
        rows[coarser] = steps[f"parent_{finer}"][rows[finer]]
    return rows


def _draw_families(
    slides: list[dict[str, np.ndarray]], names: Sequence[str], levels: Sequence[str], max_tiles: int, raw: np.ndarray
) -> Rows:
    whole = {}
    for name in levels:
        starts = np.cumsum([0, *(int(slide[name].max()) + 1 for slide in slides)])
        whole[name] = np.concatenate([slide[name] + start for slide, start in zip(slides, starts, strict=False)])
    family = whole[levels[-1]]
    # Families in random order, and the tiles of each in random order: the first are drawn.
    order = np.lexsort((raw[: len(family)], raw[len(family) :][family]))
    drawn = np.sort(order[:max_tiles])
    return {name: drawn if name == levels[0] else np.unique(whole[name][drawn]) for name in names}
