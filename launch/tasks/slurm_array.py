"""Jobs as a SLURM job array, through submitit."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cfusion.errors import ConfigError, MissingExtraError, RequeueError
from cfusion.files import read_json, write_json
from cfusion.interruption import stop_requested
from launch.sweep.work import Job, Outcome, lost
from launch.tasks.resources import TICK_SECONDS, Resources, Tick, with_threads

logger = logging.getLogger(__name__)

_MOST_TASKS = 1000
"""Of one array: SLURM's MaxArraySize is 1001 unless a site sets another."""

_MOST_REQUEUES = 1000
_QUEUE = "queue.json"


@dataclass(frozen=True)
class ArrayTask:
    """Jobs of one task of an array. Near its time limit SLURM signals; the run saves, and the task is queued again."""

    jobs: tuple[Job, ...]
    threads: int

    def __call__(self) -> list[Outcome]:
        """Do the jobs; what a former attempt did is passed over."""
        outcomes: list[Outcome] = []
        for job in self.jobs:
            outcomes += with_threads(job, self.threads)
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
        RequeueError: A signal asked this process to stop (see `cfusion.interruption`).
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
            time.sleep(TICK_SECONDS)
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
