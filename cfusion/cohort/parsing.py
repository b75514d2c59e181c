"""Parse clinical table cells strictly; errors name the row and the value."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cfusion.errors import CohortError

_MISSING = ["", "'--", "--", "NA", "N/A", "NaN", "nan", "[Not Available]", "[Not Applicable]", "[Unknown]", "#N/A"]
_ONE = ("1", "1.0", "true", "yes")
_ZERO = ("0", "0.0", "false", "no")
_STATUS = {"dead": True, "deceased": True, "alive": False, "living": False}


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV or TSV file, a ZIP file with one CSV or TSV, or a GDC clinical JSON; every cell is text or missing.

    Raises:
        CohortError: The file is missing, empty, or not such a table.
    """
    try:
        if path.suffix.lower() == ".json":
            return pd.DataFrame(_flat_cases(json.loads(path.read_text(encoding="utf-8"))))
        text = _zipped_text(path) if zipfile.is_zipfile(path) else path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        separator = "\t" if header.count("\t") > header.count(",") else ","
        _check_header(header, separator)
        # Blank lines are read first and dropped later, so that row numbers in errors match those in an editor.
        table = pd.read_csv(
            io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, na_values=_MISSING,
            skip_blank_lines=False,
        ).dropna(how="all")  # fmt: skip
    except OSError as error:
        raise CohortError(f"{path}: cannot be read ({error.strerror}).", "Give the path of a table.") from error
    except (ValueError, TypeError, AttributeError, csv.Error, pd.errors.ParserError) as error:
        raise CohortError(
            f"{path}: is not a table ({' '.join(str(error).split())}).", "Save it as CSV or TSV, in UTF-8."
        ) from error
    if table.empty:
        raise CohortError(f"{path}: has no rows.")
    table.columns = table.columns.str.strip()
    return table.loc[:, ~table.columns.str.fullmatch(r"(Unnamed: \d+)?")]


def _check_header(header: str, separator: str) -> None:
    names = [name.strip() for name in next(csv.reader([header], delimiter=separator), []) if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"duplicate column names: {', '.join(twice)}")


def _zipped_text(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.lower().endswith((".csv", ".tsv", ".txt"))]
        # macOS adds a hidden copy of every file.
        names = [n for n in names if not n.startswith("__MACOSX/") and not Path(n).name.startswith("._")]
        if len(names) != 1:
            raise ValueError(f"holds {len(names)} tables, expected one; save a spreadsheet as CSV")
        return archive.read(names[0]).decode("utf-8-sig")


def _flat_cases(cases: Any) -> list[dict[str, Any]]:
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise ValueError("expected a list of cases, as the GDC portal exports it")
    rows = []
    for case in cases:
        demographic = case.get("demographic") or {}
        days = [d.get("days_to_last_follow_up") for d in case.get("diagnoses") or []]
        days += [f.get("days_to_follow_up") for f in case.get("follow_ups") or []]
        seen = [float(d) for d in days if d is not None]
        rows.append({
            "submitter_id": case.get("submitter_id"),
            "vital_status": demographic.get("vital_status"),
            "days_to_death": demographic.get("days_to_death"),
            "days_to_last_follow_up": max(seen) if seen else None,
        })  # fmt: skip
    return rows


def first_column(table: pd.DataFrame, *names: str) -> str:
    """Return the first of `names` that is a column of the table, or the last name if none is."""
    return next((name for name in names if name in table.columns), names[-1])


def numbers(cells: pd.Series, source: Path | str) -> pd.Series:
    """Convert cells to floats, NaN where missing.

    Raises:
        CohortError: A cell is text or infinite; the message names its row (the header is row 1) and its value.
    """
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    wrong = (values.isna() & cells.notna()) | np.isinf(values)
    if wrong.any():
        at = int(np.argmax(wrong.to_numpy()))
        raise CohortError(
            f"{source}, row {cells.index[at] + 2}: {cells.name} is {cells.iloc[at]!r}, expected a finite number."
        )
    # pd.to_numeric can be off by one unit in the last place; float() is exact.
    return cells.map(float, na_action="ignore").astype(float)


def coded_events(cells: pd.Series, source: Path | str, one_is: Literal["event", "censored"] = "event") -> pd.Series:
    """Convert cells to nullable booleans, true where the event happened.

    This is the only place that inverts a censoring column.

    Args:
        cells: 1, true or yes and 0, false or no, whose meaning `one_is` gives; or dead and alive, whose meaning is
            fixed.
        source: The file, for errors.
        one_is: Meaning of 1.

    Raises:
        CohortError: A cell has another value; the message names its row and the value.
    """
    meaning = _STATUS | dict.fromkeys(_ONE, one_is == "event") | dict.fromkeys(_ZERO, one_is == "censored")
    values = cells.astype("string").str.strip().str.lower().map(meaning).astype("boolean")
    wrong = (values.isna() & cells.notna()).to_numpy(bool)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise CohortError(f"{source}, row {cells.index[at] + 2}: {cells.name} is {cells.iloc[at]!r}, expected 0 or 1.")
    return values
