"""The finished runs of a sweep, handed to the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cfusion.errors import DataError
from launch.plan import PlannedRun, SweepConfig


def report_sweep(sweep: SweepConfig, runs: Sequence[PlannedRun], out: Path) -> Path:
    """Write one report over the finished runs of a sweep.

    Raises:
        DataError: None is finished.
    """
    from cfusion.crossval import is_done
    from cfusion.report.runs import report_runs

    finished = [run.config.output for run in runs if is_done(run.config.output)]
    if not finished:
        raise DataError(f"sweep {sweep.name}: none of its runs is finished.", "Run it with cfusion sweep run.")
    return report_runs(finished, out, title=sweep.name)
