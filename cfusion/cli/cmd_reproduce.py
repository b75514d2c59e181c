"""`cfusion reproduce`: train a finished run again and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfusion.cli.options import TrustCode
from cfusion.errors import DataError


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(reproduce)


def reproduce(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the second run; default: RUN-again.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference that still counts as equal.")] = 0.0,
    trust_code: TrustCode = None,
) -> None:
    """Train a finished run again from its own configuration and compare every prediction.

    On the same CPU and library versions the predictions are equal bit for bit; on a GPU, set --tolerance. Differences
    in data, program or packages are reported first. Exits with 2 if the predictions differ.

      cfusion reproduce runs/study
    """
    from cfusion.runs.reproduction import reproduce_run

    result = reproduce_run(run, out or run.with_name(f"{run.name}-again"), trust_code=trust_code)
    if result.largest == float("inf"):
        raise DataError(
            f"{run}: was not reproduced; the predictions are of other patients.", _advice(result.differences)
        )
    typer.echo(f"{result.cases} predictions, largest difference {result.largest:.3g}")
    if result.largest > tolerance:
        raise DataError(f"{run}: was not reproduced.", _advice(result.differences))


def _advice(differences: tuple[str, ...]) -> str:
    if differences:
        return f"{'; '.join(differences)}."
    return "Data, program and packages are the same: another device or number of threads changes the last bits."
