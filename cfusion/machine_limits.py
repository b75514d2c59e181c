"""Cores and memory that this process may use: affinity, limits of a container (cgroup v1 and v2), and SLURM's count."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may use, at least 1: the least of affinity, cgroup quota and `SLURM_CPUS_PER_TASK`."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits: list[float] = [affinity, *_quotas()]
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if asked.isdigit():
        limits.append(int(asked))
    return max(1, math.ceil(min(limits)))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or less where a cgroup limits it."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def free_memory_bytes() -> int:
    """Memory that is free for this process: the machine's, or what a cgroup's limit leaves, page cache counted free."""
    left = (max(0, limit - used) for limit, used in _memory_limits())
    return min([psutil.virtual_memory().available, *left])


def _quotas() -> Iterator[float]:
    for folder in _folders("cpu"):
        quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # no quota is -1
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each cgroup that limits this process."""
    names = (("memory.max", "memory.current", "inactive_file"),
             ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip
    for folder in _folders("memory"):
        for limit_name, use_name, cache_name in names:
            limit, used = _text(folder / limit_name), _text(folder / use_name)
            # cgroup v1 writes a number near 2^63 where there is no limit; it is above the machine's and does no harm.
            if limit.isdigit():
                cache = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
                yield int(limit), int(used or 0) - int(cache.get(cache_name, 0))


def _folders(controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, from its own to the outermost, in both versions."""
    for line in _text(_OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # In version 1 each controller has a folder; a container may see the path of the host, which it has not.
        for root in [_CGROUPS / name for name in (controllers, controller)] if controllers else [_CGROUPS]:
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                yield folder
                if folder == root:
                    break
            if root.is_dir():
                break


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
