"""What the unfinished runs of a sweep will cost: steps, hours, GPU-hours, energy and disk.

Steps are counted from the folds of each cohort, at the maximum number of epochs: early stopping makes it less. The time
of a step is that of finished runs of the same model, encoder and cohort, or of the most similar that there are.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cfusion.cohort.joint import read_cohorts
from cfusion.cohort.splits import make_splits
from cfusion.config import Config
from cfusion.data.shard_index import read_index
from cfusion.errors import CfusionError
from cfusion.extensions import names_file
from cfusion.files import digest_json, read_json
from cfusion.run_folder import SEARCH, TRIALS, histories
from launch.sweep.clean import size_of
from launch.sweep.cost import gpu_watts
from launch.sweep.data_digests import places
from launch.sweep.markers import attempts
from launch.sweep.plan import PlannedRun
from launch.sweep.status import RunStatus
from launch.sweep.workers import Slot

_SAMPLE = 50
"""Maximum number of finished runs that are measured."""
_WEIGHT_BYTES, _ROW_BYTES = 4, 400
"""Size of a weight in a model's file, and of a patient's prediction in the tables of the fold and of the run."""

_ALIKE: tuple[Callable[[PlannedRun], Any], ...] = (
    lambda run: (run.config.model, run.config.data.encoder, run.config.cohort.name),
    lambda run: (run.config.model, run.config.data.encoder),
    lambda run: run.config.model,
    lambda run: run.config.model.name,
    lambda run: None,
)
"""What runs with the same time per step have in common, the most similar first."""


@dataclass(frozen=True)
class CostEstimate:
    """Cost of the unfinished runs whose data is here.

    Attributes:
        runs: Number of runs.
        folds: Their unfinished folds.
        steps: Optimizer steps of these, at most.
        step_seconds: Mean time of a step; None: unknown.
        measured_runs: Number of finished runs that it was measured on; 0: it was given, or is unknown.
        slots: Runs at the same time.
        hours: Time until all are done in these slots; None: unknown.
        gpu_hours: GPUs × time × the share of each that a slot has, 0 without GPUs; None: unknown.
        kwh: Energy of the GPUs; None: unknown.
        kwh_from: `measured` by the finished runs, or the power `limit` of the GPUs; empty: unknown.
        disk_bytes: Size of the runs once they are done; None: unknown.
        disk_from: `measured`: like the finished runs; `counted`: weights and predictions; empty: unknown.
        uncounted: Causes why the steps of some runs could not be counted, with the number of runs.
    """

    runs: int
    folds: int
    steps: int
    step_seconds: float | None
    measured_runs: int
    slots: int
    hours: float | None
    gpu_hours: float | None
    kwh: float | None
    kwh_from: str
    disk_bytes: float | None
    disk_from: str
    uncounted: Mapping[str, int]


@dataclass(frozen=True)
class _Measured:
    """What a finished run took."""

    run: PlannedRun
    steps: float
    wall_s: float
    gpu_s: float
    joules: float | None


def estimate(
    runs: Sequence[PlannedRun], statuses: Sequence[RunStatus], slots: Sequence[Slot], step_seconds: float | None = None
) -> CostEstimate:
    """Estimate what the unfinished runs will cost.

    Args:
        runs: Of `launch.sweep.plan.plan`.
        statuses: Their states.
        slots: Where they would run at the same time.
        step_seconds: Time of an optimizer step; None: as measured.
    """
    counts = _Steps()
    pairs = list(zip(runs, statuses, strict=True))
    done = list(itertools.islice((run for run, status in pairs if status.state == "done"), _SAMPLE))
    left = [(run, status) for run, status in pairs if status.state != "done" and not run.absent]
    measured = _measure(done, counts) if step_seconds is None else []
    steps, seconds = 0, 0.0
    for run, status in left:
        count = counts.left(run, status)
        pace = _pace(run, measured) if step_seconds is None else step_seconds
        steps, seconds = steps + count, seconds + count * pace
    known = steps > 0 and not math.isnan(seconds)
    gpus = sum(len(slot.gpus.split(",")) * slot.share for slot in slots if slot.gpus) / len(slots)
    gpu_hours = seconds / 3600 * gpus if known else None
    kwh, kwh_from = _energy(measured, gpu_hours)
    disk, disk_from = _disk([run for run, _ in left], done, counts)
    return CostEstimate(
        runs=len(left), folds=sum(status.folds - status.folds_done for _, status in left), steps=steps,
        step_seconds=seconds / steps if known else None, measured_runs=len(measured), slots=len(slots),
        hours=seconds / 3600 / min(len(slots), len(left)) if known else None, gpu_hours=gpu_hours, kwh=kwh,
        kwh_from=kwh_from, disk_bytes=disk, disk_from=disk_from, uncounted=dict(counts.uncounted),
    )  # fmt: skip


@dataclass
class _Steps:
    """Counts the steps of runs; cohorts and folds are read once for all runs that share them."""

    uncounted: Counter[str] = field(default_factory=Counter)
    _folds: dict[str, tuple[list[int], list[int]] | CfusionError] = field(default_factory=dict)

    def folds(self, config: Config) -> tuple[list[int], list[int]] | CfusionError:
        """Return the training bags and the scored patients of each fold, or why they cannot be counted."""
        key = digest_json([
            [one.model_dump(mode="json") for one in config.cohort_configs], config.splits.model_dump(mode="json"),
            config.data.unit, config.evaluation.protocol, places(config),
        ])  # fmt: skip
        if key not in self._folds:
            try:
                self._folds[key] = _fold_sizes(config)
            except CfusionError as error:
                self._folds[key] = error
        return self._folds[key]

    def epoch(self, config: Config) -> float:
        """Return the steps of one epoch, mean over the folds; 0 if they cannot be counted."""
        folds = self.folds(config)
        if isinstance(folds, CfusionError):
            return 0.0
        return sum(math.ceil(bags / config.parallel.global_batch) for bags in folds[0]) / len(folds[0])

    def left(self, run: PlannedRun, status: RunStatus) -> int:
        """Return the steps of a run's unfinished folds, at most."""
        if isinstance(cause := self.folds(run.config), CfusionError):
            self.uncounted[cause.message] += 1
        trials = 1 if run.config.search is None else run.config.search.trials
        folds = status.folds - status.folds_done
        return round(self.epoch(run.config) * run.config.train.epochs * trials * folds)


