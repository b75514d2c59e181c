"""Run jobs elsewhere: as a SLURM job array through submitit, or as tasks of a Ray cluster.

Both need the working folder, with its data and the sweep's output, at the same path on every node.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cfusion.errors import ConfigError, DataError, MissingExtraError
from cfusion.files import read_json, write_json
from launch.work import Job, Outcome, do, lost

logger = logging.getLogger(__name__)

Tick = Callable[[Sequence[Job]], None]

_TICK_SECONDS = 1.0
_MOST_TASKS = 1000
"""Of one array: SLURM's MaxArraySize is 1001 unless a site sets another."""

_MOST_REQUEUES = 1000
_QUEUE = "queue.json"

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
    """
    waiting = queued(jobs, folder) if cluster == "slurm" else {}
    followed = {run.name for part in waiting.values() for job in part for run in job.runs}
    left = [job for job in jobs if not any(run.name in followed for run in job.runs)]
    if left:
        waiting |= submit(left, resources, folder, cluster)
    while waiting:
        ended = [task for task in waiting if task.done()]
        for task in ended:
            yield from _result(task, waiting.pop(task))
        if not ended:
            time.sleep(_TICK_SECONDS)
        tick([job for part in waiting.values() for job in part])


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


def run_ray(jobs: Sequence[Job], resources: Resources, address: str, retries: int, tick: Tick) -> Iterator[Outcome]:
    """Do the jobs as tasks of a Ray cluster; a task whose worker dies is started again by Ray.

    Args:
        jobs: What is to be done.
        resources: `cpus` and `gpus` of each task, and how many tasks at the same time.
        address: Of the cluster: `auto`, `ray://HOST:10001`, or `local` for one on this machine while the runs last.
        retries: How often Ray starts a task again.
        tick: Called now and then with the jobs that have not ended.

    Raises:
        MissingExtraError: Ray is not installed.
        DataError: There is no such cluster.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "--executor ray")
    import ray

    with _cluster(address):
        share = jobs[0].share if jobs else 1.0
        task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus * share, max_retries=retries)(_at_place)
        todo = list(jobs)[::-1]
        waiting: dict[Any, Job] = {}
        while todo or waiting:
            while todo and len(waiting) < (resources.max_parallel or len(jobs)):
                job = todo.pop()
                waiting[task.remote(job, str(Path.cwd()), resources.cpus)] = job
            ended, _ = ray.wait(list(waiting), timeout=_TICK_SECONDS)
            for future in ended:
                yield from _ray_result(future, waiting.pop(future))
            tick(list(waiting.values()))


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {}
    if address == "local":
        options = {
            "_node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES,
        }  # fmt: skip
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdigit():
            # Ray itself asks for minutes before it says that nobody answers.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, **options)
    except OSError as error:
        remedy = "Start one with ray start --head, or give its --ray-address."
        raise DataError(f"--executor ray: there is no Ray cluster at {address}.", remedy) from error
    try:
        yield
    finally:
        ray.shutdown()


def _ray_result(future: Any, job: Job) -> list[Outcome]:
    import ray

    try:
        return ray.get(future)
    except ray.exceptions.RayError as error:
        return lost(job, f"its Ray task was lost: {str(error).strip().splitlines()[0]}")


def _at_place(job: Job, folder: str, threads: int) -> list[Outcome]:
    """Do a job in the folder that its relative paths mean."""
    if not Path(folder).is_dir():
        cause = f"{folder} is not on the node {os.uname().nodename}; the sweep's folder must be shared by all nodes"
        return [Outcome(run.name, "failed", cause) for run in job.runs]
    os.chdir(folder)
    return _with_threads(job, threads)


def _with_threads(job: Job, threads: int) -> list[Outcome]:
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return do(job)
