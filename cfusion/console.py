"""Show the progress of long steps: a bar on a terminal, log lines with the remaining time elsewhere."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, TextIO

logger = logging.getLogger("cfusion")

SILENT_SECONDS = 60.0
"""A process that waits says so after this time, and again each time it has passed."""


_WITH_DIGITS = re.compile(r"\S*\d\S*")


def is_rank_zero() -> bool:
    """Return whether this process reports: rank 0, or the only one, whose RANK, if it is set, is of another job."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


class _Waiting:
    """What this process waits for at the moment, the innermost last, and a thread that reports it."""

    things: ClassVar[list[tuple[str, float]]] = []
    lock = threading.Lock()
    started = False


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Within the block the process may wait; each minute of it is reported as `waiting for WHAT`."""
    thing = (what, time.monotonic())
    with _Waiting.lock:
        _Waiting.things.append(thing)
        if not _Waiting.started:
            _Waiting.started = True
            threading.Thread(target=_report_waits, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        with _Waiting.lock:
            _Waiting.things.remove(thing)


def _report_waits() -> None:
    while True:
        time.sleep(SILENT_SECONDS / 4)
        with _Waiting.lock:
            things = list(_Waiting.things)
        report_waits(things, time.monotonic())


_last_report = [0.0]


def report_waits(things: Sequence[tuple[str, float]], now: float) -> None:
    """Log what has been waited for longest, if that is a minute or more and was not logged within the last one."""
    what, since = min(things, key=lambda thing: thing[1], default=("", now))
    if now - max(since, _last_report[0]) >= SILENT_SECONDS:
        _last_report[0] = now
        logger.warning("waiting for %s, %.0f s so far", what, now - since, extra={"each_time": True})


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
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(description, total)
        self._bar = RichProgress(
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True),
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
    rank_zero = is_rank_zero()
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


class ToTerminal(logging.StreamHandler[TextIO]):
    """Writes lines to the standard error of the moment: a progress bar replaces it, and shows them above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


class RepeatsCounted(logging.Filter):
    """Lets the first of alike warnings through and counts the rest; shows a line marked `once` only once.

    Warnings are alike if they differ only in their first argument, which names the subject, and in words with digits,
    such as names of slides, paths and numbers. Those of a sweep, and those marked `each_time`, are news each time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._once: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is shown."""
        if getattr(record, "once", False):
            known = record.getMessage() in self._once
            self._once.add(record.getMessage())
            return not known
        if record.levelno != logging.WARNING or getattr(record, "each_time", False) or record.name.startswith("launch"):
            return True
        text = record.getMessage()
        subject = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        kind = alike(text, subject if record.msg != "%s" else "")
        self._first.setdefault(kind, text)
        self._counts[kind] += 1
        return self._counts[kind] == 1

    def lines(self) -> list[str]:
        """Return a line with a count for each warning that was repeated."""
        return [
            f"{count - 1} more like: {self._first[kind]} (all with --verbose)"
            for kind, count in self._counts.items()
            if count > 1
        ]


def alike(text: str, subject: str = "") -> str:
    """Return what texts have in common that differ only in their subject and in words with digits."""
    return _WITH_DIGITS.sub("#", text.replace(subject, "#", 1) if subject else text)
