"""Read tables as data portals export them: TCGA-CDR, UCSC Xena, cBioPortal and the GDC.

Every reader returns one row per row of the table: `case_id`, `time_months`, `event`, and covariates that it knows.
"""

from __future__ import annotations

import logging
import re

import numpy as np
import pandas as pd

from cfusion.cohort.identifiers import patient_of
from cfusion.cohort.parsing import coded_events, first_column, numbers, read_table
from cfusion.config import CohortConfig
from cfusion.errors import CohortError, ConfigError

logger = logging.getLogger(__name__)

DAYS_PER_MONTH = 365.25 / 12

_TCGA_TYPES = {
    "ACC", "BLCA", "BRCA", "CESC", "CHOL", "COAD", "DLBC", "ESCA", "GBM", "HNSC", "KICH", "KIRC", "KIRP",
    "LAML", "LGG", "LIHC", "LUAD", "LUSC", "MESO", "OV", "PAAD", "PCPG", "PRAD", "READ", "SARC", "SKCM", "STAD",
    "TGCT", "THCA", "THYM", "UCEC", "UCS", "UVM",
}  # fmt: skip
_CDR_CASES = ("bcr_patient_barcode", "_PATIENT", "sample")
_CDR_TYPES = ("type", "cancer type abbreviation")
_CBIOPORTAL_CASES = ("PATIENT_ID", "Patient ID")
_CBIOPORTAL = {
    "OS": (("OS_MONTHS", "OS_STATUS"), ("Overall Survival (Months)", "Overall Survival Status")),
    "DSS": (
        ("DSS_MONTHS", "DSS_STATUS"), ("Months of disease-specific survival", "Disease-specific Survival status"),
    ),
    "PFI": (),
}  # fmt: skip
"""Columns of time and status in cBioPortal's files and in its page's download."""
_GDC_CASES = ("cases.submitter_id", "case_submitter_id", "submitter_id")
_LIVING_WITHOUT_TIME = 5
"""Living patients from which on a table where none of them has a follow-up time is refused."""


def is_cdr(columns: set[str]) -> bool:
    """Return whether the columns are those of TCGA-CDR or of a survival table of UCSC Xena, which has its outcomes."""
    return bool(columns & set(_CDR_CASES)) and {"OS", "OS.time"} <= columns


def is_cbioportal(columns: set[str]) -> bool:
    """Return whether the columns are those of cBioPortal's patients."""
    return bool(columns & set(_CBIOPORTAL_CASES)) and any(status in columns for _, status in _CBIOPORTAL["OS"])


def is_gdc(columns: set[str]) -> bool:
    """Return whether the columns are those of a clinical export of the GDC portal."""
    return bool(columns & set(_GDC_CASES)) and any(name.endswith("vital_status") for name in columns)


