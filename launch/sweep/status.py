"""How far a sweep is: the state of every run, what failed and why, and how long the rest will take."""

from __future__ import annotations

import itertools
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cfusion.cohort.splits import fold_count
from cfusion.program import code_digest
from cfusion.run_folder import DONE, LOCK, is_done, is_fold_name, read_marker, trainer
from launch.sweep.markers import FAILED, JOBS, LOG, attempts, read_failure
from launch.sweep.plan import PlannedRun, SweepConfig
from launch.tasks.slurm_array import states_of_queued

State = Literal["done", "running", "failed", "open"]
STATES: tuple[State, ...] = ("done", "running", "failed", "open")

_SAMPLE = 200
"""Maximum number of finished runs for an estimate."""


@dataclass(frozen=True)
class RunStatus:
    """One run of a sweep.

    Attributes:
        name: The run.
        values: Its value on each axis.
        state: `running`: a process holds it; `failed`: it ended before it was done, and no process is trying again.
        folder: Its folder.
        folds_done: Number of complete folds.
        folds: Number of folds.
        word: The cause of a failure, who trains it, what is missing of its data, or what SLURM says of it.
        log: Path of its log if it failed.
    """

    name: str
    values: Mapping[str, str]
    state: State
    folder: Path
    folds_done: int
    folds: int
    word: str = ""
    log: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "name": self.name, "values": dict(self.values), "state": self.state, "folder": str(self.folder),
            "folds_done": self.folds_done, "folds": self.folds, "word": self.word,
            "log": str(self.log) if self.log else None,
        }  # fmt: skip


def look(runs: Sequence[PlannedRun]) -> list[RunStatus]:
    """Return the state of every run, from the files in its folder."""
    present = set(_names(runs[0].config.output.parent)) if runs else set()
    return [_status(run, _names(run.config.output) if run.name in present else []) for run in runs]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - lists ten thousand folders and needs only their names
    except OSError:
        return []


def _status(run: PlannedRun, files: Sequence[str]) -> RunStatus:
    folder, folds = run.config.output, fold_count(run.config.splits)
    done = sum(1 for name in files if is_fold_name(name))

    def status(state: State, word: str = "", log: Path | None = None) -> RunStatus:
        return RunStatus(run.name, run.values, state, folder, done, folds, word, log)

    if DONE in files:
        return status("done")
    left, held = trainer(folder) if LOCK in files else (None, False)
    if held:
        return status("running", str(left))
    failure = read_failure(folder) if FAILED in files else None
    if failure is not None:
        return status("failed", f"{failure['cause']} (attempt {max(1, failure['attempts'])})", folder / failure["log"])
    if left is not None:
        return status("failed", f"{left} ended without a report: killed, possibly out of memory", folder / LOG)
    return status("open", run.absent)


def look_in_queue(runs: Sequence[PlannedRun], folder: Path) -> list[RunStatus]:
    """As `look`; open runs say what they wait for if the sweep in `folder` has queued them in SLURM."""
    statuses = look(runs)
    if all(status.state != "open" for status in statuses):
        return statuses
    waiting = states_of_queued(folder / JOBS)
    return [
        replace(status, word=waiting[status.name]) if status.state == "open" and status.name in waiting else status
        for status in statuses
    ]


def stale(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[str]:
    """Return the folders of stale runs: their configuration, data or code has changed.

    Args:
        sweep: The sweep.
        runs: All its runs.
    """
    planned = {run.name for run in runs}
    folder = sweep.output / "runs"
    # There may be other folders next to the runs, such as the artifacts of tracking.
    return sorted(name for name in _names(folder) if name not in planned and (folder / name / LOCK).is_file())


def codes_of(sweep: SweepConfig, names: Sequence[str]) -> dict[str, int]:
    """Count the named runs that other code than this program's has finished, by its digest."""
    folders = [sweep.output / "runs" / name for name in names]
    done = [read_marker(folder)["provenance"] for folder in folders if is_done(folder)]
    found = Counter(provenance.get("code") for provenance in done)
    return {code: number for code, number in found.items() if code not in (None, code_digest())}


def counts(statuses: Sequence[RunStatus]) -> dict[str, int]:
    """Count the runs in each state."""
    found = Counter(status.state for status in statuses)
    return {state: found[state] for state in STATES}


def spent(statuses: Sequence[RunStatus]) -> dict[str, float]:
    """Return what all attempts at the runs have cost: `attempts`, `wall_s`, `cpu_s`, `gpu_s`, `energy_j`.

    An attempt that was killed has no cost; the wall time of runs that are trained together is divided among them.
    """
    total = dict.fromkeys(("attempts", "wall_s", "cpu_s", "gpu_s", "energy_j"), 0.0)
    for status in statuses:
        for attempt in attempts(status.folder):
            total["attempts"] += 1
            total["wall_s"] += attempt.get("wall_s", 0.0) / attempt.get("together", 1)
            for key in ("cpu_s", "gpu_s", "energy_j"):
                total[key] += attempt.get(key) or 0.0
    return total


def seconds_left(statuses: Sequence[RunStatus]) -> float | None:
    """Estimate the time for the remaining folds at the pace of finished runs; None before one is finished."""
    finished = itertools.islice((status for status in statuses if status.state == "done"), _SAMPLE)
    paces = []
    for status in finished:
        walls = [a["wall_s"] / a["together"] for a in attempts(status.folder) if "wall_s" in a]
        if walls:
            paces.append(sum(walls) / status.folds)
    if not paces:
        return None
    left = sum(status.folds - status.folds_done for status in statuses if status.state in ("running", "open"))
    at_work = sum(1 for status in statuses if status.state == "running")
    return left * statistics.fmean(paces) / max(1, at_work)


def grid(
    statuses: Sequence[RunStatus], axes: Sequence[str]
) -> tuple[str, str | None, dict[tuple[str, str], list[RunStatus]]]:
    """Group the runs by two axes, cohort and encoder if there are such: row axis, column axis, runs of each cell."""
    rows = "cohort" if "cohort" in axes else axes[0] if axes else ""
    rest = [axis for axis in axes if axis != rows]
    columns = "encoder" if "encoder" in rest else rest[0] if rest else None
    cells: dict[tuple[str, str], list[RunStatus]] = {}
    for status in statuses:
        key = (status.values.get(rows, "all"), status.values[columns] if columns else "runs")
        cells.setdefault(key, []).append(status)
    return rows, columns, cells
