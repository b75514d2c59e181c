"""Bags that are joined one after the other in one row, without padding: where each begins and ends."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The bags of one row.

    Attributes:
        lengths: Tokens of each bag, in order.
    """

    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Tokens of all bags."""
        return sum(self.lengths)

    def split(self, row: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """Return the part of each bag, given the tokens of all of them along `dim`."""
        return row.split(self.lengths, dim)

    def edges(self, device: torch.device) -> Int32[Tensor, " edge"]:
        """Return the position at which each bag begins, and the end of the last one, on a device."""
        return _edges(self.lengths, device)


@functools.lru_cache(maxsize=64)
def _edges(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    # From pageable memory, the host would wait for the GPU's work.
    return edges.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else edges


@dataclass(frozen=True)
class Pairs:
    """Queries and keys of the same bags: those of a bag attend to each other only."""

    queries: Segments
    keys: Segments


Real = Bool[Tensor, "bag token"] | Segments | None
"""Which tokens are a bag's own: true in a mask, or parts of a joined row; None: all are."""


def first_of_each(
    tokens: Float[Tensor, "bag token dim"], real: Real, count: int | None
) -> Float[Tensor, "bag query dim"]:
    """Return the first `count` tokens of each bag; None: all tokens."""
    if count is None or not isinstance(real, Segments):
        return tokens[:, :count]
    return torch.cat([part[:, :count] for part in real.split(tokens)], dim=1)
