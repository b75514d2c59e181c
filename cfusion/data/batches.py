"""Batches as stored and as a model takes them: read in place, then widened, scaled, masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cfusion.data.bags import BagEntry
from cfusion.data.buffers import Buffers
from cfusion.data.positions import bag_positions
from cfusion.data.sampling import Rows
from cfusion.data.shards import ShardDataset
from cfusion.neighbours import nearest_tiles
from cfusion.types import BagBatch

TORCH_DTYPES = {"f16": torch.float16, "f32": torch.float32, "int8": torch.int8}
_Slide = tuple[dict[str, int], Rows | None]
"""For one slide of a bag, the number of tiles to read per magnification name, and their rows; None: all."""


@dataclass(frozen=True)
class RawBatch:
    """Padded bags in the dtype of the shards.

    Attributes:
        features: Per magnification name, [bag, tile, dim], zero where padded.
        parts: Per magnification name and bag, the number of tiles of each of its slides.
        scales: Per magnification name and bag, f32 [dim] for each of its slides; empty except for int8 shards.
        positions: As in `BagBatch`.
        case_ids: The patient of each bag.
        neighbours: As in `BagBatch`.
        held: Whether its tensors are kept for later epochs; a batch made from them then needs separate memory.
    """

    features: dict[str, Tensor]
    parts: dict[str, list[list[int]]]
    scales: dict[str, list[list[Tensor]]]
    positions: dict[str, Tensor] | None
    case_ids: tuple[str, ...]
    neighbours: dict[str, Tensor] | None = None
    held: bool = False

    def lengths(self, name: str) -> list[int]:
        """Count the tiles of each bag at a magnification."""
        return [sum(parts) for parts in self.parts[name]]

    def tensors(self) -> list[Tensor]:
        """List all tensors."""
        scales = [scale for bags in self.scales.values() for bag in bags for scale in bag]
        tables = [*(self.positions or {}).values(), *(self.neighbours or {}).values()]
        return [*self.features.values(), *tables, *scales]

    def to(self, device: torch.device) -> RawBatch:
        """Move the batch to a device; from pinned memory the copy is asynchronous."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> RawBatch:
        """Return the batch in pinned memory; what is pinned already stays as it is."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> RawBatch:
        return dataclasses.replace(
            self,
            features={name: move(tensor) for name, tensor in self.features.items()},
            scales={name: [[move(s) for s in bag] for bag in bags] for name, bags in self.scales.items()},
            positions=self.positions and {n: move(t) for n, t in self.positions.items()},
            neighbours=self.neighbours and {n: move(t) for n, t in self.neighbours.items()},
        )


def read_batch(
    dataset: ShardDataset,
    bags: Sequence[BagEntry],
    names: Sequence[str],
    rows: Sequence[Rows | None],
    buffers: Buffers,
    graphs: Mapping[str, int] = MappingProxyType({}),
    positions: bool = True,
) -> RawBatch:
    """Read bags directly into the tensors of a batch; on the CPU, a bag of one complete slide is mapped instead.

    Args:
        dataset: The shards.
        bags: The bags.
        names: Magnifications, by name.
        rows: Per bag the rows to read; None: all.
        buffers: Source of memory.
        graphs: Per magnification name, how many neighbours to find of each tile that is read.
        positions: Whether to compute the positions of the tiles.
    """
    chosen = [_by_slide(dataset, bag, names, wanted) for bag, wanted in zip(bags, rows, strict=True)]
    parts = {name: [[counts[name] for counts, _ in bag] for bag in chosen] for name in names}
    features = None
    if rows == [None] and len(bags[0].slide_ids) == 1 and not buffers.pinned:
        features = _mapped(dataset, bags[0].slide_ids[0], names)
    if features is None:
        features = _read(dataset, bags, names, chosen, buffers)
    scales = {}
    if dataset.index.dtype == "int8":
        scales = {name: [[_scale(dataset, slide, name) for slide in bag.slide_ids] for bag in bags] for name in names}
    grids = _positions(dataset, bags, names, rows) if positions or graphs else None
    places = neighbours = None
    if grids is not None:
        neighbours = {n: _neighbours([grid[n] for grid in grids], parts[n], k) for n, k in graphs.items()} or None
        places = {name: _stack([grid[name] for grid in grids]) for name in names} if positions else None
    raw = RawBatch(features, parts, scales, places, tuple(b.case_id for b in bags), neighbours)
    return raw.pinned() if buffers.pinned else raw


def _mapped(dataset: ShardDataset, slide_id: str, names: Sequence[str]) -> dict[str, Tensor] | None:
    arrays = dataset.mapped(slide_id, names)
    return None if arrays is None else {name: torch.from_numpy(array)[None] for name, array in arrays.items()}


def _read(
    dataset: ShardDataset,
    bags: Sequence[BagEntry],
    names: Sequence[str],
    chosen: Sequence[Sequence[_Slide]],
    buffers: Buffers,
) -> dict[str, Tensor]:
    dtype, dim = TORCH_DTYPES[dataset.index.dtype], dataset.index.dim
    most = {name: max(sum(counts[name] for counts, _ in bag) for bag in chosen) for name in names}
    features = {name: buffers.empty((len(bags), most[name], dim), dtype) for name in names}
    arrays = {name: tensor.numpy() for name, tensor in features.items()}
    for number, (bag, slides) in enumerate(zip(bags, chosen, strict=True)):
        start = dict.fromkeys(names, 0)
        for slide, (counts, slide_rows) in zip(bag.slide_ids, slides, strict=True):
            out = {name: arrays[name][number, start[name] : start[name] + counts[name]] for name in names}
            dataset.read_into(slide, out, slide_rows)
            start = {name: start[name] + counts[name] for name in names}
        for name in names:
            arrays[name][number, start[name] :] = 0
    return features


def _by_slide(dataset: ShardDataset, bag: BagEntry, names: Sequence[str], rows: Rows | None) -> list[_Slide]:
    tiles = [dataset.tiles(slide) for slide in bag.slide_ids]
    if rows is None:
        return [(counts, None) for counts in tiles]
    slides: list[Rows] = [{} for _ in tiles]
    for name in names:
        edges = np.cumsum([0, *(counts[name] for counts in tiles)])
        cuts = np.searchsorted(rows[name], edges)
        for slide, first, last, edge in zip(slides, cuts, cuts[1:], edges, strict=False):
            slide[name] = rows[name][first:last] - edge
    return [({name: len(slide[name]) for name in names}, slide) for slide in slides]


def _scale(dataset: ShardDataset, slide_id: str, name: str) -> Tensor:
    return torch.from_numpy(dataset.read(slide_id, [f"scale_{name}"])[f"scale_{name}"])


def _positions(
    dataset: ShardDataset, bags: Sequence[BagEntry], names: Sequence[str], rows: Sequence[Rows | None]
) -> list[dict[str, Tensor]] | None:
    """Compute each bag's positions on the grid of the complete bag, so that they do not depend on the drawn tiles."""
    if not all(dataset.has_positions(slide, names) for bag in bags for slide in bag.slide_ids):
        return None
    grids = []
    for bag, wanted in zip(bags, rows, strict=True):
        coords = []
        for slide in bag.slide_ids:
            read = dataset.read(slide, [f"coords_{name}" for name in names])
            coords.append({name: read[f"coords_{name}"] for name in names})
        complete = bag_positions(coords, [dataset.sample(slide).tile_px_level0 for slide in bag.slide_ids])
        read_rows = complete if wanted is None else {name: grid[wanted[name]] for name, grid in complete.items()}
        grids.append({name: torch.from_numpy(grid) for name, grid in read_rows.items()})
    return grids


