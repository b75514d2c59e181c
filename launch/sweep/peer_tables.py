"""Reads the out-of-fold predictions that other programs write: one table of risks per fold, and their outcomes.

What each program writes stands in `docs/reference/peers.md`, with the commit it was read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cfusion.cohort.identifiers import patient_of
from cfusion.cohort.parsing import coded_events, numbers, read_table
from cfusion.errors import CohortError, DataError, PredictionsError, nearest


@dataclass(frozen=True)
class PeerLayout:
    """How a program lays out its predictions.

    Attributes:
        title: Name of the program.
        folds: Pattern of the folders of its folds.
        tables: Pattern of the table in such a folder.
        columns: Its columns of the patient (empty: the only column without another meaning), the risk, the event (1 =
            happened) and the time; others are ignored.
        protocol: How the program chooses the epoch.
        cutoff: Prefix of a column whose name ends with the training patients' median risk; empty: none.
    """

    title: str
    folds: str
    tables: str
    columns: tuple[str, str, str, str]
    protocol: str
    cutoff: str = ""


LAYOUTS: Mapping[str, PeerLayout] = {
    # The scored fold is passed as the validation data that chooses the epoch.
    "stamp": PeerLayout(
        "STAMP", "split-*", "patient-preds.csv", ("", "pred_score", "event", "time"), "published", "cut_off="
    ),
    "nnmil": PeerLayout(
        "nnMIL", "fold_*", "**/results_*.csv", ("patient_id", "risk_score", "status", "time"), "strict"
    ),
    # It has no epoch to choose with CoxNet, and its own splits have no validation side.
    "patho-bench": PeerLayout(
        "Patho-Bench", "test_metrics/fold_*", "predictions.csv",
        ("case_id", "preds", "survival_event", "survival_time"), "fixed-epoch",
    ),
}  # fmt: skip
"""Layouts by the name that `cfusion sweep import` takes."""


@dataclass(frozen=True)
class PeerFold:
    """Predictions of one fold.

    Attributes:
        name: Name of its folder.
        path: The table.
        patients: By patient: `risk`, `event`, `time` (in the program's unit); risks of several slides are averaged.
        cutoff: Median risk of the training patients; None: unknown.
    """

    name: str
    path: Path
    patients: pd.DataFrame
    cutoff: float | None


def layout_named(name: str) -> PeerLayout:
    """Return a layout.

    Raises:
        DataError: There is no such layout.
    """
    if name not in LAYOUTS:
        raise DataError(f"--from {name}: expected one of {', '.join(LAYOUTS)}.", nearest(name, LAYOUTS))
    return LAYOUTS[name]


def read_peer(folder: Path, layout: PeerLayout) -> list[PeerFold]:
    """Read a program's predictions, a fold after the other.

    Raises:
        DataError: The folder has no such fold, or a fold has no table or several.
        PredictionsError: A table lacks a column or a value, a risk is no number, or a patient has two outcomes.
    """
    folders = sorted(path for path in folder.glob(layout.folds) if path.is_dir())
    if not folders:
        raise DataError(
            f"{folder}: has no folder {layout.folds}.", f"Give the folder of the results of {layout.title}."
        )
    return [_fold(path, layout) for path in folders]


def _fold(folder: Path, layout: PeerLayout) -> PeerFold:
    tables = sorted(folder.glob(layout.tables))
    if len(tables) != 1:
        found = "; ".join(str(table.relative_to(folder)) for table in tables) or "none"
        raise DataError(
            f"{folder}: expected one {layout.tables}, found {len(tables)}: {found}.",
            "Keep the one whose predictions you mean." if tables else f"Predict this fold with {layout.title}.",
        )
    try:
        return PeerFold(folder.name, tables[0], *_read(tables[0], layout))
    except CohortError as error:
        raise PredictionsError(error.message, error.remedy) from error


def _read(path: Path, layout: PeerLayout) -> tuple[pd.DataFrame, float | None]:
    table = read_table(path)
    cutoffs = [name for name in table.columns if layout.cutoff and str(name).startswith(layout.cutoff)]
    known = [name for name in layout.columns if name]
    case, risk, event, time = layout.columns
    if not case:
        others = [name for name in table.columns if name not in (*known, *cutoffs)]
        if len(others) != 1:
            raise PredictionsError(
                f"{path}: expected one column of patients besides {', '.join(known)}, found "
                f"{', '.join(map(str, others)) or 'none'}."
            )
        case = others[0]
    missing = [name for name in known if name not in table.columns]
    if missing:
        raise PredictionsError(
            f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.",
            f"Is it a table of {layout.title}? --from takes {', '.join(LAYOUTS)}.",
        )
    read = table[[case, risk, event, time]]
    if (empty := read.isna().any(axis=1)).any():
        row = read[empty].iloc[0]
        raise PredictionsError(f"{path}: patient {row[case]} has an empty {', '.join(row.index[row.isna()])}.")
    frame = pd.DataFrame({
        "case_id": table[case].astype(str).str.strip().map(patient_of), "risk": numbers(table[risk], path),
        "event": coded_events(table[event], path), "time": numbers(table[time], path),
    })  # fmt: skip
    outcomes = frame.groupby("case_id")[["event", "time"]].nunique()
    if twice := list(outcomes.index[(outcomes > 1).any(axis=1)]):
        raise PredictionsError(f"{path}: patient {twice[0]} has two outcomes.", "Correct the rows.")
    rows = frame.groupby("case_id", sort=False).agg({"risk": "mean", "event": "first", "time": "first"})
    return rows, _cutoff(path, cutoffs, layout)


def _cutoff(path: Path, names: list[str], layout: PeerLayout) -> float | None:
    if not names:
        return None
    try:
        return float(names[0].removeprefix(layout.cutoff))
    except ValueError:
        raise PredictionsError(f"{path}: column {names[0]}: expected a number after {layout.cutoff}.") from None
