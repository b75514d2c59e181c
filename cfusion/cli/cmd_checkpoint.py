"""`cfusion checkpoint`: export a model from the checkpoints of a training in progress."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cfusion.cli.options import TrustCode
from cfusion.errors import ConfigError

checkpoints = typer.Typer(no_args_is_help=True, help="Export a model from the checkpoints of a training in progress.")


class Weights(StrEnum):
    """Which weights of a checkpoint to export."""

    best = "best"
    last = "last"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(checkpoints, name="checkpoint")
    # A group of one command would otherwise swallow its name.
    checkpoints.callback()(lambda: None)


@checkpoints.command()
def consolidate(
    folder: Annotated[Path, typer.Argument(help="Checkpoints of one fold, such as RUN/checkpoints/fold_0.")],
    out: Annotated[Path, typer.Option(help="Folder of the model: model.safetensors and model.json.")],
    weights: Annotated[
        Weights, typer.Option(help="Weights of the best epoch so far, or of the last step.")
    ] = Weights.best,
    trust_code: TrustCode = None,
) -> None:
    """Combine the checkpoint files of all processes into one model that every other command can read.

    A finished fold already has its model, in RUN/fold_0/model.

      cfusion checkpoint consolidate runs/study/checkpoints/fold_0 --out model
    """
    from cfusion.training.consolidation import consolidate

    if out.exists():
        raise ConfigError(f"{out}: already exists.", "Give another --out.")
    model = consolidate(folder, weights.value, trust_code=trust_code)
    model.save(out)
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    typer.echo(f"{out}: {model.card.model['name']}, {parameters} parameters")
