"""`cfusion registry` and `cfusion track`: registered models, and records that a tracking server missed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cfusion.errors import ConfigError, PartialResultError

models = typer.Typer(no_args_is_help=True, help="List registered models; make one the champion.")
track = typer.Typer(no_args_is_help=True, help="Upload records that the tracking server has not received.")

Uri = Annotated[str | None, typer.Option(help="MLflow server or database; default: MLFLOW_TRACKING_URI.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(models, name="registry")
    app.add_typer(track, name="track")


@models.command("list")
def list_(uri: Uri = None) -> None:
    """List every version that cfusion registered, with its inputs and scores.

    cfusion registry list --uri sqlite:///runs/mlflow.db
    """
    from rich.console import Console
    from rich.table import Table

    from cfusion.tracking.address import connect, given_uri, unavailable
    from cfusion.tracking.model_registry import list_versions

    address = given_uri(uri)
    client = connect(address)
    with unavailable(address):
        versions = list_versions(client)
    table = Table(
        "model", "version", "alias", "cohort", "protocol", "patients", "C within folds (95%)", "reads", box=None
    )
    for found in versions:
        tags = {**dict.fromkeys(("cohort", "protocol", "patients", "cindex", "low", "high"), "?"), **found.tags}
        table.add_row(
            found.name, found.version, ", ".join(found.aliases), tags["cohort"], tags["protocol"], tags["patients"],
            f"{tags['cindex']} ({tags['low']} to {tags['high']})", tags["contract"],
        )  # fmt: skip
    # A file or a pipe gets complete lines; a terminal wraps to its width.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


@models.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[str | None, typer.Option(help="Version to promote; default: the candidate.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    uri: Uri = None,
) -> None:
    """Make a version the champion, if the rule on the strict C-index allows it.

    A version becomes champion if its patients were scored once, under the strict protocol and with their real
    outcomes, and its C-index within folds is higher than the champion's on the same patients of the same cohort; the
    first one if its interval lies above .5.

      cfusion registry promote tcga_blca-crossfusion --version 3
    """
    from cfusion.tracking.address import connect, given_uri, unavailable
    from cfusion.tracking.champion import RULE, compare_with_champion
    from cfusion.tracking.champion import promote as make_champion

    address = given_uri(uri)
    client = connect(address)
    with unavailable(address):
        verdict = compare_with_champion(client, name, version)
    typer.echo("\n".join(verdict.reasons))
    if not verdict.passes:
        raise ConfigError(f"{name}: version {verdict.version} does not become champion.", RULE)
    if not yes and not typer.confirm(f"Make version {verdict.version} the champion of {name}?"):
        typer.echo("Nothing was changed.")
        return
    with unavailable(address):
        make_champion(client, verdict)
    typer.echo(f"{name}: version {verdict.version} is the champion.")


@track.command("send")
def send_(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of tracked runs.")],
    uri: Annotated[
        str | None,
        typer.Option(help="Server; default: tracking.uri of the run, or MLFLOW_TRACKING_URI."),
    ] = None,
) -> None:
    """Upload the records of finished, stopped or killed runs that the server has not received; none is sent twice.

    A server that has no record of a run, such as another one given with --uri, receives all of them.

      cfusion track send runs/study
    """
    from cfusion.run_folder import read_config
    from cfusion.secret_text import without_secrets
    from cfusion.tracking.address import checked_uri, tracking_uri
    from cfusion.tracking.delivery import send, unsent

    refused = 0
    for folder in runs:
        address = checked_uri(uri) if uri else tracking_uri(read_config(folder).tracking, folder)
        waiting = unsent(folder, address)
        state = send(folder, address)
        refused += len(state.refused)
        typer.echo(f"{folder}: {waiting} records sent to {without_secrets(address)}")
        for reason in state.refused:
            typer.echo(f"refused {reason}")
    if refused:
        raise PartialResultError(f"The server refused {refused} records.", "See above.")
