"""Time of calls on a device whose work is asynchronous, and the kernels that a call starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

BLOCKS, MOST_CALLS = 3, 20


def synchronize() -> None:
    """Wait until the GPU is idle; nothing without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_once(call: Callable[[], Any]) -> float:
    """Seconds of a single call."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def seconds_per_call(call: Callable[[], Any], budget: float) -> float:
    """Seconds of a call: the fastest of three blocks of calls, each waited for at its end, after two calls.

    Within a block the host may run ahead of the GPU, as it may in training.

    Args:
        call: What is timed.
        budget: Seconds for all blocks together; at least one call is timed, at most twenty a block.
    """
    seconds_once(call)
    once = seconds_once(call)
    calls = max(1, min(MOST_CALLS, int(budget / BLOCKS / max(once, 1e-6))))
    blocks = max(1, min(BLOCKS, int(budget / max(once * calls, 1e-6))))

    def block() -> None:
        for _ in range(calls):
            call()

    return min(seconds_once(block) for _ in range(blocks)) / calls


def kernels(call: Callable[[], Any]) -> tuple[int, float]:
    """Count the kernels that a call starts on the GPU, and the seconds that they run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        call()
        synchronize()
    found = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    return len(found), sum(event.device_time_total for event in found) / 1e6
