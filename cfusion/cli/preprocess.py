"""`cfusion preprocess`: slides to a feature store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from preprocess.extraction import Summary


class _RunByDefault(TyperGroup):
    """`cfusion preprocess SLIDES …` is `cfusion preprocess run SLIDES …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Slides to embeddings at 20x, 10x and 5x. `cfusion preprocess SLIDES` is short for `… run SLIDES`.",
)


@app.command()
def run(
    slides: Annotated[Path, typer.Argument(help="A slide, or a folder that is searched for slides.")],
    store: Annotated[Path, typer.Option(help="Feature store to write.")] = Path("features"),
    encoder: Annotated[
        list[str] | None, typer.Option(help="Encoder; several share one decoding of the slides.")
    ] = None,
    magnifications: Annotated[str, typer.Option(help="Finest first, each half the one before.")] = "20,10,5",
    resolution: Annotated[
        str, typer.Option(help="nominal: as scanners say (40x, 20x); exact: true µm/px.")
    ] = "nominal",
    default_mpp: Annotated[float | None, typer.Option(help="µm/px of slides whose files do not tell.")] = None,
    mpp_table: Annotated[Path | None, typer.Option(help="CSV slide_id,mpp for such slides.")] = None,
    resample: Annotated[str, typer.Option(help="area or bicubic.")] = "area",
    threads: Annotated[int, typer.Option(help="Reading threads.")] = 2,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first slide that fails.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo slides made with other settings.")] = False,
) -> None:
    """Extract the features of slides; run it again and it does what is left."""
    from cfusion.config import PreprocessConfig, validate
    from preprocess.extraction import preprocess_slides

    values = {
        "slides": slides, "store": store, "encoders": tuple(encoder or ["stain-texture"]),
        "magnifications": _numbers(magnifications),
        "resolution": resolution, "default_mpp": default_mpp, "mpp_table": mpp_table, "resample": resample,
        "threads": threads,
    }  # fmt: skip
    config = validate(PreprocessConfig, values, "cfusion preprocess")
    _tell(preprocess_slides(config, strict=strict or slides.is_file(), overwrite=overwrite))


def _numbers(text: str) -> tuple[float, ...]:
    from cfusion.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--magnifications {text}: expected numbers, such as 20,10,5.") from None


def _tell(summary: Summary) -> None:
    from cfusion.errors import PartialResultError

    for outcome in summary.of("failed") + summary.of("stale"):
        typer.echo(f"{outcome.status:<8}{outcome.slide_id}: {outcome.why}")
    counts = ", ".join(f"{len(summary.of(s))} {s}" for s in ("done", "skipped", "stale", "failed"))
    tiles = sum(o.tiles for o in summary.outcomes)
    typer.echo(f"{counts}; {tiles} tiles in {summary.seconds:.1f} s; {summary.table}")
    lost = len(summary.of("failed")) + len(summary.of("stale"))
    if lost:
        raise PartialResultError(f"{lost} of {len(summary.outcomes)} slides have no features.", f"See {summary.table}.")
