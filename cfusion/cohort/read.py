"""Read patients, outcomes and slides from common table layouts into a cohort.

Columns identify the layout: published tables (CLAM, MCAT, SurvPath, CrossFusion), plain tables, or those of the portals
in `cfusion.cohort.portals`. For every layout, times are converted to months, `event` is true if the event
happened, and the unit is the patient: for TCGA the first 12 characters of the barcode.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cfusion.cohort.covariates import (
    clinical_rows,
    coded_covariates,
    endpoint_outcomes,
    other_cause,
    refuse_halves,
)
from cfusion.cohort.identifiers import is_slide_file, patient_of, site_of, slide_stem
from cfusion.cohort.parsing import coded_events, first_column, numbers, read_table
from cfusion.cohort.portals import (
    DAYS_PER_MONTH,
    is_cbioportal,
    is_cdr,
    is_gdc,
    no_endpoint,
    read_cbioportal,
    read_cdr,
    read_gdc,
)
from cfusion.config import CohortConfig
from cfusion.errors import CohortError, ConfigError
from cfusion.files import atomic_path
from cfusion.types import Cohort

logger = logging.getLogger(__name__)

LONGEST_FOLLOW_UP_MONTHS = 600.0
"""No clinical cohort follows patients for more than 50 years; a longer time is probably in days."""

_MONTHS = {"months": 1.0, "days": 1 / DAYS_PER_MONTH, "years": 12.0}
_COVARIATES = ("age", "is_female", "oncotree_code", "grade", "stage", "site", "redaction", "Redaction")
_ENTRY = ("entry", "entry_time", "entry_months", "time_entry", "delayed_entry", "left_truncation", "start", "tstart")
"""Names of a column of delayed entry."""


def read_cohort(config: CohortConfig) -> Cohort:
    """Read a clinical table and, if configured, the table of slides.

    Times may be missing, zero or negative, and events unknown. `cfusion.cohort.audit.audit` drops and reports those
    patients.

    Returns:
        The cohort: times in months, `event` boolean (nullable if any is unknown). A slide listed twice has two rows.

    Raises:
        ConfigError: The table lacks the endpoint, or its layout is not the configured one.
        CohortError: A table cannot be read, a value is invalid, or rows of one patient contradict each other.
    """
    table = read_table(config.table)
    refuse_delayed_entry(table, str(config.table))
    clinical = clinical_rows(table, config)
    outcomes = None
    if clinical is not None and config.covariates_table is not None and config.endpoint != "OS":
        outcomes = endpoint_outcomes(clinical, config.endpoint, config.covariates_table)
    layout = _layout(table, config)
    if config.follow_up is not None and layout != "gdc":
        raise ConfigError(
            f"cohort.follow_up={config.follow_up}: {config.table} has the {layout} layout, which has its own times.",
            "Only exports of the GDC portal have follow-ups in another file; remove the setting.",
        )
    of_table = config if outcomes is None else config.model_copy(update={"endpoint": "OS"})
    rows = _READERS[layout](table, of_table).rename(columns={"Redaction": "redaction"})
    nameless = rows["case_id"].isna()
    if nameless.any():
        raise CohortError(
            f"{config.table}, row {rows.index[nameless][0] + 2}: has no patient name.", "Correct the row."
        )
    rows["case_id"] = rows["case_id"].str.strip().map(patient_of)
    if outcomes is not None:
        rows = rows.assign(**outcomes.reindex(rows["case_id"]).set_index(rows.index))
    _check_plausible(rows, config)
    cases = _one_row_per_case(rows, config)
    slides = _read_slides(config.slides) if config.slides is not None else _slides_of_rows(rows)
    found = (config.table, layout, len(cases), len(slides))
    logger.info("%s: %s layout, %d patients, %d slides", *found, extra={"once": True})  # a command may read it again
    cohort = Cohort(config.name, cases, slides, config.endpoint)
    return cohort if clinical is None else _with_clinical(cohort, clinical, config)


def _with_clinical(cohort: Cohort, clinical: pd.DataFrame, config: CohortConfig) -> Cohort:
    """Add the covariates, and who died without the event of the end point."""
    competing = other_cause(clinical, config.endpoint)
    if competing is not None:
        cohort.cases["other_cause"] = competing.reindex(cohort.cases.index, fill_value=False)
    covariates, unused = coded_covariates(clinical, config, config.covariates_table or config.table)
    return dataclasses.replace(
        cohort,
        covariates=None if covariates is None else covariates.reindex(cohort.cases.index),
        unused_covariates=unused,
    )


def refuse_delayed_entry(table: pd.DataFrame, source: str) -> None:
    """Refuse outcomes of patients who came under observation after time 0 (left truncation).

    No loss and no score of the program removes a patient from the risk sets before the entry; used as if every patient
    were followed from time 0, such times make survival look too long. A column of zeros is accepted.

    Args:
        table: Cells of a table.
        source: The file, for errors.

    Raises:
        CohortError: A column such as `entry` has a time other than 0, or a text.
    """
    for column in table.columns:
        if column.lower() not in _ENTRY:
            continue
        late = table.index[(numbers(table[column], source).fillna(0) != 0).to_numpy()]
        if len(late):
            raise CohortError(
                f"{source}, row {late[0] + 2}: {column} is {table.loc[late[0], column]!r}: delayed entry (left "
                f"truncation) is not supported, and {len(late)} rows have it.",
                "Start every patient's time where observation starts, if that answers the question, and remove the "
                "column; otherwise use a program with left-truncated likelihoods, such as R's survival.",
            )


def write_outcomes(cohort: Cohort, path: Path) -> None:
    """Write `case_id, time_months, event` of all patients, which are needed to score a run's predictions.

    Of several cohorts, `cohort` names the patient's own.
    """
    table = cohort.cases[["time_months", "event"]].astype({"event": int})
    if cohort.strata is not None:
        table = table.assign(cohort=cohort.strata_of(list(table.index)))
    with atomic_path(path) as temporary:
        table.to_csv(temporary, float_format="%.17g")


def write_covariates(cohort: Cohort, path: Path) -> None:
    """Write the covariates of all patients by `case_id`; without covariates no file."""
    if cohort.covariates is not None:
        with atomic_path(path) as temporary:
            cohort.covariates.loc[cohort.cases.index].to_csv(temporary, float_format="%.17g")


def read_outcomes(path: Path, name: str, covariates: Path | None = None) -> Cohort:
    """Read the patients from a file of `write_outcomes`; the cohort has no slides.

    Args:
        path: The file.
        name: Name of the cohort.
        covariates: File of `write_covariates`; none: no covariates.

    Raises:
        CohortError: The file cannot be read or lacks a column.
    """
    table = read_table(path)
    if not {"case_id", "time_months", "event"} <= set(table.columns):
        raise CohortError(f"{path}: expected the columns case_id, time_months, event.")
    outcomes = {"time_months": numbers(table["time_months"], path), "event": coded_events(table["event"], path)}
    cases = pd.DataFrame(outcomes).set_index(pd.Index(table["case_id"], name="case_id")).astype({"event": bool})
    slides = pd.DataFrame({"case_id": []}, index=pd.Index([], name="slide_id"))
    strata = pd.Series(table["cohort"].to_numpy(object), index=cases.index) if "cohort" in table.columns else None
    if covariates is None:
        return Cohort(name, cases, slides, strata=strata)
    known = read_table(covariates)
    values = {str(column): numbers(known[column], covariates) for column in known.columns if column != "case_id"}
    coded = pd.DataFrame(values).set_index(pd.Index(known["case_id"], name="case_id"))
    return Cohort(name, cases, slides, covariates=coded, strata=strata)


def _layout(table: pd.DataFrame, config: CohortConfig) -> str:
    columns = set(table.columns)
    found = {
        "published": "case_id" in columns and any(_published_columns(table, e) for e in ("OS", "DSS", "PFI")),
        "cdr": is_cdr(columns),
        "cbioportal": is_cbioportal(columns),
        "gdc": is_gdc(columns),
        "plain": {"patient", "time"} <= columns,
        "covariates": "case_id" in columns and any({e, f"{e}_months"} <= columns for e in ("os", "dss", "pfi")),
    }
    if config.format != "auto":
        if not found[config.format]:
            raise ConfigError(
                f"{config.table}: the columns do not match cohort.format={config.format}; found "
                f"{', '.join(table.columns)}.", f"Expected {_EXPECTED[config.format]}.",
            )  # fmt: skip
        return config.format
    for layout, matches in found.items():
        if matches:
            return layout
    raise ConfigError(
        f"{config.table}: unknown table layout with the columns {', '.join(table.columns)}.",
        f"For a plain table, name the columns {_EXPECTED['plain']}.",
    )


_EXPECTED = {
    "published": "case_id, slide_id, survival_months, censorship (1 = censored)",
    "cdr": "bcr_patient_barcode (or _PATIENT, sample), OS, OS.time, …",
    "cbioportal": "PATIENT_ID, OS_MONTHS, OS_STATUS",
    "gdc": "a clinical.tsv or clinical JSON export with submitter_id, vital_status and days_to_death",
    "plain": "patient, slide, time, event",
    "covariates": "case_id, os, os_months, … (dss, pfi), as in package:tcga/covariates",
}


def _published_columns(table: pd.DataFrame, endpoint: str) -> tuple[str, str] | None:
    """Return the columns of time and censorship; endpoints other than OS have a suffix, as in SurvPath's tables."""
    suffixes = ("", "_os") if endpoint == "OS" else (f"_{endpoint.lower()}",)
    pairs = ((f"survival_months{suffix}", f"censorship{suffix}") for suffix in suffixes)
    return next((pair for pair in pairs if set(pair) <= set(table.columns)), None)


