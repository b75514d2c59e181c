"""Reads and validates predictions from any source: one frame, a row per patient, model, seed and fold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from cfusion.cohort.identifiers import patient_of
from cfusion.cohort.parsing import coded_events, numbers, read_table
from cfusion.cohort.read import LONGEST_FOLLOW_UP_MONTHS, refuse_delayed_entry
from cfusion.config import Protocol
from cfusion.errors import CohortError, PredictionsError
from cfusion.types import Cohort

UNIT = ["cohort", "model", "protocol"]
"""Columns that identify a row of the summary."""

_DEFAULTS: dict[str, str | int] = {"protocol": "unknown", "seed": 0, "repeat": 0}
FOLD = [*UNIT, "seed", "repeat", "fold"]
"""Columns that identify a row of the scores per fold."""

STRATUM = "stratum"
"""Column with a patient's own cohort where `cohort` names several together; only patients of one are compared."""

JOINT = "joint"
"""Optional column with the common name of cohorts that a model was trained on as one; empty for one cohort."""

KNOWN_PROTOCOLS = (*get_args(Protocol), "unknown")
"""How the epoch was chosen; each protocol has a different null."""

_REQUIRED = ("model", "cohort", "fold", "case_id", "risk", "survival_months", "event")
_CURVE = re.compile(r"(survival|edge)_\d+")


def read_predictions(path: Path) -> pd.DataFrame:
    """Read a CSV of out-of-fold predictions.

    Columns: `model, cohort, fold, case_id, risk, survival_months` and `event` (1 = happened) or `censorship` (1 =
    censored); optional `protocol, seed, repeat, slide_id, risk_cutoff`, `joint` (see `JOINT`) and `survival_1..K` with
    `edge_1..K` (months).

    Raises:
        PredictionsError: The file is not such a table, or its values contradict each other; see `checked_predictions`.
    """
    try:
        table = read_table(path)
        refuse_delayed_entry(table, str(path))
        if "censorship" in table.columns:
            table["event"] = _events(table, path)
        elif "event" in table.columns:
            table["event"] = coded_events(table["event"], path)
        for name in ("risk", "survival_months", "fold", "seed", "repeat", "risk_cutoff", *curve_columns(table)):
            if name in table.columns:
                table[name] = numbers(table[name], path)
    except CohortError as error:
        raise PredictionsError(error.message, error.remedy) from error
    return checked_predictions(table, str(path))


def _events(table: pd.DataFrame, path: Path) -> pd.Series:
    event = coded_events(table.pop("censorship"), path, "censored")
    if "event" in table.columns and (event != coded_events(table["event"], path)).any():
        raise PredictionsError(f"{path}: event and censorship contradict each other.", "Drop the inverted column.")
    return event


def checked_predictions(table: pd.DataFrame, source: str = "predictions") -> pd.DataFrame:
    """Return predictions with every default filled in, one row per patient, model, seed, repeat and fold.

    Rows of one patient that differ in `slide_id` are averaged, because the unit of evaluation is the patient.

    Raises:
        PredictionsError: A column or a value is missing, not finite or of the wrong kind; a follow-up time is negative
            or over 50 years; a patient appears twice, is scored in two folds, or has two outcomes in a cohort.
    """
    missing = [name for name in _REQUIRED if name not in table.columns]
    if missing:
        raise PredictionsError(
            f"{source}: lacks the columns {', '.join(missing)}.",
            "Expected model, cohort, fold, case_id, risk, survival_months and event (or, in a file, censorship).",
        )
    frame = table.copy()
    for name, value in _DEFAULTS.items():
        if name not in frame.columns:
            frame[name] = value
    _check_values(frame, source)
    frame["event"] = frame["event"].astype(bool)
    frame = frame.astype({"fold": int, "seed": int, "repeat": int})
    frame["case_id"] = frame["case_id"].astype(str).str.strip().map(patient_of)
    frame = _one_row_per_patient(frame, source)
    _check_outcomes(frame, source)
    return frame.reset_index(drop=True)


def _check_values(frame: pd.DataFrame, source: str) -> None:
    def refuse(wrong: pd.Series, what: str, remedy: str) -> None:
        if wrong.any():
            row = frame[wrong].iloc[0]
            fold = f"{row['fold']:g}" if isinstance(row["fold"], float) else row["fold"]
            where = f"{row['model']}, {row['cohort']}, fold {fold}, case {row['case_id']}"
            raise PredictionsError(f"{source}: {int(wrong.sum())} values of {what}; first {where}.", remedy)

    for name in (*UNIT, "case_id", "event"):
        refuse(frame[name].isna(), f"{name} are missing", "Every row needs one.")
    for name in ("fold", "seed", "repeat", "risk", "survival_months"):
        refuse(_missing(frame[name]), f"{name} are missing or not finite", "Every row needs one.")
    for name in ("fold", "seed", "repeat"):
        refuse(frame[name].astype(float) % 1 != 0, f"{name} are not whole numbers", "Number them 0, 1, 2, …")
    known = ", ".join(KNOWN_PROTOCOLS)
    refuse(
        ~frame["protocol"].isin(KNOWN_PROTOCOLS), "protocol are not known",
        f"Known: {known}; without the column: unknown.",
    )  # fmt: skip
    times = frame["survival_months"].astype(float)
    refuse(times < 0, "survival_months are negative", "Correct the rows, or leave the patients out.")
    refuse(times > LONGEST_FOLLOW_UP_MONTHS, "survival_months are over 50 years", "Are the times in days? Give months.")
    for name in curve_columns(frame):
        missing = _missing(frame[name])
        other = name.replace("survival", "edge") if name.startswith("survival") else name.replace("edge", "survival")
        lacking = _missing(frame[other]) if other in frame.columns else pd.Series(True, index=frame.index)
        refuse(lacking & ~missing, f"{name} have no {other}", "Survival holds at edge_1, edge_2, … (months).")
        some = ~missing.groupby([frame[unit] for unit in UNIT]).transform("all")
        refuse(missing & some, f"{name} are missing or not finite", "A model has it for all patients or for none.")


