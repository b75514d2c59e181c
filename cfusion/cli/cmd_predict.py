"""`cfusion predict`: risk and survival of new patients, from shards, a feature store or slides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfusion.cli.options import TrustCode
from cfusion.errors import ConfigError, PartialResultError

if TYPE_CHECKING:
    import pandas as pd


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
        Path | None,
        typer.Option(help="CSV slide_id,case_id, or slide,patient; default: by --table and the slides' names."),
    ] = None,
    cohort: Annotated[
        str | None, typer.Option(help="Cohort of the patients, for a model that was trained on several.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow server; default: MLFLOW_TRACKING_URI.")] = None,
    store: Annotated[Path | None, typer.Option(help="Keep features of slides in this store.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder of encoder checkpoints, for slides.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never download weights.")] = False,
    default_mpp: Annotated[float | None, typer.Option(help="µm/px of slides whose files do not state it.")] = None,
    threads: Annotated[int, typer.Option(help="Reading threads, for slides.", min=1)] = 2,
    table: Annotated[
        list[Path] | None, typer.Option(help="Clinical table with outcomes, for --report; once per cohort.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder of a report that scores the predictions.")] = None,
    trust_code: TrustCode = None,
) -> None:
    """Predict risk and survival of patients, in one process or under torchrun.

    Slides are preprocessed with the encoder of the model; embeddings of another encoder are refused. One row per
    patient: mean risk over the fold models and its standard deviation, the risk group by their cut-off, and
    survival at each month where a time bin ends. A slide that no table names belongs to the patient of its TCGA
    barcode, or to the known patient whose name it starts with. With --table and --report, the predictions are scored
    on cohorts that the model has not seen.

    \b
      cfusion predict slides/ --model models:/blca@champion --out risks.csv
      cfusion predict shards/ --model runs/blca --out risks.csv
      cfusion predict shards/ --model runs/blca --table external.csv --report external
    """  # noqa: D301 - the escape is typer's mark for lines that stay as they are
    if out is None and not as_json and report is None:
        raise ConfigError(
            "cfusion predict: no output was requested.", "Give --out FILE.csv, --json or --report FOLDER."
        )
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out}: is a folder.", f"Give the name of a file, such as {out / 'risks.csv'}.")
    if bool(table) != (report is not None):
        raise ConfigError(
            "cfusion predict: --table and --report need each other.",
            "Give the outcomes with --table and the folder of the report with --report, or neither.",
        )
    from cfusion.apply.prediction import predict_inputs

    settings = {"weights": weights, "offline": offline, "default_mpp": default_mpp, "threads": threads}
    done = predict_inputs(
        sources, model, uri=uri, trust_code=trust_code, cases=cases, tables=table or (), store=store, cohort=cohort,
        settings=settings,
    )  # fmt: skip
    if done.is_main:
        if out is not None or as_json:
            _deliver(done.table, done.slides_as_patients, out, as_json)
        if report is not None:
            from cfusion.runs.external import report_external

            typer.echo(f"report: {report_external(done, model, table or [], report)}", err=as_json)
        if done.failed:
            lost = ", ".join(done.failed[:5])
            raise PartialResultError(f"{len(done.failed)} slides could not be read: {lost}.", "See above.")


def _deliver(table: pd.DataFrame, slides: int, out: Path | None, as_json: bool) -> None:
    """Write the predictions and report their number; `slides` rows are slides taken as patients."""
    from cfusion.files import atomic_path

    if out is not None:
        with atomic_path(out) as temporary:
            table.to_csv(temporary, index=False)
    if as_json:
        typer.echo(json.dumps(_records(table), indent=1))
        return
    rows = {"patients": len(table) - slides, "slides": slides}
    counted = " and ".join(f"{count} {name}" for name, count in rows.items() if count)
    typer.echo(f"{counted}, {(table['group'] == 'high').sum()} at high risk: {out}")


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    """The predictions as JSON values, each with its curve as months and survival."""
    import pandas as pd

    from cfusion.survival.predictions import curve_columns, survival_columns

    columns = survival_columns(table)
    assert columns is not None
    stated = table.drop(columns=curve_columns(table)).astype(object)
    return [
        {**{str(k): v for k, v in row.items()}, "curve": {"months": months.tolist(), "survival": survival.tolist()}}
        for row, survival, months in zip(stated.where(pd.notna(stated), None).to_dict("records"), *columns, strict=True)
    ]
