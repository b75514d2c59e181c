"""External validation: the predictions of a finished model on patients of other cohorts, scored and reported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.apply.ensemble import mean_cutoff
from cfusion.apply.prediction import Prediction
from cfusion.cohort.audit import Audit, audit
from cfusion.cohort.read import read_outcomes
from cfusion.errors import DataError
from cfusion.files import digest_file
from cfusion.report import ReportContext, write_report
from cfusion.run_folder import OUTCOMES, find_run
from cfusion.survival.added import COX_FOLDS
from cfusion.survival.predictions import curve_columns, fold_predictions
from cfusion.survival.score import Scores, score
from cfusion.training.fitted import ModelCard
from cfusion.training.seen import digest_case
from cfusion.types import Cohort

logger = logging.getLogger(__name__)

_USUAL_HIGH_RISK = (0.2, 0.8)
"""Share of patients above the training's median risk outside which the new patients or embeddings must differ."""

_UNCHECKED = (
    "The models do not record the patients of their training, so it was not checked that none of them is scored here."
)


@dataclass(frozen=True)
class _Tested:
    """One cohort: what the audit left, its scores, and what a reader must know."""

    found: Audit
    scores: Scores
    notes: tuple[str, ...]


def report_external(done: Prediction, model: str, tables: Sequence[Path], out: Path) -> Path:
    """Score predictions on cohorts with known outcomes, and write one report.

    Args:
        done: Predictions of a model on new patients.
        model: The model, as it was named.
        tables: The clinical tables of `done.cohorts`.
        out: Folder of the report.

    Returns:
        Path of the page.

    Raises:
        DataError: A patient of a table trained the model, two tables have a patient in common, or no predicted patient
            is in a table; or as for `score`.
    """
    seen = done.seen | _patients_of_run(model)
    tested = [_tested(done, cohort, seen) for cohort in done.cohorts]
    _check_disjoint([part.found.cohort for part in tested])
    card = done.cards[0]
    context = ReportContext(
        title=f"{card.model['name']} of {card.cohort} on {', '.join(part.found.cohort.name for part in tested)}",
        endpoints={part.found.cohort.name: part.found.cohort.endpoint for part in tested},
        audits={part.found.cohort.name: part.found.to_json() for part in tested},
        provenance={"external validation": _provenance(done, model, tables)},
        notes=[*([] if seen else [_UNCHECKED]), *(note for part in tested for note in part.notes)],
    )
    return write_report([part.scores for part in tested], out, context=context)


def _patients_of_run(model: str) -> frozenset[str]:
    """Return digests of the patients of the model's run; none if there is only the model."""
    outcomes = None if model.startswith("models:") else find_run(Path(model)) / OUTCOMES
    if outcomes is None or not outcomes.is_file():
        return frozenset()
    return frozenset(digest_case(str(case)) for case in read_outcomes(outcomes, "training").cases.index)


def _tested(done: Prediction, cohort: Cohort, seen: frozenset[str]) -> _Tested:
    predicted = done.table[done.table["case_id"].isin(cohort.cases.index)]
    if predicted.empty:
        raise DataError(
            f"{cohort.name}: none of its {len(cohort.cases)} patients is among the {len(done.table)} predicted ones, "
            f"such as {done.table['case_id'].iloc[0]}.",
            "Give --cases TABLE, which names the patient of each slide.",
        )
    known = sorted(case for case in predicted["case_id"] if digest_case(case) in seen)
    if known:
        raise DataError(
            f"{cohort.name}: {len(known)} patients are in the run that trained the model, such as {known[0]}.",
            "Remove them: an external cohort has patients that the model has not seen.",
        )
    found = audit(cohort.subset(list(predicted["case_id"])), [])
    usable = predicted[predicted["case_id"].isin(found.cohort.cases.index)]
    frame = _frame(usable, found.cohort, done.cards)
    scores = score(frame, covariates=found.cohort.covariates)
    notes = _notes(frame, cohort, done.cards)
    if outside := done.outside(usable):
        notes.append(f"{cohort.name}: {outside}")
    if scores.added:
        notes.append(
            f"{cohort.name}: the Cox models of the covariates are fitted on the patients of this cohort, in "
            f"{COX_FOLDS} drawn folds; the network has seen none of them."
        )
    return _Tested(found, scores, tuple(notes))


def _frame(usable: pd.DataFrame, cohort: Cohort, cards: Sequence[ModelCard]) -> pd.DataFrame:
    """Return checked predictions: one fold, which no training patient is in."""
    kept = ["case_id", "risk", *curve_columns(usable)]
    cutoff = mean_cutoff(cards)
    shared: dict[str, Any] = {
        "model": cards[0].model["name"], "protocol": "strict", "seed": 0, "repeat": 0, "fold": 0,
        "risk_cutoff": float("nan") if cutoff is None else cutoff,
    }  # fmt: skip
    return fold_predictions(usable[kept], cohort, shared)


def _notes(frame: pd.DataFrame, cohort: Cohort, cards: Sequence[ModelCard]) -> list[str]:
    card = cards[0]
    notes = [
        f"External validation: {card.model['name']} was trained on {card.cohort} ({len(cards)} fold models, embeddings "
        f"of {card.encoder}, epochs chosen under {card.protocol}) and tested on {cohort.name}."
    ]
    if card.strata:
        notes.append(
            f"{cohort.name}: {card.cohort} is several cohorts, each with its own time bins; the survival curves are in "
            "their mean. Read the C-index, not the calibration."
        )
    without = len(cohort.cases) - len(frame)
    if without:
        notes.append(
            f"{cohort.name}: {without} of {len(cohort.cases)} patients of the table have no prediction or no usable "
            "outcome."
        )
    cutoff = mean_cutoff(cards)
    if cutoff is not None:
        high = float((frame["risk"] >= cutoff).mean())
        if not _USUAL_HIGH_RISK[0] <= high <= _USUAL_HIGH_RISK[1]:
            notes.append(
                f"{cohort.name}: {high:.0%} of the patients are above the median risk of the training patients. The "
                "patients or their embeddings (stain, scanner, preparation) differ from those of the training; read "
                "survival probabilities and risk groups with care."
            )
    return notes


def _check_disjoint(cohorts: Sequence[Cohort]) -> None:
    places: dict[str, str] = {}
    for cohort in cohorts:
        for case in cohort.cases.index:
            other = places.setdefault(str(case), cohort.name)
            if other != cohort.name:
                raise DataError(f"{case}: is a patient of {other} and of {cohort.name}.", "Keep it in one table.")


def _provenance(done: Prediction, model: str, tables: Sequence[Path]) -> dict[str, Any]:
    card, distance = done.cards[0], done.table.get("distance")
    outside = "unknown" if distance is None else f"{int((distance > 1).sum())} of {len(distance)} patients"
    return {
        "model": model, "fold_models": len(done.cards), "trained_on": card.cohort, "endpoint": card.endpoint,
        "outside_of_training": outside,
        "encoder": card.encoder, "protocol_of_training": card.protocol,
        "tables": {table.name: digest_file(table) for table in tables},
    }  # fmt: skip
