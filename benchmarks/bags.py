"""Bags a second: shards read by threads against three `.pt` files a slide read by DataLoader workers.

Run `python -m benchmarks.bags [--quick] [--json FILE]`. It writes about 8 GB to a temporary folder and measures:

- f16 shards through `BagLoader`, features delivered as stored and as f32, and int8 shards delivered as f32;
- the published layout: x20, x10 and x5 as f32 `.pt` files, `torch.load` in a DataLoader of 4 workers, one bag a batch,
  and the same without collation (`batch_size=None`), which the published program does not use;
- one thread that reads the bytes of either layout into a reused buffer and does nothing else: where both sides wait
  for the disk, their ratio can be no better than that of these two;
- a random quarter of the tiles, as stored and as f32.

Complete bags of one slide in f16 are delivered without a copy, as pages of the cache, so their rate says little about
training: rows named "and used" also add up every bag, on both sides, in one thread as a model would. Bags of
two slides are read into memory, complete or in part, so that a quarter and all of them cost the same kind of work.

Warm: files in the page cache, after one epoch. Cold: dropped from it, and a process's first epoch, so that ours
includes the checksums.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
Makers = dict[str, tuple[Callable[[], Reader], Sequence[Path]]]


def bags_per_second(makers: Makers, *, cold: bool, repeats: int) -> dict[str, float]:
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


Span = tuple[Path, int, int]
"""A file, an offset and a number of bytes."""


def spans_of_shards(folder: Path, dataset: ShardDataset, bags: Sequence[BagEntry]) -> list[list[Span]]:
    """Where the features of each bag lie."""
    samples = [[dataset.sample(slide) for slide in bag.slide_ids] for bag in bags]
    return [
        [
            (folder / dataset.index.shards[sample.shard].name, member.offset, member.size)
            for sample in slides
            for member in (sample.members[f"{name}.npy"] for name in NAMES)
        ]
        for slides in samples
    ]


def raw_reads(bags: Sequence[Sequence[Span]]) -> Iterator[int]:
    """One thread reading the bytes of each bag into one buffer, and nothing else."""
    buffer = memoryview(bytearray(max(size for spans in bags for _, _, size in spans)))
    buffer[:] = bytes(len(buffer))
    with contextlib.ExitStack() as stack:
        paths = {path for spans in bags for path, _, _ in spans}
        streams = {path: stack.enter_context(path.open("rb", buffering=0)) for path in paths}
        for spans in bags:
            for path, offset, size in spans:
                os.preadv(streams[path].fileno(), [buffer[:size]], offset)
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


COMPARISONS = (
    ("f16 shards against .pt, 4 workers", "stored", "published"),
    ("f16 shards against .pt without collation", "stored", "plain"),
    ("f16 shards against .pt, and used", "stored, used", "published, used"),
    ("f16 shards delivered as f32 against .pt", "f32", "published"),
    ("int8 shards delivered as f32 against .pt", "int8", "published"),
    ("f16 shards against one thread's raw read", "stored", "raw"),
    ("one thread's raw read of f16 shards against that of .pt", "raw", "raw .pt"),
    ("a random quarter of the tiles against all, as f32, and used", "quarter, used", "f32, used"),
    ("a random quarter of bags of two slides against all, as f32", "quarter of two slides", "two slides"),
    ("a random quarter of the tiles against the raw read of all", "stored quarter", "raw"),
)
"""What is compared: a name, our side, the other side."""


def our_readers(folder: Path, slide_ids: Sequence[str]) -> Makers:
    """Readers of shards, each with the files it reads."""
    dataset = ShardDataset.open(folder / "shards")
    single = make_bags(dataset, {s: [s] for s in slide_ids}, "slide", MAGNIFICATIONS)
    two = {first: [first, second] for first, second in zip(slide_ids[::2], slide_ids[1::2], strict=True)}
    pairs = make_bags(dataset, two, "case", MAGNIFICATIONS)
    quarter = round(np.mean([bag.tiles["x20"] for bag in single]) / 4)

    def ours(
        dtype: torch.dtype | None, shards: str = "shards", bags: Sequence[BagEntry] = single, most: int | None = None
    ) -> Reader:
        config = DataConfig(max_tiles=most)
        dataset = ShardDataset.open(folder / shards)
        loader = BagLoader(dataset, bags, config, magnifications=MAGNIFICATIONS, seed=7, dtype=dtype)
        return lambda: loader.stream([[i] for i in range(len(bags))], epoch=0, training=True)

    f32, spans = torch.float32, spans_of_shards(folder / "shards", dataset, single)
    tars, small = (sorted((folder / name).glob("*.tar")) for name in ("shards", "int8"))
    return {
        "stored": (lambda: ours(None), tars),
        "f32": (lambda: ours(f32), tars),
        "int8": (lambda: ours(f32, "int8"), small),
        "stored, used": (used(lambda: ours(None)), tars),
        "f32, used": (used(lambda: ours(f32)), tars),
        "quarter, used": (used(lambda: ours(f32, most=quarter)), tars),
        "stored quarter": (lambda: ours(None, most=quarter), tars),
        "two slides": (lambda: ours(f32, bags=pairs), tars),
        "quarter of two slides": (lambda: ours(f32, bags=pairs, most=2 * quarter), tars),
        "raw": (lambda: lambda: raw_reads(spans), tars),
    }


def their_readers(folder: Path, slide_ids: Sequence[str]) -> Makers:
    """Readers of the published layout, each with the files it reads."""
    files = PtFiles(folder, slide_ids)
    published = DataLoader(files, num_workers=4, persistent_workers=True)
    plain = DataLoader(files, num_workers=4, persistent_workers=True, batch_size=None)
    bags = [[folder / f"{slide}.{name}.pt" for name in NAMES] for slide in slide_ids]
    spans = [[(path, 0, path.stat().st_size) for path in paths] for paths in bags]
    pts = [path for paths in bags for path in paths]
    return {
        "published": (lambda: lambda: published, pts),
        "plain": (lambda: lambda: plain, pts),
        "published, used": (used(lambda: lambda: published), pts),
        "raw .pt": (lambda: lambda: raw_reads(spans), pts),
    }


def measure(folder: Path, count: int, repeats: int) -> list[Row]:
    """All rows, from files made in `folder`."""
    slides = Slides(count)
    pack_store(slides, folder / "shards")
    pack_store(slides, folder / "int8", dtype="int8")
    write_pt_files(slides, folder / "pt")
    makers = our_readers(folder, slides.slide_ids()) | their_readers(folder / "pt", slides.slide_ids())
    rows = []
    for state in ("warm", "cold"):
        rate = bags_per_second(makers, cold=state == "cold", repeats=repeats)
        rows += [Row(f"{state}: {what}", rate[left], rate[right], "bags/s") for what, left, right in COMPARISONS]
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
