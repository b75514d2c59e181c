"""`cfusion preprocess shard`: pack features into WebDataset shards, and verify shards."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(enum.StrEnum):
    """How embeddings are stored in shards."""

    f16 = "f16"
    f32 = "f32"
    int8 = "int8"


def register(app: typer.Typer) -> None:
    """Add the command to `cfusion preprocess`."""
    app.command("shard")(shard)


def shard(
    store: Annotated[Path, typer.Argument(help="Feature store to pack.")],
    out: Annotated[Path, typer.Option(help="Folder for the tars and their index.")],
    encoder: Annotated[str | None, typer.Option(help="Encoder to pack; required if the store has several.")] = None,
    size: Annotated[str, typer.Option(help="Approximate size of a tar: 500MB, 1GB, 4GiB.")] = "1GB",
    dtype: Annotated[Dtype, typer.Option(help="Storage type; int8 has a scale for each channel.")] = Dtype.f16,
    seed: Annotated[int, typer.Option(help="Seed of the order of slides.")] = 7,
    workers: Annotated[int, typer.Option(help="Threads that read and encode slides.", min=1)] = 2,
) -> None:
    """Pack a feature store into WebDataset tars with an index; safe to re-run: finished tars are skipped.

    cfusion preprocess shard features --out shards --size 1GB
    """
    from cfusion.data.store import FeatureStore
    from cfusion.errors import PartialResultError
    from preprocess.packing import pack_store

    source = FeatureStore.open(store, encoder)
    index = pack_store(source, out, target_bytes=_bytes(size), dtype=dtype.value, seed=seed, workers=workers)
    total = sum(tar.size for tar in index.shards)
    typer.echo(f"{len(index.samples)} slides in {len(index.shards)} shards, {total / 1e9:.2f} GB, {index.digest[:12]}")
    if index.dtype == "int8":
        worst = max(index.samples, key=lambda sample: max(sample.error.values()))
        error = max(worst.error.values())
        typer.echo(f"int8: root mean square error at most {error:.2%} of the values' (slide {worst.slide_id})")
    if index.refused:
        for reason in index.refused.values():
            typer.echo(f"skipped: {reason}")
        raise PartialResultError(f"{len(index.refused)} slides were skipped.", "The rest are packed.")


def print_verification(shards: Path) -> None:
    """Check every byte of a folder of shards against its index, and print the result."""
    from cfusion.data.verify import verify_shards
    from cfusion.errors import DataError

    result = verify_shards(shards)
    for problem in result.problems:
        typer.echo(str(problem))
    if not result.problems:
        typer.echo(f"{len(result.good)} slides, all intact")
        return
    for slide_id in result.good:
        typer.echo(f"intact: {slide_id}")
    raise DataError(f"{shards}: {len(result.problems)} problems, {len(result.good)} slides are intact.", "See above.")


def _bytes(text: str) -> int:
    from cfusion.errors import ConfigError

    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    for unit, factor in units.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * factor)
    raise ConfigError(f"--size {text}: expected a number with a unit, such as 500MB, 1GB or 4GiB.")
