"""The comparison as machine-readable tables: cells, runs and tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from cfusion.report.comparison.cells import Cell, Comparison, Cost
from cfusion.report.context import optimistic


@dataclass(frozen=True)
class ResultGrid:
    """The cells of one protocol in the layout of a paper's table.

    Attributes:
        protocol: Protocol of all its cells.
        cohorts: Columns.
        methods: Rows, as encoder and model.
        cells: By encoder, model and cohort; missing where the sweep excludes it.
    """

    protocol: str
    cohorts: tuple[str, ...]
    methods: tuple[tuple[str, str], ...]
    cells: dict[tuple[str, str, str], Cell]

    @classmethod
    def of(cls, comparison: Comparison, protocol: str) -> ResultGrid:
        """Build the grid of a protocol."""
        cells = comparison.of(protocol)
        return cls(
            protocol,
            tuple(dict.fromkeys(cell.cohort for cell in cells)),
            tuple(dict.fromkeys((cell.encoder, cell.model) for cell in cells)),
            {(cell.encoder, cell.model, cell.cohort): cell for cell in cells},
        )

    def row(self, encoder: str, model: str) -> list[Cell | None]:
        """Return a method's cells over the cohorts."""
        return [self.cells.get((encoder, model, cohort)) for cohort in self.cohorts]

    def mean(self, encoder: str, model: str) -> float:
        """Return a method's C within folds, mean over the cohorts; NaN unless every cohort is complete."""
        return self._over_cohorts(encoder, model, lambda cell: cell.value)

    def mean_of_folds(self, encoder: str, model: str) -> float:
        """Return a method's C, mean over folds, seeds and cohorts; NaN unless every cohort is complete."""
        return self._over_cohorts(encoder, model, lambda cell: cell.mean_of_folds)

    def _over_cohorts(self, encoder: str, model: str, value: Callable[[Cell], float]) -> float:
        values = [value(cell) if cell is not None else math.nan for cell in self.row(encoder, model)]
        return sum(values) / len(values) if values else math.nan

    def clinical(self, cohort: str) -> str:
        """Return the C of the clinical covariates in a cohort; a dash where it is unknown."""
        known = [cell.clinical for cell in self.cells.values() if cell.cohort == cohort and cell.clinical != "–"]
        return known[0] if known else "–"

    def cost(self, encoder: str, model: str) -> Cost:
        """Return the cost of a method's runs over the cohorts."""
        return Cost.total([cell.cost for cell in self.row(encoder, model) if cell is not None])


def cells_table(comparison: Comparison) -> pd.DataFrame:
    """Return a row per cell: scores with intervals, null, test against the best, states and cost."""
    rows = []
    for cell in comparison.cells:
        scores = {} if cell.summary is None else {str(name): value for name, value in cell.summary.items()}
        rows.append({
            **scores,
            "cohort": cell.cohort, "encoder": cell.encoder, "model": cell.model, "protocol": cell.protocol,
            "optimistic": optimistic(cell.protocol), "complete": cell.complete, "runs": len(cell.members),
            "runs_done": sum(member.state == "done" for member in cell.members),
            "runs_failed": sum(member.state == "failed" for member in cell.members),
            "best": cell.best, "p_against_best": cell.p_best, "null_permuted": cell.null, **asdict(cell.cost),
        })  # fmt: skip
    return pd.DataFrame(rows)


def runs_table(comparison: Comparison) -> pd.DataFrame:
    """Return a row per run: folder, final state and cost."""
    members = [member for cell in comparison.cells for member in (*cell.members, *cell.permuted)]
    rows = [{**asdict(member), "folder": str(member.folder), **asdict(member.cost)} for member in members]
    return pd.DataFrame(rows).drop(columns="cost")


def tests_table(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the tests as rows, within a cohort by distance to the best; `why` gives the reason of a missing test."""
    if comparison.tests.empty:
        return []
    by = ["cohort", "protocol", "difference"]
    table = comparison.tests.sort_values(by, ascending=[True, True, False])
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.itertuples(index=False)]
    return [{**row, "why": _why_untested(row)} for row in rows]


def _why_untested(row: dict[str, Any]) -> str:
    if not math.isnan(row["p"]):
        return ""
    missing = "no common seed" if not row["seeds"] else "no common patient" if not row["patients"] else ""
    return f"not compared: {missing or 'too few comparable pairs'}"
