"""Signals to save and stop: SIGTERM, and SIGUSR1 or SIGUSR2, which SLURM sends before the time limit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM sends the signal in its `--signal` option: SIGUSR1 in our scripts, SIGUSR2 in submitit's."""


class _Stop:
    """A request to stop, and whether somebody has read it."""

    requested = False
    read = False
    blocks = 0


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop."""
    _Stop.read = _Stop.read or _Stop.requested
    return _Stop.requested


@contextlib.contextmanager
def graceful_stop() -> Iterator[None]:
    """Within the block, make `SIGNALS` request a stop after the current step instead of ending the process.

    Blocks may be nested. The request ends with the outermost block, if `stop_requested` has returned it; one that
    nobody has read, because the work ended just then, stays for the next block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(_signal: int) -> None:
        _Stop.requested = True

    _Stop.blocks += 1
    try:
        with handling(SIGNALS, ask):
            yield
    finally:
        _Stop.blocks -= 1
        if _Stop.blocks == 0 and _Stop.read:
            _Stop.requested = _Stop.read = False


@contextlib.contextmanager
def handling(numbers: Iterable[signal.Signals], handler: Callable[[int], Any]) -> Iterator[None]:
    """Within the block, `handler` is called with the number of a signal that arrives; then the old handlers return.

    Only the main thread receives signals; in another thread this does nothing.
    """
    numbers = tuple(numbers)
    with handlers_kept(numbers):
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, lambda received, _frame: handler(received))
        yield


@contextlib.contextmanager
def handlers_kept(numbers: Iterable[signal.Signals] = SIGNALS) -> Iterator[None]:
    """After the block, the handlers of these signals are those from before it, whatever a library has installed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
