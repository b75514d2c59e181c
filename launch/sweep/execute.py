"""Do the unfinished runs of a sweep on any executor: jobs, retries, and one error at the end for what failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cfusion.addresses import refuse_written
from cfusion.cohort.splits import fold_count
from cfusion.console import Progress, progress
from cfusion.errors import CfusionError, PartialResultError, RequeueError
from cfusion.files import digest_json
from cfusion.run_folder import fold_folders, is_done
from launch.sweep.data_digests import places, remember_data
from launch.sweep.markers import JOBS
from launch.sweep.plan import PlannedRun
from launch.sweep.work import Job, Outcome
from launch.sweep.workers import run_local, slots_here
from launch.tasks.attempts import attempt_all
from launch.tasks.ray_tasks import run_ray
from launch.tasks.slurm_array import array_script, run_slurm
from launch.tasks.task import TaskResources, Tick

logger = logging.getLogger(__name__)

_SLURM_NAME = "cfusion-sweep"
_SHOWN = 5
"""Causes that the final error lists; `cfusion sweep status` shows all."""


@dataclass(frozen=True)
class Execution:
    """How a sweep is done.

    Attributes:
        executor: `local`: worker processes of this machine; `slurm`: a job array; `ray`: tasks of a Ray cluster.
        slots: Workers at the same time (local); None: `slots_per_gpu` for each GPU, or one.
        slots_per_gpu: Runs on one GPU at the same time, each with an equal share of its memory.
        retries: Further attempts at a run that was killed or failed unexpectedly; invalid input is not tried again.
        processes: Processes of each run; more than one are started by torchrun.
        group: Maximum number of runs in one job where they share one read.
        resources: Resources of a task (slurm, ray).
        address: Address of the Ray cluster.
    """

    executor: str = "local"
    slots: int | None = None
    slots_per_gpu: int = 1
    retries: int = 1
    processes: int = 1
    group: int = 8
    resources: TaskResources = field(default_factory=TaskResources)
    address: str = "auto"


def run_all(runs: Sequence[PlannedRun], execution: Execution, folder: Path) -> None:
    """Do the runs that are not done.

    Args:
        runs: Of `launch.sweep.plan.plan`.
        execution: Where and how.
        folder: Folder of the sweep; executors write to it.

    Raises:
        PartialResultError: Some runs failed, or another process trains them; each is named with its cause.
        RequeueError: A signal asked for a stop; running runs have saved their state.
    """
    from cfusion.interruption import graceful_stop

    if execution.executor == "slurm" or execution.processes > 1:
        for run in runs:
            for shards in run.config.data.shard_sets:
                refuse_written("data.shards", shards, "a file for another process")
            refuse_written("tracking.uri", run.config.tracking.uri, "a file for another process")
    missing = [run for run in runs if not is_done(run.config.output)]
    if len(missing) < len(runs):
        logger.info("%d of %d runs are done already", len(runs) - len(missing), len(runs))
    remember_data(folder, [run.data for run in runs])
    outcomes = {run.name: Outcome(run.name, "failed", run.absent) for run in missing if run.absent}
    todo = [run for run in missing if not run.absent]
    if execution.executor == "slurm":  # hours in a queue are too late to learn of a wrong table
        refused = dict(_refused(todo))
        outcomes |= {name: Outcome(name, "failed", cause) for name, cause in refused.items()}
        todo = [run for run in todo if run.name not in refused]
    with (
        progress(f"{len(todo)} runs, folds", sum(fold_count(run.config.splits) for run in todo)) as bar,
        graceful_stop(),
    ):
        outcomes |= attempt_all(todo, execution.retries, _Attempt(execution, folder, _Folds(bar)))
    _raise_if_not_done(missing, outcomes)


class _Attempt:
    """Does runs on the executor; after one ran out of memory on its share of a GPU, with one run per GPU."""

    def __init__(self, execution: Execution, folder: Path, folds: _Folds) -> None:
        self._execution, self._folder, self._folds = execution, folder, folds

    def __call__(self, runs: Sequence[PlannedRun]) -> Iterator[Outcome]:
        exclusive = False
        jobs = jobs_of(runs, self._execution)
        for outcome in _dispatch(jobs, self._execution, self._folder, self._folds.look):
            if outcome.state == "failed":
                logger.warning("%s: %s", outcome.name, outcome.cause)
            exclusive = exclusive or outcome.again == "exclusive"
            yield outcome
        self._folds.look([Job((run,)) for run in runs], at_once=True)
        if exclusive:
            self._execution = replace(self._execution, slots=None, slots_per_gpu=1)


def _raise_if_not_done(runs: Sequence[PlannedRun], outcomes: Mapping[str, Outcome]) -> None:
    left = [outcomes.get(run.name) for run in runs if not is_done(run.config.output)]
    if any(outcome is None or outcome.stopped for outcome in left):
        raise RequeueError(f"{len(left)} of {len(runs)} runs are left; the running ones have saved their state.")
    causes: dict[str, list[str]] = {}
    for outcome in left:
        if outcome is not None and outcome.state == "failed":
            causes.setdefault(outcome.cause, []).append(outcome.name)
    held = [outcome.cause for outcome in left if outcome is not None and outcome.state == "held"]
    if causes:
        reasons = [f"{_names(names)}: {cause}" for cause, names in list(causes.items())[:_SHOWN]]
        raise PartialResultError(
            f"{sum(map(len, causes.values()))} of {len(runs)} runs failed. {' '.join(map(_sentence, reasons))}",
            "cfusion sweep status lists all, with the log of each.",
        )
    if held:
        raise PartialResultError(
            f"{len(held)} of {len(runs)} runs are left to another sweep in this folder. {'; '.join(held[:_SHOWN])}",
            "cfusion sweep status shows them.",
        )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def jobs_of(runs: Sequence[PlannedRun], execution: Execution) -> list[Job]:
    """Make jobs of the runs, in order; runs with `train.folds=together` that share a read are one job."""
    from cfusion.runs.crossval import shares_a_read

    groups: dict[str, list[PlannedRun]] = {}
    jobs: list[list[PlannedRun]] = []
    for run in runs:
        if run.config.train.folds != "together" or execution.processes > 1:
            jobs.append([run])
            continue
        key = shares_a_read(run.config)
        if key not in groups or len(groups[key]) == execution.group:
            groups[key] = []
            jobs.append(groups[key])
        groups[key].append(run)
    return [Job(tuple(job), execution.processes) for job in jobs]


def audits(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Audit the data of the runs: each cohort with each encoder is read once. Yields lines."""
    from cfusion.runs.run import Run

    for run, *_ in _by_data(runs):
        yield from ([run.absent] if run.absent else Run.prepare(run.config).describe().splitlines())


