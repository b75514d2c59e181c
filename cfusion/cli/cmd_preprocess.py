"""`cfusion preprocess`: slides to a feature store, and what can be asked of a store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cfusion.cli import cmd_shard as shard
from cfusion.cli import cmd_store as store_changes
from cfusion.cli.completion import encoders
from cfusion.cli.options import (
    TASK_OPTIONS,
    Account,
    Chunk,
    Constraint,
    Cpus,
    Exclusive,
    Executor,
    Gpus,
    Hours,
    MaxParallel,
    Mem,
    Partition,
    Qos,
    RayAddress,
    Retries,
    Sbatch,
    Setup,
    cores_of,
    queue_options,
    refuse_unheard,
)
from cfusion.console import alike
from cfusion.errors import ConfigError, DataError, PartialResultError

if TYPE_CHECKING:
    from preprocess.outcome import Summary


SHOWN = 10
"""Skipped files that an import prints; its table has all."""

_OF_TASKS = {"tasks", "retries", "dry_run"}
TAKES = {
    "local": {"strict", "process_per_gpu"},
    **{executor: names | _OF_TASKS for executor, names in TASK_OPTIONS.items()},
}
"""Options of `cfusion preprocess run` that not every executor takes."""


class _RunByDefault(TyperGroup):
    """`cfusion preprocess SLIDES …` is `cfusion preprocess run SLIDES …`, the options before or after the slides."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Slides to embeddings at 20x, 10x and 5x. `cfusion preprocess SLIDES` is short for `… run SLIDES`.",
)
shard.register(app)
store_changes.register(app)


@app.command()
def run(
    context: typer.Context,
    slides: Annotated[Path, typer.Argument(help="A slide, or a folder that is searched for slides.")],
    store: Annotated[Path, typer.Option(help="Feature store to write.")] = Path("features"),
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="Encoder; several share one decoding of the slides. Default stain-texture.", autocompletion=encoders
        ),
    ] = None,
    magnifications: Annotated[str, typer.Option(help="Finest first, each half the one before.")] = "20,10,5",
    resolution: Annotated[str, typer.Option(help="nominal: 80x to 5x, as TRIDENT; exact: the true µm/px.")] = "nominal",
    default_mpp: Annotated[float | None, typer.Option(help="µm/px of slides whose files do not state it.")] = None,
    mpp_table: Annotated[Path | None, typer.Option(help="CSV slide_id,mpp, which wins over the files.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of tissue masks (.png) or .geojson; they win.")] = None,
    resample: Annotated[str, typer.Option(help="area, or bicubic as PIL's default.")] = "area",
    min_tissue: Annotated[float, typer.Option(help="Share of a finest tile that must be tissue.")] = 0.25,
    min_piece: Annotated[
        float, typer.Option(help="Area of the smallest piece of tissue, in µm²; lower it for cytology.")
    ] = 20_000,
    artefacts: Annotated[
        bool, typer.Option("--artefacts", help="Leave out folds and blur; calibrated on synthetic ones only.")
    ] = False,
    sheets: Annotated[bool, typer.Option(help="Write masks, contours and sheets to look at.")] = True,
    batch_size: Annotated[
        str, typer.Option(help="Tiles an encoder takes at once; auto: as fit a GPU's memory, not measured yet.")
    ] = "64",
    upload_ahead: Annotated[
        bool, typer.Option("--upload-ahead", help="Upload a batch while a GPU encodes another; not measured yet.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint, or a folder of them, ENCODER.safetensors.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network for weights.")] = False,
    precision: Annotated[str, typer.Option(help="card, f32, bf16 or f16.")] = "card",
    tf32: Annotated[
        bool, typer.Option("--tf32", help="TF32 for f32 on a GPU, if the embeddings agree; not measured yet.")
    ] = False,
    process_per_gpu: Annotated[
        bool, typer.Option("--process-per-gpu", help="A process for each GPU of this machine; not measured yet.")
    ] = False,
    device: Annotated[list[str] | None, typer.Option(help="cpu, cuda:0, …; default all GPUs.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Reading threads; default: all cores, on slurm and ray those of --cpus.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first slide that fails, on this machine.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Redo slides made with other settings or from another file.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="slurm, ray: check the input, show what would start, and stop.")
    ] = False,
    executor: Executor = "local",
    tasks: Annotated[int, typer.Option(help="slurm, ray: shares of the slides, one task each.", min=1)] = 1,
    retries: Retries = 2,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclusive: Exclusive = False,
    sbatch: Sbatch = None,
    setup: Setup = None,
    hours: Hours = 24.0,
    cpus: Cpus = None,
    gpus: Gpus = 0,
    mem: Mem = None,
    max_parallel: MaxParallel = None,
    chunk: Chunk = 1,
    ray_address: RayAddress = "auto",
) -> None:
    """Extract the features of slides; safe to re-run: finished slides are skipped.

    cfusion preprocess slides/ --store features --encoder uni --encoder conch
    """
    from cfusion.config import validate
    from launch.extract import FanOut, extract_by_device, fan_out, rehearse
    from launch.tasks.task import TaskResources
    from preprocess.extraction import preprocess_slides
    from preprocess.settings import PreprocessConfig

    refuse_unheard(context, executor, TAKES)
    slurm = queue_options(executor, partition, account, qos, constraint, exclusive, sbatch, setup)
    cores = cores_of(threads if cpus is None else cpus, executor, slurm)
    if executor != "local" and threads is None:
        threads = cores
    values = {
        "slides": slides, "store": store, "encoders": tuple(encoder or ["stain-texture"]), "masks": masks,
        "magnifications": _numbers(magnifications), "resolution": resolution, "default_mpp": default_mpp,
        "mpp_table": mpp_table, "resample": resample, "min_tissue": min_tissue, "sheets": sheets, "weights": weights,
        "min_piece_um2": min_piece, "artefacts": artefacts, "upload_ahead": upload_ahead,
        "tf32": tf32, "offline": offline, "batch_size": batch_size if batch_size == "auto" else _tile_count(batch_size),
        "precision": precision, "devices": tuple(device or ()),
        **({} if threads is None else {"threads": threads}),
    }  # fmt: skip
    config = validate(PreprocessConfig, values, "cfusion preprocess")
    if executor != "local":
        resources = TaskResources(cores, gpus, mem, hours, slurm, max_parallel, chunk)
        plan = FanOut(executor, tasks, retries, resources, ray_address)  # type: ignore[arg-type]
        if dry_run:
            typer.echo("\n".join(rehearse(config, plan, overwrite=overwrite)))
            return
        _report(fan_out(config, plan, overwrite=overwrite))
    elif process_per_gpu:
        if strict:
            raise ConfigError(
                "--strict stops at the first slide that fails, which --process-per-gpu cannot.", "Leave one out."
            )
        _report(extract_by_device(config, overwrite=overwrite))
    else:
        _report(preprocess_slides(config, strict=strict or slides.is_file(), overwrite=overwrite))


