"""Commands for evidence: score, report, null, audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(score)
    app.command()(audit)


def score(
    predictions: Annotated[Path, typer.Option(help="CSV of out-of-fold predictions.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, summary.csv and the report.")],
    bootstrap: Annotated[int, typer.Option(help="Patient-bootstrap replicates of each interval.", min=0)] = 1000,
) -> None:
    """Score anyone's predictions: tables, intervals, nulls and a report."""
    from cfusion.report import write_report
    from cfusion.survival.predictions import read_predictions
    from cfusion.survival.score import score as compute

    page = write_report([compute(read_predictions(predictions), bootstrap=bootstrap)], out)
    typer.echo(f"Report: {page}")


def audit(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    strict: Annotated[bool, typer.Option(help="Stop with an error where anything is dropped or doubted.")] = False,
) -> None:
    """Read a cohort and its splits; say what a run would drop or doubt, and why."""
    from cfusion.audit import audit as examine
    from cfusion.cohort import read_cohort
    from cfusion.config import load_config
    from cfusion.splits import make_splits

    settings = load_config(config, overrides or [])
    cohort = read_cohort(settings.cohort)
    splits = make_splits(cohort, settings.splits, settings.evaluation.protocol)
    result = examine(cohort, splits, n_bins=settings.evaluation.n_bins, keep_zero_times=settings.cohort.keep_zero_times)
    for finding in result.findings:
        typer.echo(f"{finding.action}: {finding.subject} {finding.message} [{finding.kind}]")
    for step, patients, slides in result.flow:
        typer.echo(f"{step}: {patients} patients, {slides} slides")
    if strict or settings.evaluation.strict:
        result.raise_if_strict()