def read_cdr(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    """Read TCGA-CDR (Liu et al., Cell 2018) or Xena's copy of it: days, and only the cancer types of the cohort's name.

    Raises:
        ConfigError: The table lacks the endpoint.
        CohortError: The cohort is named after a cancer type that the table does not have.
    """
    time = f"{config.endpoint}.time"
    if time not in table.columns or config.endpoint not in table.columns:
        raise no_endpoint(config, f"{config.endpoint}, {time}")
    table = _of_named_types(table, config)
    rows = pd.DataFrame({"case_id": table[first_column(table, *_CDR_CASES)]})
    rows["time_months"] = numbers(table[time], config.table) / DAYS_PER_MONTH
    rows["event"] = coded_events(table[config.endpoint], config.table)
    if "Redaction" in table.columns:
        rows["redaction"] = table["Redaction"]
    return rows


def _of_named_types(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    column = first_column(table, *_CDR_TYPES)
    if column not in table.columns:
        return table
    types = table[column].str.strip().str.upper()
    named = _types_in(config.name, _TCGA_TYPES | set(types.dropna()))
    absent = sorted(named - set(types))
    if absent:
        raise CohortError(
            f"{config.table}: cohort.name={config.name} names {', '.join(absent)}, and the table has no such patients.",
            "Give another cohort.name, or the table of that cancer type.",
        )
    if not named:
        logger.info("%s: cohort.name=%s names no cancer type; kept all %d", config.table, config.name, types.nunique())
        return table
    logger.info("%s: kept the cancer types named in cohort.name: %s", config.table, ", ".join(sorted(named)))
    return table[types.isin(named)]


def _types_in(name: str, known: set[str]) -> set[str]:
    """Return the cancer types that are words of a name, or that a word is made of, as GBM and LGG in `gbmlgg`."""
    one = "|".join(re.escape(word) for word in sorted(known, key=len, reverse=True))
    words = re.split(r"[^A-Z0-9]+", name.upper())
    return {found for word in words if re.fullmatch(f"(?:{one})+", word) for found in re.findall(one, word)}


def read_cbioportal(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    """Read cBioPortal's patients: months, and statuses such as `1:DECEASED`.

    Raises:
        ConfigError: The table lacks the endpoint. cBioPortal's PFS counts deaths of any cause, so it is not PFI.
    """
    pairs = _CBIOPORTAL[config.endpoint]
    found = next((pair for pair in pairs if set(pair) <= set(table.columns)), None)
    if found is None:
        raise no_endpoint(config, ", ".join(pairs[0]) if pairs else "cBioPortal has PFS, which is not PFI")
    time, status = found
    rows = pd.DataFrame({"case_id": table[first_column(table, *_CBIOPORTAL_CASES)]})
    rows["time_months"] = numbers(table[time], config.table)
    rows["event"] = coded_events(table[status], config.table)
    return rows


def read_gdc(table: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    """Read a clinical export of the GDC portal, and its file of follow-ups if `cohort.follow_up` names it.

    Raises:
        ConfigError: The endpoint is not OS.
        CohortError: No living patient has a follow-up time.
    """
    if config.endpoint != "OS":
        raise ConfigError(
            f"{config.table}: this layout has only OS, not cohort.endpoint={config.endpoint}.",
            "TCGA-CDR has OS, DSS and PFI.",
        )
    cases = table[first_column(table, *_GDC_CASES)]
    words = table[next(name for name in table.columns if name.endswith("vital_status"))]
    event = coded_events(words.mask(words.str.strip().str.lower().isin(("not reported", "unknown"))), config.table)
    followed = _latest(table, ("days_to_last_follow_up", "days_to_follow_up"), cases, config.table)
    if config.follow_up is not None:
        later = _follow_ups(config)
        followed = pd.concat([followed, cases.map(patient_of, na_action="ignore").map(later)], axis=1).max(axis=1)
    time = _latest(table, ("days_to_death",), cases, config.table).where(event.fillna(False).astype(bool), followed)
    living = ~event.fillna(True).astype(bool)
    if cases[living].nunique() >= _LIVING_WITHOUT_TIME and time[living].isna().all():
        raise CohortError(
            f"{config.table}: none of the {cases[living].nunique()} living patients has a follow-up time; only the "
            "dead would stay.",
            "Since data release 42 the GDC exports it in another file: set cohort.follow_up to follow_up.tsv.",
        )
    return pd.DataFrame({"case_id": cases, "time_months": time / DAYS_PER_MONTH, "event": event})


def _latest(table: pd.DataFrame, names: tuple[str, ...], cases: pd.Series, source: object) -> pd.Series:
    """Return the longest of the named days of each row's patient; columns may have a prefix, as `diagnoses.`."""
    columns = [column for column in table.columns if column.rsplit(".", 1)[-1] in names]
    days = [numbers(table[column], str(source)).groupby(cases).transform("max") for column in columns]
    return pd.concat(days, axis=1).max(axis=1) if days else pd.Series(np.nan, index=table.index)


def _follow_ups(config: CohortConfig) -> pd.Series:
    """Return the longest follow-up in days of each patient of the GDC's file of follow-ups."""
    path = config.follow_up
    assert path is not None
    table = read_table(path)
    column = first_column(table, *_GDC_CASES)
    if column not in table.columns or not any(name.endswith("days_to_follow_up") for name in table.columns):
        raise CohortError(
            f"{path}: lacks {column} or days_to_follow_up.", "Give follow_up.tsv of the same export of the GDC portal."
        )
    cases = table[column].map(patient_of, na_action="ignore")
    return _latest(table, ("days_to_last_follow_up", "days_to_follow_up"), cases, path).groupby(cases).max()


def no_endpoint(config: CohortConfig, columns: str) -> ConfigError:
    """Return the error of a table without the configured endpoint."""
    return ConfigError(f"{config.table}: has no endpoint {config.endpoint} (columns {columns}).")
