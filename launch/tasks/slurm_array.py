"""Tasks as a SLURM job array, through submitit."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from cfusion.child_processes import python_command, python_path
from cfusion.errors import ConfigError, MissingExtraError, RequeueError
from cfusion.files import read_json, write_json
from cfusion.interruption import graceful_stop, stop_requested
from launch.tasks.slurm_options import most_cores
from launch.tasks.slurm_states import GONE, JobState, SlurmStates, is_being_ended, states_now
from launch.tasks.task import TICK_SECONDS, Task, TaskResources, TaskResult, Tick, logged_to_output, with_threads

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=TaskResult)

_MOST_TASKS = 1000
"""Elements of one array; SLURM's MaxArraySize is 1001 unless a site sets another."""

_MOST_REQUEUES = 1000
_OWN_OPTIONS = frozenset(
    {"array", "cpus-per-task", "gpus-per-node", "job-name", "mem", "nodes", "open-mode", "output", "error", "signal",
     "time", "requeue", "no-requeue", "ntasks", "ntasks-per-node"}
)  # fmt: skip
"""Options of sbatch that follow from the tasks and their resources."""
_QUEUE = "queue.json"
_LAST_LINES = 5
_RESULT_SECONDS = 15.0
"""How long the result of an ended job is waited for."""


@dataclass(frozen=True)
class ArrayElement(Generic[R]):
    """Tasks of one element of an array.

    SLURM sends a signal shortly before the time limit; the running task saves its state, and the element is queued
    again.
    """

    tasks: tuple[Task[R], ...]
    threads: int

    def __call__(self) -> list[R]:
        """Do the tasks; each skips what an earlier attempt finished."""
        results: list[R] = []
        stopped = False
        # One block around all tasks, so that a signal between two of them is not lost.
        with graceful_stop(), logged_to_output():
            for task in self.tasks:
                stopped = stop_requested()
                if stopped:
                    break
                logger.info("begins: %s", ", ".join(task.names))
                done = with_threads(task, self.threads)
                for result in done:
                    logger.info("%s: %s", result.name, result.word)
                results += done
                stopped = any(result.stopped for result in done)
                if stopped:
                    break
        if stopped:
            if is_being_ended():
                logger.warning("SLURM ends this job; it is not queued again from here")
                logging.shutdown()
                os._exit(RequeueError.exit_code)  # without a result, which would count as the end of the tasks
            # submitit's own handler for this signal queues the element again.
            os.kill(os.getpid(), signal.SIGUSR2)
        return results

    def checkpoint(self) -> Any:
        """Return what submitit queues again: the same element, because its tasks skip what is finished."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run_slurm(
    tasks: Sequence[Task[R]],
    resources: TaskResources,
    folder: Path,
    name: str,
    tick: Tick,
    cluster: Literal["slurm", "local"] = "slurm",
) -> Iterator[R]:
    """Do the tasks as a job array and wait for it; if this process ends, the array continues.

    Tasks that an earlier call queued in `folder` and that have not ended are waited for, not queued again.

    Args:
        tasks: What to do.
        resources: Resources of each element of the array.
        folder: Folder for submitit's scripts and logs.
        name: Name of the array in SLURM's queue.
        tick: Called regularly with the tasks that have not ended.
        cluster: `local`: submitit's own processes on this machine, for tests.

    Yields:
        The results of each task when its element ends.

    Raises:
        MissingExtraError: submitit is not installed.
        RequeueError: A signal asked this process to stop (see `cfusion.interruption`).
    """
    watch = _Watch()
    waiting = queued(tasks, folder) if cluster == "slurm" else {}
    followed = {known for part in waiting.values() for task in part for known in task.names}
    left = [task for task in tasks if not followed.intersection(task.names)]
    if left:
        waiting |= submit(left, resources, folder, name, cluster)
    while waiting:
        if stop_requested():
            raise _left_to_slurm(waiting)
        ended = watch.ended(waiting) if cluster == "slurm" else {e: None for e in waiting if e.done()}
        for element, state in ended.items():
            yield from _result(element, waiting.pop(element), state)
        if not ended:
            time.sleep(TICK_SECONDS)
        tick([task for part in waiting.values() for task in part])


class _Watch:
    """Says which elements of arrays have ended."""

    def __init__(self) -> None:
        self._states = SlurmStates()
        self._since: dict[str, float] = {}

    def ended(self, elements: Iterable[Any]) -> dict[Any, JobState | None]:
        """Return the elements that have a result, and with SLURM's state those that have ended without one.

        A network file system may show a result late, so an element that ran counts as ended only after a while.
        """
        elements = list(elements)
        ended: dict[Any, JobState | None] = {element: None for element in elements if _has_result(element)}
        left = [element for element in elements if element not in ended]
        states = self._states.look([element.job_id for element in left]) if left else {}
        for element in left:
            state = states.get(element.job_id)
            if state is None or not state.ended:
                self._since.pop(element.job_id, None)
                continue
            since = self._since.setdefault(element.job_id, time.monotonic())
            if time.monotonic() - since >= (_RESULT_SECONDS if _log_of(element) else 0.0):
                ended[element] = state
        return ended


def _log_of(element: Any) -> Path | None:
    return next((path for path in (element.paths.stderr, element.paths.stdout) if path.exists()), None)


def _has_result(element: Any) -> bool:
    folder = element.paths.folder
    with contextlib.suppress(OSError):  # a change of the folder makes NFS look at the server
        folder.chmod(folder.stat().st_mode)
    return bool(element.paths.result_pickle.exists())


def _left_to_slurm(elements: Iterable[Any]) -> RequeueError:
    arrays = " ".join(sorted({element.job_id.partition("_")[0] for element in elements}))
    return RequeueError(
        f"Asked to stop: this command no longer waits; SLURM's job {arrays} continues.",
        f"The same command waits for it again and queues nothing twice; scancel {arrays} ends it.",
    )


def submit(
    tasks: Sequence[Task[R]],
    resources: TaskResources,
    folder: Path,
    name: str,
    cluster: Literal["slurm", "local"] = "slurm",
) -> dict[Any, tuple[Task[R], ...]]:
    """Queue the tasks as one array; returns submitit's jobs, one per element, with the tasks of each."""
    _check_slurm(cluster)
    import submitit

    if cluster == "slurm":
        _check_fit(resources)
    parts = _parts(tasks, resources)
    executor = _executor(resources, folder, name, len(parts), cluster)
    try:
        elements = _queue(executor, parts, resources)
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(
            f"sbatch refused the job: {_reason(str(error))}.", "Change --cpus, --gpus, --mem, --hours or --partition."
        ) from error
    array = elements[0].job_id.split("_")[0]
    logger.info("%d array tasks are queued as job %s; their logs are in %s", len(elements), array, folder)
    waiting = dict(zip(elements, parts, strict=True))
    names = {element.job_id: [known for task in part for known in task.names] for element, part in waiting.items()}
    write_json(folder / _QUEUE, {**_read_queue(folder), **names})
    return waiting


