"""The shared order of bags of a group, as pure functions: which rank reads a bag, and when each member steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cfusion.data.partition import distribute, evaluation_slices, global_batches


@dataclass(frozen=True)
class Window:
    """One global batch of a member.

    Attributes:
        bags: Its bags over all ranks, by their numbers in the group.
        end: Position in the order after its last bag; the member steps when the pass reaches it.
        passes: Bags of each forward pass of this rank.
    """

    bags: tuple[int, ...]
    end: int
    passes: tuple[tuple[int, ...], ...]


def owners(
    order: Int[np.ndarray, " bag"], costs: Float[np.ndarray, " bag"], world_size: int, window: int
) -> Int[np.ndarray, " bag"]:
    """Assign a rank to each bag of a pass: equal shares of the cost within every `window` bags of the order.

    Args:
        order: Bags of the pass.
        costs: Cost of every bag of the group.
        world_size: Number of ranks.
        window: Bags per window, such as the global batch.
    """
    owner = np.zeros(len(order), np.int64)
    for start in range(0, len(order), window):
        for rank, share in enumerate(evaluation_slices(costs[order[start : start + window]], world_size)):
            owner[start + share] = rank
    return owner


def windows(
    order: Int[np.ndarray, " bag"],
    members: Collection[int],
    mine: Collection[int],
    costs: Float[np.ndarray, " bag"],
    lengths: Int[np.ndarray, " bag"],
    *,
    global_batch: int,
    micro_batch: int,
    token_budget: int | None,
) -> list[Window]:
    """Return the global batches of a member in a pass; they are the same as without the group.

    Args:
        order: Bags of the pass.
        members: Bags that the member trains on.
        mine: Bags that this rank reads.
        costs: Cost of every bag of the group.
        lengths: Tiles of every bag of the group.
        global_batch: Bags per step.
        micro_batch: Maximum bags of a forward pass without `token_budget`.
        token_budget: See `distribute`.
    """
    positions = np.flatnonzero([bag in members for bag in order.tolist()])
    found = []
    for batch in global_batches(positions, global_batch):
        own = order[[p for p in batch.tolist() if order[p] in mine]]
        distributed = distribute(costs[own], 1, micro_batch, lengths=lengths[own], token_budget=token_budget)[0]
        passes = tuple(tuple(own[list(micro.indices)].tolist()) for micro in distributed)
        found.append(Window(tuple(order[batch].tolist()), int(batch[-1]) + 1, passes))
    return found


def visits(roles: Sequence[Collection[int]], order: Int[np.ndarray, " bag"]) -> Int[np.ndarray, " bag"]:
    """Return the bags of `order` that at least one role needs, in that order."""
    needed = set().union(*roles)
    return order[[bag in needed for bag in order.tolist()]]
