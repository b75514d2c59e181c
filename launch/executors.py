"""Run jobs elsewhere: as a SLURM job array through submitit, or as tasks of a Ray cluster.

Both need the working folder, with its data and the sweep's output, at the same path on every node.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cfusion.errors import ConfigError, DataError, MissingExtraError, RequeueError
from cfusion.files import read_json, write_json
from cfusion.training.interruption import SIGNALS, graceful_stop, stop_requested
from launch.work import Job, Outcome, do, lost

logger = logging.getLogger(__name__)

Tick = Callable[[Sequence[Job]], None]

_TICK_SECONDS = 1.0
_GRACE_SECONDS = 60.0
_MOST_TASKS = 1000
"""Of one array: SLURM's MaxArraySize is 1001 unless a site sets another."""

_MOST_REQUEUES = 1000
_QUEUE = "queue.json"

_LAST_PORT = 65535
_ADDRESSES = "Give HOST:6379, ray://HOST:10001, auto (this machine's cluster), or local (one for these runs)."

_OBJECT_STORE_BYTES = 80 << 20
"""Enough for jobs and outcomes; data are read by the workers themselves."""


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


@dataclass(frozen=True)
class ArrayTask:
    """Jobs of one task of an array. Near its time limit SLURM signals; the run saves, and the task is queued again."""

    jobs: tuple[Job, ...]
    threads: int

    def __call__(self) -> list[Outcome]:
        """Do the jobs; what a former attempt did is passed over."""
        outcomes: list[Outcome] = []
        for job in self.jobs:
            outcomes += _with_threads(job, self.threads)
            if any(outcome.state == "stopped" for outcome in outcomes):
                # submitit's own handler for this signal queues the task again.
                os.kill(os.getpid(), signal.SIGUSR2)
                break
        return outcomes

    def checkpoint(self) -> Any:
        """What submitit queues again: the same task, since its runs know what they have done."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run_slurm(
    jobs: Sequence[Job], resources: Resources, folder: Path, tick: Tick, cluster: Literal["slurm", "local"] = "slurm"
) -> Iterator[Outcome]:
    """Do the jobs as a job array, and wait; should this process end, the array goes on without it.

    Tasks that an earlier call has queued in `folder` and that have not ended are waited for, not queued again.

    Args:
        jobs: What is to be done.
        resources: Of each task.
        folder: For submitit's scripts and logs.
        tick: Called now and then with the jobs of tasks that have not ended.
        cluster: `local`: submitit's own processes on this machine, for tests.

    Raises:
        MissingExtraError: submitit is not installed.
        RequeueError: A signal asked this process to stop (see `cfusion.training.interruption`).
    """
    waiting = queued(jobs, folder) if cluster == "slurm" else {}
    followed = {run.name for part in waiting.values() for job in part for run in job.runs}
    left = [job for job in jobs if not any(run.name in followed for run in job.runs)]
    if left:
        waiting |= submit(left, resources, folder, cluster)
    while waiting:
        if stop_requested():
            raise _left_to_slurm(waiting)
        ended = [task for task in waiting if task.done()]
        for task in ended:
            yield from _result(task, waiting.pop(task))
        if not ended:
            time.sleep(_TICK_SECONDS)
        tick([job for part in waiting.values() for job in part])


def _left_to_slurm(tasks: Iterable[Any]) -> RequeueError:
    arrays = " ".join(sorted({task.job_id.partition("_")[0] for task in tasks}))
    return RequeueError(
        f"Asked to stop, this command waits no longer; SLURM's job {arrays} goes on without it.",
        f"The same command waits for it again, and queues nothing twice; scancel {arrays} ends it.",
    )


def submit(
    jobs: Sequence[Job], resources: Resources, folder: Path, cluster: Literal["slurm", "local"] = "slurm"
) -> dict[Any, tuple[Job, ...]]:
    """Queue the jobs as one array; returns submitit's tasks with the jobs of each."""
    if importlib.util.find_spec("submitit") is None:
        raise MissingExtraError("submitit", "slurm", "--executor slurm")
    import submitit

    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm: there is no sbatch here.", "Run it where jobs are submitted.")
    chunk = max(resources.chunk, math.ceil(len(jobs) / _MOST_TASKS))
    parts = [tuple(jobs[start : start + chunk]) for start in range(0, len(jobs), chunk)]
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=_MOST_REQUEUES)
    executor.update_parameters(name="cfusion-sweep", **_slurm_parameters(resources, len(parts)))
    with executor.batch():
        tasks = [executor.submit(ArrayTask(part, resources.cpus)) for part in parts]
    logger.info("%d tasks are queued as %s; their logs are in %s", len(tasks), tasks[0].job_id.split("_")[0], folder)
    waiting = dict(zip(tasks, parts, strict=True))
    names = {task.job_id: [run.name for job in part for run in job.runs] for task, part in waiting.items()}
    write_json(folder / _QUEUE, {**_read_queue(folder), **names})
    return waiting


