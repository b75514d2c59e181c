"""How evenly a global batch's work is distributed to ranks: by cost, and at random.

    python -m benchmarks.balance --clinical FOLDER [--quick] [--json FILE]

FOLDER holds clinical tables with columns case_id and slide_id (such as TCGA's), from which the real number of slides
per case is taken; slides' sizes are log-normal. Time lost is what ranks wait for the slowest of each step, over an
epoch: sum of the largest loads over sum of the mean loads, minus one. A bag that costs more than a rank's share
prevents an even distribution, so each row also shows the least possible loss; `data.max_tiles` removes it. No process
is started.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.table import Row, options, present
from cfusion.data.partition import bag_cost, distribute, epoch_order, global_batches
from cfusion.study.packaged import FOLDER

MEDIAN_TILES = 9000
SIGMA = 0.5
MOST_TILES = 100_000


def slides_per_case(clinical: Path) -> list[int]:
    """Number of slides of every case of the tables in a folder."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted(clinical.glob("*.csv")):
        with path.open(newline="") as stream:
            counts.update({(path.stem, row["case_id"]): 0 for row in csv.DictReader(stream)})
            stream.seek(0)
            counts.update((path.stem, row["case_id"]) for row in csv.DictReader(stream))
    return list(counts.values())


def costs_of(slides: Sequence[int], cases: int, most_tiles: int, seed: int) -> np.ndarray:
    """Cost of the bag of each of `cases` cases, whose numbers of slides are drawn from `slides`."""
    generator = np.random.default_rng(seed)
    costs = []
    for count in generator.choice(slides, cases):
        tiles = min(int(generator.lognormal(np.log(MEDIAN_TILES), SIGMA, count).sum()), most_tiles)
        costs.append(bag_cost({"x20": tiles, "x10": tiles // 4 + 1, "x5": tiles // 16 + 1}))
    return np.array(costs)


def _steps(costs: np.ndarray, batch: int) -> list[np.ndarray]:
    return global_batches(epoch_order([str(bag) for bag in range(len(costs))], seed=7, epoch=0), batch)


def least_lost(costs: np.ndarray, world: int, batch: int) -> float:
    """Time that any dealing loses: a step takes as long as its costliest bag."""
    steps = [costs[step] for step in _steps(costs, batch)]
    return sum(max(step.max(), step.sum() / world) for step in steps) / (costs.sum() / world) - 1


def time_lost(costs: np.ndarray, world: int, batch: int, *, balanced: bool) -> float:
    """Share of rank time that is spent waiting, over an epoch."""
    slowest = mean = 0.0
    for step in _steps(costs, batch):
        if balanced:
            loads = [sum(costs[step[i]] for m in share for i in m.indices) for share in distribute(costs[step], world)]
        else:
            # The order is random, so dealing in turn is dealing at random.
            loads = [costs[step[rank::world]].sum() for rank in range(world)]
        slowest += max(loads)
        mean += costs[step].sum() / world
    return slowest / mean - 1


def main() -> None:
    """Simulate, print, and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--clinical", type=Path, default=FOLDER / "tcga" / "clinical")
    parser.add_argument("--steps", type=int, default=8)
    chosen = parser.parse_args()
    slides = slides_per_case(chosen.clinical)
    rows = []
    for world in (8, 64) if chosen.quick else (8, 64, 512):
        for most, bags in itertools.product((MOST_TILES, 24_000), (8, 32)):
            batch = world * bags
            costs = costs_of(slides, batch * (1 if chosen.quick else chosen.steps), most, seed=world)
            ours, theirs = (100 * time_lost(costs, world, batch, balanced=balanced) for balanced in (True, False))
            least = 100 * least_lost(costs, world, batch)
            what = f"{world} ranks × {bags} bags of at most {most // 1000}k tiles (least possible {least:.1f})"
            rows.append(Row(what, ours, theirs, "% lost", "lower"))
    present("Dealing by cost (ours) and at random (theirs)", rows, chosen.json)


if __name__ == "__main__":
    main()
