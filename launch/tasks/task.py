"""Work for other machines: what a task is, what it may use, how it runs on its cores.

The executors of this package need the task's data and output at the same path on every node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cfusion.secret_text import SecretsLeftOut
from launch.tasks.slurm_options import SlurmQueueOptions

TICK_SECONDS = 1.0

Tick = Callable[[Sequence[Any]], None]
"""Called regularly while tasks are running, with those that have not ended."""


class TaskResult(Protocol):
    """The result of one named item of a task."""

    @property
    def name(self) -> str:
        """The item."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether a signal stopped it; the same task resumes it."""
        ...

    @property
    def retry(self) -> bool:
        """Whether it failed in a way that another attempt may avoid."""
        ...

    @property
    def word(self) -> str:
        """How it went, in one line."""
        ...


R = TypeVar("R", bound=TaskResult)


class Task(Protocol[R]):
    """Work that can be pickled. It can be started again after any end, and skips what is finished."""

    @property
    def names(self) -> tuple[str, ...]:
        """What it does, by names that are unique among the tasks of one folder; the record of a queue holds them."""
        ...

    def __call__(self) -> list[R]:
        """Do the work; a failure is returned as a result, not raised."""
        ...

    def lost(self, cause: str, *, stopped: bool = False) -> list[R]:
        """Return the results of a task whose process ended without any; `stopped`: it had been asked to stop."""
        ...

    def refused(self, cause: str) -> list[R]:
        """Return the results of a task that cannot start where another attempt would fail too."""
        ...


@dataclass(frozen=True)
class TaskResources:
    """What one task may use.

    Attributes:
        cpus: Cores.
        gpus: GPUs.
        mem_gb: Memory in GB; None: the cluster's default.
        hours: Time limit in SLURM; shortly before it a task saves its state and is queued again.
        slurm: What the site's SLURM asks for besides.
        max_parallel: Maximum number of tasks at the same time; None: as many as the cluster allows.
        chunk: Tasks that one element of a SLURM array does one after the other, so that short tasks do not each wait
            for a node.
    """

    cpus: int = 4
    gpus: int = 0
    mem_gb: float | None = None
    hours: float = 24.0
    slurm: SlurmQueueOptions = field(default_factory=SlurmQueueOptions)
    max_parallel: int | None = None
    chunk: int = 1


@contextlib.contextmanager
def logged_to_output() -> Iterator[None]:
    """Within the block, write the program's log to the standard output of this process, with the time of each line."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(SecretsLeftOut("%(asctime)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("cfusion", "preprocess", "launch")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.INFO)
        each.addHandler(handler)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
            each.removeHandler(handler)


def with_threads(task: Task[R], threads: int) -> list[R]:
    """Do a task on `threads` cores."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return task()


def cause_of(error: Exception) -> str:
    """Return the class of an error and its first line, as the cause of a failed task."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
