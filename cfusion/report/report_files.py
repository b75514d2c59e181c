"""Writes the report: one page, a model card, and the tables behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cfusion.errors import ConfigError
from cfusion.files import atomic_path, write_json, write_text
from cfusion.report.context import ReportContext
from cfusion.report.evidence import evidence_table
from cfusion.report.methods_text import methods_text, results_table
from cfusion.report.printed_tables import latex_file
from cfusion.report.run_page import render_card, render_run_page
from cfusion.run_folder import SCORES, SUMMARY
from cfusion.survival.paired import compare
from cfusion.survival.score import Scores

CLINICAL = ("clinical_c", "added_c", "added_c_low", "added_c_high", "hr_sd_adjusted", "hr_sd_adjusted_p")
"""Columns of `summary.json` where clinical covariates are known."""


def write_report(scores: Sequence[Scores], out_dir: Path | str, *, context: ReportContext | None = None) -> Path:
    """Write a report to a folder.

    Files: `index.html`, the page, a single file that needs no network; `model_card.md`, a summary; `summary.csv`, a
    row per cohort, model and protocol, with nulls; `scores.csv`, a row per fold; `comparisons.csv`, the paired
    comparisons; `findings.csv`, patients and slides that the audits dropped or marked as suspicious; `summary.json`,
    C within folds and pooled with intervals, oracle and permuted C, and what the risk adds to clinical covariates;
    `methods.md`, text for the methods section of a paper; `table.tex`, the results for a paper.

    Args:
        scores: Scores to report. Models with different numbers of patients or seeds are compared on the common ones.
        out_dir: Output folder, created if missing.
        context: Where the numbers come from.

    Returns:
        The path of the page.

    Raises:
        ConfigError: There are no scores, or two hold the same cohort, model and protocol.
    """
    context = context or ReportContext()
    _check_distinct(scores)
    summary = evidence_table(scores, context)
    folds = pd.concat([part.folds for part in scores], ignore_index=True)
    comparisons = compare(pd.concat([part.predictions for part in scores], ignore_index=True))
    out = Path(out_dir)
    write_table(out / SUMMARY, summary)
    write_table(out / SCORES, folds)
    write_table(out / "comparisons.csv", comparisons)
    findings = [finding for audit in context.audits.values() for finding in audit["findings"]]
    write_table(out / "findings.csv", pd.DataFrame(findings, columns=["kind", "subject", "action", "message"]))
    write_json(out / "summary.json", summary_rows(summary))
    write_text(out / "model_card.md", render_card(summary, context))
    rows = [dict(zip(summary.columns, values, strict=True)) for values in summary.itertuples(index=False)]
    write_text(out / "methods.md", methods_text(rows, context))
    write_text(out / "table.tex", latex_file(results_table(rows)))
    write_text(out / "index.html", render_run_page(scores, summary, folds, comparisons, context))
    return out / "index.html"


def _check_distinct(scores: Sequence[Scores]) -> None:
    if not scores:
        raise ConfigError("a report needs at least one set of scores.")
    keys = [key for part in scores for key in part.patients]
    twice = [key for key in keys if keys.count(key) > 1] if len(set(keys)) < len(keys) else []
    if twice:
        raise ConfigError(f"report: {', '.join(twice[0])} is among the scores twice.", "Leave one of them out.")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV whose floats read back exactly."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.17g")


def summary_rows(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of `summary.json`; unknown values are null."""
    columns = [
        "cohort", "model", "protocol", "cindex_within", "within_low", "within_high", "cindex_pooled", "cindex_low",
        "cindex_high", "oracle", "permuted", *(name for name in CLINICAL if name in summary.columns),
    ]  # fmt: skip
    return [
        {name: None if pd.isna(value) else value for name, value in zip(columns, values, strict=True)}
        for values in summary[columns].itertuples(index=False)
    ]
