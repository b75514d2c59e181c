"""`cfusion init`: a configuration for a cohort, from its table and its features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(init)


def init(
    table: Annotated[Path, typer.Option(help="Clinical table, a row per patient or slide.")],
    features: Annotated[
        Path, typer.Option(help="Features of TRIDENT, CLAM, STAMP or own files; a feature store; or shards.")
    ],
    out: Annotated[Path, typer.Option(help="Configuration to write; shards go next to it.")] = Path("study.yaml"),
    name: Annotated[str | None, typer.Option(help="Name of the cohort; default: that of the file.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="The encoder to use, or its name where the files state none.")
    ] = None,
    magnification: Annotated[
        float | None, typer.Option(help="Magnification of files that do not state theirs, such as 20.", min=0.1)
    ] = None,
    layout: Annotated[
        str, typer.Option("--from", help="auto, or published, clam, trident, stamp, slide, plain.")
    ] = "auto",
    only: Annotated[list[str] | None, typer.Option(help="Take only folders or files of this name.")] = None,
) -> None:
    """Write a commented configuration for your own cohort: reads table and features, makes shards, runs the audit.

    The shards need about as much disk as the features; imported features need it twice. Safe to re-run: finished
    slides are skipped.

      cfusion init --table clinical.csv --features trident_output
    """
    import shlex

    from cfusion.proposal.feature_folder import FeatureAnswers
    from cfusion.proposal.study_file import first_try, propose_study

    answers = FeatureAnswers(layout, encoder, tuple(only or ()), magnification)
    study = propose_study(table, features, out, name, answers)
    for remark in study.features.remarks:
        typer.echo(f"note: {remark}")
    typer.echo(study.run.describe())
    path = shlex.quote(str(study.path))
    typer.echo(
        f"written: {study.path}. Read its comments, then:\n"
        f"  cfusion null {path}     # what a model without signal scores\n"
        f"  {first_try(study)}    # a first try, to see that all works\n"
        f"  cfusion train {path}    # every model; report in {study.config.output}/report/index.html"
    )
