"""Remarks on scores that a reader must see with them: doubts about outcomes, risks and intervals."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from cfusion.cohort.findings import outcome_doubts
from cfusion.cohort.identifiers import alike
from cfusion.survival.added import is_constant
from cfusion.survival.bootstrap import FEW_EVENTS
from cfusion.survival.doubts import Doubt, prediction_doubts
from cfusion.survival.predictions import FOLD, UNIT

_DISAGREE = 0.02
"""Difference between pooled C and C within folds from which a note says so."""


_TURNED = 0.003
"""Minimum difference between two models from which a note says that both rank them differently."""


def score_notes(frame: pd.DataFrame, folds: pd.DataFrame, summary: pd.DataFrame, resampled: bool) -> tuple[str, ...]:
    """Return the remarks on a set of scores.

    Args:
        frame: Checked predictions.
        folds: Scores by fold.
        summary: Scores by cohort, model and protocol.
        resampled: Whether there are intervals.
    """
    notes: list[str] = []
    for name, rows in frame.groupby("cohort", sort=False):
        cases = rows.drop_duplicates("case_id")
        doubts = outcome_doubts(str(name), cases["survival_months"], cases["event"])
        notes += [Doubt(f"{doubt.subject}: {doubt.message}.") for doubt in doubts]
        notes += [
            Doubt(f"{name}: {' and '.join(group)} are scored as different patients; are they one?")
            for group in alike(cases["case_id"])[:1]
        ]
        events = int(cases["event"].sum())
        if resampled and events < FEW_EVENTS:
            notes.append(
                f"{name}: {events} events. Below about {FEW_EVENTS}, no interval or test can be trusted; read them as "
                "the least that is uncertain."
            )
    constant = no_models(frame)
    notes += [
        Doubt(f"{c}, {m} ({p}): no model; within each fold all patients have the same risk.") for c, m, p in constant
    ]
    notes += _fold_notes(folds, constant)
    notes += prediction_doubts(frame, summary)
    if resampled:
        notes += [
            f"{row['cohort']}, {row['model']}: no interval; most bootstrap replicates have no comparable pair."
            for row in summary[summary["within_low"].isna()].to_dict("records")
        ]
    return (*notes, *_disagreements(summary))


def no_models(frame: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Return cohort, model and protocol of predictions that rank nobody: one risk for all patients of each fold."""
    constant = frame.groupby(FOLD, sort=False)["risk"].apply(lambda risk: is_constant(risk.to_numpy(float)))
    every = constant.groupby(level=UNIT, sort=False).all()
    return [(str(c), str(m), str(p)) for c, m, p in every.index[every]]


def _fold_notes(folds: pd.DataFrame, constant: list[tuple[str, str, str]]) -> list[str]:
    """Return the remarks of folds, except those of results that are no model at all."""
    named = pd.MultiIndex.from_frame(folds[UNIT].astype(str)).isin(constant) if constant else False
    notes = []
    for words, rows in folds[(folds["note"] != "") & ~pd.Series(named, index=folds.index)].groupby(
        ["model", "note"], sort=False
    ):
        counts = ", ".join(f"{count} of {cohort}" for cohort, count in rows["cohort"].value_counts(sort=False).items())
        notes.append(f"{words[0]}: {words[1]} in folds ({counts}).")
    return notes


def _disagreements(summary: pd.DataFrame) -> list[str]:
    """Say where pooled C and C within folds differ, or rank two models differently."""
    notes = []
    for (cohort, protocol), rows in summary.groupby(["cohort", "protocol"], sort=False):
        several = rows.to_dict("records") if (rows["folds"] > 1).all() else []
        notes += [
            f"{cohort}, {row['model']} ({protocol}): pooled C {row['cindex_pooled']:.3f} and C within folds "
            f"{row['cindex_within']:.3f} disagree; the risks of its folds may differ in scale, so only C within folds "
            "is a claim."
            for row in several if _apart(row)
        ]  # fmt: skip
        for one, other in itertools.combinations(several, 2):
            pooled, within = (one[name] - other[name] for name in ("cindex_pooled", "cindex_within"))
            if pooled * within < 0 and min(abs(pooled), abs(within)) > _TURNED and (_apart(one) or _apart(other)):
                better, worse = sorted((one, other), key=lambda row: -row["cindex_within"])
                notes.append(
                    f"{cohort} ({protocol}): {better['model']} is better than {worse['model']} within folds, and worse "
                    "when the risks are pooled."
                )
    return notes


def _apart(row: Mapping[Hashable, Any]) -> bool:
    return bool(abs(row["cindex_pooled"] - row["cindex_within"]) > _DISAGREE)
