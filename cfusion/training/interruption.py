"""Signals that ask a run to save and leave: SIGTERM, and SIGUSR1, which SLURM sends before the time is up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_requested = threading.Event()


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _requested.is_set()


@contextlib.contextmanager
def graceful_stop() -> Iterator[None]:
    """Within the block, SIGTERM and SIGUSR1 ask for a stop after the current step instead of ending the process."""

    def ask(_signal: int, _frame: FrameType | None) -> None:
        _requested.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested.clear()
