"""When checkpoints are written, which are kept and which one is resumed, for one fold and for a group."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cfusion.errors import CheckpointError, DataError
from cfusion.training.checkpoint_files import Stored, open_checkpoint
from cfusion.training.runtime import Runtime
from cfusion.training.snapshot import OtherTrainingError

logger = logging.getLogger(__name__)

FoundT = TypeVar("FoundT")

CHECKPOINT_FORMAT = 2

INTERVAL_SECONDS = 30.0
"""Seconds between checkpoints: one is written at the first step after this time; below 0: at every step."""

SHARE = 0.05
"""Largest share of the time that may go into writing checkpoints."""


class CheckpointPolicy:
    """The checkpoints in a folder, shared by all processes of a training run; all of them must call each method.

    Attributes:
        folder: Folder of the checkpoints.
        runtime: The processes.
        keep: Number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, runtime: Runtime, keep: int) -> None:
        self.folder = folder
        self.runtime = runtime
        self.keep = keep
        self._saved = time.monotonic()
        self._took = 0.0

    def _due(self, interval: float, *, now: bool) -> bool:
        """Whether a checkpoint must be written: `now`, or because the last one is old enough."""
        since = time.monotonic() - self._saved
        return self.runtime.from_main(now or interval < 0 or since > max(interval, self._took / SHARE))

    def _write(self, path: Path, write: Callable[[], str | None], *, now: bool) -> bool:
        """Call `write`, which returns a problem or None, and remove older checkpoints if it succeeds.

        If the checkpoint cannot be written, for example on a full disk, a warning is logged and training continues.

        Returns:
            Whether it was written.

        Raises:
            CheckpointError: It must be written `now` and cannot be; older ones are unchanged.
        """
        started = time.monotonic()
        problem = write()
        self._saved = time.monotonic()
        self._took = self._saved - started
        if problem is None:
            if self.runtime.is_main:
                self._drop_older()
            return True
        message = f"{path}: the checkpoint cannot be written ({problem})."
        if now:
            raise CheckpointError(message, "Free disk space there. The same command resumes from the last checkpoint.")
        if self.runtime.is_main:
            logger.warning("%s Training continues; the previous checkpoint is kept.", message)
        return False

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
