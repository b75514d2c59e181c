"""`cfusion predict`: risk and survival of new patients, from shards, a feature store or slides."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from cfusion.cli.options import TrustCode
from cfusion.errors import ConfigError, DataError, PartialResultError

if TYPE_CHECKING:
    import pandas as pd

    from cfusion.apply.ensemble import FoldEnsemble
    from cfusion.apply.sources import BagSource
    from cfusion.training.fitted import ModelCard
    from cfusion.training.runtime import Runtime

logger = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(predict)


def predict(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Shards (folder or URL), a feature store, or slides.")
    ],
    model: Annotated[str, typer.Option(help="models:/NAME@champion, a run's folder, or one fold's.")],
    out: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the predictions as JSON.")] = False,
    cases: Annotated[
        Path | None, typer.Option(help="Table slide_id,case_id; default: TCGA barcodes, or by slide.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow server; default: MLFLOW_TRACKING_URI.")] = None,
    store: Annotated[Path | None, typer.Option(help="Keep features of slides in this store.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder of encoder checkpoints, for slides.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network for weights.")] = False,
    default_mpp: Annotated[float | None, typer.Option(help="µm/px of slides whose files do not tell.")] = None,
    threads: Annotated[int, typer.Option(help="Reading threads, for slides.", min=1)] = 2,
    trust_code: TrustCode = None,
) -> None:
    """Predict risk and survival of patients, alone or under torchrun.

    Slides are preprocessed with the encoder that the model names; embeddings of another encoder are refused. A row a
    patient: mean risk over the fold models and its standard deviation, the risk group by their cut-off, and survival
    at each month where a time bin ends. Without --cases, a slide without a TCGA barcode is taken for a patient.

    \b
      cfusion predict slides/ --model models:/blca@champion --out risks.csv
      cfusion predict shards/ --model runs/blca --out risks.csv
    """  # noqa: D301 - the escape is typer's mark for lines that stay as they are
    if out is None and not as_json:
        raise ConfigError("cfusion predict: nothing would be kept.", "Give --out FILE.csv or --json.")
    from cfusion.apply.sources import group_slides
    from cfusion.config import ParallelConfig
    from cfusion.training.world import join_world, launched

    runtime = join_world(ParallelConfig(global_batch=launched()))
    with tempfile.TemporaryDirectory() as scratch:
        ensemble = load_ensemble(model, uri, Path(scratch) / "model", trust_code)
        options: dict[str, object] = {
            "weights": weights,
            "offline": offline,
            "default_mpp": default_mpp,
            "threads": threads,
        }
        where = runtime.from_main(str(store or Path(scratch) / "features"))
        found = _source(sources, ensemble.models[0].card, Path(where), options, runtime)
        slides = group_slides(found.slide_ids, cases)
        alone = 0 if cases else _taken_for_patients(found.slide_ids, runtime)
        table = ensemble.predict(found.source, slides, runtime)
        runtime.barrier()
    if runtime.is_main:
        _deliver(table, alone, out, as_json)
        if found.failed:
            lost = ", ".join(found.failed[:5])
            raise PartialResultError(f"{len(found.failed)} slides could not be read: {lost}.", "See above.")


def load_ensemble(model: str, uri: str | None, folder: Path, trust_code: str | None = None) -> FoldEnsemble:
    """The models that `--model` names.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION, the folder of a finished run, or that of one fold.
        uri: MLflow server; None: MLFLOW_TRACKING_URI.
        folder: Where a registered model's files are put; made where it is needed.
        trust_code: Digest of code that came with the model and may run.

    Raises:
        DataError: There is no such model, its run is not finished, or the folder holds models of several runs.
    """
    from cfusion.apply.ensemble import FoldEnsemble
    from cfusion.run_folder import find_run, is_done, is_run

    if model.startswith("models:"):
        from cfusion.tracking.address import connect, given_uri, unavailable
        from cfusion.tracking.model_registry import fetch_ensemble, model_address

        name, which = model_address(model)
        address = given_uri(uri)
        client = connect(address)
        with unavailable(address):
            return fetch_ensemble(client, name, which, folder, trust_code=trust_code)
    run = find_run(Path(model))
    if is_run(run) and not is_done(run):
        raise DataError(f"{run}: its run is not finished.", "Finish it, or give the folder of one of its folds.")
    return FoldEnsemble.load(Path(model), trust_code=trust_code)


class _Found(NamedTuple):
    """The embeddings, which slides of them are asked for, and which slides have none."""

    source: BagSource
    slide_ids: Sequence[str]
    failed: Sequence[str] = ()


def _source(sources: list[str], card: ModelCard, store: Path, options: dict[str, object], runtime: Runtime) -> _Found:
    from cfusion.apply.sources import ShardSource, StoreSource
    from cfusion.config import DataConfig
    from cfusion.data.shard_index import INDEX_NAME

    first = Path(sources[0])
    if len(sources) == 1 and ("://" in sources[0] or (first / INDEX_NAME).is_file()):
        shards = ShardSource(DataConfig(shards=sources[0]))
        return _Found(shards, shards.slide_ids)
    if len(sources) == 1 and any(first.glob("*/*.zarr")):
        features = StoreSource(first, card.encoder)
        return _Found(features, features.slide_ids)
    states = runtime.gather(
        [state for source in sources for state in _preprocess(Path(source), card, store, options, runtime)]
    )
    there = sorted({slide for slide, done in states if done})
    failed = sorted({slide for slide, done in states if not done})
    if not there:
        raise DataError(f"None of the {len(failed)} slides could be read: {', '.join(failed[:5])}.", "See above.")
    return _Found(StoreSource(store, card.encoder), there, failed)


def _preprocess(
    slides: Path, card: ModelCard, store: Path, options: dict[str, object], runtime: Runtime
) -> list[tuple[str, bool]]:
    """Extract this rank's share of the slides as the training's were, with the model's encoder; which are there."""
    from cfusion.config import validate
    from preprocess.extraction import preprocess_slides
    from preprocess.settings import PreprocessConfig

    values = {"slides": slides, "store": store, "sheets": False, **card.preprocessing, **options}
    config = validate(PreprocessConfig, values, "cfusion predict")
    summary = preprocess_slides(config, strict=slides.is_file(), share=(runtime.rank, runtime.world_size))
    return [(outcome.slide_id, outcome.status in ("done", "skipped")) for outcome in summary.outcomes]


