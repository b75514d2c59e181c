"""Sampling for training: a random part of a bag's tiles and channels, the same for the same seed."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from cfusion.data.shards import ShardDataset

Rows = dict[str, Int[np.ndarray, " _"]]
"""Per magnification name, ascending rows of a bag, whose slides follow each other."""


def _random(seed: int, epoch: int, purpose: int, key: str) -> np.random.PCG64:
    """Return raw random integers that do not depend on threads, ranks or the order of bags."""
    return np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose, zlib.crc32(key.encode())]))


def kept_channels(dim: int, drop: float, *, seed: int, epoch: int, key: str) -> Bool[np.ndarray, " dim"]:
    """Choose the channels that feature dropout keeps of a bag; at least one."""
    raw = _random(seed, epoch, 1, key).random_raw(dim)
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
    """Draw at most `max_tiles` tiles of the finest magnification of a bag, and their ancestors.

    Complete families are drawn, that is all tiles under one tile of the coarsest magnification; the last family is
    cut to meet `max_tiles`. At coarser magnifications the ancestors of drawn tiles stay. If the source has no
    parents, or no coarser magnification, each magnification is sampled independently, in the same proportion.

    Args:
        dataset: The shards.
        slide_ids: The bag's slides.
        names: Magnifications to read, finest first.
        max_tiles: Maximum tiles at the finest of `names`.
        seed: Seed of the run.
        epoch: Each epoch is resampled.
        key: The bag's name.
    """
    total = sum(dataset.tiles(slide)[names[0]] for slide in slide_ids)
    levels = dataset.index.magnifications[dataset.index.magnifications.index(names[0]) :]
    linked = all(dataset.has(slide, f"parent_{name}") for slide in slide_ids for name in levels[:-1])
    if linked and len(levels) > 1:
        above = _ancestors(dataset, slide_ids, levels)
        drawn = _draw_families(above[levels[-1]], max_tiles, _random(seed, epoch, 0, key))
        return {name: drawn if name == names[0] else _distinct(above[name][drawn]) for name in names}
    rows = {}
    for number, name in enumerate(names):
        size = sum(dataset.tiles(slide)[name] for slide in slide_ids)
        count = max_tiles if number == 0 else max(1, round(size * max_tiles / total))
        raw = _random(seed, epoch, 2 + number, key).random_raw(size)
        rows[name] = np.sort(np.argsort(raw, kind="stable")[:count])
    return rows


def _ancestors(
    dataset: ShardDataset, slide_ids: Sequence[str], levels: Sequence[str]
) -> dict[str, Int[np.ndarray, " _"]]:
    """Return, for each finest tile of a bag, the row in the bag of its ancestor at every coarser level."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in levels[1:]}
    starts = dict.fromkeys(levels[1:], 0)
    for slide_id in slide_ids:
        steps, tiles = dataset.read(slide_id, [f"parent_{name}" for name in levels[:-1]]), dataset.tiles(slide_id)
        rows: np.ndarray | slice = slice(None)
        for finer, coarser in itertools.pairwise(levels):
            rows = steps[f"parent_{finer}"][rows]
            parts[coarser].append(rows + starts[coarser])
        starts = {name: start + tiles[name] for name, start in starts.items()}
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _draw_families(
    family: Int[np.ndarray, " tile"], max_tiles: int, random: np.random.PCG64
) -> Int[np.ndarray, " kept"]:
    """Take the tiles of families in random order; of the last family, a random part."""
    sizes = np.bincount(family)
    order = np.argsort(random.random_raw(len(sizes)), kind="stable")
    complete = int(np.searchsorted(np.cumsum(sizes[order]), max_tiles))
    chosen = np.zeros(len(sizes), bool)
    chosen[order[:complete]] = True
    drawn = np.flatnonzero(chosen[family])
    cut = np.flatnonzero(family == order[complete])
    cut = cut[np.argsort(random.random_raw(len(cut)), kind="stable")][: max_tiles - len(drawn)]
    return np.sort(np.concatenate([drawn, cut]))


def _distinct(rows: Int[np.ndarray, " tile"]) -> Int[np.ndarray, " row"]:
    flags = np.zeros(int(rows.max()) + 1, bool)
    flags[rows] = True
    return np.flatnonzero(flags)
