"""Builds one report from the folders of finished `cfusion train` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.cohort.read import read_outcomes
from cfusion.cohort.splits import read_splits
from cfusion.config import Config
from cfusion.errors import DataError
from cfusion.report.context import ReportContext
from cfusion.report.pseudonyms import Pseudonyms
from cfusion.report.report_files import write_report
from cfusion.report.search_section import choices_of
from cfusion.run_folder import COVARIATES, OUTCOMES, SPLITS, FinishedRun, predictions_file, read_run
from cfusion.survival.null import EpochChoice
from cfusion.survival.predictions import read_predictions
from cfusion.survival.score import Key, Scores, score
from cfusion.types import Cohort, Split
from cfusion.yaml_files import differing_values


def report_runs(
    folders: Sequence[Path], out: Path, *, title: str, oracle: dict[str, float] | None = None, pseudonyms: bool = False
) -> Path:
    """Score finished runs and write one report; runs on permuted outcomes are shown as the permuted null.

    Args:
        folders: Output folders of runs; seeds of one cohort, model and protocol are scored together.
        out: Folder of the report.
        title: Heading.
        oracle: Per cohort, the C-index of the true risk, for synthetic cohorts.
        pseudonyms: Replace the names of patients and slides.

    Returns:
        Path of the page.

    Raises:
        DataError: A folder holds no finished run, none has real outcomes, or runs of one cohort, model and protocol
            differ in more than the seed and the fold.
    """
    runs = [read_run(folder) for folder in folders]
    real = [run for run in runs if run.config.evaluation.permute_outcomes is None]
    permuted = [run for run in runs if run.config.evaluation.permute_outcomes is not None]
    if not real:
        raise DataError("report: none of the runs has real outcomes.", "Add a run without evaluation.permute_outcomes.")
    grouped: dict[Key, list[FinishedRun]] = {}
    for run in real:
        grouped.setdefault(run.key, []).append(run)
    null: dict[Key, list[float]] = {}
    for run in permuted:
        null.setdefault(run.key, []).append(float(score_runs([run], bootstrap=0).summary["cindex_within"].iloc[0]))
    hidden = Pseudonyms(name for run in runs for name in _names_in(run)) if pseudonyms else None
    context = ReportContext(
        title=title,
        endpoints={run.config.cohort.name: run.config.cohort.endpoint for run in real},
        audits={run.config.cohort.name: run.audit if hidden is None else _without_names(run, hidden) for run in real},
        provenance={str(run.folder.name): run.provenance for run in real},
        curves=pd.concat([run.curves() for run in real], ignore_index=True),
        oracle={key: oracle[key[0]] for key in grouped if oracle and key[0] in oracle},
        choices={key: EpochChoice.of(members[0].config.train) for key, members in grouped.items()},
        searches={key: found for key, members in grouped.items() if (found := choices_of(members))},
        permuted={key: sum(values) / len(values) for key, values in null.items()},
        notes=[f"{', '.join(key)}: {note}" for key, members in grouped.items() for note in members[0].config.notes],
    )
    context = context.with_parts({run.config.cohort.name: list(run.config.cohorts) for run in real})
    scores = [score_runs(runs, runs[0].config.evaluation.bootstrap) for runs in grouped.values()]
    page = write_report(scores, out, context=context)
    if hidden is not None:
        hidden.hide_in_folder(out)
    return page


def _names_in(run: FinishedRun) -> set[str]:
    """Return the names of patients and slides in a run: of its outcomes, its predictions and its audit."""
    predictions = read_predictions(predictions_file(run.folder))
    names = {str(name) for column in ("case_id", "slide_id") if column in predictions for name in predictions[column]}
    names |= set(map(str, read_outcomes(run.folder / OUTCOMES, run.config.cohort.name).cases.index))
    subjects = {str(finding["subject"]) for finding in run.audit["findings"]}
    subjects = {subject for subject in subjects if not subject.startswith("fold ")} - set(_cohort_names(run))
    return {name for name in names | subjects if name not in ("", "nan")}


def _cohort_names(run: FinishedRun) -> tuple[str, ...]:
    return (run.config.cohort.name, *run.config.cohorts)


def _without_names(run: FinishedRun, hidden: Pseudonyms) -> dict[str, Any]:
    kept = _cohort_names(run)
    return {**run.audit, "findings": [hidden.of_finding(finding, kept) for finding in run.audit["findings"]]}


def score_runs(runs: Sequence[FinishedRun], bootstrap: int) -> Scores:
    """Score runs that differ only in the seed or in the fold that each trained, as one result.

    Raises:
        DataError: They differ in something else, or two have the same seed and fold.
    """
    first = runs[0]
    for other in runs[1:]:
        _check_alike(first, other)
    return score(
        pd.concat([read_predictions(predictions_file(run.folder)) for run in runs], ignore_index=True),
        *outcomes_and_splits([run.folder for run in runs], first.config.cohort.name),
        bootstrap=bootstrap,
        horizons=first.config.evaluation.horizons_months,
    )


def outcomes_and_splits(folders: Sequence[Path], cohort: str) -> tuple[Cohort, list[Split]]:
    """Return the reference for runs of one cohort: the outcomes of all patients, and the folds of all runs."""
    splits = {(split.repeat, split.fold): split for folder in folders for split in read_splits(folder / SPLITS)}
    covariates = folders[0] / COVARIATES
    truth = read_outcomes(folders[0] / OUTCOMES, cohort, covariates if covariates.is_file() else None)
    return truth, list(splits.values())


def _check_alike(first: FinishedRun, other: FinishedRun) -> None:
    differing = differing_values(_without_places(first), _without_places(other)).keys()
    fold_apart = "config.splits.fold" in differing
    seeds = {"config.seed", "config.data.order_seed", "config.splits.fold"}
    # The report shows which code ran each run.
    elsewhere = {"platform", "code", "program", "notes"}
    wrong = {name for name in differing - seeds - elsewhere if not name.startswith("packages.")}
    wrong -= {"splits_digest"} if fold_apart else set()
    if wrong or not differing & {"config.seed", "config.splits.fold"}:
        what = f"differ in {', '.join(sorted(wrong))}" if wrong else "have the same seed and fold"
        raise DataError(
            f"{first.folder} and {other.folder} are both {', '.join(first.key)}, but {what}.",
            "Report them separately, or compare them as a sweep: cfusion sweep report.",
        )


def _without_places(run: FinishedRun) -> dict[str, Any]:
    """Return the provenance without settings that decide no number; tables and shards are compared by their digests."""
    return {**run.provenance, "config": Config.without_asides(run.provenance["config"])}
