"""`cfusion baseline`: what age, sex, stage and grade predict without a slide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfusion.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from cfusion.config import Config
    from cfusion.survival.score import Scores


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(baseline)


def baseline(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [section.key=value]...", help="YAML files, or shipped names.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the report and the predictions.")] = None,
) -> None:
    """Train and score the clinical model: a Cox regression of age, sex, stage and grade, on the folds of a run.

    It needs no slides and takes seconds. What a network must add to is the C printed here. The six TCGA cohorts come
    with the package; their names stand for their files.

    \b
      cfusion baseline tcga_blca tcga_brca tcga_coad tcga_gbmlgg tcga_luad tcga_ucec
      cfusion baseline study.yaml evaluation.endpoint=dss --out baseline
    """  # noqa: D301 - the escape is typer's mark for lines that stay as they are
    from cfusion.config import load_config
    from cfusion.report import ReportContext, write_report
    from cfusion.report.report_files import write_table
    from cfusion.run_folder import PREDICTIONS

    overrides = [word for word in configs if "=" in word and not Path(word).exists()]
    files = [word for word in configs if word not in overrides]
    if not files:
        raise ConfigError("cfusion baseline: no configuration was given.", "Example: cfusion baseline tcga_blca.")
    results, audits, endpoints = [], dict[str, dict[str, Any]](), dict[str, str]()
    for settings in (one for word in files for one in _each_cohort(load_config(_file(word), overrides))):
        scores, found = _scored(settings)
        results.append(scores)
        audits |= found
        endpoints |= dict.fromkeys(found, settings.cohort.endpoint)
        _echo(scores)
    if out is not None:
        context = ReportContext(title="What age, sex, stage and grade predict", audits=audits, endpoints=endpoints)
        typer.echo(f"report: {write_report(results, out, context=context)}")
        write_table(out / PREDICTIONS, _all_predictions(results))


def _file(word: str) -> Path:
    from cfusion.study.packaged import shipped_config, shipped_configs

    return shipped_config(word) if word in shipped_configs() and not Path(word).exists() else Path(word)


def _each_cohort(settings: Config) -> list[Config]:
    """Return the configuration of each cohort by itself: a Cox model of covariates is not shared by cancers."""
    if settings.splits.scheme == "cohort":
        raise ConfigError(
            "cfusion baseline fits the covariates of each cohort on its own folds; splits.scheme=cohort has none.",
            "Add splits.scheme=stratified and splits.folds=5.",
        )
    return [settings.of_cohort(name) for name in settings.cohorts] or [settings]


def _scored(settings: Config) -> tuple[Scores, dict[str, dict[str, Any]]]:
    from cfusion.cohort.audited import audited
    from cfusion.cohort.read import read_cohort
    from cfusion.survival.clinical import clinical_predictions
    from cfusion.survival.score import score

    # A regression chooses no epoch, so all patients that a fold does not score train it.
    evaluation = settings.evaluation.model_copy(update={"protocol": "fixed-epoch"})
    found = audited(settings.model_copy(update={"evaluation": evaluation}), read_cohort(settings.cohort))
    if evaluation.strict:
        found.raise_if_strict()
    scores = score(
        clinical_predictions(found.cohort, found.splits), splits=found.splits,
        bootstrap=evaluation.bootstrap, horizons=evaluation.horizons_months,
    )  # fmt: skip
    # The report describes the patients by their covariates; what the clinical model adds to itself is not computed.
    described = dataclasses.replace(scores, covariates=found.cohort.covariates)
    return described, {found.cohort.name: found.to_json()}


def _echo(scores: Scores) -> None:
    row = scores.summary.iloc[0]
    typer.echo(
        f"{row['cohort']}\t{row['n']} patients, {row['events']} events\tC {row['cindex_mean']:.3f} ± "
        f"{row['cindex_std']:.3f} over folds, {row['cindex_within']:.3f} [{row['within_low']:.3f}, "
        f"{row['within_high']:.3f}] within folds"
    )


def _all_predictions(results: Sequence[Scores]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([scores.predictions for scores in results], ignore_index=True)
