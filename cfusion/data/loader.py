"""Bags read ahead of the model: threads, positioned reads into reused buffers, a bound in bytes."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfusion.config import DataConfig
from cfusion.data.bags import BagEntry
from cfusion.data.positions import bag_positions, has_positions
from cfusion.data.shard_index import STORED_DTYPES
from cfusion.data.shards import ShardDataset
from cfusion.types import BagBatch, magnification_name


class _Buffers:
    """Memory that is used again when the arrays made of it are gone; fresh pages cost as much as reading them."""

    def __init__(self, limit: int, pinned: bool) -> None:
        self._limit = limit
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = {}
        self._held = 0
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self._pinned:
            # torch's pinned allocator reuses blocks itself, and knows when a copy from them has ended.
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)
        capacity = _size_class(size)
        with self._lock:
            free = self._free.get(capacity)
            block = free.pop() if free else None
            self._held -= capacity if block is not None else 0
        if block is None:
            block = torch.empty(capacity, dtype=torch.uint8)
        owner = np.frombuffer(block.numpy().data, np.uint8)
        weakref.finalize(owner, self._give_back, capacity, block).atexit = False
        return owner[:size].view(dtype).reshape(shape)

    def _give_back(self, capacity: int, block: Tensor) -> None:
        with self._lock:
            if self._held + capacity <= self._limit:
                self._free.setdefault(capacity, []).append(block)
                self._held += capacity


def _size_class(size: int) -> int:
    """The next of eight steps per power of two, so that buffers of similar bags can stand in for each other."""
    step = max(4096, 1 << max(size.bit_length() - 4, 0))
    return -(-max(size, 1) // step) * step


class BagLoader:
    """Reads bags from shards as batches on a device.

    Args:
        dataset: The shards.
        bags: The bags that indices refer to.
        data_config: Tile sampling, caching, threads and memory.
        magnifications: Magnifications to read.
        seed: Seed of tile sampling and feature dropout.
        device: Where batches are delivered.
        dtype: Floating type of delivered features; None: as stored.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        bags: Sequence[BagEntry],
        data_config: DataConfig,
        *,
        magnifications: Sequence[float],
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        self.dataset = dataset
        self.bags = tuple(bags)
        self.names = tuple(magnification_name(m) for m in magnifications)
        self._config = data_config
        self._seed = seed
        self._device = torch.device(device)
        self._dtype = dtype
        self._stored = STORED_DTYPES[dataset.index.dtype]
        self._buffers = _Buffers(data_config.buffer_bytes, self._device.type == "cuda")
        self._pool = ThreadPoolExecutor(data_config.read_threads, "bags")

    def stream(self, micro_batches: Iterable[Sequence[int]], *, epoch: int, training: bool) -> Iterator[BagBatch]:
        """Deliver the given batches in order, reading ahead.

        What is delivered depends on the seed, the epoch and the bags, never on the threads.

        Args:
            micro_batches: For each batch, indices of its bags.
            epoch: Number of the epoch, for tile sampling and dropout.
            training: Whether tiles are sampled and features dropped as configured.
        """
        waiting: collections.deque[tuple[Future[BagBatch], int]] = collections.deque()
        ahead = 0
        remaining = iter(micro_batches)
        batch = next(remaining, None)
        try:
            while batch is not None or waiting:
                while batch is not None and (not waiting or self._fits(len(waiting), ahead + self._size(batch))):
                    size = self._size(batch)
                    waiting.append((self._pool.submit(self._read, tuple(batch), epoch, training), size))
                    ahead += size
                    batch = next(remaining, None)
                future, size = waiting.popleft()
                delivered = future.result()
                ahead -= size
                yield self._deliver(delivered)
        finally:
            for future, _ in waiting:
                future.cancel()

    def _deliver(self, batch: BagBatch) -> BagBatch:
        if self._device.type == "cpu":
            return batch
        # Moved as stored, widened there: half the bytes over the bus.
        return batch.to(self._device).to(self._device, self._dtype)

    def _fits(self, count: int, size: int) -> bool:
        return size <= self._config.buffer_bytes and count < 4 * self._config.read_threads

    def _size(self, batch: Sequence[int]) -> int:
        """Bytes a batch takes while it is read."""
        per_tile = self.dataset.index.dim * (self._stored.itemsize + (4 if self._device.type == "cpu" else 0)) + 32
        return sum(len(batch) * max(self.bags[i].tiles[name] for i in batch) * per_tile for name in self.names)

    def _read(self, batch: tuple[int, ...], epoch: int, training: bool) -> BagBatch:
        bags = [self.bags[i] for i in batch]
        features = {name: self._read_features(bags, name) for name in self.names}
        if self._device.type == "cpu" and self._dtype is not None:
            features = {name: self._convert(tensor, self._dtype) for name, tensor in features.items()}
        lengths = {name: [bag.tiles[name] for bag in bags] for name in self.names}
        masks = None
        if any(len(set(counts)) > 1 for counts in lengths.values()):
            masks = {
                name: torch.arange(max(counts))[None, :] < torch.tensor(counts)[:, None]
                for name, counts in lengths.items()
            }
        return BagBatch(features, masks, self._positions(bags), tuple(bag.case_id for bag in bags))

    def _convert(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        size = tensor.numel() * dtype.itemsize
        block = torch.from_numpy(self._buffers.empty((size,), np.dtype(np.uint8)))
        return block.view(dtype).view(tensor.shape).copy_(tensor)

    def _read_features(self, bags: Sequence[BagEntry], name: str) -> Tensor:
        longest = max(bag.tiles[name] for bag in bags)
        out = self._buffers.empty((len(bags), longest, self.dataset.index.dim), self._stored)
        for row, bag in zip(out, bags, strict=True):
            start = 0
            for slide in bag.slide_ids:
                stop = start + self.dataset.tiles(slide)[name]
                self.dataset.read_into(slide, name, row[start:stop])
                start = stop
            row[start:] = 0
        return torch.from_numpy(out)

    def _positions(self, bags: Sequence[BagEntry]) -> dict[str, Tensor] | None:
        if not all(has_positions(self.dataset, slide, self.names) for bag in bags for slide in bag.slide_ids):
            return None
        positions = {}
        placed = [bag_positions(self.dataset, bag.slide_ids, self.names) for bag in bags]
        for name in self.names:
            longest = max(len(columns[name]) for columns in placed)
            out = torch.zeros(len(bags), longest, 2, dtype=torch.int64)
            for row, columns in zip(out, placed, strict=True):
                row[: len(columns[name])] = torch.from_numpy(columns[name])
            positions[name] = out
        return positions