def _taken_for_patients(slide_ids: Sequence[str], runtime: Runtime) -> int:
    """How many slides stand for a patient each, since no name tells whose they are; said once."""
    from cfusion.cohort.read import has_barcode

    alone = sum(not has_barcode(slide) for slide in slide_ids)
    if alone and runtime.is_main:
        logger.warning(
            "%d of %d slides bear no TCGA barcode: each is taken for a patient. --cases TABLE groups them.",
            alone, len(slide_ids),
        )  # fmt: skip
    return alone


def _deliver(table: pd.DataFrame, alone: int, out: Path | None, as_json: bool) -> None:
    """Write the predictions and say what they are of; `alone` of the rows are slides taken for patients."""
    from cfusion.files import atomic_path

    if out is not None:
        with atomic_path(out) as temporary:
            table.to_csv(temporary, index=False)
    if as_json:
        typer.echo(json.dumps(_records(table), indent=1))
        return
    rows = {"patients": len(table) - alone, "slides": alone}
    told = " and ".join(f"{count} {name}" for name, count in rows.items() if count)
    typer.echo(f"{told}, {(table['group'] == 'high').sum()} of high risk: {out}")


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    """The predictions as JSON values, each with its curve as months and survival."""
    from cfusion.survival.predictions import survival_columns

    columns = survival_columns(table)
    assert columns is not None
    names = ["case_id", "slides", "risk", "risk_sd", "group"]
    return [
        {**{str(k): v for k, v in row.items()}, "curve": {"months": months.tolist(), "survival": survival.tolist()}}
        for row, survival, months in zip(table[names].to_dict("records"), *columns, strict=True)
    ]