def queued(jobs: Sequence[Job], folder: Path) -> dict[Any, tuple[Job, ...]]:
    """SLURM's tasks of earlier calls that have not ended, with those of the jobs that each does."""
    recorded = _read_queue(folder)
    if not recorded or importlib.util.find_spec("submitit") is None:
        return {}
    import submitit

    waiting: dict[Any, tuple[Job, ...]] = {}
    for job_id, names in list(recorded.items()):
        part = tuple(job for job in jobs if any(run.name in names for run in job.runs))
        task: Any = submitit.SlurmJob(folder=folder, job_id=job_id)
        if part and task.done(force_check=True):
            del recorded[job_id]
        elif part:
            waiting[task] = part
    if waiting:
        logger.info("%d tasks of an earlier call are queued or at work; waiting for them", len(waiting))
    write_json(folder / _QUEUE, recorded)
    return waiting


def _read_queue(folder: Path) -> dict[str, list[str]]:
    return read_json(folder / _QUEUE) if (folder / _QUEUE).is_file() else {}


def _slurm_parameters(resources: Resources, tasks: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "timeout_min": math.ceil(resources.hours * 60), "cpus_per_task": resources.cpus,
        "slurm_array_parallelism": resources.max_parallel or tasks,
    }  # fmt: skip
    if resources.gpus:
        parameters["gpus_per_node"] = resources.gpus
    if resources.mem_gb is not None:
        parameters["mem_gb"] = resources.mem_gb
    if resources.partition:
        parameters["slurm_partition"] = resources.partition
    return parameters


def _result(task: Any, jobs: tuple[Job, ...]) -> list[Outcome]:
    import submitit

    try:
        return task.result()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        logger.warning("task %s: %s", task.job_id, str(error).splitlines()[0])
        return [
            outcome
            for job in jobs
            for outcome in lost(job, f"its task {task.job_id} was lost, see {task.paths.stderr}")
        ]


def run_ray(jobs: Sequence[Job], resources: Resources, address: str, tick: Tick) -> Iterator[Outcome]:
    """Do the jobs as tasks of a Ray cluster; Ray does not start any of them again.

    Args:
        jobs: What is to be done.
        resources: `cpus` and `gpus` of each task, and how many tasks at the same time.
        address: Of the cluster: `auto`, `HOST:6379`, `ray://HOST:10001`, or `local` for one on this machine while the
            runs last.
        tick: Called now and then with the jobs that have not ended.

    Yields:
        How each run went, as it ends. After a request to stop (see `cfusion.training.interruption`) the runs at work
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
        try:
            while True:
                if stop_requested() and not stopping:
                    stopping = True
                    todo.clear()
                    _cancel(waiting)
                while todo and len(waiting) < (resources.max_parallel or len(jobs)):
                    job = todo.popleft()
                    waiting[task.remote(job, str(Path.cwd()), resources.cpus)] = job
                if not waiting:
                    return
                ended, _ = ray.wait(list(waiting), timeout=_TICK_SECONDS)
                for future in ended:
                    yield from _ray_result(future, waiting.pop(future), stopping)
                tick(list(waiting.values()))
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
    with _signals_kept():
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
        with _signals_kept():
            ray.init(address=address, log_to_driver=False, **options)
    except OSError as error:
        raise _no_cluster(address) from error
    except SystemExit as error:
        # Ray's own answer to a SIGTERM, for as long as it starts.
        raise RequeueError("Asked to stop before a run was begun.", "The same command begins.") from error


def _no_cluster(address: str) -> DataError:
    remedy = "Start one with ray start --head, or give its --ray-address."
    return DataError(f"--executor ray: there is no Ray cluster at {address}.", remedy)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself as it starts, and leaves it to the system as it ends; here it asks for a stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
    with graceful_stop(), _interrupt_asks_to_stop():
        return _with_threads(job, threads)


@contextlib.contextmanager
def _interrupt_asks_to_stop() -> Iterator[None]:
    """Within the block SIGINT, by which Ray cancels a task on whichever node, is taken for the request to stop."""
    before = signal.signal(signal.SIGINT, lambda _number, _frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _with_threads(job: Job, threads: int) -> list[Outcome]:
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return do(job)
