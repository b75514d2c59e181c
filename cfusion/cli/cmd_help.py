"""`cfusion help`: the page that explains an error, in the terminal."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from typing import Annotated

import typer

from cfusion.errors import ConfigError, nearest

_HEADING = re.compile(r"^## (?P<title>.+?) \{#(?P<topic>[a-z-]+)\}$", re.MULTILINE)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("help")(explain)


def topics() -> dict[str, tuple[str, str]]:
    """The sections of `errors.md`: topic → title and text."""
    text = files("cfusion").joinpath("errors.md").read_text(encoding="utf-8")
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return {h["topic"]: (h["title"], text[h.end() : end].strip()) for h, end in zip(headings, ends, strict=True)}


def _complete(incomplete: str) -> list[tuple[str, str]]:
    return [(name, title) for name, (title, _) in topics().items() if name.startswith(incomplete)]


def explain(
    ctx: typer.Context,
    topic: Annotated[
        str | None, typer.Argument(help="Topic, as an error message names it, or a command.", autocompletion=_complete)
    ] = None,
) -> None:
    """Explain an error: its causes, and what to do; or a command. Without a topic, list them.

    Example: cfusion help resolution
    """
    known = topics()
    if topic is None:
        for name, (title, _) in known.items():
            typer.echo(f"{name:<17}{title}")
        return
    commands = getattr(ctx.find_root().command, "commands", {})
    if topic in commands and topic not in known:
        commands[topic].main(["--help"], prog_name=f"cfusion {topic}")
    if topic not in known:
        raise ConfigError(f"{topic!r}: unknown topic.", nearest(topic, known))
    title, text = known[topic]
    if not sys.stdout.isatty():
        typer.echo(f"{title}\n\n{text}")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=min(100, Console().width)).print(Markdown(f"# {title}\n\n{text}"))
