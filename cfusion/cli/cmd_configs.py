"""`cfusion configs`: the configurations that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfusion.errors import ConfigError
from cfusion.files import write_text

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List or copy the configurations that come with the package."
)


def _complete(incomplete: str) -> list[str]:
    from cfusion.study.packaged import shipped_configs

    return [name for name in shipped_configs() if name.startswith(incomplete)]


@app.command("list")
def show() -> None:
    """List the shipped configurations, each with the first line of its comment.

    cfusion configs list
    """
    from cfusion.study.packaged import shipped_configs

    for name, path in shipped_configs().items():
        comment = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        typer.echo(f"{name:<18}{comment}")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Name, as `configs list` shows it.", autocompletion=_complete)],
    destination: Annotated[Path | None, typer.Argument(help="File or folder; default: the current folder.")] = None,
) -> None:
    """Copy a shipped configuration to edit and run; an existing file is never overwritten.

    cfusion configs copy tcga_blca study.yaml
    """
    from cfusion.study.packaged import shipped_config

    source = shipped_config(name)
    target = destination or Path()
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise ConfigError(f"{target}: already exists.", "Give another destination.")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, source.read_text(encoding="utf-8"))
    typer.echo(target)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; default: print it.")] = None,
) -> None:
    """Print the JSON Schema of a configuration; editors complete and check keys with it.

    cfusion configs schema --out cfusion.schema.json
    """
    import json

    from cfusion.config import config_schema

    text = json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
