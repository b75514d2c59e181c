"""`cfusion demo`: the whole path on phantom cohorts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of everything the demo makes.")] = Path("runs/demo"),
    cases: Annotated[int, typer.Option(help="Patients per cohort.", min=40)] = 240,
    slots: Annotated[
        int | None, typer.Option(help="Trainings at the same time; default: one a core, at most 4.")
    ] = None,
) -> None:
    """Draw two phantom cohorts as real slides, and take them the whole way to a report.

    Slides → tissue → tiles at 20x, 10x and 5x → embeddings → zarr store → WebDataset shards → CrossFusion and a
    baseline over 5 folds under the strict protocol, with real and with permuted outcomes → report. The embeddings
    come from an untrained stain and texture descriptor, so that nothing needs to be downloaded. Started again after
    an interruption, it does what is missing and ends with the same numbers.
    """
    from launch.demo import run_demo
    from launch.local import usable_cores

    result = run_demo(out, cases=cases, slots=slots or min(4, usable_cores()))
    columns = ["cohort", "model", "protocol", "cindex_pooled", "cindex_low", "cindex_high", "oracle", "permuted"]
    typer.echo(result.summary[columns].to_string(index=False, float_format="{:.3f}".format))
    typer.echo(f"report: {result.page}")
