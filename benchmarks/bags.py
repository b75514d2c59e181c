"""Bags a second: shards read by threads against three `.pt` files a slide read by DataLoader workers.

Run `python -m benchmarks.bags [--quick] [--json FILE]`. It writes about 8 GB to a temporary folder and measures:

- f16 shards through `BagLoader`, features delivered as stored and as f32, and int8 shards delivered as f32;
- the published layout: x20, x10 and x5 as f32 `.pt` files, `torch.load` in a DataLoader of 4 workers, one bag a batch,
  and the same without collation (`batch_size=None`), which the published program does not use;
- one thread that reads the same shard bytes into a reused buffer and does nothing else;
- a random quarter of the tiles, as stored and as f32.

Whole bags in f16 are delivered without a copy, as the pages of the cache, so their rate alone says little about a
training: rows named "and used" also add up every bag, on both sides, in one thread as a model would.

Warm: files in the page cache, after one epoch. Cold: dropped from it, and a process's first epoch, so that ours
includes the checksums.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.table import Row, options, present
from cfusion.config import DataConfig
from cfusion.data.bags import BagEntry, make_bags
from cfusion.data.loader import BagLoader
from cfusion.data.shards import ShardDataset
from cfusion.types import BagBatch, SlideFeatures
from preprocess.packing import pack_store

MAGNIFICATIONS = (20.0, 10.0, 5.0)
NAMES = ("x20", "x10", "x5")
DIM = 1536


class Slides:
    """Made-up slides of 12 to 16 thousand tiles at 20x, laid out in rows as slides are."""

    def __init__(self, count: int) -> None:
        self._cells = {f"slide-{i:03d}": 768 + (i * 97) % 257 for i in range(count)}

    def slide_ids(self) -> list[str]:
        """All slides."""
        return list(self._cells)

    def attrs(self, slide_id: str) -> dict[str, Any]:
        """Provenance."""
        return {
            "encoder": "made-up",
            "cells": self._cells[slide_id],
            "tile_px_level0": {"x20": 256, "x10": 512, "x5": 1024},
        }

    def read(self, slide_id: str) -> SlideFeatures:
        """A slide whose tiles lie in rows 32 cells wide."""
        cells = self._cells[slide_id]
        generator = np.random.default_rng(cells)
        block = generator.standard_normal((997, DIM), dtype=np.float32).astype(np.float16)
        at = {"x5": np.stack([np.arange(cells) // 32, np.arange(cells) % 32], axis=1)}
        for name, coarser in (("x10", "x5"), ("x20", "x10")):
            children = (at[coarser][:, None] * 2 + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])).reshape(-1, 2)
            at[name] = children[np.lexsort((children[:, 1], children[:, 0]))]
        parents = {}
        for name, coarser in (("x10", "x5"), ("x20", "x10")):
            rows = {tuple(place): row for row, place in enumerate(at[coarser].tolist())}
            parents[name] = np.array([rows[y // 2, x // 2] for y, x in at[name].tolist()], np.int32)
        side = {"x20": 256, "x10": 512, "x5": 1024}
        features = {n: block[(np.arange(len(at[n])) * 31 + cells) % 997] for n in NAMES}
        coords = {n: (at[n][:, ::-1] * side[n]).astype(np.int32) for n in NAMES}
        return SlideFeatures(slide_id, features, coords, parents, self.attrs(slide_id))


class PtFiles(Dataset[dict[str, torch.Tensor]]):
    """The published layout."""

    def __init__(self, folder: Path, slide_ids: Sequence[str]) -> None:
        self._folder = folder
        self._slide_ids = slide_ids

    def __len__(self) -> int:
        return len(self._slide_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {n: torch.load(self._folder / f"{self._slide_ids[index]}.{n}.pt", weights_only=True) for n in NAMES}


def write_pt_files(slides: Slides, folder: Path) -> None:
    """Each slide as three f32 tensors."""
    folder.mkdir()
    for slide_id in slides.slide_ids():
        for name, features in slides.read(slide_id).features.items():
            torch.save(torch.from_numpy(features.astype(np.float32)), folder / f"{slide_id}.{name}.pt")


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Write the files back and ask the kernel to forget them."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


Reader = Callable[[], Iterable[object]]


def bags_per_second(
    makers: Mapping[str, tuple[Callable[[], Reader], Sequence[Path]]], *, cold: bool, repeats: int
) -> dict[str, float]:
    """Median over repeats of bags delivered a second; sides take turns, so that a busy machine is busy for all."""
    # Cold readers are made afresh: a memory map that is still open keeps its pages in the cache.
    readers = {} if cold else {name: make() for name, (make, _) in makers.items()}
    for read in readers.values():
        sum(1 for _ in read())
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for name in list(makers) * repeats:
        make, files = makers[name]
        read = make() if cold else readers[name]
        if cold:
            drop_from_page_cache(files)
        start = time.perf_counter()
        count = sum(1 for _ in read())
        rates[name].append(count / (time.perf_counter() - start))
    return {name: float(np.median(found)) for name, found in rates.items()}


def raw_reads(dataset: ShardDataset, folder: Path, bags: Sequence[BagEntry]) -> Iterator[int]:
    """One thread reading each bag's features by its offsets into one buffer."""
    buffer = memoryview(bytearray(max(dataset.bytes_of(bag.slide_ids) for bag in bags)))
    buffer[:] = bytes(len(buffer))
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context((folder / s.name).open("rb", buffering=0)) for s in dataset.index.shards]
        for bag in bags:
            for slide in bag.slide_ids:
                sample = dataset.sample(slide)
                for member in (sample.members[f"{name}.npy"] for name in NAMES):
                    os.preadv(streams[sample.shard].fileno(), [buffer[: member.size]], member.offset)
            yield 1


