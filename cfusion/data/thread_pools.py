"""Thread pools that work during training without a second OpenMP team.

A thread that calls a torch operation starts its own team of OpenMP threads, as many as the process may use. Two teams
on the same cores spin against each other: with two cores, a training step on 128 tiles takes twice as long. Threads of
the pools here have a team of one, or of as many as they are given.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def single_core_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Start a pool whose threads each run torch operations on one core; see `pool_of_teams`."""
    return pool_of_teams(threads, 1, name)


def pool_of_teams(threads: int, cores: int, name: str) -> ThreadPoolExecutor:
    """Start a pool whose threads each run torch operations on `cores` cores; the caller keeps its number of threads.

    Args:
        threads: Number of threads; all are started here.
        cores: Size of the OpenMP team of each.
        name: Prefix of the threads' names.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, name, initializer=_use_cores, initargs=(cores,))
    # The pool starts a thread for each task that finds none idle, so all of them have to be at work at once.
    everyone = threading.Barrier(threads)
    for started in [pool.submit(everyone.wait) for _ in range(threads)]:
        started.result()
    # The number of threads that MKL uses is the process's, and the new threads have set it.
    torch.set_num_threads(before)
    return pool


@contextlib.contextmanager
def threads_each(cores: int) -> Iterator[None]:
    """Limit torch to `cores` threads while a pool works: MKL has one thread count per process, which torch sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _use_cores(cores: int) -> None:
    # Without this call, torch would set the thread to the process's number before its first parallel operation.
    torch.get_num_threads()
    torch.set_num_threads(cores)
