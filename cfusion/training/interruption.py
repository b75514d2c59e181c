"""Signals to save and stop: SIGTERM, and SIGUSR1 or SIGUSR2, which SLURM sends before the time limit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM sends the signal in its `--signal` option: SIGUSR1 in our scripts, SIGUSR2 in submitit's."""

_requested = threading.Event()


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _requested.is_set()


@contextlib.contextmanager
def graceful_stop() -> Iterator[None]:
    """Within the block, make `SIGNALS` request a stop after the current step instead of ending the process."""

    def ask(_signal: int, _frame: FrameType | None) -> None:
        _requested.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested.clear()
