"""Sets a table of published results next to the cells of a sweep: `cfusion sweep report --beside`.

Each published C-index is compared with the cell of the same cohort, encoder and model, with the score of a model
without signal under the protocol of the publication, and with the clinical covariates. Nothing is left out: what only
one of the two sides has is a row with empty columns, and a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.cohort.parsing import numbers, read_table
from cfusion.errors import CohortError, ConfigError, DataError, nearest
from cfusion.report.comparison.cells import Cell, Comparison, cell_predictions
from cfusion.report.evidence import CohortNull, cohort_null, first_run_outcomes
from cfusion.study.packaged import shipped_tables
from cfusion.survival.null import SCORED_FOLD_CHOOSES, EpochChoice

PUBLISHED = "published.csv"
"""File of a report: the cells next to published results."""

KEY = ["cohort", "encoder", "model"]
"""Columns by which a published result and a cell are the same."""

_NEEDED = (*KEY, "protocol", "cindex_mean")
_OPTIONAL = ("cindex_std", "table", "printed_encoder", "printed_model")
_PROTOCOLS = ("published", "strict", "fixed-epoch", "unknown")
_SHOWN = 4
"""Number of names in a note."""
_NAN = float("nan")


@dataclass(frozen=True)
class PublishedTable:
    """Results of a publication.

    Attributes:
        name: Name or path that the user gave.
        results: A row per result: cohort, encoder, model, protocol, cindex_mean, and cindex_std, NaN where unknown.
    """

    name: str
    results: pd.DataFrame


@dataclass(frozen=True)
class PublishedComparison:
    """Cells of a sweep and published results, side by side.

    Attributes:
        name: Name of the published table.
        rows: A row per cell and published result of the same cohort, encoder and model; then those that only one side
            has. Columns: cohort, encoder, model, protocol, complete, cindex_mean, cindex_std (of the cell),
            their_protocol, their_cindex_mean, their_cindex_std, difference (the cell's C minus theirs), within_fold_sd
            (whether theirs is within the cell's standard deviation over folds and seeds), null_independent,
            null_correlated, null_high (mean C of noise scores under their protocol, and its 97.5% limit),
            clinical_c_mean (mean over folds of the C of the clinical covariates).
    """

    name: str
    rows: pd.DataFrame

    @classmethod
    def read(cls, path: Path, name: str) -> PublishedComparison:
        """Read the rows of a written report."""
        rows = pd.read_csv(path, float_precision="round_trip")
        return cls(name, rows.astype({"complete": "boolean", "within_fold_sd": "boolean"}))

    @property
    def matched(self) -> pd.DataFrame:
        """The rows that both sides have."""
        return self.rows[self.rows["protocol"].notna() & self.rows["their_protocol"].notna()]

    @property
    def notes(self) -> list[str]:
        """What only one side has, first by cohort, encoder and model, and what is unknown."""
        ours, theirs = self.rows[self.rows["protocol"].notna()], self.rows[self.rows["their_protocol"].notna()]
        here, there = "in this sweep", f"in {self.name}"
        notes = [*_one_sided(ours, theirs, here, there), *_one_sided(theirs, ours, there, here)]
        unknown = sorted(set(ours.loc[ours["clinical_c_mean"].isna(), "cohort"]))
        if unknown:
            notes.append(f"No clinical covariates are known for {_listed(unknown)} (cohort.covariates_table).")
        return notes

    @property
    def summary(self) -> str:
        """Count the published results that are near the cells, below the nulls and below the clinical covariates."""
        rows = self.matched
        theirs = rows.drop_duplicates([*KEY, "their_protocol"])
        known = rows[rows["within_fold_sd"].notna()]
        clinical = theirs[theirs["clinical_c_mean"].notna()]
        parts = [
            f"{int(known['within_fold_sd'].sum())} of {len(known)} lie within your standard deviation over folds",
            f"{_below(theirs, 'null_independent')} of {len(theirs)} lie below the mean of noise scores that are "
            f"independent between epochs, {_below(theirs, 'null_correlated')} below that of correlated ones",
        ]
        if len(clinical):
            parts.append(f"{_below(clinical, 'clinical_c_mean')} of {len(clinical)} lie below the clinical covariates")
        return f"Results of {self.name}: {'; '.join(parts)}."


def _below(rows: pd.DataFrame, column: str) -> int:
    return int((rows["their_cindex_mean"] < rows[column]).sum())


def read_published(word: str) -> PublishedTable:
    """Read a table of published results.

    Args:
        word: Path of a CSV file, or the name of a table that ships with the package. Columns: cohort, encoder, model,
            protocol (published, strict, fixed-epoch, unknown), cindex_mean; optional: cindex_std, table,
            printed_encoder, printed_model. A result may stand in several tables with the same numbers.

    Raises:
        ConfigError: There is no such file and no such shipped table.
        DataError: The file is not such a table; the message names row and column.
    """
    known = shipped_tables()
    path = Path(word)
    if not path.exists():
        if word not in known:
            raise ConfigError(
                f"--beside {word}: no such file, and no shipped table of this name.", nearest(word, known)
            )
        path = known[word]
    try:
        table = read_table(path)
        _check_columns(table, word)
        results = table[[*KEY, "protocol"]].map(str.strip)
        for name in ("cindex_mean", "cindex_std"):
            results[name] = _scores(table, name, word) if name in table else _NAN
    except CohortError as error:
        raise DataError(f"--beside {error.message}", error.remedy) from error
    return PublishedTable(word, _distinct(results, word))


def _check_columns(table: pd.DataFrame, word: str) -> None:
    expected = f"Expected {', '.join(_NEEDED)}, and optionally {', '.join(_OPTIONAL)}."
    missing = [name for name in _NEEDED if name not in table]
    if missing:
        raise DataError(f"--beside {word}: has no column {missing[0]}.", expected)
    unknown = [name for name in table if name not in (*_NEEDED, *_OPTIONAL)]
    if unknown:
        raise DataError(f"--beside {word}: the column {unknown[0]} has no meaning here.", expected)
    for name in _NEEDED:
        empty = table.index[table[name].isna()]
        if len(empty):
            raise DataError(f"--beside {word}, row {empty[0] + 2}: {name} is empty.", "Fill it in or remove the row.")
    wrong = table[~table["protocol"].str.strip().isin(_PROTOCOLS)]
    if len(wrong):
        raise DataError(
            f"--beside {word}, row {wrong.index[0] + 2}: protocol is {wrong['protocol'].iloc[0]!r}, expected "
            f"{', '.join(_PROTOCOLS)}.",
            "It states which patients chose the epoch; published: those of the scored fold.",
        )


def _scores(table: pd.DataFrame, name: str, word: str) -> pd.Series:
    values = numbers(table[name], word)
    wrong = values.index[~(values.between(0, 1) | values.isna())]
    if len(wrong):
        raise DataError(
            f"--beside {word}, row {wrong[0] + 2}: {name} is {values[wrong[0]]:g}, expected a number from 0 to 1.",
            "Divide percentages by 100.",
        )
    return values


def _distinct(results: pd.DataFrame, word: str) -> pd.DataFrame:
    """Drop repetitions of a result; refuse two results of one cell and protocol."""
    results = results.drop_duplicates()
    twice = results[results.duplicated([*KEY, "protocol"])]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(
            f"--beside {word}, row {twice.index[0] + 2}: {row['cohort']}, {row['encoder']}, {row['model']} has another "
            "result in a row above.",
            "Keep one of them.",
        )
    return results.reset_index(drop=True)


def compare_published(comparison: Comparison, table: PublishedTable) -> PublishedComparison:
    """Compare the cells of a sweep with published results.

    The nulls are simulated on the outcomes and folds of the sweep, per patient. Where the publication chose the epoch
    on the scored fold, or does not say, the simulation chooses among the epochs of the published recipe.

    Raises:
        DataError: No cell of the sweep is in the table.
    """
    cells = pd.DataFrame([_cell_row(cell) for cell in comparison.cells])
    theirs = table.results.rename(columns={name: f"their_{name}" for name in table.results if name not in KEY})
    rows = cells.assign(order=range(len(cells))).merge(theirs, on=KEY, how="outer", indicator="side")
    both = rows["side"] == "both"
    rows = rows.assign(side=~both).sort_values(["side", "order"], kind="stable", ignore_index=True)
    rows = rows.drop(columns=["side", "order"]).astype({"complete": "boolean"})
    rows["difference"] = rows["cindex_mean"] - rows["their_cindex_mean"]
    within = rows["difference"].abs() <= rows["cindex_std"]
    rows["within_fold_sd"] = within.astype("boolean").where(rows["difference"].notna())
    clinical = {cell.cohort: value for cell in comparison.cells if not math.isnan(value := _clinical(cell))}
    rows = pd.concat([rows, _nulls(comparison, rows)], axis=1)
    rows["clinical_c_mean"] = rows["cohort"].map(clinical).astype(float)
    found = PublishedComparison(table.name, rows)
    if found.matched.empty:
        raise DataError(
            f"--beside {table.name}: none of its {len(theirs)} results has the cohort, encoder and model of a cell of "
            f"this sweep. {' '.join(found.notes)}",
            "Name them as the sweep does.",
        )
    return found


def _cell_row(cell: Cell) -> dict[str, Any]:
    return {
        "cohort": cell.cohort, "encoder": cell.encoder, "model": cell.model, "protocol": cell.protocol,
        "complete": cell.complete, "cindex_mean": cell.mean_of_folds, "cindex_std": cell.spread,
    }  # fmt: skip


def _clinical(cell: Cell) -> float:
    return _NAN if cell.summary is None else float(cell.summary.get("clinical_c_mean", _NAN))


def _nulls(comparison: Comparison, rows: pd.DataFrame) -> pd.DataFrame:
    """Simulate the null of each cohort of the sweep under each protocol of the publication, once."""
    # The last cell of a cohort stays: a complete one, if there is one.
    cells = sorted(comparison.cells, key=lambda cell: cell.complete)
    fullest = {cell.cohort: cell for cell in cells if cell.summary is not None}
    known: dict[tuple[str, bool], CohortNull] = {}
    found: list[CohortNull | None] = []
    for cohort, protocol in rows[["cohort", "their_protocol"]].itertuples(index=False):
        key = (cohort, protocol in SCORED_FOLD_CHOOSES)
        if cohort in fullest and isinstance(protocol, str) and key not in known:
            done = [member for member in fullest[cohort].members if member.state == "done"]
            folds, _ = first_run_outcomes(cell_predictions(fullest[cohort], done))
            known[key] = cohort_null(folds, EpochChoice() if key[1] else None)
        found.append(known.get(key) if isinstance(protocol, str) else None)
    figures = {
        "null_independent": [null.independent.mean if null else _NAN for null in found],
        "null_correlated": [null.correlated.mean if null else _NAN for null in found],
        "null_high": [null.independent.high if null else _NAN for null in found],
    }
    return pd.DataFrame(figures, index=rows.index)


def _one_sided(one: pd.DataFrame, other: pd.DataFrame, here: str, there: str) -> Iterator[str]:
    """Yield a sentence on each cohort, encoder, model and combination of them that only the first side has."""
    rest = one[KEY].drop_duplicates()
    for column in KEY:
        only = list(dict.fromkeys(value for value in rest[column] if value not in set(other[column])))
        if only:
            yield f"Only {here}, not {there}: {column} {_listed(only)}."
            rest = rest[~rest[column].isin(only)]
    keys = set(other[KEY].itertuples(index=False, name=None))
    left = [key for key in rest.itertuples(index=False, name=None) if key not in keys]
    if left:
        shown = "; ".join(" / ".join(key) for key in left[:_SHOWN])
        yield f"Only {here}, not {there}: {len(left)} more combinations, such as {shown}."


def _listed(names: Iterable[str]) -> str:
    known: Sequence[str] = list(names)
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"{', '.join(known[:_SHOWN])}{more}"
