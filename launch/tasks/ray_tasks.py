"""Jobs as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cfusion.errors import ConfigError, DataError, MissingExtraError, RequeueError
from cfusion.interruption import graceful_stop, handlers_kept, handling, stop_requested
from launch.sweep.work import Job, Outcome, lost
from launch.tasks.resources import TICK_SECONDS, Resources, Tick, with_threads

_GRACE_SECONDS = 60.0
_LAST_PORT = 65535
_ADDRESSES = "Give HOST:6379, ray://HOST:10001, auto (this machine's cluster), or local (one for these runs)."

_OBJECT_STORE_BYTES = 80 << 20
"""Enough for jobs and outcomes; data are read by the workers themselves."""


def run_ray(jobs: Sequence[Job], resources: Resources, address: str, tick: Tick) -> Iterator[Outcome]:
    """Do the jobs as tasks of a Ray cluster; Ray does not start any of them again.

    Args:
        jobs: What is to be done.
        resources: `cpus` and `gpus` of each task, and how many tasks at the same time.
        address: Of the cluster: `auto`, `HOST:6379`, `ray://HOST:10001`, or `local` for one on this machine while the
            runs last.
        tick: Called now and then with the jobs that have not ended.

    Yields:
        How each run went, as it ends. After a request to stop (see `cfusion.interruption`) the runs at work
        save their state and end as `stopped`; the rest is not begun.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: `address` is none.
        DataError: There is no such cluster.
        RequeueError: A signal asked for a stop before there was a cluster.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "--executor ray")
    import ray

    with _cluster(address):
        share = jobs[0].share if jobs else 1.0
        # The caller tries again what was lost; tries of Ray's own would multiply with its.
        task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus * share, max_retries=0)(_at_place)
        todo = deque(jobs)
        waiting: dict[Any, Job] = {}
        stopping = False
        interrupted = threading.Event()  # not the exception, which Ray's own code now and then swallows
        try:
            with handling((signal.SIGINT,), lambda _number: interrupted.set()):
                while not interrupted.is_set():
                    if stop_requested() and not stopping:
                        stopping = True
                        todo.clear()
                        _cancel(waiting)
                    while todo and len(waiting) < (resources.max_parallel or len(jobs)):
                        job = todo.popleft()
                        waiting[task.remote(job, str(Path.cwd()), resources.cpus)] = job
                    if not waiting:
                        return
                    ended, _ = ray.wait(list(waiting), timeout=TICK_SECONDS)
                    for future in ended:
                        yield from _ray_result(future, waiting.pop(future), stopping)
                    tick(list(waiting.values()))
            raise KeyboardInterrupt
        finally:
            # After Ctrl-C, too, the runs at work save their state.
            if waiting:
                _cancel(waiting)
                ray.wait(list(waiting), num_returns=len(waiting), timeout=_GRACE_SECONDS)


def _cancel(futures: Iterable[Any]) -> None:
    """Tasks at work are asked to stop (see `_at_place`); those that wait are not begun."""
    import ray

    for future in futures:
        ray.cancel(future)


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _expect_answer(address)
    # Ray takes SIGTERM for itself as it starts, and leaves it to the system as it ends.
    with handlers_kept():
        try:
            _connect(address)
            yield
        finally:
            ray.shutdown()


def _connect(address: str) -> None:
    import ray

    options: dict[str, Any] = {}
    if address == "local":
        options = {
            "_node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES,
        }  # fmt: skip
    try:
        with handlers_kept():
            ray.init(address=address, log_to_driver=False, **options)
    except OSError as error:
        raise _no_cluster(address) from error
    except SystemExit as error:
        # Ray's own answer to a SIGTERM, for as long as it starts.
        raise RequeueError("Asked to stop before a run was begun.", "The same command begins.") from error


def _no_cluster(address: str) -> DataError:
    remedy = "Start one with ray start --head, or give its --ray-address."
    return DataError(f"--executor ray: there is no Ray cluster at {address}.", remedy)


def _expect_answer(address: str) -> None:
    """Refuse what is no address, and one where nobody answers; Ray itself asks for minutes before it says so."""
    name = "--ray-address"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        name, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    if address in ("auto", "local"):
        return
    there = re.fullmatch(r"(?:ray://)?([^\s/]+):(\d{1,5})", address)
    if there is None or int(there[2]) > _LAST_PORT:
        raise ConfigError(f"{name}={address} is no address of a Ray cluster.", _ADDRESSES)
    try:
        socket.create_connection((there[1], int(there[2])), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address) from error


def _ray_result(future: Any, job: Job, stopping: bool) -> list[Outcome]:
    import ray

    try:
        return ray.get(future)
    except ray.exceptions.RayError as error:
        # The text of some is empty.
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        return lost(job, f"its Ray task was lost: {told}", stopped=stopping)


def _at_place(job: Job, folder: str, threads: int) -> list[Outcome]:
    """Do a job in the folder that its relative paths mean; cancelled by Ray, it saves its state and ends."""
    if not Path(folder).is_dir():
        cause = f"{folder} is not on the node {os.uname().nodename}; the sweep's folder must be shared by all nodes"
        return [Outcome(run.name, "failed", cause) for run in job.runs]
    os.chdir(folder)
    with graceful_stop(), handling((signal.SIGINT,), lambda _number: signal.raise_signal(signal.SIGTERM)):
        return with_threads(job, threads)
