"""Which rank reads which bag when, as pure functions of seed, epoch, costs and world size.

An epoch is an order of bags. The order is cut into global batches, one per optimizer step. A global batch is
distributed over the ranks. Only this last step depends on the world size, so a run resumed on another number of ranks
continues with the same sequence of global batches from (epoch, samples seen) on.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cfusion.errors import ConfigError


@dataclass(frozen=True)
class MicroBatch:
    """Bags of one forward pass.

    Attributes:
        indices: Positions in the global batch.
        weights: Per bag 1, or 0 for padding: a bag that is run, but not counted, so that all ranks run equally many
            passes.
    """

    indices: tuple[int, ...]
    weights: tuple[int, ...]


def bag_cost(tiles: Mapping[str, int], source: str = "x10", max_tiles: int | None = None) -> float:
    """Estimate the relative cost of a bag: the work per tile, and CrossFusion's attention over its source tokens.

    In multiply-adds over the width: 4.5 per tile for the projection and the context's keys and values; per source
    token 120 for eight transformer blocks and two cross-attention blocks; per attended pair 2. Without source
    tokens,
    as in the baselines, only the tiles count.

    Args:
        tiles: Number of tiles per magnification name.
        source: Magnification whose tokens attend.
        max_tiles: Maximum tiles drawn at the finest magnification; None: all are read.
    """
    width = 512
    share = 1.0 if max_tiles is None else min(1.0, max_tiles / max(tiles.values()))
    tokens = tiles.get(source, 0) * share
    context = sum(count for name, count in tiles.items() if name != source) * share
    linear = 4.5 * width * (tokens + context) + 120 * width * tokens
    return linear + 2.0 * tokens * (8 * tokens + context)


def epoch_order(
    keys: Sequence[str], *, seed: int, epoch: int, weights: Sequence[float] | Float[np.ndarray, " bag"] | None = None
) -> Int[np.ndarray, " draw"]:
    """Return the order in which an epoch visits bags.

    If every bag comes once, its place depends only on its own key. The order of a subset is then the subset's order
    in the full set, so folds that share bags can also share one pass over them.

    Args:
        keys: Names of the bags.
        seed: Seed of the order.
        epoch: Number of the epoch; each has a different order.
        weights: None: every bag once. Otherwise as many draws as bags, with replacement, in proportion to these
            (published recipe).

    Returns:
        Positions in `keys`.

    Raises:
        ConfigError: Weights are negative, not finite, all zero, or not one per bag.
    """
    n = len(keys)
    if weights is None:
        salt = f"{seed}/{epoch}/".encode()
        places = [hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest() for key in keys]
        return np.array(sorted(range(n), key=places.__getitem__), dtype=np.int64)
    # Raw generator output is the same in every numpy version, so draws can be repeated years later.
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n) if n else np.zeros(0, np.uint64)
    share = np.asarray(weights, np.float64)
    if share.shape != (n,) or not np.isfinite(share).all() or (share < 0).any() or not share.sum() > 0:
        raise ConfigError(f"Sampling weights must be {n} finite numbers ≥ 0 with a positive sum; got {share}.")
    edges = np.cumsum(share)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # side="right" never lands on a bag of weight zero; the clip guards the last edge against rounding.
    return np.minimum(np.searchsorted(edges, uniform * edges[-1], side="right"), np.flatnonzero(share)[-1])


def earlier_draws(order: Int[np.ndarray, " draw"]) -> Int[np.ndarray, " draw"]:
    """Count how often the bag of each draw was drawn before it; all 0 if every bag comes once."""
    by_bag = np.argsort(order, kind="stable")
    _, first, count = np.unique(order[by_bag], return_index=True, return_counts=True)
    earlier = np.empty_like(order)
    earlier[by_bag] = np.arange(len(order)) - np.repeat(first, count)
    return earlier


def global_batches(order: Int[np.ndarray, " draw"], batch: int) -> list[Int[np.ndarray, " _"]]:
    """Cut an order into the bags of each optimizer step; the last may be partial.

    To resume after `seen` samples, pass `order[seen:]`.
    """
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def distribute(
    costs: Sequence[float] | Float[np.ndarray, " bag"],
    world_size: int,
    micro_batch: int = 1,
    *,
    lengths: Sequence[int] | Int[np.ndarray, " bag"] | None = None,
    token_budget: int | None = None,
) -> list[list[MicroBatch]]:
    """Distribute one global batch over the ranks with balanced costs.

    Every rank gets equally many micro-batches, and every bag is in exactly one of them with weight 1. Bags of similar
    cost share a micro-batch, because shorter ones are padded to the longest. A rank short of bags repeats the
    cheapest bag of the batch with weight 0.

    Args:
        costs: Cost of each bag of the batch, such as `bag_cost`.
        world_size: Number of ranks.
        micro_batch: Maximum bags in a micro-batch, if there is no `token_budget`.
        lengths: Tiles of each bag, if there is a `token_budget`.
        token_budget: Bags share a micro-batch while their number × the longest stays within this; a longer bag gets
            a separate micro-batch.

    Returns:
        Per rank, its micro-batches in order, the costliest first.
    """
    cost = np.asarray(costs, np.float64)
    if not len(cost):
        return [[] for _ in range(world_size)]
    if token_budget is None:
        length, most, budget = np.zeros(len(cost), np.int64), micro_batch, 0
    else:
        length, most, budget = np.asarray(lengths, np.int64), len(cost), token_budget
    distributed = [_micro_batches(share, cost, length, most, budget) for share in _balance(cost, world_size, most)]
    rounds = max(len(batches) for batches in distributed)
    padding = MicroBatch((int(np.argmin(cost)),), (0,))
    return [batches + [padding] * (rounds - len(batches)) for batches in distributed]


def _micro_batches(share: list[int], cost: np.ndarray, length: np.ndarray, most: int, budget: int) -> list[MicroBatch]:
    groups: list[list[int]] = []
    longest = 0
    for bag in sorted(share, key=lambda i: (-cost[i], i)):
        longest = max(longest, int(length[bag]))
        if not groups or len(groups[-1]) == most or (len(groups[-1]) + 1) * longest > budget > 0:
            groups.append([])
            longest = int(length[bag])
        groups[-1].append(bag)
    return [MicroBatch(tuple(group), (1,) * len(group)) for group in groups]


def _balance(cost: np.ndarray, world_size: int, micro_batch: int) -> list[list[int]]:
    """Assign the longest first to the least loaded rank, at most the same number of full passes each; then swap."""
    capacity = -(-len(cost) // (world_size * micro_batch)) * micro_batch
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for bag in np.argsort(-cost, kind="stable"):
        load, rank = heapq.heappop(loads)
        shares[rank].append(int(bag))
        if len(shares[rank]) < capacity:
            heapq.heappush(loads, (load + float(cost[bag]), rank))
    _even_out(shares, cost)
    return shares


def _even_out(shares: list[list[int]], cost: np.ndarray) -> None:
    """Swap bags between the costliest rank and the cheapest rank that still helps, until nothing improves."""
    loads = np.array([cost[share].sum() for share in shares])
    for _ in range(8 * len(shares)):
        high = int(np.argmax(loads))
        if not any(_swap(shares, cost, loads, high, int(low)) for low in np.argsort(loads, kind="stable")[:4]):
            return


def _swap(shares: list[list[int]], cost: np.ndarray, loads: np.ndarray, high: int, low: int) -> bool:
    gap = loads[high] - loads[low]
    if high == low or not shares[low] or gap <= 1e-9 * loads[high]:
        return False
    difference = cost[shares[high]][:, None] - cost[shares[low]][None, :]
    rest = np.abs(gap - 2 * difference)
    i, j = np.unravel_index(int(np.argmin(rest)), rest.shape)
    moved = difference[i, j]
    if not 0 < moved < gap:
        return False
    shares[high][i], shares[low][j] = shares[low][j], shares[high][i]
    loads[high] -= moved
    loads[low] += moved
    return True


def evaluation_slices(
    costs: Sequence[float] | Float[np.ndarray, " bag"], world_size: int
) -> list[Int[np.ndarray, " _"]]:
    """Distribute bags for evaluation: every bag exactly once over the ranks, without padding, with balanced costs.

    Ranks may get different numbers of bags, some none; each rank's are in ascending order.
    """
    cost = np.asarray(costs, np.float64)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for bag in np.argsort(-cost, kind="stable"):
        load, rank = heapq.heappop(loads)
        shares[rank].append(int(bag))
        heapq.heappush(loads, (load + float(cost[bag]), rank))
    return [np.array(sorted(share), np.int64) for share in shares]
