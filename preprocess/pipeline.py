"""Run slides through one pool of readers and, in parallel, the encoders. Batches span slides.

Read-ahead and the encoding queue are bounded, so memory does not grow with the slides.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from cfusion.errors import CfusionError, DataError, SlideError
from preprocess.encoders import Encoder
from preprocess.slide_plan import CellTiles, SlidePlan

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Work:
    """A slide between its plan and its written features.

    Attributes:
        path: The slide's file.
        plan: What to read of it.
        start: When it was opened, by the monotonic clock.
        features: Per encoder and magnification name, f16 [N, d]; rows of cells that cannot be read stay NaN.
        unread_cells: Cells not yet read; after the last one the slide's files are closed.
        open_rows: Tiles not yet encoded.
        bad_cells: Number of each cell that cannot be read, with the reason.
    """

    path: Path
    plan: SlidePlan
    start: float
    features: dict[str, dict[str, np.ndarray]]
    unread_cells: int
    open_rows: int
    bad_cells: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Piece:
    """The tiles of one cell within a batch."""

    work: Work
    rows: np.ndarray
    tiles: np.ndarray


class Pipeline:
    """Reads and encodes slides.

    Args:
        slots: One list of encoders per device or thread that encodes in parallel; all lists are alike.
        threads: Reading threads.
        batch_size: Tiles per batch.
        plan: Makes a slide's plan; a `CfusionError` it raises goes to `on_failure`.
        on_slide: Takes each finished slide, in a separate thread; a `CfusionError` it raises goes to `on_failure`.
        on_failure: Takes the slides that fail; it may raise to stop everything.
        on_batch: Called after each batch; `tiles` and `pixels` give the progress.
    """

    def __init__(
        self,
        slots: Sequence[Sequence[Encoder]],
        threads: int,
        batch_size: int,
        plan: Callable[[Path], SlidePlan],
        on_slide: Callable[[Work], None],
        on_failure: Callable[[Path, CfusionError], None],
        on_batch: Callable[[], None],
    ) -> None:
        self.pixels = self.tiles = 0
        self.encode_seconds = 0.0
        self._all = slots[0]
        self._wanted: Sequence[int] = range(len(slots[0]))
        self._slots: queue.SimpleQueue[Sequence[Encoder]] = queue.SimpleQueue()
        for slot in slots:
            self._slots.put(slot)
        self._workers, self._threads, self._batch_size = len(slots), threads, batch_size
        self._plan, self._on_slide, self._on_failure, self._on_batch = plan, on_slide, on_failure, on_batch
        self._batches: dict[str, list[_Piece]] = {}
        self._encoding: deque[tuple[Future, list[_Piece], str]] = deque()
        self._writing: deque[tuple[Future, Path]] = deque()

    def run(self, paths: Sequence[Path], wanted: Sequence[int]) -> None:
        """Process all slides in order, with the encoders of these indices.

        Raises:
            DataError: An encoder returns invalid embeddings.
        """
        self._wanted = wanted
        with (
            ThreadPoolExecutor(self._threads, "read") as readers,
            ThreadPoolExecutor(self._workers, "encode") as self._encode_pool,
            ThreadPoolExecutor(1, "write") as self._write_pool,
        ):
            try:
                plans = bounded_map(readers, self._try_plan, paths, ahead=self._threads)
                cells = ((work, number) for work in self._started(plans) for number in work.plan.cells())
                for work, cell in bounded_map(readers, _read, cells, ahead=2 * self._threads):
                    self._take(work, cell)
                self._flush()
            except BaseException:
                for pool in (readers, self._encode_pool, self._write_pool):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise

    @property
    def _encoders(self) -> list[Encoder]:
        return [self._all[i] for i in self._wanted]

    def _try_plan(self, path: Path) -> tuple[Path, float, SlidePlan | CfusionError]:
        start = time.monotonic()
        try:
            return path, start, self._plan(path)
        except CfusionError as error:
            return path, start, error
        except MemoryError:
            raise
        except Exception as error:  # a library's error is one slide's, not the run's
            logger.debug("%s", path, exc_info=True)
            return path, start, SlideError(f"{path}: cannot be read ({error!r}).", "Check the file.")

    def _started(self, plans: Iterable[tuple[Path, float, SlidePlan | CfusionError]]) -> Iterator[Work]:
        for path, start, plan in plans:
            if isinstance(plan, CfusionError):
                self._on_failure(path, plan)
                continue
            counts = {name: len(tiles) for name, tiles in plan.grid.tiles.items()}
            features = {
                encoder.name: {n: np.full((count, encoder.dim), np.nan, np.float16) for n, count in counts.items()}
                for encoder in self._encoders
            }
            yield Work(path, plan, start, features, len(plan.grid.cells), sum(counts.values()))

    def _take(self, work: Work, cell: CellTiles) -> None:
        """Add a cell's tiles to the batches, and encode the full ones."""
        self.pixels += cell.pixels
        work.unread_cells -= 1
        if work.unread_cells == 0:
            work.plan.close()
        if cell.tiles is None:
            work.bad_cells[cell.number] = cell.error
            logger.warning("%s", cell.error)
            self._close_rows(work, sum(len(rows) for rows in cell.rows.values()))
            return
        for name, tiles in cell.tiles.items():
            batch = self._batches.setdefault(name, [])
            batch.append(_Piece(work, cell.rows[name], tiles))
            if sum(len(piece.rows) for piece in batch) >= self._batch_size:
                self._submit(name)

    def _submit(self, name: str) -> None:
        batch = self._batches.pop(name, [])
        if batch:
            self._encoding.append((self._encode_pool.submit(self._encode, batch), batch, name))
        while len(self._encoding) > 2 * self._workers:
            self._collect()

    def _encode(self, batch: list[_Piece]) -> tuple[list[np.ndarray], float]:
        tiles = np.concatenate([piece.tiles for piece in batch])
        slot = self._slots.get()
        start = time.monotonic()
        try:
            embeddings = [slot[i].encode(tiles) for i in self._wanted]
        finally:
            self._slots.put(slot)
        return embeddings, time.monotonic() - start

    def _collect(self) -> None:
        """Copy the oldest batch's embeddings into their slides."""
        future, batch, name = self._encoding.popleft()
        results, seconds = future.result()
        self.encode_seconds += seconds
        count = sum(len(piece.rows) for piece in batch)
        self.tiles += count
        for encoder, embeddings in zip(self._encoders, results, strict=True):
            if embeddings.shape != (count, encoder.dim):
                raise DataError(
                    f"encoder {encoder.name}: returned {list(embeddings.shape)}, expected {[count, encoder.dim]}.",
                    "Check that its checkpoint matches the encoder.",
                )
            with np.errstate(over="ignore"):
                halves = embeddings.astype(np.float16)
            at = 0
            for piece in batch:
                piece.work.features[encoder.name][name][piece.rows] = halves[at : at + len(piece.rows)]
                at += len(piece.rows)
        for piece in batch:
            self._close_rows(piece.work, len(piece.rows))
        self._on_batch()

    def _close_rows(self, work: Work, count: int) -> None:
        work.open_rows -= count
        if work.open_rows == 0:
            self._writing.append((self._write_pool.submit(self._on_slide, work), work.path))
        while len(self._writing) > 4:
            self._finish()

    def _finish(self) -> None:
        future, path = self._writing.popleft()
        try:
            future.result()
        except CfusionError as error:
            self._on_failure(path, error)
        except MemoryError:
            raise
        except Exception as error:  # likewise
            logger.debug("%s", path, exc_info=True)
            self._on_failure(path, SlideError(f"{path}: its features cannot be written ({error!r})."))

    def _flush(self) -> None:
        for name in list(self._batches):
            self._submit(name)
        while self._encoding:
            self._collect()
        while self._writing:
            self._finish()


def _read(cell: tuple[Work, int]) -> tuple[Work, CellTiles]:
    work, number = cell
    return work, work.plan.read_cell(number)


def bounded_map(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Run `map` over a pool, in order, with at most `ahead` results computed in advance."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
