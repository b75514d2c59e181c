"""Cost of an attempt at a run: time, CPU time, GPU time, and energy if the GPU measures it; what a GPU may draw."""

from __future__ import annotations

import importlib.util
import resource
import socket
import time
from typing import Any


class Meter:
    """Measures from its construction to `read`.

    Args:
        share: Fraction of its GPUs that the work uses, if several runs share them.
        runs: Number of runs trained together; each is charged an equal part.
    """

    def __init__(self, share: float, runs: int) -> None:
        self._part = 1 / runs
        self._share = share
        self._runs = runs
        self._started = time.time()
        self._clock = time.monotonic()
        self._cpu = _cpu_seconds()
        self._energy = _gpu_joules()

    def read(self) -> dict[str, Any]:
        """Return the cost of one run.

        `started` (seconds since 1970), `host`, `wall_s`, `cpu_s` (user and system, children included), `gpu_s` (GPUs ×
        wall × share), `energy_j` (of the GPUs; None if unknown), `together` (runs that shared the attempt).
        """
        wall = time.monotonic() - self._clock
        energy = _gpu_joules()
        known = energy is not None and self._energy is not None
        return {
            "started": self._started, "host": socket.gethostname(), "together": self._runs, "wall_s": wall,
            "cpu_s": (_cpu_seconds() - self._cpu) * self._part, "gpu_s": wall * _gpus() * self._share * self._part,
            "energy_j": (energy - self._energy) * self._share * self._part if known else None,  # type: ignore[operator]
        }  # fmt: skip


def _cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _gpu_joules() -> float | None:
    """Return the energy that the visible GPUs have used since their driver was loaded; None without NVML."""
    used = _nvml("nvmlDeviceGetTotalEnergyConsumption")
    return None if used is None else sum(used) / 1000


def gpu_watts() -> float | None:
    """Return the power that a visible GPU may draw, mean over them; None without GPUs or NVML."""
    limits = _nvml("nvmlDeviceGetEnforcedPowerLimit")
    return None if not limits else sum(limits) / 1000 / len(limits)


def _nvml(question: str) -> list[int] | None:
    """Ask NVML a question about each visible GPU."""
    if not _gpus() or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        handles = [
            pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(i).uuid}") for i in range(_gpus())
        ]
        return [getattr(pynvml, question)(handle) for handle in handles]
    except pynvml.NVMLError:
        return None