def _published(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    columns = _published_columns(table, config.endpoint)
    if columns is None:
        suffix = "" if config.endpoint == "OS" else f"_{config.endpoint.lower()}"
        raise no_endpoint(config, f"survival_months{suffix}, censorship{suffix}")
    time, censorship = columns
    event = coded_events(table[censorship], config.table, "censored")
    if "event" in table.columns and config.endpoint == "OS":
        _check_polarity(table.rename(columns={censorship: "censorship"}), event, config)
    rows = table[["case_id", *(c for c in (*_COVARIATES, "slide_id") if c in table.columns)]].copy()
    rows["time_months"] = numbers(table[time], config.table)
    rows["event"] = event
    return rows


def _plain(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    column = "event" if config.event_is == "event" else first_column(table, "censorship", "event")
    if column not in table.columns:
        raise ConfigError(f"{config.table}: lacks the column event.", f"Expected {_EXPECTED['plain']}.")
    named = {"patient": "case_id", "slide": "slide_id", "time": "time_months"}
    twice = sorted(f"{old} and {new}" for old, new in named.items() if {old, new} <= set(table.columns))
    if twice:
        raise CohortError(f"{config.table}: has the columns {twice[0]}, which mean the same.", "Remove one of them.")
    event = coded_events(table[column], config.table, config.event_is)
    if {"event", "censorship"} <= set(table.columns):
        _check_polarity(table, event, config)
    rows = table.rename(columns=named).drop(columns=["time_months", column])
    rows["time_months"] = numbers(table["time"], config.table) * _MONTHS[config.time_unit]
    rows["event"] = event
    return rows


def _check_polarity(table: pd.DataFrame, event: pd.Series, config: CohortConfig) -> None:
    """Refuse rows whose columns `event` and `censorship` say the same of a patient, so that one is inverted."""
    columns = (coded_events(table["event"], config.table), coded_events(table["censorship"], config.table, "censored"))
    other = sum(((event != column).fillna(False).to_numpy(bool) for column in columns), np.zeros(len(table), bool))
    if other.any():
        raise CohortError(
            f"{config.table}, row {table.index[other][0] + 2}: event and censorship contradict each other.",
            "One of them is inverted; correct the table.",
        )


def _covariate_table(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    name = config.endpoint.lower()
    if not {name, f"{name}_months"} <= set(table.columns):
        raise no_endpoint(config, f"{name}, {name}_months")
    rows = table[["case_id", *(c for c in ("redaction",) if c in table.columns)]].copy()
    rows["time_months"] = numbers(table[f"{name}_months"], config.table)
    rows["event"] = coded_events(table[name], config.table)
    return rows


_READERS: dict[str, Callable[[pd.DataFrame, CohortConfig], pd.DataFrame]] = {
    "published": _published, "plain": _plain, "cdr": read_cdr, "gdc": read_gdc, "cbioportal": read_cbioportal,
    "covariates": _covariate_table,
}  # fmt: skip


def _check_plausible(rows: pd.DataFrame, config: CohortConfig) -> None:
    longest = rows["time_months"].max()
    if longest > LONGEST_FOLLOW_UP_MONTHS:
        case = rows["case_id"].iloc[int(rows["time_months"].argmax())]
        raise CohortError(
            f"{config.table}, case {case}: a follow-up of {longest:g} months is longer than 50 years.",
            "If the times are in days, set cohort.time_unit=days for a plain table, or convert them.",
        )


def _one_row_per_case(rows: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    grouped = rows.groupby("case_id", sort=False)
    for column in ("time_months", "event", *(c for c in ("site",) if c in rows.columns)):
        distinct = grouped[column].nunique()
        if (distinct > 1).any():
            case = str(distinct.index[distinct > 1][0])
            values = ", ".join(str(v) for v in rows.loc[rows["case_id"] == case, column].drop_duplicates())
            raise CohortError(
                f"{config.table}, case {case}: the rows have different values of {column} ({values}).",
                "A patient has only one outcome and one site; correct the rows.",
            )
    refuse_halves(rows.set_index("case_id"), config.table, rows.index + 2)
    cases = grouped.first().drop(columns="slide_id", errors="ignore")
    if not cases["event"].isna().any():
        cases["event"] = cases["event"].astype(bool)
    barcodes = cases.index.to_series().map(site_of)
    if barcodes.notna().all():
        cases["site"] = barcodes
    return cases


def _slides_of_rows(rows: pd.DataFrame) -> pd.DataFrame:
    if "slide_id" not in rows.columns:
        return pd.DataFrame({"case_id": pd.Series(dtype=str)}, index=pd.Index([], name="slide_id"))
    named = rows[rows["slide_id"].notna()]
    return _slides(named["slide_id"], named["case_id"], "the clinical table")


def _read_slides(path: Path) -> pd.DataFrame:
    table = read_table(path)
    name = first_column(table, "slide_id", "File Name", "filename", "file_name")
    if name not in table.columns:
        raise CohortError(f"{path}: has no column of slides.", "Expected slide_id, File Name or filename.")
    slides = table if name == "slide_id" else table[table[name].map(is_slide_file, na_action="ignore").eq(True)]
    if slides.empty:
        raise CohortError(f"{path}: none of the files in {name} is a slide.", "Give the sheet of the slide images.")
    case = first_column(table, "case_id", "Case ID")
    cells = slides[[name, *(c for c in (case,) if c in table.columns)]]
    if cells.isna().any(axis=None):
        row = cells.index[cells.isna().any(axis=1)][0] + 2
        raise CohortError(f"{path}, row {row}: lacks {name} or {case}.", "Correct the row.")
    # A sample sheet repeats the case for each sample of the file: "C3L-00001, C3L-00001".
    cases = slides[case].str.split(", ").str[0] if case in table.columns else slides[name].map(slide_stem)
    return _slides(slides[name], cases, str(path))


def _slides(names: pd.Series, cases: pd.Series, source: str) -> pd.DataFrame:
    stems = names.str.strip().map(slide_stem)
    slides = pd.DataFrame({"slide_id": stems, "case_id": cases.str.strip().map(patient_of)})
    owners = slides.groupby("slide_id")["case_id"].nunique()
    if (owners > 1).any():
        slide = owners.index[owners > 1][0]
        raise CohortError(f"{source}, slide {slide}: belongs to more than one patient.", "Correct its rows.")
    return slides.set_index("slide_id")