def _neighbours(grids: Sequence[Tensor], parts: Sequence[Sequence[int]], k: int) -> Tensor:
    found = [nearest_tiles(grid.numpy(), k, slide_numbers(part)) for grid, part in zip(grids, parts, strict=True)]
    return _stack([torch.from_numpy(table) for table in found], fill=-1)


def slide_numbers(tiles: Sequence[int]) -> Int[np.ndarray, " tile"]:
    """Return the number of the slide of each tile of a bag, given the tiles of each slide."""
    return np.repeat(np.arange(len(tiles)), tiles)


def _stack(tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else pad_sequence(list(tensors), True, fill)


def finish(
    raw: RawBatch,
    dtype: torch.dtype | None,
    buffers: Buffers,
    kept: Sequence[Bool[np.ndarray, " dim"]] | None = None,
    drop: float = 0.0,
) -> BagBatch:
    """Convert a batch for the model, on the device of `raw`.

    Args:
        raw: The batch as stored; it is not changed.
        dtype: Type of the features; None: as stored, f16 for int8.
        buffers: Source of CPU memory.
        kept: Per bag, the channels to keep; the others become zero and these are scaled by 1 / (1 − drop).
        drop: Share of dropped channels.
    """
    features = {name: _widen(raw, name, dtype, buffers) for name in raw.features}
    if kept is not None:
        for name, tensor in features.items():
            factor = _sent(torch.from_numpy(np.stack(kept)), tensor.device).to(tensor.dtype)[:, None] / (1 - drop)
            features[name] = tensor * factor if tensor is raw.features[name] else tensor.mul_(factor)
    lengths = {name: raw.lengths(name) for name in raw.features}
    masks = None
    if any(len(set(counts)) > 1 for counts in lengths.values()):
        masks = {name: _mask(counts, raw.features[name].device) for name, counts in lengths.items()}
    positions, neighbours = (
        tables and {name: table.clone() if raw.held else table for name, table in tables.items()}
        for tables in (raw.positions, raw.neighbours)
    )
    return BagBatch(features, masks, positions, raw.case_ids, _slides(raw), neighbours)


def _slides(raw: RawBatch) -> dict[str, Tensor] | None:
    if all(len(tiles) == 1 for bags in raw.parts.values() for tiles in bags):
        return None
    numbers = {name: [torch.from_numpy(slide_numbers(tiles)) for tiles in bags] for name, bags in raw.parts.items()}
    return {name: _sent(_stack(bags), raw.features[name].device) for name, bags in numbers.items()}


def join(bags: Sequence[BagBatch]) -> BagBatch:
    """Join bags that were delivered one by one into one batch, as if they had been read together."""
    if len(bags) == 1:
        return bags[0]
    names = list(bags[0].features)
    lengths = {name: [bag.features[name].shape[1] for bag in bags] for name in names}
    masks = positions = None
    if any(len(set(counts)) > 1 for counts in lengths.values()):
        masks = {name: _mask(counts, bags[0].features[name].device) for name, counts in lengths.items()}
    if all(bag.positions is not None for bag in bags):
        positions = {name: _stack([bag.positions[name][0] for bag in bags if bag.positions]) for name in names}
    slides = None
    if any(bag.slides is not None for bag in bags):
        slides = {name: _stack([_slides_of_one(bag, name) for bag in bags]) for name in names}
    features = {name: _stack([bag.features[name][0] for bag in bags]) for name in names}
    cases = tuple(case for bag in bags for case in bag.case_ids)
    return BagBatch(features, masks, positions, cases, slides, _joined_neighbours(bags))


def pack(bags: Sequence[BagBatch]) -> BagBatch:
    """Join bags that were delivered one by one into one row, without padding.

    Numbers of slides and neighbours are left out: no model that takes such a row reads them.
    """
    if len(bags) == 1:
        return bags[0]
    names = list(bags[0].features)
    positions = None
    if all(bag.positions is not None for bag in bags):
        positions = {name: torch.cat([bag.positions[name] for bag in bags if bag.positions], dim=1) for name in names}
    return BagBatch(
        {name: torch.cat([bag.features[name] for bag in bags], dim=1) for name in names},
        positions=positions,
        case_ids=tuple(case for bag in bags for case in bag.case_ids),
        lengths={name: tuple(bag.features[name].shape[1] for bag in bags) for name in names},
    )


def _slides_of_one(bag: BagBatch, name: str) -> Tensor:
    tiles = bag.features[name][0]
    return torch.zeros(len(tiles), dtype=torch.long, device=tiles.device) if bag.slides is None else bag.slides[name][0]


def _joined_neighbours(bags: Sequence[BagBatch] | Sequence[RawBatch]) -> dict[str, Tensor] | None:
    tables = [bag.neighbours for bag in bags]
    first = tables[0]
    if first is None or any(table is None for table in tables):
        return None
    return {name: _stack([table[name][0] for table in tables if table], fill=-1) for name in first}


def _mask(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.arange(max(counts), device=device) < _sent(torch.tensor(counts), device)[:, None]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to the device of its batch; from pageable memory, the host would wait for a GPU's work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _widen(raw: RawBatch, name: str, dtype: torch.dtype | None, buffers: Buffers) -> Tensor:
    stored = raw.features[name]
    wanted = dtype or (torch.float16 if stored.dtype == torch.int8 else stored.dtype)
    if stored.dtype == wanted and not raw.held:
        return stored
    if stored.device.type == "cpu":
        out = buffers.empty(stored.shape, wanted)
    else:
        out = torch.empty(stored.shape, dtype=wanted, device=stored.device)
    if stored.dtype != torch.int8:
        return out.copy_(stored)
    for bag, (counts, scales) in enumerate(zip(raw.parts[name], raw.scales[name], strict=True)):
        start = 0
        for count, scale in zip(counts, scales, strict=True):
            _scaled(stored[bag, start : start + count], scale, out[bag, start : start + count])
            start += count
        out[bag, start:] = 0
    return out


def _scaled(stored: Int8[Tensor, "tile dim"], scale: Float32[Tensor, " dim"], out: Float[Tensor, "tile dim"]) -> None:
    # A mixed-type product in one call is up to twenty times slower on a CPU; blocks of 256 rows stay in its cache.
    size = 256 if stored.device.type == "cpu" else 4096
    block = torch.empty(min(size, len(stored)), len(scale), device=stored.device)
    for rows, into in zip(stored.split(size), out.split(size), strict=True):
        into.copy_(block[: len(rows)].copy_(rows).mul_(scale))


def select(held: Sequence[RawBatch], rows: Sequence[Rows | None]) -> RawBatch:
    """Join bags that are held as batches of one into one batch, with the chosen rows of each."""
    bags = [raw if wanted is None else _take(raw, wanted) for raw, wanted in zip(held, rows, strict=True)]
    if len(bags) == 1:
        return bags[0]
    names = list(bags[0].features)
    positions = None
    if all(bag.positions is not None for bag in bags):
        positions = {name: _stack([bag.positions[name][0] for bag in bags if bag.positions]) for name in names}
    return RawBatch(
        {name: _stack([bag.features[name][0] for bag in bags]) for name in names},
        {name: [bag.parts[name][0] for bag in bags] for name in names},
        {name: [bag.scales[name][0] for bag in bags] for name in bags[0].scales},
        positions,
        tuple(case for bag in bags for case in bag.case_ids),
        _joined_neighbours(bags),
    )


def _take(raw: RawBatch, rows: Rows) -> RawBatch:
    index = {n: torch.from_numpy(wanted).to(raw.features[n].device) for n, wanted in rows.items()}
    parts = {}
    for name, wanted in rows.items():
        edges = np.cumsum([0, *raw.parts[name][0]])
        parts[name] = [np.diff(np.searchsorted(wanted, edges)).tolist()]
    positions = raw.positions and {name: table[:, index[name]] for name, table in raw.positions.items()}
    features = {name: tensor[:, index[name]] for name, tensor in raw.features.items()}
    # The neighbours of the drawn tiles among each other are not those of the complete bag.
    return dataclasses.replace(raw, features=features, parts=parts, positions=positions, neighbours=None, held=False)
