"""From slides to a feature store: one pool of readers, batches over slides, encoders beside them."""

from __future__ import annotations

import csv
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

import cfusion
from cfusion.config import PreprocessConfig
from cfusion.console import progress
from cfusion.data.store import FeatureStore, write_slide
from cfusion.errors import CfusionError, DataError
from cfusion.files import atomic_path, digest_json
from cfusion.types import SlideFeatures
from preprocess.encoders import Encoder, load_encoder
from preprocess.grid import GRID_VERSION
from preprocess.plan import CellTiles, SlidePlan, plan_slide
from preprocess.resolution import read_mpp_table
from preprocess.slides import find_slides, same_name
from preprocess.tissue import METHOD

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class SlideOutcome:
    """What became of one slide.

    Attributes:
        slide_id: File stem.
        status: `done`; `skipped`: it was there already; `stale`: it is there, made with another configuration;
            `failed`.
        why: The reason, where it is not `done`; else what is worth knowing.
        tiles: Tiles over all magnifications.
        seconds: From opening the slide to the written features; slides overlap.
        mpp: µm per level-0 px.
        mpp_source: Where that number comes from.
        path: The slide's file.
    """

    slide_id: str
    status: Literal["done", "skipped", "stale", "failed"]
    why: str = ""
    tiles: int = 0
    seconds: float = 0.0
    mpp: float | None = None
    mpp_source: str = ""
    path: str = ""


@dataclass(frozen=True)
class Summary:
    """What became of all slides.

    Attributes:
        outcomes: One per slide, in the order of their paths.
        seconds: Of the whole run.
        pixels: Level-0 pixels that were read.
        encoder_idle: Share of the time in which no encoder had work.
        table: The CSV file with `outcomes`.
    """

    outcomes: tuple[SlideOutcome, ...]
    seconds: float
    pixels: int
    encoder_idle: float
    table: Path

    def of(self, status: str) -> list[SlideOutcome]:
        """The slides of one status."""
        return [o for o in self.outcomes if o.status == status]