def _by_data(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """Group the runs by their patients and bags."""
    groups: dict[str, list[PlannedRun]] = {}
    for run in runs:
        config = run.config
        deciding = config.deciding()
        contents = [run.data[place] for key, place in places(config).items() if key != "model.name"]
        key = digest_json([deciding["cohort"], deciding["splits"], contents, config.data.encoder,
                           config.evaluation.protocol, run.absent])  # fmt: skip
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def _refused(runs: Sequence[PlannedRun]) -> Iterator[tuple[str, str]]:
    """Check the data of the runs; yields the names of those that would be refused, with the cause."""
    from cfusion.runs.run import Run

    for group in _by_data(runs):
        try:
            Run.prepare(group[0].config)
        except CfusionError as error:
            yield from ((run.name, str(error)) for run in group)


def script_of(runs: Sequence[PlannedRun], execution: Execution, folder: Path) -> tuple[str, int]:
    """Return the script that would be handed to sbatch for the runs, and the number of elements of its array.

    Raises:
        MissingExtraError, ConfigError: As `launch.tasks.slurm_array.array_script`.
    """
    return array_script(jobs_of(runs, execution), execution.resources, folder / JOBS, _SLURM_NAME)


def folds_done(run: PlannedRun) -> int:
    """Return how many folds of a run are complete."""
    return len(fold_folders(run.config.output))


def _dispatch(jobs: Sequence[Job], execution: Execution, folder: Path, tick: Tick) -> Iterator[Outcome]:
    if not jobs:
        return iter(())
    if execution.executor == "slurm":
        return run_slurm(jobs, execution.resources, folder / JOBS, _SLURM_NAME, tick)
    if execution.executor == "ray":
        return run_ray(jobs, execution.resources, execution.address, tick)
    return run_local(jobs, slots_here(execution.slots, execution.slots_per_gpu, execution.processes), tick)


class _Folds:
    """Advances the bar by the folds that running runs have finished; the more runs, the less often it looks."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._seen: dict[str, int] = {}
        self._last = 0.0

    def look(self, jobs: Sequence[Job], at_once: bool = False) -> None:
        runs = [run for job in jobs for run in job.runs]
        if not at_once and time.monotonic() - self._last < 0.5 + 0.01 * len(runs):
            return
        for run in runs:
            done = folds_done(run)
            self._bar.advance(done - self._seen.get(run.name, 0))
            self._seen[run.name] = done
        self._last = time.monotonic()
