"""Time in which a network runs on its device: on a GPU by the GPU's clock, so that uploads and waits do not count."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch


class NetworkClock:
    """Adds up the time of a network that several threads may call.

    Attributes:
        seconds: Time in which at least one call ran. Where calls of several threads overlap and are not added in the
            order of their ends, it is a little too low.

    Args:
        device: Where the network runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._on_gpu = device.type == "cuda"
        self._lock, self._until = threading.Lock(), 0.0
        self._origin = self.mark()

    def mark(self) -> Any:
        """Return the present point of this thread's work on the device."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: Any, end: Any) -> None:
        """Count the time between two marks; on a GPU the work up to `end` must be done."""
        begin, stop = self._since(start), self._since(end)
        with self._lock:
            self.seconds += max(0.0, stop - max(begin, self._until))
            self._until = max(self._until, stop)

    def _since(self, mark: Any) -> float:
        return self._origin.elapsed_time(mark) / 1e3 if self._on_gpu else mark - self._origin
