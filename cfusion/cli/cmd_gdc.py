"""`cfusion gdc`: slides from the Genomic Data Commons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfusion.errors import PartialResultError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Slides from the Genomic Data Commons (TCGA).")

Source = Annotated[str, typer.Argument(help="A manifest, a sample sheet, a cohort such as tcga_blca, or package:PATH.")]
Api = Annotated[str, typer.Option(help="GDC endpoint.")]


@app.command()
def manifest(
    source: Source,
    out: Annotated[Path, typer.Option(help="Manifest to write.")] = Path("gdc_manifest.tsv"),
    folder: Annotated[Path, typer.Option(help="Folder of the slides, for the printed command.")] = Path("slides"),
    api: Api = "https://api.gdc.cancer.gov",
) -> None:
    """Write a manifest for gdc-client, and print the command that downloads its slides.

    cfusion gdc manifest tcga_blca --out blca.tsv
    """
    import shlex

    from preprocess.gdc import client_call, find_rows, write_manifest

    rows = find_rows(_resolved(source), api)
    write_manifest(out, rows)
    typer.echo(f"{out}: {len(rows)} slides, {sum(r.size for r in rows) / 1e12:.2f} TB")
    typer.echo(shlex.join(client_call(out, folder)))


@app.command()
def download(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for the slides.")] = Path("slides"),
    first: Annotated[int | None, typer.Option(help="Only the first N.", min=1)] = None,
    client: Annotated[
        str | None, typer.Option(help="Program gdc-client, to transfer the files; default: built in.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Files at the same time.", min=1)] = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be downloaded, and stop.")] = False,
    api: Api = "https://api.gdc.cancer.gov",
) -> None:
    """Download slides and check their MD5 sums; safe to re-run: finished slides are skipped.

    cfusion gdc download tcga_blca --out slides --first 10

    The package has manifests of six cohorts, which need no query:

    cfusion gdc download package:tcga/manifests/tcga_blca.tsv --dry-run
    """
    from preprocess.gdc import download as fetch
    from preprocess.gdc import find_rows

    rows = find_rows(_resolved(source), api)[:first]
    if dry_run:
        typer.echo(f"{source}: {len(rows)} slides, {sum(r.size for r in rows) / 1e12:.2f} TB, would go to {out}")
        return
    failed = fetch(rows, out, api=api, client=client, threads=threads)
    for name, why in failed.items():
        typer.echo(f"failed  {name}: {why}")
    typer.echo(f"{out}: {len(rows) - len(failed)} of {len(rows)} slides downloaded")
    if failed:
        raise PartialResultError(f"{len(failed)} slides were not downloaded.", "Run the same command again.")


def _resolved(source: str) -> str:
    from cfusion.study.packaged import find_data

    return str(find_data(Path(source)))