def _fold_sizes(config: Config) -> tuple[list[int], list[int]]:
    cohort = read_cohorts(config)
    splits = make_splits(cohort, config.splits, config.evaluation.protocol)
    slides = cohort.slides_of(list(cohort.cases.index))
    one = config.data.unit == "case"
    bags = [sum(1 if one else len(slides[case]) for case in split.train) for split in splits]
    return bags, [len(split.test) for split in splits]


def _measure(done: Sequence[PlannedRun], counts: _Steps) -> list[_Measured]:
    found = []
    for run in done:
        ended = [attempt for attempt in attempts(run.config.output) if "wall_s" in attempt]
        steps = _epochs_done(run) * counts.epoch(run.config)
        if ended and steps:
            energies = [attempt["energy_j"] for attempt in ended]
            found.append(_Measured(
                run, steps, sum(a["wall_s"] / a.get("together", 1) for a in ended), sum(a["gpu_s"] for a in ended),
                None if None in energies else sum(energies),
            ))  # fmt: skip
    return found


def _epochs_done(run: PlannedRun) -> int:
    """Return the epochs that a finished run trained: of all folds, and of all trials where it searched."""
    if run.config.search is None:
        return sum(len(history) for history in histories(run.config.output))
    tables = (run.config.output / SEARCH).glob(f"*/{TRIALS}")
    return sum(len(trial["epochs"]) for table in tables for trial in read_json(table))


def _pace(run: PlannedRun, measured: Sequence[_Measured]) -> float:
    """Return the seconds per step of the finished runs most similar to a run; NaN without any."""
    for kind in _ALIKE:
        like = [one for one in measured if kind(one.run) == kind(run)]
        if like:
            return sum(one.wall_s for one in like) / sum(one.steps for one in like)
    return math.nan


def _energy(measured: Sequence[_Measured], gpu_hours: float | None) -> tuple[float | None, str]:
    if not gpu_hours:
        return None, ""
    known = [(one.joules, one.gpu_s) for one in measured if one.joules is not None and one.gpu_s]
    if known:
        watts = sum(joules for joules, _ in known) / sum(seconds for _, seconds in known)
        return watts * gpu_hours / 1000, "measured"
    limit = gpu_watts()
    return (None, "") if limit is None else (limit * gpu_hours / 1000, "limit")


def _disk(left: Sequence[PlannedRun], done: Sequence[PlannedRun], counts: _Steps) -> tuple[float | None, str]:
    """Return the size of runs once they are done, and where it is from; the checkpoints of unfinished folds not."""
    if done:
        return len(left) * sum(size_of(run.config.output) for run in done) / len(done), "measured"
    sizes: dict[str, float | None] = {}
    total = 0.0
    for run in left:
        folds = counts.folds(run.config)
        model = _model_bytes(run.config, sizes)
        if isinstance(folds, CfusionError) or model is None:
            return None, ""
        total += len(folds[1]) * model + sum(folds[1]) * _ROW_BYTES
    return total, "counted"


def _model_bytes(config: Config, sizes: dict[str, float | None]) -> float | None:
    """Return the size of a model's file; None for a model of the user's own, or if the shards cannot be asked."""
    from cfusion.training.fitted import build

    data, place = config.data, str(config.data.shard_sets[0])
    key = digest_json([config.model.model_dump(mode="json"), place, data.magnifications, config.evaluation.n_bins])
    if key not in sizes:
        sizes[key] = None
        if not names_file(config.model.name) and "://" not in place:
            try:
                network = build(config.model, read_index(place).dim, config.evaluation.n_bins, data.magnifications)
                sizes[key] = _WEIGHT_BYTES * sum(weight.numel() for weight in network.parameters())
            except CfusionError:
                pass  # training would say why
    return sizes[key]
