"""Find out how a clinical table must be read: layout, time unit, polarity, endpoint, and the slides of its patients."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from cfusion.cohort.identifiers import Names
from cfusion.cohort.parsing import numbers, read_table
from cfusion.cohort.read import read_cohort
from cfusion.cohort.slide_owners import known_owner
from cfusion.config import CohortConfig, validate
from cfusion.errors import ConfigError, DataError
from cfusion.types import Cohort

MOST_MONTHS = 360.0
"""Longest time that is taken for months; whole numbers above it are days."""
MOST_YEARS = 15.0
"""Longest time that is taken for years, if times have decimals: few cohorts end within 15 months."""

_KNOWN_COLUMNS = {
    "patient": ("patient", "patientid", "case", "caseid", "subject", "subjectid", "id"),
    "slide": ("slide", "slideid", "slidename", "filename", "file", "image", "imageid", "wsi"),
    "time": ("time", "survival", "survivaltime", "followup", "os", "ostime", "months", "osmonths", "days", "osdays",
             "survivaldays", "survivalmonths", "timetoevent", "futime"),
    "event": ("event", "status", "dead", "death", "died", "vitalstatus", "osstatus", "osevent", "fustat"),
}  # fmt: skip
"""Columns of a plain table, and what other tables call them, without case, spaces and signs."""


@dataclass(frozen=True)
class ProposedCohort:
    """How the table is read.

    Attributes:
        values: Settings of the section `cohort`.
        reasons: Why, by key.
        cohort: The patients that this gives.
    """

    values: Mapping[str, Any]
    reasons: Mapping[str, str]
    cohort: Cohort


def propose_cohort(table: Path, name: str) -> ProposedCohort:
    """Propose the section `cohort` for a table; see also `with_slides`.

    Args:
        table: The clinical table.
        name: Name of the cohort.

    Raises:
        ConfigError: The layout is unknown; the remedy names the columns to rename.
        DataError: A value of the table is invalid.
    """
    cells = read_table(table)
    values: dict[str, Any] = {"name": name, "table": str(table)}
    reasons: dict[str, str] = {"table": f"{len(cells)} rows"}
    if {"patient", "time"} <= set(cells.columns):
        values["time_unit"], reasons["time_unit"] = time_unit(numbers(cells["time"], table))
        if "censorship" in cells.columns and "event" not in cells.columns:
            values["event_is"], reasons["event_is"] = "censored", "1 in the column censorship is a censored patient"
    values, cohort = _read(values, reasons, cells)
    reasons["name"] = f"{len(cohort.cases)} patients, {int(cohort.cases['event'].sum())} events"
    if cohort.covariates is not None and len(cohort.covariates.columns):
        found = ", ".join(map(str, cohort.covariates.columns))
        reasons["table"] += f"; clinical covariates that reports compare with: {found}"
    return ProposedCohort(values, reasons, cohort)


def with_slides(proposed: ProposedCohort, slides: Collection[str]) -> ProposedCohort:
    """Add how the slides that have features belong to the patients.

    Args:
        proposed: How the table is read.
        slides: Slides that have features.

    Raises:
        DataError: The table names no slides, and none of `slides` is named after a patient.
    """
    known = Names(proposed.cohort.cases.index)
    if len(proposed.cohort.slides):
        return proposed
    if all(known_owner(slide, known.find) is None for slide in slides):
        raise DataError(
            f"{proposed.values['table']}: names no slides, and no slide with features is named after a patient, such "
            f"as slide {min(slides)} and patient {proposed.cohort.cases.index[0]}.",
            "Add a column slide to the table, or write a table slide_id,case_id and name it in cohort.slides.",
        )
    how = "; names no slides: a slide belongs to the patient whose name its name starts with"
    return replace(proposed, reasons={**proposed.reasons, "table": proposed.reasons["table"] + how})


def time_unit(times: pd.Series) -> tuple[str, str]:
    """Guess the unit of times, and say why.

    Returns:
        months, days or years, and a reason that a reader can check.
    """
    known = times.dropna()
    longest, median = float(known.max()), float(known.median())
    with_decimals = bool((known % 1 != 0).any())
    unit = "months"
    if longest > MOST_MONTHS:
        unit = "days"
    elif longest <= MOST_YEARS and with_decimals:
        unit = "years"
    in_months = {"days": 12 / 365.25, "months": 1.0, "years": 12.0}[unit]
    return unit, (
        f"check: median {median * in_months:.1f} and longest {longest * in_months:.1f} months of follow-up, if this is "
        "the unit"
    )


def _read(values: dict[str, Any], reasons: dict[str, str], cells: pd.DataFrame) -> tuple[dict[str, Any], Cohort]:
    """Read the cohort with the first endpoint that the table has."""
    first: ConfigError | None = None
    endpoints = get_args(CohortConfig.model_fields["endpoint"].annotation)
    for endpoint in endpoints:
        chosen = values if endpoint == endpoints[0] else {**values, "endpoint": endpoint}
        try:
            cohort = read_cohort(validate(CohortConfig, chosen, values["table"]))
        except ConfigError as error:
            first = first or error
            continue
        if endpoint != endpoints[0]:
            reasons["endpoint"] = f"the table has no {endpoints[0]}"
        return chosen, cohort
    assert first is not None
    renamed = _renamings(cells.columns)
    if "unknown table layout" in first.message and renamed:
        raise ConfigError(first.message, f"Rename {renamed}; then start again.")
    raise first


def _renamings(columns: Iterable[str]) -> str:
    """Return which columns to rename for a plain table, as words; empty if patient or time is not found."""
    plain = {column: "".join(c for c in column.lower() if c.isalnum()) for column in columns}
    found: dict[str, str] = {}
    for wanted, others in _KNOWN_COLUMNS.items():
        fitting = [column for other in others for column, word in plain.items() if word == other]
        fitting = [column for column in fitting if column not in found.values()]
        if fitting:
            found[wanted] = fitting[0]
    if not {"patient", "time", "event"} <= set(found):
        return ""
    return ", ".join(f"{old} to {new}" for new, old in found.items() if old != new)
