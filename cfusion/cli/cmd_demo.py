"""`cfusion demo`: every step on phantom cohorts; `cfusion phantom`: draw one phantom cohort."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cfusion.cli.completion import encoders


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(demo)
    app.command()(phantom)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all output of the demo.")] = Path("runs/demo"),
    cases: Annotated[int, typer.Option(help="Patients per cohort.", min=40)] = 72,
    slots: Annotated[
        int | None, typer.Option(help="Trainings at the same time; default: one per core, at most 4.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Encoder of the tiles; efficientnet-lite0 is a trained one.", autocompletion=encoders)
    ] = "stain-texture",
) -> None:
    """Draw two phantom cohorts as real slides and run every step, up to the report.

    Slides → tissue → tiles at 20x, 10x and 5x → embeddings → zarr store → WebDataset shards → CrossFusion and a
    baseline over 5 folds under the strict protocol, with real and with permuted outcomes → report. By default
    the embeddings come from an untrained stain and texture descriptor, so that nothing needs to be downloaded. Safe
    to re-run after an interruption: finished steps are skipped, and the numbers are the same.

      cfusion demo --out runs/demo
    """
    from cfusion.demo import DemoCost, run_demo
    from cfusion.machine_limits import usable_cores

    slots = slots or min(4, usable_cores())
    typer.echo(f"two cohorts of {cases} drawn patients in {out}: {DemoCost.of(cases, slots).describe(out)}")
    result = run_demo(out, cases=cases, slots=slots, encoder=encoder)
    columns = ["cohort", "model", "protocol", "cindex_within", "within_low", "within_high", "oracle", "permuted"]
    typer.echo(result.summary[columns].to_string(index=False, float_format="{:.3f}".format))
    typer.echo(f"report: {result.page}")
    typer.echo(
        "next:\n"
        f"  source {_shown(Path(sys.prefix) / 'bin' / 'activate')}\n"
        f"  cfusion view {result.slides} --run {result.run}    # slides and survival curves\n"
        "  cfusion init --table clinical.csv --features FOLDER    # features you have; slides: cfusion preprocess -h"
    )


def _shown(path: Path) -> str:
    """Return a path relative to the current folder if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def phantom(
    out: Annotated[Path, typer.Argument(help="Folder for the slides and the tables.")],
    cases: Annotated[int, typer.Option(help="Patients.", min=1)] = 40,
    like: Annotated[str, typer.Option(help="Which of the demo's cohorts: phantom-a or phantom-b.")] = "phantom-a",
) -> None:
    """Draw a phantom cohort to try things on: pyramidal slides, and a table of made-up patients.

    Two slides a second; nothing in it is data about people. OUT/slides holds the slides, OUT/cohort.csv the columns
    patient, slide, time (months) and event, OUT/truth.csv the planted risk.

      cfusion phantom study --cases 40
    """
    import dataclasses

    from cfusion.errors import ConfigError
    from preprocess.phantom.draw import PHANTOMS, draw_cohort

    known = {spec.name: spec for spec in PHANTOMS}
    if like not in known:
        raise ConfigError(f"--like {like}: expected {' or '.join(known)}.")
    cohort = draw_cohort(dataclasses.replace(known[like], patients=cases, two_slides=min(1, cases)), out)
    typer.echo(f"slides: {cohort.slides}")
    typer.echo(f"table: {cohort.table}")
