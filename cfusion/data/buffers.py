"""Reusable memory for bags: fresh pages cost as much time as reading into them."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 18


class Buffers:
    """Gives tensors whose memory returns to the pool when their last view is gone.

    Args:
        limit: Memory is kept for reuse while kept and used memory total at most this many bytes.
        pinned: Whether tensors are page-locked, for copies to a GPU.
    """

    def __init__(self, limit: int, *, pinned: bool) -> None:
        self._limit = limit
        self.pinned = pinned
        self._free: dict[int, list[Tensor]] = {}
        # Re-entrant: garbage collection inside the lock may free another buffer.
        self._lock = threading.RLock()
        self.kept = 0
        self.in_use = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a CPU tensor with undefined content."""
        size = math.prod(shape) * dtype.itemsize
        if self.pinned or size < _SMALL:
            # torch's pinned allocator reuses blocks itself, and tracks when a copy from them has ended.
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.pinned)
        capacity = _size_class(size)
        with self._lock:
            free = self._free.get(capacity)
            block = free.pop() if free else None
            self.kept -= capacity if block is not None else 0
            self.in_use += capacity
        if block is None:
            block = torch.empty(capacity, dtype=torch.uint8)
        # All views of the tensor reference this array, so it is freed with the last of them.
        owner = np.frombuffer(block.numpy().data, np.uint8)
        weakref.finalize(owner, self._give_back, capacity, block).atexit = False
        return torch.from_numpy(owner)[:size].view(dtype).view(tuple(shape))

    def _give_back(self, capacity: int, block: Tensor) -> None:
        with self._lock:
            self.in_use -= capacity
            if self.in_use + self.kept + capacity <= self._limit:
                self._free.setdefault(capacity, []).append(block)
                self.kept += capacity


def _size_class(size: int) -> int:
    """Round up to one of eight steps per power of two, so that bags of similar size can share buffers."""
    step = 1 << (size.bit_length() - 4)
    return -(-size // step) * step
