"""Read bags ahead of the model: threads, mapped pages or reused buffers, bounded in bytes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool

from cfusion.config import DataConfig
from cfusion.data.bags import BagEntry, make_bags
from cfusion.data.batches import RawBatch, finish, pack, read_batch, select
from cfusion.data.buffers import Buffers
from cfusion.data.cache import Place, choose_cache, free_device_bytes, free_ram_bytes
from cfusion.data.partition import bag_cost
from cfusion.data.sampling import Rows, kept_channels, sample_tiles
from cfusion.data.shards import ShardDataset
from cfusion.data.thread_pools import single_core_pool
from cfusion.types import BagBatch, magnification_names

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class BagLoader:
    """Reads bags from shards as batches on a device.

    Args:
        dataset: The shards.
        bags: The bags that indices refer to.
        data_config: Tile sampling, feature dropout, caching, threads and memory.
        magnifications: Magnifications to read.
        seed: Seed of tile sampling and feature dropout.
        device: Device that receives the batches.
        dtype: Floating type of delivered features; None: as stored (f16 for int8 shards).
        graphs: Per magnification name, how many neighbours of each tile to find while reading.
        positions: Whether batches carry the positions of the tiles, where the shards have them.
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
        graphs: Mapping[str, int] = MappingProxyType({}),
        positions: bool = True,
    ) -> None:
        self.dataset = dataset
        self.bags = tuple(bags)
        self.names = magnification_names(magnifications)
        self._config = data_config
        self._seed = seed
        self._device = torch.device(device)
        self._dtype = dtype
        self._graphs, self._positions = dict(graphs), positions
        self._buffers = Buffers(data_config.buffer_bytes, pinned=self._device.type == "cuda")
        self._threads = single_core_pool(data_config.read_threads, "bags")
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._held: list[RawBatch] = []
        self._place = self._choose_place()

    def _choose_place(self) -> Place:
        slides = list(dict.fromkeys(slide for bag in self.bags for slide in bag.slide_ids))
        needed = self.dataset.bytes_of(slides) - self.dataset.held_bytes(slides)
        place, why = choose_cache(self._config.cache, needed, free_ram_bytes(), free_device_bytes(self._device))
        logger.log(logging.DEBUG if self._config.cache == "page" else logging.INFO, "%s", why)
        if place == "ram":
            self.dataset.hold(slides)
        return place

    def stream(self, micro_batches: Iterable[Sequence[int]], *, epoch: int, training: bool) -> Iterator[BagBatch]:
        """Deliver the given batches in order, reading ahead within `buffer_bytes`.

        The content depends only on the seed, the epoch and the bags, never on threads or on earlier bags. The caller
        owns a batch and may keep it.

        Args:
            micro_batches: For each batch, indices of its bags.
            epoch: Number of the epoch, for tile sampling and dropout.
            training: Whether tiles are sampled and channels dropped as configured.

        Raises:
            DataError: A bag's bytes differ from the packed ones; shard, slide and member are named.
        """
        batches = (tuple(batch) for batch in micro_batches)

        def rows(index: int) -> Rows | None:
            return self._rows(index, epoch) if training else None

        def finished(raw: RawBatch, batch: tuple[int, ...]) -> BagBatch:
            drop = self._config.feature_dropout if training else 0.0
            kept = [self._channels(i, epoch) for i in batch] if drop else None
            return finish(raw, self._dtype, self._buffers, kept, drop)

        most = self._config.max_tiles if training else None
        if self._place == "gpu":
            self._fill()
            for batch in batches:
                yield finished(select([self._held[i] for i in batch], [rows(i) for i in batch]), batch)
        elif self._device.type == "cpu":
            yield from self._ahead(batches, lambda batch: finished(self._read(batch, rows), batch), most)
        else:
            for raw, batch in self._ahead(batches, lambda batch: (self._read(batch, rows), batch), most):
                yield finished(self._move(raw), batch)

    def packed(self, micro_batches: Iterable[Sequence[int]], *, epoch: int, training: bool) -> Iterator[BagBatch]:
        """Deliver the given batches as `stream` does, the bags of each joined without padding."""
        batches, singles = itertools.tee(map(tuple, micro_batches))
        bags = self.stream(((index,) for batch in singles for index in batch), epoch=epoch, training=training)
        for batch in batches:
            yield pack([next(bags) for _ in batch])

    def _ahead(
        self,
        batches: Iterator[tuple[int, ...]],
        read: Callable[[tuple[int, ...]], Item],
        most: int | None = None,
    ) -> Iterator[Item]:
        """Run `read` on the batches in threads, ahead of the caller within the bound, and yield in order.

        At most `most` tiles per bag are read at the finest magnification; None: all.
        """
        waiting: collections.deque[tuple[Future[Item], int]] = collections.deque()
        ahead = 0
        batch = next(batches, None)

        def submit() -> None:
            nonlocal batch, ahead
            while batch is not None and self._may_read(len(waiting), ahead + (size := self._bytes(batch, most))):
                waiting.append((self._threads.submit(read, batch), size))
                ahead += size
                batch = next(batches, None)

        try:
            submit()
            while waiting:
                future, size = waiting.popleft()
                item = future.result()
                ahead -= size
                # Start before the caller computes: a bag that fills the bound by itself is then read meanwhile.
                submit()
                yield item
        finally:
            for future, _ in waiting:
                future.cancel()

    def _may_read(self, waiting: int, ahead: int) -> bool:
        # The next batch to deliver is always read, however large; later ones only within the bound.
        return not waiting or (ahead <= self._config.buffer_bytes and waiting < 4 * self._config.read_threads)

    def _bytes(self, batch: Sequence[int], most: int | None = None) -> int:
        """Return the maximum host memory, in bytes, that a batch takes until it is delivered."""
        delivered = 0 if self._device.type != "cpu" or self._dtype is None else self._dtype.itemsize
        per_tile = (
            self.dataset.index.dim * (self.dataset.index.itemsize + delivered) + 17 + 8 * sum(self._graphs.values())
        )
        longest = {name: max(self.bags[i].tiles[name] for i in batch) for name in self.names}
        # Coarser tiles are ancestors of drawn ones, so their number is never larger.
        return sum(len(batch) * min(tiles, most or tiles) * per_tile for tiles in longest.values())

    def _rows(self, index: int, epoch: int) -> Rows | None:
        most, bag = self._config.max_tiles, self.bags[index]
        if most is None or bag.tiles[self.names[0]] <= most:
            return None
        return sample_tiles(self.dataset, bag.slide_ids, self.names, most, seed=self._seed, epoch=epoch, key=bag.key)

    def _channels(self, index: int, epoch: int) -> Bool[np.ndarray, " dim"]:
        share, key = self._config.feature_dropout, self.bags[index].key
        return kept_channels(self.dataset.index.dim, share, seed=self._seed, epoch=epoch, key=key)

    def _read(self, batch: Sequence[int], rows: Callable[[int], Rows | None]) -> RawBatch:
        bags = [self.bags[i] for i in batch]
        return read_batch(
            self.dataset, bags, self.names, [rows(i) for i in batch], self._buffers, self._graphs, self._positions
        )

    def _move(self, raw: RawBatch) -> RawBatch:
        """Move the batch to the device; on a GPU the copy overlaps with the model's work."""
        if self._copies is None:
            return raw.to(self._device)
        with torch.cuda.stream(self._copies):
            moved = raw.to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        for tensor in moved.tensors():
            tensor.record_stream(current)
        return moved

    def _fill(self) -> None:
        """Copy all bags to the device, once."""
        if not self._held:
            complete = self._ahead(
                ((i,) for i in range(len(self.bags))), lambda batch: self._read(batch, lambda _: None)
            )
            self._held = [dataclasses.replace(self._move(raw), held=True) for raw in complete]


