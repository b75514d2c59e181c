"""`cfusion train`: cross-validate one configuration."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

import typer

from cfusion.cli.completion import SettingsCommand, settings


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(cls=SettingsCommand)(train)


def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration; see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as train.epochs=20", autocompletion=settings)
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete configuration, and stop.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and audit the data, and stop.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if the audit drops anything or finds anything suspicious.")
    ] = False,
    same_code: Annotated[
        str | None,
        typer.Option(help="Resume a run of other code that you know gives the same numbers.", metavar="DIGEST"),
    ] = None,
) -> None:
    """Train and score every fold of a configuration; safe to re-run: finished folds are skipped.

    The same command runs in one process, under torchrun and under accelerate launch:

      cfusion train configs/tcga_blca.yaml train.epochs=20

      torchrun --nproc-per-node 4 -m cfusion train configs/tcga_blca.yaml
    """
    import yaml

    from cfusion.config import load_config

    resolved = load_config(config, [*(overrides or []), *(["evaluation.strict=true"] if strict else [])])
    if print_config:
        typer.echo(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), nl=False)
        return
    from cfusion.console import is_rank_zero

    if resolved.tracking.enabled and not dry_run and is_rank_zero():
        from cfusion.tracking.sender_process import sender_process

        sender_process()  # it imports MLflow on one core while this process imports torch on another
    from cfusion.runs.crossval import cross_validate
    from cfusion.runs.run import Run

    if dry_run:
        typer.echo(Run.prepare(resolved).describe())
        return
    gc.freeze()  # what the imports left is never garbage; a full collection at the end of each fold passes over it
    scores = cross_validate(resolved, same_code=same_code)
    if not is_rank_zero():
        return
    from cfusion.report.runs import report_runs
    from cfusion.run_folder import REPORT

    for row in scores.summary.to_dict("records"):
        pairs = "C within folds and cohorts" if row["cohort"] == scores.joint else "C within folds"
        typer.echo(
            f"{row['cohort']} {row['model']} ({resolved.evaluation.protocol}): {pairs} {row['cindex_within']:.3f} "
            f"[{row['within_low']:.3f}, {row['within_high']:.3f}], mean over folds {row['cindex_mean']:.3f}"
        )
    if resolved.evaluation.permute_outcomes is not None:
        typer.echo(
            "null run on permuted outcomes; to compare it with the real run: "
            f"cfusion report RUN {resolved.output} --out report"
        )
        return
    title = f"{resolved.cohort.name}: {resolved.model.name}"
    page = report_runs([resolved.output], resolved.output / REPORT, title=title)
    typer.echo(f"report: {page}")
