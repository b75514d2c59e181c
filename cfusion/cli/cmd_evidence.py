"""Commands for evidence: score, report, null, audit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfusion.cli.completion import SettingsCommand, settings

if TYPE_CHECKING:
    from cfusion.cohort.audit import Audit
    from cfusion.config import Config

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value, such as evaluation.protocol=published", autocompletion=settings),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(score)
    app.command()(report)
    app.command(cls=SettingsCommand)(null)
    app.command(cls=SettingsCommand)(audit)


def score(
    predictions: Annotated[
        Path, typer.Option(help="CSV of out-of-fold predictions, one row per patient and model; or a sweep's archive.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, summary.csv and the report.")],
    bootstrap: Annotated[int, typer.Option(help="Patient-bootstrap replicates of each interval.", min=0)] = 1000,
    horizons: Annotated[str, typer.Option(help="Months at which the time-dependent AUC is computed.")] = "12,36,60",
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Scores of out-of-fold predictions",
    covariates: Annotated[
        list[str] | None,
        typer.Option(help="Table with case_id, age, sex, stage, grade; may be given again for other cohorts."),
    ] = None,
) -> None:
    """Score predictions of any program: tables, intervals, nulls and a report.

    Columns: model, cohort, fold, case_id, risk (higher is worse), survival_months, event (1 = happened) or censorship
    (1 = censored); optional protocol, seed, repeat, slide_id, risk_cutoff, survival_1..K and edge_1..K (months).

    With --covariates, the report also says what the risk adds to them; package:tcga/covariates/tcga_blca.csv and its
    neighbours ship with the package.

    \b
      cfusion score --predictions predictions.csv --out scored
      cfusion score --predictions p.csv --out scored --covariates clinic.csv
    """  # noqa: D301
    import pandas as pd

    from cfusion.cohort.covariates import read_covariates
    from cfusion.files import digest_file
    from cfusion.report import ReportContext, write_report
    from cfusion.survival.predictions import read_predictions
    from cfusion.survival.score import score as compute
    from launch.sweep.sharing import predictions_in

    with predictions_in(predictions) as table:
        frame = read_predictions(table)
    known = read_covariates([Path(table) for table in covariates or []], frame["case_id"])
    scores = compute(frame, covariates=known, bootstrap=bootstrap, horizons=_months(horizons))
    source = {predictions.name: {"sha256": digest_file(predictions), "bootstrap": bootstrap, "horizons": horizons}}
    page = write_report([scores], out, context=ReportContext(title=title, provenance=source))
    for note in scores.notes:
        typer.echo(f"note: {note}")
    for row in scores.summary.to_dict("records"):
        interval = f" [{row['within_low']:.3f}, {row['within_high']:.3f}]" if pd.notna(row["within_low"]) else ""
        typer.echo(
            f"{row['cohort']}\t{row['model']}\tC within folds {row['cindex_within']:.3f}{interval}\tmean "
            f"{row['cindex_mean']:.3f} ± {row['cindex_std']:.3f}\tpooled {row['cindex_pooled']:.3f}"
            f"{_clinical_words({str(name): value for name, value in row.items()})}"
        )
    typer.echo(f"report: {page}")


def _clinical_words(row: Mapping[str, Any]) -> str:
    """Return what the risk adds to the covariates; empty where they are unknown."""
    if not isinstance(row.get("clinical_covariates"), str):
        return ""
    ratio = row["hr_sd_adjusted"]
    adjusted = (
        "no hazard ratio" if ratio != ratio else f"adjusted HR per SD {ratio:.2f}, p {row['hr_sd_adjusted_p']:.2g}"
    )
    return (
        f"\tclinical {row['clinical_c']:.3f}, added {row['added_c']:+.3f} [{row['added_c_low']:+.3f}, "
        f"{row['added_c_high']:+.3f}]\t{adjusted}"
    )


def _months(text: str) -> tuple[float, ...]:
    from cfusion.errors import ConfigError

    try:
        months = tuple(float(word) for word in text.split(","))
    except ValueError:
        months = ()
    if not all(0 < month < float("inf") for month in months) or not months or list(months) != sorted(set(months)):
        raise ConfigError(f"--horizons {text!r}: expected increasing months, such as 12,36,60.")
    return months


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    title: Annotated[str, typer.Option(help="Heading.")] = "Survival from whole-slide images",
    pseudonyms: Annotated[
        bool, typer.Option("--pseudonyms", help="Replace the names of patients and slides by numbers.")
    ] = False,
) -> None:
    """Write one report on finished runs; seeds are scored together, permuted runs become the null of the others.

    cfusion report runs/study runs/study-amil --out report
    """
    from cfusion.report.runs import report_runs

    typer.echo(f"report: {report_runs(runs, out, title=title, pseudonyms=pseudonyms)}")


def null(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Overrides = None,
    permutations: Annotated[int, typer.Option(help="Also train N times on permuted outcomes.", min=0)] = 0,
    unit: Annotated[str, typer.Option(help="Unit that is scored: case or slide.")] = "case",
    repetitions: Annotated[
        int | None, typer.Option(help="Repetitions of the simulation; as many as in reports if not given.", min=2)
    ] = None,
    power: Annotated[
        bool, typer.Option("--power", help="Also print which difference of C the cohort can show.")
    ] = False,
) -> None:
    """Simulate what models without signal score on a cohort and its folds, under each protocol.

    The simulation takes seconds: linear models learn from random features. Patients, folds and limits are those of a
    run's report. Under published it chooses among the epochs that the configuration allows (train.epochs,
    train.min_epoch, train.patience). --permutations also trains the configuration on permuted outcomes, which is the
    better yardstick; the folders of those runs are next to the run's output folder.
    --power states which difference between two models the cohort can show, and how many events a difference of .03
    takes.

      cfusion null study.yaml --permutations 1
    """
    from cfusion.cohort.audited import audited
    from cfusion.cohort.joint import read_cohorts
    from cfusion.config import load_config
    from cfusion.errors import ConfigError

    settings = load_config(config, overrides or [])
    if unit not in ("case", "slide"):
        raise ConfigError(f"--unit {unit!r}: expected case or slide.")
    found = audited(settings, read_cohorts(settings))
    _echo_simulation(settings, found, unit, repetitions)
    if power:
        _echo_power(found)
    for seed in range(permutations):
        _echo_permutation(settings, seed)


def _echo_simulation(settings: Config, found: Audit, unit: str, repetitions: int | None) -> None:
    from cfusion.survival.null import EpochChoice, scored_outcomes, simulate_null

    folds = scored_outcomes(found.cohort, found.splits, unit)
    typer.echo("cohort\tprotocol\tepochs\tmean C of noise scores\tsd\t97.5% limit\tits Monte-Carlo error")
    choice = EpochChoice.of(settings.train)
    kinds = [("strict, fixed-epoch", "–", False, 0.0), ("published", f"independent; {choice}", True, 0.0),
             ("published", f"correlated; {choice}", True, 0.9)]  # fmt: skip
    for protocol, epochs, chosen, memory in kinds:
        result = simulate_null(
            folds, chosen_on_scored_fold=chosen, autocorrelation=memory, repetitions=repetitions, choice=choice
        )
        numbers = f"{result.mean:.3f}\t{result.sd:.3f}\t{result.high:.3f}\t{result.high_error:.3f}"
        typer.echo(f"{found.cohort.name}\t{protocol}\t{epochs}\t{numbers}")


def _echo_power(found: Audit) -> None:
    from cfusion.survival.null import scored_outcomes
    from cfusion.survival.power import power_of

    folds = scored_outcomes(found.cohort, found.splits)
    patients, events = sum(len(fold[0]) for fold in folds), sum(int(fold[1].sum()) for fold in folds)
    for line in power_of(patients, events).lines():
        typer.echo(f"power: {line}")


def _echo_permutation(settings: Config, seed: int) -> None:
    from cfusion.runs.crossval import cross_validate

    evaluation = settings.evaluation.model_copy(update={"permute_outcomes": seed})
    output = settings.output.with_name(f"{settings.output.name}-permuted-{seed}")
    scores = cross_validate(settings.model_copy(update={"evaluation": evaluation, "output": output}))
    row = scores.summary.iloc[0]
    typer.echo(
        f"permuted outcomes, seed {seed} ({settings.evaluation.protocol}): C within folds {row['cindex_within']:.3f}, "
        f"mean {row['cindex_mean']:.3f} in {output}"
    )


def audit(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if anything is dropped or suspicious.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="Try to read the site from the shards' embeddings.")] = False,
) -> None:
    """Check a cohort and its splits: what a run would drop, what is suspicious, and why.

    It needs no shards. `cfusion train --dry-run` also checks that each slide has features. --sites reads the shards and
    says how well the embeddings give away the submitting site.

      cfusion audit configs/tcga_blca.yaml
    """
    from cfusion.cohort.audited import audited
    from cfusion.cohort.findings import polarity, polarity_words
    from cfusion.cohort.joint import read_cohorts
    from cfusion.config import load_config
    from cfusion.survival.power import power_of

    settings = load_config(config, overrides or [])
    result = audited(settings, read_cohorts(settings))
    for finding in sorted(result.findings, key=lambda finding: finding.action, reverse=True):
        typer.echo(finding)
    for step, patients, slides in result.flow:
        typer.echo(f"{step}: {patients} patients, {slides} slides")
    cases = result.cohort.cases
    times, event = cases["time_months"].to_numpy(float), cases["event"].to_numpy(bool)
    if polarity(times, event) == "rather as stated":
        typer.echo(f"polarity: {polarity_words(times, event)}")
    for line in power_of(len(cases), int(cases["event"].sum())).lines():
        typer.echo(f"power: {line}")
    if sites:
        from cfusion.runs.site_embeddings import sites_in_embeddings

        found = sites_in_embeddings(settings, result.cohort)
        typer.echo(f"embeddings: {found or 'fewer than two sites have enough patients with slides in the shards'}")
    typer.echo(f"features: not checked; `cfusion train {config} --dry-run` checks them in {settings.data.where}")
    if strict or settings.evaluation.strict:
        result.raise_if_strict()
