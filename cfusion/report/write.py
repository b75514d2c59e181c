"""Write the report: one page, and the tables behind it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.errors import ConfigError
from cfusion.files import atomic_path, write_json, write_text
from cfusion.report.context import ReportContext
from cfusion.survival.score import Scores


def write_report(scores: Sequence[Scores], out_dir: Path | str, *, context: ReportContext | None = None) -> Path:
    """Write `index.html`, `summary.csv`, `scores.csv` and `summary.json` to a folder.

    Returns:
        The path of the page.

    Raises:
        ConfigError: There are no scores.
    """
    if not scores:
        raise ConfigError("a report needs at least one set of scores.")
    context = context or ReportContext()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    summary = pd.concat([s.summary for s in scores], ignore_index=True)
    write_table(out / "summary.csv", summary)
    write_table(out / "scores.csv", pd.concat([s.folds for s in scores], ignore_index=True))
    write_json(out / "summary.json", summary_rows(summary, context))
    table = summary.to_html(index=False, float_format=lambda value: f"{value:.3f}")
    write_text(out / "index.html", f"<!doctype html><title>{html.escape(context.title)}</title>{table}")
    return out / "index.html"


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV whose floats read back as they were."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.17g")


def summary_rows(summary: pd.DataFrame, context: ReportContext) -> list[dict[str, Any]]:
    """The rows of `summary.json`; what is not known is null."""
    columns = ["cohort", "model", "protocol", "cindex_pooled", "cindex_low", "cindex_high"]
    rows = []
    for values in summary[columns].itertuples(index=False):
        row = {name: None if pd.isna(value) else value for name, value in zip(columns, values, strict=True)}
        key = (str(row["cohort"]), str(row["model"]), str(row["protocol"]))
        rows.append({**row, "oracle": context.oracle.get(key), "permuted": context.permuted.get(key)})
    return rows
