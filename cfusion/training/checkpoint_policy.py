"""When checkpoints are written, which are kept and which one is resumed, for one fold and for a group."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import TypeVar

from cfusion.errors import CheckpointError, DataError
from cfusion.training.checkpoint_files import CheckpointWriting, Stored, open_checkpoint
from cfusion.training.runtime import Runtime
from cfusion.training.snapshot import OtherTrainingError

logger = logging.getLogger(__name__)

FoundT = TypeVar("FoundT")

CHECKPOINT_FORMAT = 2

INTERVAL_SECONDS = 30.0
"""Seconds between checkpoints: one is written at the first step after this time; below 0: at every step."""

SHARE = 0.05
"""Largest share of the time that may go into writing checkpoints."""


class _UnderWay:
    """A checkpoint that a thread is writing."""

    def __init__(self, path: Path, writings: Sequence[CheckpointWriting]) -> None:
        self.path, self.writings = path, writings
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.thread = pool.submit(self._write)
        pool.shutdown(wait=False)

    def _write(self) -> None:
        for writing in self.writings:
            writing.write_pieces()


def _finished_in_turn(writings: Sequence[CheckpointWriting], *, write: bool) -> str | None:
    """Finish each of `writings` after the one before it, and write it first if `write`; return the first problem."""
    problem = None
    for writing in writings:
        if problem is not None:
            writing.discard()
            continue
        if write:
            writing.write_pieces()
        problem = writing.finish()
    return problem


class CheckpointPolicy:
    """The checkpoints in a folder, shared by all processes of a training run; all of them must call each method.

    Attributes:
        folder: Folder of the checkpoints.
        runtime: The processes.
        keep: Number of newest checkpoints to keep.
        background: Whether a thread writes the files, from a copy of the state, while training continues.
    """

    def __init__(self, folder: Path, runtime: Runtime, keep: int, *, background: bool = False) -> None:
        self.folder = folder
        self.runtime = runtime
        self.keep = keep
        self.background = background
        self._saved = time.monotonic()
        self._took = 0.0
        self._under_way: _UnderWay | None = None

    def _due(self, interval: float, *, now: bool) -> bool:
        """Whether a checkpoint must be written: `now`, or because the last one is old enough."""
        since = time.monotonic() - self._saved
        return self.runtime.from_main(now or interval < 0 or since > max(interval, self._took / SHARE))

    def _write(self, path: Path, prepare: Callable[[], Sequence[CheckpointWriting]], *, now: bool) -> None:
        """Write what `prepare` returns, in its order, and remove older checkpoints if that succeeds.

        In the background this only copies the state and starts a thread; `settle` does the rest. If a checkpoint cannot
        be written, for example on a full disk, a warning is logged and training continues.

        Raises:
            CheckpointError: It must be written `now` and cannot be; older ones are unchanged.
        """
        started = time.monotonic()
        writings = prepare()
        if self.background and not now:
            for writing in writings:
                writing.copy_pieces()
            self._under_way = _UnderWay(path, writings)
        else:
            self._conclude(path, _finished_in_turn(writings, write=True), now=now)
        self._saved = time.monotonic()
        self._took = self._saved - started

    def _conclude(self, path: Path, problem: str | None, *, now: bool) -> None:
        if problem is None:
            if self.runtime.is_main:
                self._drop_older()
            return
        message = f"{path}: the checkpoint cannot be written ({problem})."
        if now:
            raise CheckpointError(message, "Free disk space there. The same command resumes from the last checkpoint.")
        if self.runtime.is_main:
            logger.warning("%s Training continues; the previous checkpoint is kept.", message)

    def settle(self, *, wait: bool = True) -> bool:
        """Put a checkpoint in place that the thread has written. Every process must call this.

        Args:
            wait: Whether to wait for the thread; rank 0's decides for all.

        Returns:
            Whether none is under way any more.
        """
        writing = self._under_way
        if writing is None:
            return True
        if not self.runtime.from_main(wait or writing.thread.done()):
            return False
        writing.thread.result()  # raises what the thread did not expect
        self._under_way = None
        self._conclude(writing.path, _finished_in_turn(writing.writings, write=False), now=False)
        return True

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Settle at the end of the block; if it raises, wait only for this process's thread and remove its files."""
        try:
            yield
            self.settle()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        if self._under_way is not None:
            wait_for([self._under_way.thread])
            for writing in self._under_way.writings:
                writing.discard()
            self._under_way = None

    def _drop_older(self) -> None:
        for old in kept_checkpoints(self.folder)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _take_up(self, checkpoints: Sequence[Path], restore: Callable[[Stored], FoundT]) -> tuple[Path, FoundT] | None:
        """Restore the first of `checkpoints` that is complete; damaged ones are skipped with a warning.

        Returns:
            Its folder and the return value of `restore`; None if there is no checkpoint.

        Raises:
            OtherTrainingError: `restore` found a checkpoint of another training run.
            CheckpointError: All are damaged.
        """
        problem = ""
        for folder in checkpoints:
            found, damage = self._try(folder, restore)
            if found is not None:
                if self.runtime.is_main:
                    logger.info("resumes from %s", folder)
                return folder, found
            problem = problem or damage
            if self.runtime.is_main and folder != checkpoints[-1]:
                logger.warning("%s Using the previous checkpoint.", damage)
        if problem:
            raise CheckpointError(problem, f"No checkpoint is complete. Delete {self.folder} to train from the start.")
        return None

    def _try(self, folder: Path, restore: Callable[[Stored], FoundT]) -> tuple[FoundT | None, str]:
        """Return what `restore` makes of a checkpoint, or its problem; the same on every process."""
        found, problem = None, ""
        try:
            with open_checkpoint(folder, turn=self.runtime.rank, turns=self.runtime.world_size) as stored:
                found = restore(stored)
        except OtherTrainingError:
            raise
        except (DataError, OSError, KeyError, RuntimeError) as error:
            problem = " ".join(str(error).split())
        problem = next((damage for damage in self.runtime.gather([problem]) if damage), "")
        return (None if problem else found), problem

    def _check_format(self, stored: Stored) -> None:
        if stored.numbers.get("format") != CHECKPOINT_FORMAT:
            raise OtherTrainingError(
                f"{stored.folder}: has format {stored.numbers.get('format')}; this program reads {CHECKPOINT_FORMAT}.",
                f"Delete {self.folder} to train from the start.",
            )


def kept_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run's folder, newest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)
