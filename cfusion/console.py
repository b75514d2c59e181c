"""Show the progress of long steps: a bar on a terminal, log lines with the remaining time elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("cfusion")


class Progress:
    """Counts the finished items of a long step and logs the remaining time."""

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.note = ""
        self._start = self._last_line = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more items as finished; `note` is shown after the bar."""
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if now - self._last_line >= 15 and 0 < self.done < self.total:
            self._last_line = now
            left = (now - self._start) / self.done * (self.total - self.done)
            logger.info("%s: %d of %d, about %.0f s left %s", self.description, self.done, self.total, left, self.note)


class _Bar(Progress):
    def __init__(self, description: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(description, total)
        self._bar = RichProgress(
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), transient=False,
        )  # fmt: skip
        self._task = self._bar.add_task(description, total=total, note="")
        self._bar.start()

    def advance(self, count: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=count, note=note or self.note)
        self.note = note or self.note

    def close(self) -> None:
        self._bar.stop()


@contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """Show the progress of a long step: a bar on a terminal, otherwise a log line at most every 15 s.

    Only rank 0 of a distributed run shows progress.
    """
    start = time.monotonic()
    rank_zero = os.environ.get("RANK", "0") == "0"
    if rank_zero and sys.stderr.isatty() and sys.stdout.isatty():
        bar = _Bar(description, total)
        try:
            yield bar
        finally:
            bar.close()
    else:
        counter = Progress(description, total)
        yield counter
        if rank_zero:
            logger.info("%s: %d of %d in %.1f s", description, counter.done, total, time.monotonic() - start)