def _missing(cells: pd.Series) -> pd.Series:
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    return values.isna() | (values.abs() == np.inf)


def _one_row_per_patient(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    keys = [*FOLD, "case_id"]
    if "slide_id" in frame.columns and frame.duplicated(keys).any():
        frame = frame.drop_duplicates()
        again = frame.duplicated([*keys, "slide_id"])
        if again.any():
            row = frame[again].iloc[0]
            raise PredictionsError(
                f"{source}: slide {row['slide_id']} of case {row['case_id']} has two different predictions "
                f"({row['model']}, {row['cohort']}, fold {row['fold']}).",
                "Correct the rows; repetitions go into a column repeat.",
            )
        rule = {
            name: "mean" if name in ("risk", "risk_cutoff") or _CURVE.fullmatch(name) else "first"
            for name in frame.columns
        }
        frame = frame.groupby(keys, sort=False, as_index=False).agg({k: v for k, v in rule.items() if k not in keys})
    for columns, what in ((keys, "twice in one fold"), ([k for k in keys if k != "fold"], "in two folds")):
        twice = frame.duplicated(columns)
        if twice.any():
            row = frame[twice].iloc[0]
            where = f"{row['model']}, {row['cohort']}, fold {row['fold']}"
            raise PredictionsError(
                f"{source}: case {row['case_id']} is scored {what} ({where}).",
                "Give slides of one patient a column slide_id, repetitions a column repeat.",
            )
    return frame


def _check_outcomes(frame: pd.DataFrame, source: str) -> None:
    distinct = frame.groupby(["cohort", "case_id"], sort=False)[["survival_months", "event"]].nunique()
    wrong = distinct.index[(distinct > 1).any(axis=1)]
    if len(wrong):
        cohort, case = wrong[0]
        raise PredictionsError(f"{source}: case {case} of {cohort} has two different outcomes.", "Correct its rows.")


def curve_columns(frame: pd.DataFrame) -> list[str]:
    """Return the names of the columns `survival_1…K` and `edge_1…K`."""
    return [str(name) for name in frame.columns if _CURVE.fullmatch(str(name))]


def curve_table(
    case_ids: Sequence[str], survival: np.ndarray, edges_months: Sequence[float], risk: np.ndarray | None = None
) -> pd.DataFrame:
    """Return one row per patient: `case_id, risk, survival_1…K, edge_1…K`.

    Args:
        case_ids: The patients.
        survival: [case, bin], survival past the right edge of each time bin.
        edges_months: [bin], right edges, the same for all patients.
        risk: [case]; None: minus the sum of `survival`, the risk that every single model uses.
    """
    shared = {"case_id": list(case_ids), "risk": -survival.sum(axis=1) if risk is None else risk}
    curves = {f"survival_{k + 1}": values for k, values in enumerate(survival.T)}
    return pd.DataFrame({**shared, **curves, **{f"edge_{k + 1}": edge for k, edge in enumerate(edges_months)}})


def fold_predictions(curves: pd.DataFrame, cohort: Cohort, shared: Mapping[str, Any]) -> pd.DataFrame:
    """Return the predictions of a fold's test patients with their outcomes, validated like any other predictions.

    Args:
        curves: Output of `curve_table`, or its columns `case_id` and `risk`.
        cohort: Cohort with the patients' outcomes; with strata, each row names the patient's own cohort.
        shared: The columns that all rows share: `model, protocol, seed, repeat, fold`, and `risk_cutoff`, one or [row].
    """
    cases = cohort.cases.loc[curves["case_id"]]
    outcomes = {"survival_months": cases["time_months"].to_numpy(), "event": cases["event"].to_numpy()}
    frame = curves.assign(cohort=cohort.strata_of(list(curves["case_id"])), **shared, **outcomes)
    first = ["model", "cohort", *FOLD[2:], "case_id", "risk", "survival_months", "event", "risk_cutoff"]
    return checked_predictions(frame[[*first, *curve_columns(frame)]])


def survival_columns(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray] | None:
    """Return predicted survival [case, bin] and right edges [case, bin] in months; None without survival columns.

    Args:
        frame: Checked predictions of one model.
    """
    there = [c for c in curve_columns(frame) if c.startswith("survival_") and frame[c].notna().all()]
    names = sorted(there, key=lambda c: int(c[9:]))
    if not names:
        return None
    return frame[names].to_numpy(float), frame[[f"edge_{name[9:]}" for name in names]].to_numpy(float)
