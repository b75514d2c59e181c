"""Parse clinical table cells strictly; errors name the row and the value."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cfusion.cohort.table_text import split_text
from cfusion.errors import CohortError

_MISSING = {
    "", "'--", "--", "NA", "N/A", "NaN", "nan", "#N/A", "NULL", "null", "None", "<NA>", "[Not Available]",
    "[Not Applicable]", "[Not Evaluated]", "[Unknown]", "[Discrepancy]",
}  # fmt: skip
_ONE = ("1", "1.0", "true", "yes")
_ZERO = ("0", "0.0", "false", "no")
_STATUS = {
    "dead": True, "deceased": True, "1:deceased": True, "1:dead with tumor": True, "1:progression": True,
    "alive": False, "living": False, "0:living": False, "0:alive or dead tumor free": False, "0:censored": False,
}  # fmt: skip
"""Words whose meaning is fixed, among them those of cBioPortal."""
_COMMA = re.compile(r"[-+]?\d+,\d+")
_INTEGER = re.compile(r"[-+]?\d+")
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([T ].*)?")
_OTHER_CODE = re.compile(r"([2-9]|\d{2,})(\.0+)?")


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV or TSV file, a ZIP file with one CSV or TSV, or a GDC clinical JSON; every cell is text or missing.

    Cells may be separated by commas, tabs or semicolons. With semicolons, numbers may have a decimal comma. The index
    is the number of the row in an editor, minus 2: the row below a header in the first line is 0.

    Raises:
        CohortError: The file is missing, empty, or not such a table; the message names the row that does not fit.
    """
    try:
        if path.suffix.lower() == ".json":
            return pd.DataFrame(_flat_cases(json.loads(path.read_text(encoding="utf-8"))))
        text = split_text(_zipped_text(path) if zipfile.is_zipfile(path) else path.read_text(encoding="utf-8-sig"))
        cells = {
            name: [None if cell.strip() in _MISSING else cell for cell in column]
            for name, column in zip(text.names, zip(*text.rows, strict=True), strict=False) if name
        }  # fmt: skip
        if text.separator == ";":
            cells = {name: _pointed(name, column) for name, column in cells.items()}
    except OSError as error:
        raise CohortError(f"{path}: cannot be read ({error.strerror}).", "Give the path of a table.") from error
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise CohortError(
            f"{path}: is not a table ({' '.join(str(error).split())}).",
            "Save it as CSV or TSV, in UTF-8, with as many fields in every row as in the header.",
        ) from error
    table = pd.DataFrame(cells, index=pd.Index(text.numbers) - 2, dtype=object).dropna(how="all")
    if table.empty:
        raise CohortError(f"{path}: has no rows.")
    return table


def _pointed(name: str, column: list[str | None]) -> list[str | None]:
    """Return a column of numbers with decimal points instead of commas; any other column is returned unchanged."""
    known = [cell.strip() for cell in column if cell is not None]
    with_comma = [cell for cell in known if _COMMA.fullmatch(cell)]
    if not with_comma or not all(_COMMA.fullmatch(cell) or _INTEGER.fullmatch(cell) for cell in known):
        return column
    if all(len(cell.partition(",")[2]) == 3 for cell in with_comma):
        raise ValueError(f"{name} is {with_comma[0]!r}, in decimals or in thousands; write numbers with a point")
    return [cell if cell is None else cell.replace(",", ".") for cell in column]


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
        found = str(cells.iloc[at])
        raise CohortError(
            f"{source}, row {cells.index[at] + 2}: {cells.name} is {found!r}, expected a finite number.",
            "Give the time between two dates, not a date."
            if _DATE.fullmatch(found.strip())
            else "Write digits and a decimal point, without units, percent signs or separators of thousands.",
        )
    # pd.to_numeric can be off by one unit in the last place; float() is exact.
    return cells.map(float, na_action="ignore").astype(float)


def _from_one(cells: pd.Series) -> str:
    """Return what to do where codes start at 1; empty where there is a 0."""
    codes = set(pd.to_numeric(cells, errors="coerce").dropna())
    known = "The column has no 0: if 1 is censored and 2 is dead, as in many tables of R, subtract 1. Otherwise: "
    return known if codes == {1.0, 2.0} else ""


def coded_events(cells: pd.Series, source: Path | str, one_is: Literal["event", "censored"] = "event") -> pd.Series:
    """Convert cells to nullable booleans, true where the event happened.

    This is the only place that inverts a censoring column.

    Args:
        cells: 1, true or yes and 0, false or no, whose meaning `one_is` gives; or dead and alive, or cBioPortal's
            `1:DECEASED` and `0:LIVING`, whose meaning is fixed.
        source: The file, for errors.
        one_is: Meaning of 1.

    Raises:
        CohortError: A cell has another value, such as the 2 of a competing event; the message names its row and value.
    """
    meaning = _STATUS | dict.fromkeys(_ONE, one_is == "event") | dict.fromkeys(_ZERO, one_is == "censored")
    values = cells.astype("string").str.strip().str.lower().map(meaning).astype("boolean")
    wrong = (values.isna() & cells.notna()).to_numpy(bool)
    if wrong.any():
        at = int(np.argmax(wrong))
        value = str(cells.iloc[at])
        found = f"{source}, row {cells.index[at] + 2}: {cells.name} is {value!r}, expected 0 or 1."
        if _OTHER_CODE.fullmatch(value.strip()):
            raise CohortError(
                f"{found} Codes above 1 are competing events, which no loss and no score of this program models.",
                _from_one(cells) + "Decide on one endpoint: code the other events as censored (cause-specific hazard) "
                "or as the event (composite endpoint), and say so in the methods.",
            )
        raise CohortError(found)
    return values
