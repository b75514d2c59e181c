"""Code clinical covariates (age, sex, stage, grade) as numbers for regressions, and read other end points.

Nothing is imputed here: what is missing stays NaN, and each regression fills it from its own training patients.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cfusion.cohort.identifiers import patient_of
from cfusion.cohort.parsing import coded_events, first_column, numbers, read_table
from cfusion.config import CohortConfig, CovariateType, validate
from cfusion.errors import CohortError, ConfigError, nearest

logger = logging.getLogger(__name__)

KNOWN: Mapping[str, CovariateType] = {
    "age": "number", "sex": "category", "is_female": "number", "stage": "ordered", "grade": "ordered",
}  # fmt: skip
"""Columns that are used when `cohort.covariates` is not set, and their types."""

_LEVEL = re.compile(r"(?:stage|grade|g)?\s*(?:([0-4])|(i{1,3}|iv))(?:[abc]\d?)?")
_ROMAN = {"i": 1.0, "ii": 2.0, "iii": 3.0, "iv": 4.0}
_WORDS = {"low": 1.0, "intermediate": 2.0, "high": 3.0, "low grade": 1.0, "high grade": 3.0}
_UNKNOWN = re.compile(r"(?:stage|grade|g)?\s*(?:x|unknown|not reported|not available|indeterminate)")


def coded_covariates(
    rows: pd.DataFrame, config: CohortConfig, source: Path
) -> tuple[pd.DataFrame | None, dict[str, str]]:
    """Return one column of numbers per covariate, or per level of a category; NaN where a value is missing.

    Without `cohort.covariates`, the columns in `KNOWN` are used, and one that cannot be coded is left out with a
    warning.

    Args:
        rows: Indexed by `case_id`; several rows of a patient must agree.
        config: Names and types of the covariates.
        source: The file, for errors.

    Returns:
        [case, column], indexed by `case_id`; None if there are no covariates. A category has a column for each level
        but the first in alphabetical order, such as `sex=male`. Then why a known column is not among them, by its name.

    Raises:
        ConfigError: A configured covariate is not a column of the table.
        CohortError: A value cannot be coded, or rows of a patient contradict each other.
    """
    chosen = config.covariates
    if chosen is None:
        chosen = {name: kind for name, kind in KNOWN.items() if name in rows.columns and rows[name].notna().any()}
        if "sex" in chosen:
            chosen.pop("is_female", None)
    parts: list[pd.DataFrame] = []
    unused: dict[str, str] = {}
    for name, kind in chosen.items():
        if name not in rows.columns:
            raise ConfigError(f"{source}: has no column {name} (cohort.covariates).", nearest(name, rows.columns))
        try:
            parts.append(_coded(_one_value(rows[name], source), kind, source))
        except CohortError as error:
            if config.covariates is not None:
                raise
            unused[name] = error.message
    return pd.concat(parts, axis=1) if parts else None, unused


def read_covariates(tables: Sequence[Path], case_ids: Iterable[str]) -> pd.DataFrame | None:
    """Read the covariates of patients from tables that need no outcomes; see `cohort.covariates_table`.

    Args:
        tables: Tables, each with its own patients; none: no covariates.
        case_ids: The patients whose covariates are wanted.

    Returns:
        [case, column], indexed by `case_id`; None without tables.

    Raises:
        ConfigError: A table has no column of patients, or no covariates.
        CohortError: Two tables have a patient in common, or none of the patients is in them.
    """
    parts = []
    for path in tables:
        config = validate(CohortConfig, {"covariates_table": str(path)}, "--covariates")
        rows = clinical_rows(pd.DataFrame(), config)
        assert rows is not None
        assert config.covariates_table is not None
        coded, _ = coded_covariates(rows, config, config.covariates_table)
        if coded is None:
            raise ConfigError(f"{path}: has no covariates.", f"Expected {', '.join(KNOWN)}.")
        parts.append(coded)
    if not parts:
        return None
    found = pd.concat(parts)
    order = list(KNOWN)
    found = found[sorted(found.columns, key=lambda name: order.index(str(name).split("=")[0]))]
    twice = found.index[found.index.duplicated()]
    if len(twice):
        raise CohortError(f"{twice[0]}: is a patient of two tables of covariates.", "Give each patient in one table.")
    if not found.index.isin(list(case_ids)).any():
        raise CohortError(
            f"{tables[0]}: none of the predicted patients is in the tables of covariates.", "Check the column case_id."
        )
    return found


def clinical_rows(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame | None:
    """Return the rows with the clinical covariates, indexed by patient; None if they do not name patients."""
    rows = table if config.covariates_table is None else read_table(config.covariates_table)
    names = ("case_id", "patient", "bcr_patient_barcode", "cases.submitter_id", "case_submitter_id", "submitter_id")
    name = first_column(rows, *names)
    if name not in rows.columns:
        if config.covariates_table is None:
            return None
        raise ConfigError(f"{config.covariates_table}: has no column of patients.", "Expected case_id.")
    named = rows[rows[name].notna()]
    return named.set_index(named[name].str.strip().map(patient_of).rename("case_id"))


def other_cause(rows: pd.DataFrame, endpoint: str) -> pd.Series | None:
    """Return which patients died without the event of the end point, [case]; None if the table does not say.

    Their follow-up is censored at death although the event can no longer happen: a competing risk.
    """
    if endpoint == "PFI" and "pfi_competing" in rows.columns:
        return _first(rows["pfi_competing"]).map(lambda cell: cell == "2")
    if endpoint == "DSS" and {"os", "dss"} <= set(rows.columns):
        died, of_it = (_by_case(coded_events, _first(rows[name]), "the covariates") for name in ("os", "dss"))
        return (died & ~of_it).fillna(False).astype(bool)
    return None


def endpoint_outcomes(rows: pd.DataFrame, endpoint: str, source: Path) -> pd.DataFrame | None:
    """Return `time_months` and `event` of an end point from columns such as `dss` and `dss_months`, [case].

    None if the table does not have them. Patients without a value have NaN and no event.

    Raises:
        CohortError: A value cannot be read, or rows of a patient contradict each other or hold half an outcome each.
    """
    name = endpoint.lower()
    if not {name, f"{name}_months"} <= set(rows.columns):
        return None
    named = {"time_months": rows[f"{name}_months"], "event": rows[name]}
    refuse_halves(pd.DataFrame(named), source)
    time, event = (_one_value(rows[column], source) for column in (f"{name}_months", name))
    return pd.DataFrame(
        {"time_months": _by_case(numbers, time, source), "event": _by_case(coded_events, event, source)}
    )


def refuse_halves(rows: pd.DataFrame, source: Path, numbers: pd.Index | None = None) -> None:
    """Refuse a patient whose time and event stand only in different rows: together they may be no one's outcome.

    Args:
        rows: `time_months` and `event`, indexed by patient, several rows of a patient allowed.
        source: The file, for errors.
        numbers: Number of each row in an editor, if it is known.

    Raises:
        CohortError: There is such a patient.
    """
    known = rows[["time_months", "event"]].notna()
    known["both"] = known["time_months"] & known["event"]
    has = known.groupby(level=0, sort=False).any()
    halves = has.index[has["time_months"] & has["event"] & ~has["both"]]
    if len(halves):
        of_case = rows.index == halves[0]
        where = "" if numbers is None else f" (rows {', '.join(map(str, numbers[of_case]))})"
        raise CohortError(
            f"{source}, case {halves[0]}: a row has a time and no event, and another an event and no time{where}.",
            "A patient's time and event must stand in one row; complete the row, or remove the one that is wrong.",
        )


def _by_case(convert: Callable[[pd.Series, Path | str], pd.Series], cells: pd.Series, source: Path | str) -> pd.Series:
    """Convert cells indexed by patient; an error names the patient, since the rows have been reordered."""
    plain = cells.reset_index(drop=True)
    try:
        return convert(plain, source).set_axis(cells.index)
    except CohortError:
        for case, cell in cells.items():
            try:
                convert(pd.Series([cell], name=cells.name), source)
            except CohortError as error:
                expected = error.message.partition("expected")[2]
                raise CohortError(
                    f"{source}, case {case}: {cells.name} is {cell!r}, expected{expected}", "Correct the cell."
                ) from None
        raise


def _first(cells: pd.Series) -> pd.Series:
    return cells.groupby(level=0, sort=False).first()


def _one_value(cells: pd.Series, source: Path) -> pd.Series:
    """Return the one value of each patient."""
    grouped = cells.groupby(level=0, sort=False)
    several = grouped.nunique() > 1
    if several.any():
        case = several.index[several][0]
        values = ", ".join(map(str, cells.loc[case].drop_duplicates()))
        raise CohortError(
            f"{source}, case {case}: the rows have different values of {cells.name} ({values}).", "Correct the rows."
        )
    return grouped.first()


def _coded(cells: pd.Series, kind: CovariateType, source: Path) -> pd.DataFrame:
    if kind == "number":
        return _by_case(numbers, cells, source).rename(str(cells.name)).to_frame()
    text = cells.astype("string").str.strip()
    if kind == "category":
        levels = sorted(text.dropna().unique())
        columns = {f"{cells.name}={level}": (text == level).astype("Float64") for level in levels[1:]}
        return pd.DataFrame(columns, index=cells.index).astype(float)
    lowered = text.str.lower()
    values = lowered.map(_level if kind == "ordered" else _listed(kind))
    wrong = lowered.notna() & values.isna() & ~lowered.fillna("").map(lambda cell: bool(_UNKNOWN.fullmatch(cell)))
    if wrong.any():
        case = wrong.index[wrong][0]
        known = "a stage or grade such as II, IIIa, G2, low" if kind == "ordered" else ", ".join(kind)
        raise CohortError(
            f"{source}, case {case}: {cells.name} is {cells[case]!r}, expected {known}.",
            f"Correct the cell, or list the levels in cohort.covariates.{cells.name}, lowest first.",
        )
    return values.astype(float).rename(str(cells.name)).to_frame()


def _listed(levels: Sequence[str]) -> dict[str, float]:
    return {level.lower(): float(place) for place, level in enumerate(levels, start=1)}


def _level(cell: str) -> float:
    """Return 0 … 4 for a stage or grade in words, Roman or Arabic numerals; NaN if it is none."""
    if pd.isna(cell):
        return float("nan")
    if cell in _WORDS:
        return _WORDS[cell]
    found = _LEVEL.fullmatch(cell)
    if found is None:
        return float("nan")
    return float(found[1]) if found[1] is not None else _ROMAN[found[2]]


def filled(values: pd.DataFrame, training: np.ndarray) -> pd.DataFrame:
    """Fill missing values with the training patients' medians, and drop columns that do not vary among them.

    Args:
        values: [case, column].
        training: [case], true for training patients.
    """
    known = values[training]
    varying = [name for name in values.columns if known[name].nunique() > 1]
    return values[varying].fillna(known[varying].median())
