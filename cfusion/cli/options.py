"""Options that several commands have, and options that go with one choice and not with another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated

import typer

from cfusion.errors import ConfigError, nearest

TrustCode = Annotated[
    str | None,
    typer.Option(metavar="DIGEST", help="Run code that came with the model if its SHA-256 begins with this."),
]


def refuse_unheard(context: typer.Context, executor: str, takes: Mapping[str, Collection[str]]) -> None:
    """Refuse options that the chosen executor would not hear, rather than do without them.

    Args:
        context: Of the command.
        executor: The chosen one.
        takes: Executor → parameters that it takes and not every other does.

    Raises:
        ConfigError: There is no such executor, or an option was given that it does not take.
    """
    if executor not in takes:
        raise ConfigError(f"--executor {executor}: expected one of {', '.join(takes)}.", nearest(executor, takes))
    for parameter in context.command.params:
        name = str(parameter.name)
        others = [other for other, names in takes.items() if name in names]
        source = context.get_parameter_source(name)
        if others and executor not in others and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"{parameter.opts[0]} does not go with --executor {executor}.",
                f"Leave it out, or give --executor {' or '.join(others)}.",
            )