def array_script(tasks: Sequence[Task[R]], resources: TaskResources, folder: Path, name: str) -> tuple[str, int]:
    """Return the script that `submit` would hand to sbatch, and the number of elements of its array.

    Raises:
        MissingExtraError: submitit is not installed.
        ConfigError: There is no SLURM here, or an option is refused.
    """
    _check_slurm("slurm")
    _check_fit(resources)
    elements = len(_parts(tasks, resources))
    executor = _executor(resources, folder, name, elements, "slurm")._executor
    if elements > 1:  # submitit queues a single element without an array
        executor.parameters["map_count"] = elements
    return executor._make_submission_file_text(executor._submitit_command_str, "ID"), elements


def _check_slurm(cluster: str) -> None:
    if importlib.util.find_spec("submitit") is None:
        raise MissingExtraError("submitit", "slurm", "--executor slurm")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm: sbatch was not found.", "Run this command on a node that submits jobs.")


def _check_fit(resources: TaskResources) -> None:
    """Refuse more cores than any node has: many sites queue such a job, and it waits without end.

    Raises:
        ConfigError: No node of the partition has them.
    """
    most = most_cores(resources.slurm.partition)
    if most is not None and resources.cpus > most:
        where = f"partition {resources.slurm.partition}" if resources.slurm.partition else "the default partition"
        raise ConfigError(
            f"--cpus {resources.cpus}: the largest node of {where} has {most} cores.",
            f"Ask for at most --cpus {most}, or give another --partition.",
        )


def _parts(tasks: Sequence[Task[R]], resources: TaskResources) -> list[tuple[Task[R], ...]]:
    chunk = max(resources.chunk, math.ceil(len(tasks) / _MOST_TASKS))
    return [tuple(tasks[start : start + chunk]) for start in range(0, len(tasks), chunk)]


def _executor(resources: TaskResources, folder: Path, name: str, elements: int, cluster: str) -> Any:
    import submitit

    executor = submitit.AutoExecutor(
        folder=folder, cluster=cluster, slurm_max_num_timeout=_MOST_REQUEUES, slurm_python=shlex.join(python_command())
    )
    executor.update_parameters(name=name, **_slurm_parameters(resources, elements))
    if cluster == "slurm":
        executor._executor.parameters["wckey"] = None  # submitit's own is refused where a site checks them
    return executor


