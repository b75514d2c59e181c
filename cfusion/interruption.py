"""Signals to save and stop: SIGTERM, and SIGUSR1 or SIGUSR2, which SLURM sends before the time limit."""

from __future__ import annotations

import contextlib
import ctypes
import os
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


PARENT = "CFUSION_PARENT"
"""Variable with the number of the process whose end asks this one to stop; see `naming_parent`."""
_SIGNAL_AT_PARENTS_END = 1  # PR_SET_PDEATHSIG of prctl


def naming_parent() -> dict[str, str]:
    """Return the variable that makes a child process (see `stop_with_parent`) stop when this process ends."""
    return {PARENT: str(os.getpid())}


def stop_with_parent(parent: int | None = None) -> None:
    """Have the system send SIGTERM to this process when its parent ends, even by kill -9.

    Args:
        parent: Number of the parent; None: of `naming_parent`, and without that variable this does nothing.
    """
    named = os.environ.pop(PARENT, None)
    if parent is None:
        if named is None:
            return
        parent = int(named)
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_SIGNAL_AT_PARENTS_END, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


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