def used(make: Callable[[], Reader]) -> Callable[[], Reader]:
    """The same reader, whose caller reads every byte that it delivers."""

    def reader() -> Reader:
        read = make()

        def summed() -> Iterator[int]:
            for bag in read():
                tensors = bag.features if isinstance(bag, BagBatch) else bag
                assert isinstance(tensors, dict)
                yield sum(int(tensor.view(torch.int64).sum()) for tensor in tensors.values())

        return summed

    return reader


def measure(folder: Path, count: int, repeats: int) -> list[Row]:
    """All rows, from files made in `folder`."""
    slides = Slides(count)
    pack_store(slides, folder / "shards")
    pack_store(slides, folder / "int8", dtype="int8")
    write_pt_files(slides, folder / "pt")
    bags = make_bags(
        ShardDataset.open(folder / "shards"), {s: [s] for s in slides.slide_ids()}, "slide", MAGNIFICATIONS
    )
    quarter = round(np.mean([bag.tiles["x20"] for bag in bags]) / 4)

    def ours(dtype: torch.dtype | None = None, shards: str = "shards", **config: Any) -> Reader:
        dataset = ShardDataset.open(folder / shards)
        loader = BagLoader(dataset, bags, DataConfig(**config), magnifications=MAGNIFICATIONS, seed=7, dtype=dtype)
        return lambda: loader.stream([[i] for i in range(count)], epoch=0, training=True)

    def raw() -> Reader:
        return lambda: raw_reads(ShardDataset.open(folder / "shards"), folder / "shards", bags)

    files = PtFiles(folder / "pt", slides.slide_ids())
    published = DataLoader(files, num_workers=4, persistent_workers=True)
    plain = DataLoader(files, num_workers=4, persistent_workers=True, batch_size=None)
    tars, small = (sorted((folder / name).glob("*.tar")) for name in ("shards", "int8"))
    pts = sorted((folder / "pt").iterdir())
    makers: dict[str, tuple[Callable[[], Reader], list[Path]]] = {
        "stored": (ours, tars),
        "f32": (lambda: ours(torch.float32), tars),
        "int8": (lambda: ours(torch.float32, "int8"), small),
        "quarter": (lambda: ours(torch.float32, max_tiles=quarter), tars),
        "stored quarter": (lambda: ours(max_tiles=quarter), tars),
        "stored, used": (used(ours), tars),
        "raw": (raw, tars),
        "published": (lambda: lambda: published, pts),
        "plain": (lambda: lambda: plain, pts),
        "published, used": (used(lambda: lambda: published), pts),
    }
    rows = []
    for state in ("warm", "cold"):
        rate = bags_per_second(makers, cold=state == "cold", repeats=repeats)
        for what, left, right in (
            ("f16 shards against .pt, 4 workers", "stored", "published"),
            ("f16 shards against .pt without collation", "stored", "plain"),
            ("f16 shards against .pt, and used", "stored, used", "published, used"),
            ("f16 shards delivered as f32 against .pt", "f32", "published"),
            ("int8 shards delivered as f32 against .pt", "int8", "published"),
            ("f16 shards against one thread's raw read", "stored", "raw"),
            ("a random quarter of the tiles against all, as f32", "quarter", "f32"),
            ("a random quarter of the tiles against the raw read of all", "stored quarter", "raw"),
        ):
            rows.append(Row(f"{state}: {what}", rate[left], rate[right], "bags/s"))
    return rows


def main() -> None:
    """Measure, print, and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--bags", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; default: the system's")
    chosen = parser.parse_args()
    bags, repeats = (4, 1) if chosen.quick else (chosen.bags, chosen.repeats)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        rows = measure(Path(folder), bags, repeats)
    present(f"{bags} bags of 12–16k + 4k + 1k tiles × {DIM}", rows, chosen.json)


if __name__ == "__main__":
    main()
