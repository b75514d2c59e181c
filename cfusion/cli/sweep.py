"""`cfusion sweep`: many runs from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

sweep = typer.Typer(help="Plan, run and follow the product of cohorts, encoders, models, seeds and protocols.")

SweepFile = Annotated[Path, typer.Argument(help="YAML file of the sweep; see configs/sweeps/.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(sweep, name="sweep")


@sweep.command()
def plan(file: SweepFile) -> None:
    """List the runs of a sweep and whether each is done."""
    from cfusion.crossval import is_done
    from launch.plan import load_sweep
    from launch.plan import plan as plan_runs

    for run in plan_runs(load_sweep(file)):
        typer.echo(f"{'done' if is_done(run.config.output) else 'open'}\t{run.name}")


@sweep.command()
def run(
    file: SweepFile,
    slots: Annotated[int, typer.Option(help="Runs at the same time.", min=1)] = 1,
    retries: Annotated[int, typer.Option(help="How often a run whose worker was killed is tried again.", min=0)] = 1,
) -> None:
    """Do what is missing of a sweep on this machine."""
    from launch.local import run_all
    from launch.plan import load_sweep
    from launch.plan import plan as plan_runs

    run_all(plan_runs(load_sweep(file)), slots=slots, retries=retries)


@sweep.command()
def report(
    file: SweepFile,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; default: report/ in the sweep's.")] = None,
) -> None:
    """Write one report over the finished runs of a sweep."""
    from cfusion.crossval import is_done
    from cfusion.errors import DataError
    from cfusion.report.runs import report_runs
    from launch.plan import load_sweep
    from launch.plan import plan as plan_runs

    settings = load_sweep(file)
    finished = [run.config.output for run in plan_runs(settings) if is_done(run.config.output)]
    if not finished:
        raise DataError(f"{file}: none of its runs is finished.", f"Run: cfusion sweep run {file}")
    page = report_runs(finished, out or settings.output / "report", title=settings.name)
    typer.echo(f"report: {page}")