def _queue(executor: Any, parts: Sequence[tuple[Task[R], ...]], resources: TaskResources) -> list[Any]:
    with executor.batch():
        return [executor.submit(ArrayElement(part, resources.cpus)) for part in parts]


def _reason(text: str) -> str:
    """Return what sbatch said, of submitit's text around it."""
    found = re.search(r"sbatch: error: (?!Batch job submission failed)(.+)|submission failed: (.+)", text)
    return (found[1] or found[2] if found else text.strip().splitlines()[-1]).strip().rstrip(".")


def queued(tasks: Sequence[Task[R]], folder: Path) -> dict[Any, tuple[Task[R], ...]]:
    """Find elements that earlier calls queued and that have not ended, with those of the tasks that each does."""
    recorded = _read_queue(folder)
    if not recorded or importlib.util.find_spec("submitit") is None:
        return {}
    import submitit

    waiting: dict[Any, tuple[Task[R], ...]] = {}
    for job_id, names in recorded.items():
        part = tuple(task for task in tasks if not set(names).isdisjoint(task.names))
        element: Any = submitit.SlurmJob(folder=folder, job_id=job_id)
        if part:
            waiting[element] = part
    # Nothing has been waited for yet, so an answer without the job is enough.
    states = SlurmStates(looks_until_gone=1).look([e.job_id for e in waiting], now=True) if waiting else {}
    for element in list(waiting):
        state = states.get(element.job_id)
        if _has_result(element) or (state is not None and state.ended):
            del recorded[element.job_id], waiting[element]
    if waiting:
        logger.info("%d array tasks of an earlier call are queued or running; waiting for them", len(waiting))
    write_json(folder / _QUEUE, recorded)
    return waiting


def states_of_queued(folder: Path) -> dict[str, str]:
    """Return what SLURM says of the tasks that are queued or run, by name; nothing where it does not answer."""
    recorded = _read_queue(folder)
    states = states_now(list(recorded)) if recorded else {}
    return {
        name: f"SLURM's job {job.partition('_')[0]}: {state}"
        for job, state in states.items() if not state.ended for name in recorded.get(job, ())
    }  # fmt: skip


def _read_queue(folder: Path) -> dict[str, list[str]]:
    return read_json(folder / _QUEUE) if (folder / _QUEUE).is_file() else {}


def _slurm_parameters(resources: TaskResources, elements: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "timeout_min": math.ceil(resources.hours * 60), "cpus_per_task": resources.cpus,
        "slurm_setup": [f"export PYTHONPATH={shlex.quote(python_path())}", *resources.slurm.setup_lines()],
        "slurm_array_parallelism": resources.max_parallel or elements,
        # Since SLURM 22.05 srun does not take it from sbatch, and where a site binds tasks, each has one core.
        "slurm_srun_args": [f"--cpus-per-task={resources.cpus}"],
    }  # fmt: skip
    if resources.gpus:
        parameters["gpus_per_node"] = resources.gpus
    if resources.mem_gb is not None:
        parameters["mem_gb"] = resources.mem_gb
    directives = resources.slurm.directives({key: "" for key in _OWN_OPTIONS if key != "mem" or resources.mem_gb})
    # At the time limit a task queues itself again, also where the site does not allow it by itself (JobRequeue=0).
    parameters["slurm_additional_parameters"] = {key: value or True for key, value in directives.items()} | {
        "requeue": True
    }
    return parameters


def _error_at_the_end(log: Path) -> str:
    """Return the error that the last lines of a log report, such as of a line of the setup; empty without one."""
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    return next((line.removeprefix("error: ").rstrip(".") for line in reversed(last) if line.startswith("error: ")), "")


def _result(element: Any, tasks: tuple[Task[R], ...], state: JobState | None) -> list[R]:
    """Return the results of an element; `state`: SLURM's, if the element ended without a result."""
    import submitit

    if state is None or _has_result(element):
        try:
            return element.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            logger.warning("array task %s: %s", element.job_id, str(error).splitlines()[0])
    log = _log_of(element)
    where = f", see {log}" if log else "; it wrote no log"
    task = f"its SLURM task {element.job_id}"
    if state is not None and state.name in ("CANCELLED", GONE):
        word = "is no longer known to SLURM" if state.name == GONE else "was CANCELLED"
        cause = f"{task} {word}{where}; the same command queues it again"
        return [result for each in tasks for result in each.refused(cause)]
    how = f"ended as {state.name}" if state is not None else "was lost"
    if log and state is not None and state.name == "FAILED" and (reported := _error_at_the_end(log)):
        how += f" ({reported})"
    return [result for each in tasks for result in each.lost(f"{task} {how}{where}")]
