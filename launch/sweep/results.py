"""The runs of a sweep for the report: the cell of each, how it ended, what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cfusion.report.comparison.cells import ComparedRun, Cost, compare_runs
from cfusion.report.comparison.comparison_files import write_comparison
from cfusion.report.comparison.published_results import PublishedTable
from cfusion.report.search_section import fold_choices
from launch.sweep.markers import attempts
from launch.sweep.peer_runs import imported
from launch.sweep.plan import PlannedRun, SweepConfig
from launch.sweep.status import RunStatus, look


def report_sweep(
    sweep: SweepConfig, runs: Sequence[PlannedRun], out: Path, published: PublishedTable | None = None
) -> Path:
    """Compare the finished runs of a sweep and write the report to `out`; returns the path of the page.

    Raises:
        DataError: None of the runs is finished, or none of the published results belongs to a cell.
    """
    found = compare_runs(compared(sweep, runs), bootstrap_of(runs))
    return write_comparison(found, out, title=sweep.name, published=published)


def compared(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[ComparedRun]:
    """Return the members of a sweep's comparison: its runs, and what was imported for their cohorts."""
    cohorts = {run.config.cohort.name for run in runs}
    return [*members_of(runs, look(runs)), *(peer for peer in imported(sweep.output) if peer.cohort in cohorts)]


def bootstrap_of(runs: Sequence[PlannedRun]) -> int:
    """Return the replicates of a sweep's intervals and tests."""
    return max(run.config.evaluation.bootstrap for run in runs)


def members_of(runs: Sequence[PlannedRun], statuses: Sequence[RunStatus]) -> list[ComparedRun]:
    """Return the runs with the cell of each.

    Cohort, encoder, protocol, seed, fold and permuted outcomes come from the configuration. Runs that differ in
    anything else are different models. A model's name is its value on the axis `model`, or its own name, followed by
    the values of all axes that differ between runs which are alike in everything above.
    """
    varied = _varied(runs)
    return [
        ComparedRun(
            name=run.name,
            folder=run.config.output,
            cohort=run.config.cohort.name,
            encoder=_encoder(run),
            model=", ".join([_model(run), *(run.values[axis] for axis in varied)]),
            protocol=run.config.evaluation.protocol,
            seed=run.config.seed,
            permuted=run.config.evaluation.permute_outcomes,
            state=status.state,
            word=status.word,
            cost=_cost(run.config.output),
            endpoint=run.config.cohort.endpoint,
            search=fold_choices(run.config.output, run.config.seed) if status.state == "done" else (),
        )
        for run, status in zip(runs, statuses, strict=True)
    ]


def _model(run: PlannedRun) -> str:
    return run.values.get("model", run.config.model.name)


def _encoder(run: PlannedRun) -> str:
    return run.values.get("encoder") or run.config.data.encoder or "any encoder"


def _varied(runs: Sequence[PlannedRun]) -> list[str]:
    """Return the axes, except the model's, whose values differ between runs of one cell."""
    alike: dict[tuple, list[PlannedRun]] = {}
    for run in runs:
        config = run.config
        key = (
            config.cohort.name, _encoder(run), _model(run), config.evaluation.protocol, config.seed,
            config.splits.fold, config.evaluation.permute_outcomes,
        )  # fmt: skip
        alike.setdefault(key, []).append(run)
    axes = [axis for axis in (runs[0].values if runs else ()) if axis not in ("model", "encoder")]
    return [axis for axis in axes if any(len({run.values[axis] for run in group}) > 1 for group in alike.values())]


def _cost(folder: Path) -> Cost:
    measured = [attempt for attempt in attempts(folder) if "wall_s" in attempt]
    energies = [attempt["energy_j"] for attempt in measured]
    return Cost(
        sum(attempt["cpu_s"] for attempt in measured) / 3600,
        sum(attempt["gpu_s"] for attempt in measured) / 3600,
        float("nan") if not energies or None in energies else sum(energies) / 3.6e6,
    )