@app.command()
def verify(
    store: Annotated[Path, typer.Argument(help="Feature store, or folder of shards.")],
    encoder: Annotated[str | None, typer.Option(help="Only this encoder of a store.")] = None,
) -> None:
    """Read every byte of a store or of shards again, and compare shapes and digests with what was written.

    cfusion preprocess verify features
    """
    if (store / "index.json").is_file() or any(store.glob("*.tar")):
        shard.print_verification(store)
        return
    from preprocess.inspection import list_store, verify_store

    wrong = verify_store(store, encoder)
    for slide, why in wrong.items():
        typer.echo(f"WRONG   {slide}: {why}")
    if wrong:
        raise DataError(f"{store}: {len(wrong)} slides are not what was written.", "Delete them and extract again.")
    typer.echo(f"{store}: {len(list_store(store, encoder))} slides match the digests recorded when they were written.")


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(help="Feature store.")],
    slide: Annotated[str | None, typer.Option(help="Draw this slide.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Only this encoder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Picture to write; default SLIDE.png.")] = None,
) -> None:
    """Show a store as a table, or one slide as a picture.

    cfusion preprocess inspect features --slide SLIDE_ID --out slide.png
    """
    from preprocess.inspection import draw_slide, list_store

    if slide is not None:
        from cfusion.data.store import FeatureStore

        target = out or Path(f"{slide}.png")
        draw_slide(FeatureStore.open(store, encoder).read(slide), target)
        typer.echo(str(target))
        return
    from rich.console import Console
    from rich.table import Column, Table

    # A pipe has no width to fit, and what reads it wants a line a slide.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    table = Table("encoder", Column("slide", overflow="fold"), "tiles", "width", "µm/px", "unreadable", box=None)
    for row in list_store(store, encoder):
        tiles = " ".join(f"{name}:{count}" for name, count in row.tiles.items())
        table.add_row(row.encoder, row.slide_id, tiles, str(row.dim), row.mpp, str(row.unreadable or ""))
    console.print(table)


