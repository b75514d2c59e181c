"""What the executors of other machines share: what a task may use, and how it does a job.

They need the working folder, with its data and the sweep's output, at the same path on every node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.sweep.work import Job, Outcome, do

Tick = Callable[[Sequence[Job]], None]
"""Called now and then, while jobs are at work, with those that have not ended."""

TICK_SECONDS = 1.0


@dataclass(frozen=True)
class Resources:
    """What one task may use.

    Attributes:
        cpus: Cores.
        gpus: GPUs.
        mem_gb: Memory in GB; none: the cluster's default.
        hours: Time limit; a task that comes near it saves its state and is queued again.
        partition: SLURM partition; empty: the cluster's default.
        max_parallel: Tasks of an array at the same time; none: as many as the cluster gives.
        chunk: Jobs that one task does one after the other, so that small runs do not wait for a node each.
    """

    cpus: int = 4
    gpus: int = 0
    mem_gb: float | None = None
    hours: float = 24.0
    partition: str = ""
    max_parallel: int | None = None
    chunk: int = 1


def with_threads(job: Job, threads: int) -> list[Outcome]:
    """Do a job on so many cores."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return do(job)