def preprocess_slides(
    config: PreprocessConfig,
    *,
    encoders: Sequence[Encoder] | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Extract the features of all slides of `config.slides` into `config.store`.

    A slide is done when its group is whole and was made with the same configuration; such slides are skipped, so the
    same call after an interruption does what is left. A slide that cannot be read is listed with the reason.

    Args:
        config: What to do.
        encoders: Loaded encoders; none: those that `config.encoders` names.
        strict: Raise at the first slide that fails.
        overwrite: Extract slides again that were made with another configuration.

    Raises:
        DataError: No slide was found, the store cannot be written, or, if `strict`, a slide failed.
        ConfigError: An encoder or the magnifications cannot be used.
    """
    start = time.monotonic()
    encoders = [load_encoder(name) for name in config.encoders] if encoders is None else list(encoders)
    paths = find_slides(config.slides)
    table = read_mpp_table(config.mpp_table) if config.mpp_table else {}
    run = _Run(config, encoders, table, strict)
    todo = run.sort_out(paths, overwrite)
    with progress("Slides", len(todo)) as bar:
        run.bar = bar.advance
        run.extract(todo)
    seconds = time.monotonic() - start
    idle = 1 - run.encode_seconds / max(1e-9, seconds * config.threads)
    outcomes = tuple(run.outcomes[p] for p in paths)
    return Summary(outcomes, seconds, run.pixels, max(0.0, idle), write_summary(config.store, outcomes))


def configuration_digest(config: PreprocessConfig, encoder: Encoder) -> str:
    """Digest of all that features depend on, but for the slide and its resolution."""
    return digest_json({
        "encoder": encoder.name, "identity": encoder.identity, "magnifications": config.magnifications,
        "resolution": config.resolution, "resample": config.resample, "min_tissue": config.min_tissue,
        "tissue": METHOD, "grid": GRID_VERSION,
    })  # fmt: skip


def write_summary(store: Path, outcomes: Sequence[SlideOutcome]) -> Path:
    """Write `summary.csv` into the store: one row per slide."""
    target = store / "summary.csv"
    with atomic_path(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(SlideOutcome)])
        writer.writeheader()
        writer.writerows({**asdict(o), "seconds": f"{o.seconds:.2f}"} for o in outcomes)
    return target


@dataclass
class _Work:
    """A slide between its plan and its written features."""

    path: Path
    plan: SlidePlan
    start: float
    features: dict[str, dict[str, np.ndarray]]
    open_rows: int
    bad_cells: dict[int, str] = field(default_factory=dict)


class _Run:
    """One pass over slides: who is done, what is being encoded, what came out."""

    def __init__(
        self, config: PreprocessConfig, encoders: Sequence[Encoder], mpp_table: dict[str, float], strict: bool
    ) -> None:
        self.config, self.encoders, self.mpp_table, self.strict = config, encoders, mpp_table, strict
        self.outcomes: dict[Path, SlideOutcome] = {}
        self._digests = {e.name: configuration_digest(config, e) for e in encoders}
        self.pixels = 0
        self.encode_seconds = 0.0
        self.bar: Callable[[], None] = lambda: None
        self._batches: dict[str, list[tuple[_Work, np.ndarray, np.ndarray]]] = {}
        self._encoding: deque[tuple[Future, list[tuple[_Work, np.ndarray, np.ndarray]], str]] = deque()
        self._writing: deque[tuple[Future, _Work]] = deque()

    def sort_out(self, paths: Sequence[Path], overwrite: bool) -> list[Path]:
        """The slides that are to be extracted; the others get their outcome."""
        todo = []
        for slide_id, files in same_name(paths).items():
            for path in files:
                names = ", ".join(str(f) for f in files)
                self._fail(path, DataError(f"{len(files)} files are named {slide_id}: {names}.", "Rename one."))
        for path in paths:
            if path in self.outcomes:
                continue
            states = {self._state(path, encoder) for encoder in self.encoders}
            if states == {"done"}:
                self.outcomes[path] = SlideOutcome(path.stem, "skipped", "it is there already", path=str(path))
            elif "stale" in states and not overwrite:
                why = "made with another configuration or file; --overwrite extracts it again"
                self.outcomes[path] = SlideOutcome(path.stem, "stale", why, path=str(path))
            else:
                todo.append(path)
        return todo

    def _state(self, path: Path, encoder: Encoder) -> Literal["done", "stale", "absent"]:
        attrs = FeatureStore(self.config.store / encoder.name).attrs_if_whole(path.stem)
        if attrs is None:
            return "absent"
        told = {"table": self.mpp_table.get(path.stem), "default": self.config.default_mpp}
        same = (
            attrs.get("config_digest") == self._digests[encoder.name]
            and attrs.get("slide_bytes") == path.stat().st_size
            and attrs.get("mpp") == told.get(str(attrs.get("mpp_source")), attrs.get("mpp"))
        )
        return "done" if same else "stale"

    def extract(self, paths: Sequence[Path]) -> None:
        """Read, encode and write the slides."""
        threads = self.config.threads
        with (
            ThreadPoolExecutor(threads, "read") as readers,
            ThreadPoolExecutor(threads, "encode") as self._encode_pool,
            ThreadPoolExecutor(1, "write") as self._write_pool,
        ):
            try:
                plans = bounded_map(readers, self._plan, paths, ahead=threads)
                cells = ((work, number) for work in self._started(plans) for number in work.plan.cells())
                for work, cell in bounded_map(readers, _read, cells, 2 * threads):
                    self._take(work, cell)
                self._flush()
            except BaseException:
                for pool in (readers, self._encode_pool, self._write_pool):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _plan(self, path: Path) -> tuple[Path, float, SlidePlan | CfusionError]:
        start = time.monotonic()
        try:
            return path, start, plan_slide(path, self.config, self.mpp_table)
        except CfusionError as error:
            return path, start, error

    def _started(self, plans: Iterable[tuple[Path, float, SlidePlan | CfusionError]]) -> Iterator[_Work]:
        for path, start, plan in plans:
            if isinstance(plan, CfusionError):
                self._fail(path, plan)
                self.bar()
                continue
            rows = {n: len(t) for n, t in plan.grid.tiles.items()}
            features = {
                e.name: {n: np.full((count, e.dim), np.nan, np.float16) for n, count in rows.items()}
                for e in self.encoders
            }
            yield _Work(path, plan, start, features, sum(rows.values()))

    def _take(self, work: _Work, cell: CellTiles) -> None:
        """Put a cell's tiles into the batches, and encode those that are full."""
        self.pixels += cell.pixels
        if cell.tiles is None:
            work.bad_cells[cell.number] = cell.error
            logger.warning("%s", cell.error)
            self._close_rows(work, sum(len(r) for r in cell.rows.values()))
            return
        for name, tiles in cell.tiles.items():
            batch = self._batches.setdefault(name, [])
            batch.append((work, cell.rows[name], tiles))
            if sum(len(rows) for _, rows, _ in batch) >= self.config.batch_size:
                self._submit(name)

    def _submit(self, name: str) -> None:
        batch = self._batches.pop(name, [])
        if not batch:
            return
        self._encoding.append((self._encode_pool.submit(self._encode, batch, name), batch, name))
        while len(self._encoding) > 2 * self.config.threads:
            self._collect()

    def _encode(self, batch: list[tuple[_Work, np.ndarray, np.ndarray]], name: str) -> tuple[list[np.ndarray], float]:
        start = time.monotonic()
        tiles = np.concatenate([t for _, _, t in batch])
        mpp = batch[0][0].plan.mpp(name)
        results = [np.asarray(e.encode(tiles, mpp)) for e in self.encoders]
        return results, time.monotonic() - start

    def _collect(self) -> None:
        """Lay the oldest batch's embeddings into their slides."""
        future, batch, name = self._encoding.popleft()
        results, seconds = future.result()
        self.encode_seconds += seconds
        for encoder, embeddings in zip(self.encoders, results, strict=True):
            expected = (sum(len(rows) for _, rows, _ in batch), encoder.dim)
            if embeddings.shape != expected:
                raise DataError(
                    f"encoder {encoder.name}: returned {embeddings.shape}, expected {expected}.",
                    "The weights do not belong to this encoder.",
                )
            with np.errstate(over="ignore"):
                halves = embeddings.astype(np.float16)
            at = 0
            for work, rows, _ in batch:
                work.features[encoder.name][name][rows] = halves[at : at + len(rows)]
                at += len(rows)
        for work, rows, _ in batch:
            self._close_rows(work, len(rows))

    def _close_rows(self, work: _Work, count: int) -> None:
        work.open_rows -= count
        if work.open_rows == 0:
            work.plan.close()
            self._writing.append((self._write_pool.submit(self._write, work), work))
            while len(self._writing) > 4:
                self._finish()

    def _flush(self) -> None:
        for name in list(self._batches):
            self._submit(name)
        while self._encoding:
            self._collect()
        while self._writing:
            self._finish()

    def _write(self, work: _Work) -> SlideOutcome:
        plan, bad = work.plan, work.bad_cells
        if len(bad) == len(plan.grid.cells):
            raise DataError(f"{work.path}: none of its {len(bad)} cells can be read: {next(iter(bad.values()))}")
        grid = plan.grid.without_cells(list(bad))
        for encoder in self.encoders:
            features = {}
            for name, array in work.features[encoder.name].items():
                keep = ~np.isin(plan.grid.cell_of(name), list(bad))
                features[name] = array[keep]
            tile_px = {n: grid.scale * grid.cell_px / grid.factor(n) for n in grid.names}
            attrs = {
                "encoder": encoder.name, **encoder.identity, "config_digest": self._digests[encoder.name],
                "dtype": "float16",
                "resample": self.config.resample, "resolution": self.config.resolution, "reader": plan.reader.name,
                "mpp": plan.slide.resolution.mpp, "mpp_source": plan.slide.resolution.source,
                "tile_px_level0": tile_px,
                "grid_version": GRID_VERSION, "tissue": METHOD, "slide_digest": plan.slide.quickhash,
                "slide_bytes": work.path.stat().st_size,

                "slide_size_px": list(plan.slide.size_px), "program_version": cfusion.__version__,
                "unreadable_cells": [[int(v) for v in plan.grid.cells[b]] for b in sorted(bad)],
            }  # fmt: skip
            parents = {n: grid.parents(n) for n in grid.names[:-1]}
            coords = {n: grid.coords(n) for n in grid.names}
            write_slide(self.config.store, SlideFeatures(work.path.stem, features, coords, parents, attrs))
        why = f"{len(bad)} of {len(plan.grid.cells)} cells cannot be read" if bad else ""
        tiles = sum(len(t) for t in grid.tiles.values())
        seconds = time.monotonic() - work.start
        mpp, source = plan.slide.resolution.mpp, plan.slide.resolution.source
        return SlideOutcome(work.path.stem, "done", why, tiles, seconds, mpp, source, str(work.path))

    def _finish(self) -> None:
        future, work = self._writing.popleft()
        try:
            self.outcomes[work.path] = future.result()
        except DataError as error:
            self._fail(work.path, error)
        self.bar()

    def _fail(self, path: Path, error: CfusionError) -> None:
        if self.strict:
            raise error
        logger.warning("slide %s failed: %s", path.stem, error)
        self.outcomes[path] = SlideOutcome(path.stem, "failed", str(error), path=str(path))


def _read(cell: tuple[_Work, int]) -> tuple[_Work, CellTiles]:
    work, number = cell
    return work, work.plan.read_cell(number)


def bounded_map(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map` over a pool, in order, with at most `ahead` results computed before they are asked for."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
