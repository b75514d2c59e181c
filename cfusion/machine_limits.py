"""Cores and memory that this process may use: affinity, limits of a container (cgroup v1 and v2), of a job and a shell.

A scheduler without cgroups only says in variables what a job may use; `ulimit -v` limits the address space.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

_JOB_CORES = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NSLOTS", "NCPUS", "LSB_DJOB_NUMPROC")
"""Variables with the cores of a task or job: SLURM, Grid Engine, PBS, LSF; the first that is set counts."""

SLOTS = "CFUSION_SLOTS"
"""Variable with the number of a sweep's workers on this machine, set for each of them: they share its memory."""

GPU_SHARE = "CFUSION_GPU_SHARE"
"""Variable with the fraction of its GPU's memory that a process may fill, set for each worker of a sweep."""

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may use, at least 1: the least of affinity, cgroup quota and the job's count."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits: list[float] = [affinity, *_quotas()]
    if (asked := _job_cores()) is not None:
        limits.append(asked)
    return max(1, math.ceil(min(limits)))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or less where a cgroup, the job or the shell limits it."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in (*_memory_limits(), *_own_limits()))])


def free_memory_bytes() -> int:
    """Memory that is free for this process: the machine's, or what a limit leaves, page cache counted free."""
    left = (max(0, limit - used) for limit, used in (*_memory_limits(), *_own_limits()))
    return min([psutil.virtual_memory().available, *left])


def processes_here() -> int:
    """Return how many processes of this run and of the other runs of its sweep share the memory of this machine."""
    counts = (os.environ.get(name, "") for name in (SLOTS, "LOCAL_WORLD_SIZE"))
    return math.prod(int(count) for count in counts if count.isdecimal() and int(count) > 0)


def gpu_share() -> float:
    """Return the fraction of its GPU's memory that this process may fill."""
    return float(os.environ.get(GPU_SHARE, "1"))


def _job_cores() -> int | None:
    """Return the cores of this job, or of this task of it, as its scheduler says; None outside a job."""
    found = (os.environ.get(name, "") for name in _JOB_CORES)
    return next((int(text) for text in found if text.isdigit() and int(text) > 0), None)


def _own_limits() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of what the scheduler and the shell allow."""
    process = psutil.Process()
    if (asked := _job_bytes()) is not None:
        with contextlib.suppress(psutil.Error):
            family = [process, *process.children(recursive=True)]
            yield asked, sum(member.memory_info().rss for member in family)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield space, process.memory_info().vms


def _job_bytes() -> int | None:
    """Return the memory of this SLURM job on this node, which SLURM counts in MiB; None without a limit."""
    names = ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")
    node, core, cores = (os.environ.get(name, "") for name in names)
    if node.isdigit():
        return int(node) << 20 or None
    return (int(core) * int(cores) << 20 or None) if core.isdigit() and cores.isdigit() else None


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
