"""Tasks on a Ray cluster."""

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
from typing import Any, TypeVar

from cfusion.errors import ConfigError, DataError, MissingExtraError, RequeueError
from cfusion.interruption import graceful_stop, handlers_kept, handling, stop_requested
from launch.tasks.task import TICK_SECONDS, Task, TaskResources, TaskResult, Tick, with_threads

R = TypeVar("R", bound=TaskResult)

_GRACE_SECONDS = 60.0
_LAST_PORT = 65535
_ADDRESSES = "Give HOST:6379, ray://HOST:10001, auto (this machine's cluster), or local (one for this command)."

_OBJECT_STORE_BYTES = 80 << 20
"""Enough for tasks and results; data are read by the workers themselves."""


def run_ray(
    tasks: Sequence[Task[R]], resources: TaskResources, address: str, tick: Tick, folder: Path | None = None
) -> Iterator[R]:
    """Do the tasks on a Ray cluster; Ray does not retry any of them.

    Args:
        tasks: What to do.
        resources: `cpus` and `gpus` of each task, and `max_parallel`.
        address: Address of the cluster: `auto`, `HOST:6379`, `ray://HOST:10001`, or `local` for one on this machine
            that ends with the call.
        tick: Called regularly with the tasks that have not ended.
        folder: Working folder of the tasks, which all nodes share; None: that of this process.

    Yields:
        The results of each task when it ends. After a request to stop (see `cfusion.interruption`) running tasks save
        their state and end as `stopped`; the rest is not started.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: `address` is not an address.
        DataError: No cluster answers at `address`.
        RequeueError: A signal asked for a stop before the cluster was connected.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "--executor ray")
    import ray

    with _cluster(address):
        # The caller retries lost tasks; Ray's own retries would multiply with these.
        place = str(folder or Path.cwd())
        remote: Any = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_at_place)
        todo = deque(tasks)
        waiting: dict[Any, Task[R]] = {}
        stopping = False
        interrupted = threading.Event()  # not the exception, which Ray's code sometimes swallows
        try:
            with handling((signal.SIGINT,), lambda _number: interrupted.set()):
                while not interrupted.is_set():
                    if stop_requested() and not stopping:
                        stopping = True
                        todo.clear()
                        _cancel(waiting)
                    while todo and len(waiting) < (resources.max_parallel or len(tasks)):
                        task = todo.popleft()
                        waiting[remote.remote(task, place, resources.cpus)] = task
                    if not waiting:
                        return
                    ended, _ = ray.wait(list(waiting), timeout=TICK_SECONDS)
                    for future in ended:
                        yield from _ray_result(future, waiting.pop(future), stopping)
                    tick(list(waiting.values()))
            raise KeyboardInterrupt
        finally:
            # Running tasks save their state after Ctrl-C, too.
            if waiting:
                _cancel(waiting)
                ray.wait(list(waiting), num_returns=len(waiting), timeout=_GRACE_SECONDS)


def _cancel(futures: Iterable[Any]) -> None:
    """Ask running tasks to stop (see `_at_place`); waiting ones are not started."""
    import ray

    for future in futures:
        ray.cancel(future)


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _expect_answer(address)
    # Ray handles SIGTERM itself when it starts, and restores the system's default when it ends.
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
    except ConnectionError as error:
        raise _no_cluster(address) from error
    except OSError as error:
        raise _not_started(address, error) from error
    except SystemExit as error:
        # Ray's own response to SIGTERM while it starts.
        raise RequeueError("Asked to stop before any task had started.", "Run the same command again.") from error


def _no_cluster(address: str) -> DataError:
    remedy = "Start one with ray start --head, or give its address with --ray-address."
    return DataError(f"--executor ray: there is no Ray cluster at {address}.", remedy)


def _not_started(address: str, error: OSError) -> DataError:
    """Return the error for what kept Ray from starting, such as a path that is too long for its sockets."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    remedy = "Set RAY_TMPDIR to a short path, such as /tmp/ray." if "AF_UNIX" in text else "See the cause."
    return DataError(f"--executor ray: Ray cannot start or join {address}: {text}.", remedy)


def _expect_answer(address: str) -> None:
    """Refuse an invalid address, and one that does not answer; Ray itself waits for minutes."""
    name = "--ray-address"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        name, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    if address in ("auto", "local"):
        return
    there = re.fullmatch(r"(?:ray://)?([^\s/]+):(\d{1,5})", address)
    if there is None or int(there[2]) > _LAST_PORT:
        raise ConfigError(f"{name}={address} is not the address of a Ray cluster.", _ADDRESSES)
    try:
        socket.create_connection((there[1], int(there[2])), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address) from error


def _ray_result(future: Any, task: Task[R], stopping: bool) -> list[R]:
    import ray

    try:
        return ray.get(future)
    except ray.exceptions.RayError as error:
        # The text of some is empty.
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        return task.lost(f"its Ray task was lost: {text}", stopped=stopping)


def _at_place(task: Task[R], folder: str, threads: int) -> list[R]:
    """Do a task in its working folder; when Ray cancels it, it saves its state and ends."""
    if not Path(folder).is_dir():
        return task.refused(f"{folder} is not on the node {os.uname().nodename}; it must be shared by all nodes")
    os.chdir(folder)
    with graceful_stop(), handling((signal.SIGINT,), lambda _number: signal.raise_signal(signal.SIGTERM)):
        return with_threads(task, threads)
