"""Read patients, outcomes and slides from common table layouts into a cohort.

Columns identify the layout: published tables (CLAM, MCAT, SurvPath, CrossFusion), exports of the GDC portal, TCGA-CDR
(Liu et al., Cell 2018) or plain tables. For every layout, times are converted to months, `event` is true if the event
happened, and the unit is the patient: for TCGA the first 12 characters of the barcode.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cfusion.cohort.parsing import coded_events, first_column, numbers, read_table
from cfusion.config import CohortConfig
from cfusion.errors import CohortError, ConfigError
from cfusion.files import atomic_path
from cfusion.types import Cohort

logger = logging.getLogger(__name__)

DAYS_PER_MONTH = 365.25 / 12
LONGEST_FOLLOW_UP_MONTHS = 600.0
"""No clinical cohort follows patients for more than 50 years; a longer time is probably in days."""

_MONTHS = {"months": 1.0, "days": 1 / DAYS_PER_MONTH, "years": 12.0}
_BARCODE = re.compile(r"TCGA-(\w{2})-\w{4}")
_SLIDE_SUFFIX = re.compile(
    r"\.(?:svs|ndpi|tiff?|qptiff|mrxs|czi|scn|vms|vmu|bif|svslide|dcm|isyntax|h5|pt|zarr)$", re.IGNORECASE
)
_COVARIATES = ("age", "is_female", "oncotree_code", "grade", "stage", "site")


def patient_of(name: str) -> str:
    """Return the patient of a slide, sample or case name: the first 12 characters of a TCGA barcode, else the name."""
    return name[:12] if has_barcode(name) else name


def has_barcode(name: str) -> bool:
    """Return whether a slide, sample or case name starts with a TCGA barcode, which identifies the patient."""
    return _BARCODE.match(name) is not None


def slide_stem(name: str) -> str:
    """Return the slide_id of a file name, without folder and slide suffix; other dots (TCGA's UUIDs) are kept.

    Accents are composed, as in the names of slides: macOS writes them as separate characters.
    """
    return unicodedata.normalize("NFC", _SLIDE_SUFFIX.sub("", re.split(r"[\\/]", name)[-1]))


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
    layout = _layout(table, config)
    rows = _READERS[layout](table, config)
    nameless = rows["case_id"].isna()
    if nameless.any():
        raise CohortError(
            f"{config.table}, row {rows.index[nameless][0] + 2}: has no patient name.", "Correct the row."
        )
    rows["case_id"] = rows["case_id"].str.strip().map(patient_of)
    _check_plausible(rows, config)
    cases = _one_row_per_case(rows, config)
    slides = _read_slides(config.slides) if config.slides is not None else _slides_of_rows(rows)
    logger.info("%s: %s layout, %d patients, %d slides", config.table, layout, len(cases), len(slides))
    return Cohort(config.name, cases, slides, config.endpoint)


def write_outcomes(cohort: Cohort, path: Path) -> None:
    """Write `case_id, time_months, event` of all patients, which are needed to score a run's predictions."""
    with atomic_path(path) as temporary:
        cohort.cases[["time_months", "event"]].astype({"event": int}).to_csv(temporary, float_format="%.17g")


def read_outcomes(path: Path, name: str) -> Cohort:
    """Read the patients from a file of `write_outcomes`; the cohort has no slides.

    Args:
        path: The file.
        name: Name of the cohort.

    Raises:
        CohortError: The file cannot be read or lacks a column.
    """
    table = read_table(path)
    if not {"case_id", "time_months", "event"} <= set(table.columns):
        raise CohortError(f"{path}: expected the columns case_id, time_months, event.")
    outcomes = {"time_months": numbers(table["time_months"], path), "event": coded_events(table["event"], path)}
    cases = pd.DataFrame(outcomes).set_index(pd.Index(table["case_id"], name="case_id")).astype({"event": bool})
    return Cohort(name, cases, pd.DataFrame({"case_id": []}, index=pd.Index([], name="slide_id")))


def _layout(table: pd.DataFrame, config: CohortConfig) -> str:
    columns = set(table.columns)
    found = {
        "published": "case_id" in columns and any(_published_columns(table, e) for e in ("OS", "DSS", "PFI")),
        "cdr": "bcr_patient_barcode" in columns and {"OS", "OS.time"} <= columns,
        "gdc": any(name.endswith("vital_status") for name in columns),
        "plain": {"patient", "time"} <= columns,
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
    "cdr": "bcr_patient_barcode, OS, OS.time, …",
    "gdc": "a clinical.tsv or clinical JSON export with vital_status and days_to_death",
    "plain": "patient, slide, time, event",
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
        raise _no_endpoint(config, f"survival_months{suffix}, censorship{suffix}")
    time, censorship = columns
    event = coded_events(table[censorship], config.table, "censored")
    if "event" in table.columns and config.endpoint == "OS":
        other = (event != coded_events(table["event"], config.table)).fillna(False).to_numpy(bool)
        if other.any():
            raise CohortError(
                f"{config.table}, row {table.index[other][0] + 2}: event and censorship contradict each other.",
                "One of them is inverted; correct the table.",
            )
    rows = table[["case_id", *(c for c in (*_COVARIATES, "slide_id") if c in table.columns)]].copy()
    rows["time_months"] = numbers(table[time], config.table)
    rows["event"] = event
    return rows


def _no_endpoint(config: CohortConfig, columns: str) -> ConfigError:
    return ConfigError(f"{config.table}: has no endpoint {config.endpoint} (columns {columns}).")


def _plain(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    column = "event" if config.event_is == "event" else first_column(table, "censorship", "event")
    if column not in table.columns:
        raise ConfigError(f"{config.table}: lacks the column event.", f"Expected {_EXPECTED['plain']}.")
    rows = table.rename(columns={"patient": "case_id", "slide": "slide_id"}).drop(columns=["time", column])
    rows["time_months"] = numbers(table["time"], config.table) * _MONTHS[config.time_unit]
    rows["event"] = coded_events(table[column], config.table, config.event_is)
    return rows


def _cdr(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    time = f"{config.endpoint}.time"
    if time not in table.columns or config.endpoint not in table.columns:
        raise _no_endpoint(config, f"{config.endpoint}, {time}")
    name = config.name.upper()
    types = sorted(t for t in table.get("type", pd.Series(dtype=str)).dropna().unique() if t in name)
    if types:
        logger.info("%s: kept the cancer types named in cohort.name: %s", config.table, ", ".join(types))
        table = table[table["type"].isin(types)]
    elif "type" in table.columns:
        logger.info("%s: cohort.name=%s names no cancer type; kept all", config.table, config.name)
    rows = pd.DataFrame({"case_id": table["bcr_patient_barcode"].astype(str)})
    rows["time_months"] = numbers(table[time], config.table) / DAYS_PER_MONTH
    rows["event"] = coded_events(table[config.endpoint], config.table)
    return rows


def _gdc(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    if config.endpoint != "OS":
        raise ConfigError(
            f"{config.table}: this layout has only OS, not cohort.endpoint={config.endpoint}.",
            "TCGA-CDR has OS, DSS and PFI.",
        )
    column = {name.rsplit(".", 1)[-1]: name for name in reversed(table.columns)}
    case = next((name for name in ("cases.submitter_id", "case_submitter_id", "submitter_id") if name in table), None)
    if case is None:
        raise ConfigError(f"{config.table}: lacks the case's submitter_id.", f"Expected {_EXPECTED['gdc']}.")
    status = table[column["vital_status"]].str.lower()
    event = status.map({"dead": True, "alive": False}).astype("boolean")

    def days(name: str) -> pd.Series:
        if name not in column:
            return pd.Series(np.nan, index=table.index)
        return numbers(table[column[name]], config.table).groupby(table[case]).transform("max")

    follow_up = pd.concat([days("days_to_last_follow_up"), days("days_to_follow_up")], axis=1).max(axis=1)
    time = days("days_to_death").where(event.fillna(False).astype(bool), follow_up)
    return pd.DataFrame({"case_id": table[case], "time_months": time / DAYS_PER_MONTH, "event": event})


_READERS: dict[str, Callable[[pd.DataFrame, CohortConfig], pd.DataFrame]] = {
    "published": _published, "plain": _plain, "cdr": _cdr, "gdc": _gdc,
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
    for column in ("time_months", "event"):
        distinct = grouped[column].nunique()
        if (distinct > 1).any():
            case = str(distinct.index[distinct > 1][0])
            values = ", ".join(str(v) for v in rows.loc[rows["case_id"] == case, column].drop_duplicates())
            raise CohortError(
                f"{config.table}, case {case}: the rows have different values of {column} ({values}).",
                "A patient has only one outcome; correct the rows.",
            )
    cases = grouped.first().drop(columns="slide_id", errors="ignore")
    if not cases["event"].isna().any():
        cases["event"] = cases["event"].astype(bool)
    barcodes = cases.index.to_series().str.extract(_BARCODE, expand=False)
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
    slides = table if name == "slide_id" else table[table[name].str.contains(_SLIDE_SUFFIX, na=False)]
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
