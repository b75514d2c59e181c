"""Do what is missing of a sweep, on whichever executor: jobs, retries, and one word at the end for what failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cfusion.cohort.splits import fold_count
from cfusion.console import Progress, progress
from cfusion.errors import PartialResultError, RequeueError
from cfusion.files import digest_json
from cfusion.run_folder import fold_folders, is_done
from launch.sweep.markers import LOG
from launch.sweep.plan import PlannedRun, places, remember_data
from launch.sweep.work import Job, Outcome
from launch.sweep.workers import run_local, slots_here
from launch.tasks.ray_tasks import run_ray
from launch.tasks.resources import Resources, Tick
from launch.tasks.slurm_array import run_slurm

logger = logging.getLogger(__name__)

_TOLD = 5
"""Causes that the closing word names; `cfusion sweep status` shows all."""


@dataclass(frozen=True)
class Execution:
    """How a sweep is done.

    Attributes:
        executor: `local`: worker processes of this machine; `slurm`: a job array; `ray`: tasks of a Ray cluster.
        slots: Workers at the same time (local); none: `slots_per_gpu` for each GPU, or one.
        slots_per_gpu: Runs on one GPU at the same time, each with an equal share of its memory.
        retries: How often a run is tried again that was killed or failed unexpectedly; bad input is not tried again.
        processes: Processes of each run; more than one are started by torchrun.
        group: Most runs in one job where they share one read.
        resources: Of a task (slurm, ray).
        address: Of the Ray cluster.
    """

    executor: str = "local"
    slots: int | None = None
    slots_per_gpu: int = 1
    retries: int = 1
    processes: int = 1
    group: int = 8
    resources: Resources = field(default_factory=Resources)
    address: str = "auto"


def run_all(runs: Sequence[PlannedRun], execution: Execution, folder: Path) -> None:
    """Do the runs that are not done.

    Args:
        runs: Of `launch.sweep.plan.plan`.
        execution: Where and how.
        folder: Of the sweep, for what an executor writes.

    Raises:
        PartialResultError: Some runs failed, or another process trains them; each is named with its cause.
        RequeueError: A signal asked for a stop; runs at work have saved their state.
    """
    from cfusion.interruption import graceful_stop, stop_requested

    missing = [run for run in runs if not is_done(run.config.output)]
    if len(missing) < len(runs):
        logger.info("%d of %d runs are done already", len(runs) - len(missing), len(runs))
    remember_data(folder, runs)
    outcomes = {run.name: Outcome(run.name, "failed", run.absent) for run in missing if run.absent}
    todo = [run for run in missing if not run.absent]
    with (
        progress(f"{len(todo)} runs, folds", sum(fold_count(run.config.splits) for run in todo)) as bar,
        graceful_stop(),
    ):
        folds = _Folds(bar)
        for attempt in range(execution.retries + 1):
            for outcome in _dispatch(jobs_of(todo, execution), execution, folder, folds.look):
                outcomes[outcome.name] = outcome
                if outcome.state == "failed":
                    logger.warning("%s: %s", outcome.name, outcome.cause)
            folds.look([Job((run,)) for run in todo], at_once=True)
            todo = [run for run in todo if run.name in outcomes and outcomes[run.name].again != "no"]
            if not todo or attempt == execution.retries or stop_requested():
                break
            if any(outcomes[run.name].again == "alone" for run in todo):
                execution = replace(execution, slots=None, slots_per_gpu=1)
            logger.warning("trying again: %s", ", ".join(run.name for run in todo[:_TOLD]))
    _raise_if_not_done(missing, outcomes)


def _raise_if_not_done(runs: Sequence[PlannedRun], outcomes: Mapping[str, Outcome]) -> None:
    left = [outcomes.get(run.name) for run in runs if not is_done(run.config.output)]
    if any(outcome is None or outcome.state == "stopped" for outcome in left):
        raise RequeueError(f"{len(left)} of {len(runs)} runs are left; those at work have saved their state.")
    causes: dict[str, list[str]] = {}
    for outcome in left:
        if outcome is not None and outcome.state == "failed":
            causes.setdefault(outcome.cause, []).append(outcome.name)
    held = [outcome.cause for outcome in left if outcome is not None and outcome.state == "held"]
    if causes:
        told = [f"{_names(names)}: {cause}" for cause, names in list(causes.items())[:_TOLD]]
        raise PartialResultError(
            f"{sum(map(len, causes.values()))} of {len(runs)} runs failed. {' '.join(map(_sentence, told))}",
            f"Their folders hold {LOG}; cfusion sweep status shows all.",
        )
    if held:
        raise PartialResultError(
            f"{len(held)} of {len(runs)} runs are left to another sweep in this folder. {'; '.join(held[:_TOLD])}",
            "cfusion sweep status follows them.",
        )


def _sentence(words: str) -> str:
    return words if words.endswith((".", "?")) else f"{words}."


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def jobs_of(runs: Sequence[PlannedRun], execution: Execution) -> list[Job]:
    """The runs as jobs, in their order; those with `train.folds=together` that share a read are one job."""
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
    """What the data of the runs are and what an audit drops or doubts; each cohort with each encoder is read once."""
    from cfusion.runs.run import Run

    seen = set()
    for run in runs:
        config = run.config
        deciding = config.deciding()
        contents = [run.data[place] for key, place in places(config).items() if key != "model.name"]
        key = digest_json([deciding["cohort"], deciding["splits"], contents, config.data.encoder,
                           config.evaluation.protocol, run.absent])  # fmt: skip
        if key not in seen:
            seen.add(key)
            yield from ([run.absent] if run.absent else Run.prepare(config).describe().splitlines())


def folds_done(run: PlannedRun) -> int:
    """How many folds of a run are whole."""
    return len(fold_folders(run.config.output))


def _dispatch(jobs: Sequence[Job], execution: Execution, folder: Path, tick: Tick) -> Iterator[Outcome]:
    if not jobs:
        return iter(())
    if execution.executor == "slurm":
        return run_slurm(jobs, execution.resources, folder / "jobs", tick)
    if execution.executor == "ray":
        return run_ray(jobs, execution.resources, execution.address, tick)
    return run_local(jobs, slots_here(execution.slots, execution.slots_per_gpu, execution.processes), tick)


class _Folds:
    """Moves the bar by the folds that runs at work have finished; looks seldom where the runs are many."""

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