@app.command()
def derive(
    store: Annotated[Path, typer.Argument(help="Feature store with the finest magnification.")],
    out: Annotated[Path, typer.Option(help="Another feature store to write.")],
    magnifications: Annotated[str, typer.Option(help="To derive, each half the one before.")] = "10,5",
    encoder: Annotated[str | None, typer.Option(help="The encoder, if the store has several.")] = None,
) -> None:
    """Derive coarser magnifications: each cell is the mean of its children's embeddings.

    cfusion preprocess derive features --out derived
    """
    from preprocess.derive import derive_store

    report = derive_store(store, out, _numbers(magnifications), encoder)
    for name, why in report.refused.items():
        typer.echo(f"refused {name}: {why}")
    shares = [share for by_name in report.done.values() for share in by_name.values()]
    mean = f"; on average {sum(shares) / len(shares):.0%} of a cell's children are present" if shares else ""
    typer.echo(f"{len(report.done)} slides derived into {out}, {len(report.refused)} refused{mean}")
    if report.refused:
        raise PartialResultError(f"{len(report.refused)} of the slides were not derived.", "See above.")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder of features that another program made.")],
    store: Annotated[Path, typer.Option(help="Feature store to write.")] = Path("features"),
    layout: Annotated[
        str, typer.Option("--from", help="auto, or published, clam, trident, stamp, slide, plain.")
    ] = "auto",
    encoder: Annotated[
        str | None,
        typer.Option(help="The encoder to import, or its name where the files state none; FOUND=NAME renames it."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Take only folders or files of this name, such as '*_256px_0px_overlap'.")
    ] = None,
    magnification: Annotated[
        float | None, typer.Option(help="Magnification of files that do not state theirs, such as 20.", min=0.1)
    ] = None,
    slides: Annotated[
        Path | None, typer.Option(help="Folder of the slides: gives µm/px, checks sizes, places the tiles of STAMP.")
    ] = None,
    mpp_table: Annotated[Path | None, typer.Option(help="CSV slide_id,mpp for --slides.")] = None,
    default_mpp: Annotated[float | None, typer.Option(help="µm/px of --slides whose files do not state it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace features that the store has.")] = False,
) -> None:
    """Import features made by the published program, CLAM, TRIDENT or STAMP, or by slide encoders.

    cfusion preprocess import clam/ --store features --from clam --encoder uni
    """
    from preprocess.importers import ImportOptions, import_features

    options = ImportOptions(tuple(only or ()), magnification, slides, mpp_table, default_mpp, overwrite)
    report = import_features(source, store, layout, encoder, options)
    typer.echo(f"{report.layout}: {report.alignment}")
    for name, why in report.refused.items():
        typer.echo(f"refused {name}: {why}")
    for name, why in list(report.skipped.items())[:SHOWN]:
        typer.echo(f"skipped {name}: {why}")
    if len(report.skipped) > SHOWN:
        typer.echo(f"skipped {len(report.skipped) - SHOWN} more files")
    skipped = f", {len(report.skipped)} files skipped" if report.skipped else ""
    typer.echo(
        f"{len(report.imported)} slides imported into {store}, {len(report.refused)} refused{skipped}; {report.table}"
    )
    if report.refused:
        raise PartialResultError(f"{len(report.refused)} of the slides were not imported.", "See above.")


def _tile_count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--batch-size {text}: expected a whole number, or auto.") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--magnifications {text}: expected numbers, such as 20,10,5.") from None


def _report(summary: Summary) -> None:
    from preprocess.outcome import ALREADY

    others = [o for o in summary.of("skipped") if o.why != ALREADY]
    for outcome in summary.of("failed") + summary.of("stale") + others:
        typer.echo(f"{outcome.status:<8}{outcome.slide_id}: {outcome.why}")
    _table(summary)
    speed = summary.tiles / max(1e-9, summary.seconds)
    typer.echo(
        f"{summary.tiles} tiles in {summary.seconds:.1f} s ({speed:.0f} tiles/s, "
        f"{summary.pixels * 3 / 1e9 / max(1e-9, summary.seconds):.2f} GB/s, "
        f"encoders idle {summary.encoder_idle:.0%}); {summary.table}"
    )
    _grouped("partly ", [(o.slide_id, o.why) for o in summary.of("done") if o.why])
    _grouped("warning", [(o.slide_id, o.warnings) for o in summary.of("done") if o.warnings])
    failed, stale = len(summary.of("failed")), len(summary.of("stale"))
    if failed or stale:
        problems = [f"{failed} failed"] * bool(failed) + [f"{stale} are stale"] * bool(stale)
        raise PartialResultError(
            f"of {len(summary.outcomes)} slides {' and '.join(problems)}.", f"See {summary.table}."
        )


def _grouped(kind: str, remarks: list[tuple[str, str]]) -> None:
    """Print remarks on slides, alike ones as one line with a count; the table of the store has all."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for slide_id, text in remarks:
        groups.setdefault(alike(text, slide_id), []).append((slide_id, text))
    for of_kind in groups.values():
        slide_id, text = of_kind[0]
        others = f" and {len(of_kind) - 1} more slides" if len(of_kind) > 1 else ""
        typer.echo(f"{kind} {slide_id}{others}: {text}")


def _table(summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("slides", Column("number", justify="right"), Column("tiles", justify="right"), box=None)
    for status in ("done", "skipped", "stale", "failed"):
        found = summary.of(status)
        table.add_row(status, str(len(found)), f"{sum(o.tiles for o in found):,}")
    Console().print(table)