@dataclass(frozen=True)
class BagSet:
    """Bags of some patients, how they are read, and the maximum number of tiles that training reads of one."""

    bags: tuple[BagEntry, ...]
    loader: BagLoader
    max_tiles: int | None

    @classmethod
    def open(
        cls,
        dataset: ShardDataset,
        slides_of_case: Mapping[str, Sequence[str]],
        data: DataConfig,
        *,
        magnifications: Sequence[float],
        device: torch.device,
        dtype: torch.dtype,
        graphs: Mapping[str, int] = MappingProxyType({}),
        positions: bool = True,
    ) -> BagSet:
        """Open the bags of the given patients, read from `dataset` and delivered to `device`; see `BagLoader`."""
        bags = make_bags(dataset, slides_of_case, data.unit, magnifications)
        loader = BagLoader(
            dataset,
            bags,
            data,
            magnifications=magnifications,
            seed=data.order_seed,
            device=device,
            dtype=dtype,
            graphs=graphs,
            positions=positions,
        )
        return cls(bags, loader, data.max_tiles)

    def __len__(self) -> int:
        return len(self.bags)

    @property
    def lengths(self) -> np.ndarray:
        """Return the maximum number of tiles that training reads of each bag, over all magnifications."""
        # Coarser tiles are ancestors of drawn ones, so their number is never larger.
        most = self.max_tiles
        return np.array([sum(min(count, most or count) for count in bag.tiles.values()) for bag in self.bags])

    @property
    def costs(self) -> np.ndarray:
        """Estimate the training cost of each bag, for balancing the ranks."""
        return np.array([bag_cost(bag.tiles, max_tiles=self.max_tiles) for bag in self.bags])
