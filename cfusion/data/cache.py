"""Chooses where to cache a cohort between epochs, by its measured size."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from cfusion.machine_limits import free_memory_bytes, processes_here

logger = logging.getLogger(__name__)

Place = Literal["page", "ram", "gpu"]


def choose_cache(wanted: Place, needed: int, free_ram: int, free_gpu: int) -> tuple[Place, str]:
    """Choose where to cache bags of `needed` bytes; return it with a line that gives the reason.

    On a GPU, half of the free memory is reserved for the model; on the host, a fifth is reserved for everything
    else.

    Args:
        wanted: The configured cache.
        needed: Bytes of the bags, as stored, that are not cached yet.
        free_ram: Free bytes of host memory for this process.
        free_gpu: Free bytes of GPU memory; 0 if there is no GPU.
    """
    if wanted == "page":
        return "page", "cache page: the operating system caches what it can"
    why = ""
    if wanted == "gpu":
        if needed <= free_gpu // 2:
            return "gpu", f"cache gpu: {_gb(needed)} of bags on the GPU, {_gb(free_gpu)} are free there"
        why = f"{_gb(needed)} of bags do not fit half of {_gb(free_gpu)} free on the GPU; "
    if needed <= free_ram * 4 // 5:
        return "ram", f"cache ram: {why}{_gb(needed)} of bags in memory, {_gb(free_ram)} are free"
    return "page", f"cache page: {why}{_gb(needed)} of bags do not fit four fifths of {_gb(free_ram)} free memory"


def free_ram_bytes() -> int:
    """Return this process's share of the free host memory on its node; a sweep's other workers have theirs."""
    return free_memory_bytes() // processes_here()


def free_device_bytes(device: torch.device) -> int:
    """Return how much memory of a GPU this process may still take; 0 for a CPU.

    A process may be limited to a share of a GPU, as the runs of a sweep that share one are; what torch has reserved for
    it counts against the share.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(int(free), share - torch.cuda.memory_reserved(device)))


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
