"""`cfusion reproduce`: train a finished run again and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfusion.errors import DataError


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(reproduce)


def reproduce(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the second run; default: RUN-again.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a risk that still counts as equal.")] = 0.0,
) -> None:
    """Train a finished run again from its own configuration and compare every prediction.

    On the same CPU and library versions the predictions are equal bit for bit; on a GPU give a --tolerance. Leaves
    with 2 where the data, the program or the predictions differ, and says which.

      cfusion reproduce runs/study
    """
    from cfusion.reproduction import reproduce_run

    result = reproduce_run(run, out or run.with_name(f"{run.name}-again"))
    for line in result.differences:
        typer.echo(line)
    typer.echo(f"{result.cases} predictions, largest difference of a risk {result.largest:.3g}")
    if result.largest > tolerance:
        raise DataError(f"{run}: was not reproduced.", "Compare the lines above; other versions give other bits.")
