"""Builds the text of the report page from scores, section by section."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from cfusion.report import figures
from cfusion.report.context import PROTOCOL_TEXTS, ReportContext, endpoint_words
from cfusion.report.number_words import bare_p, decimal, interval, p_text
from cfusion.report.opening import covariate_words, opening_lines
from cfusion.report.page_environment import page_environment
from cfusion.report.patients_section import described
from cfusion.report.tripod import TRIPOD_ITEMS
from cfusion.survival.calibration import MOST_CENSORED_FOR_D_CALIBRATION
from cfusion.survival.doubts import Doubt
from cfusion.survival.null import SCORED_FOLD_CHOOSES
from cfusion.survival.predictions import UNIT
from cfusion.survival.score import Scores

_OPEN_DETAILS = 12
"""Up to this number of models, figures are shown; with more, they are folded."""


def _interval(row: dict, names: str, digits: int = 3, sign: str = "") -> str:
    """Format two columns of a row as `low to high`; empty if they are undefined."""
    low, high = (row[name] for name in names.split())
    return interval(low, high, digits, sign)


def report_environment() -> jinja2.Environment:
    """Templates of the report's pages, with their filters."""
    return page_environment("cfusion.report", num=decimal, words=covariate_words, p=p_text, bare_p=bare_p, to=_interval)


def render_run_page(
    scores: Sequence[Scores],
    summary: pd.DataFrame,
    folds: pd.DataFrame,
    comparisons: pd.DataFrame,
    context: ReportContext,
) -> str:
    """Render the page as one HTML text without external links."""
    rows = [dict(zip(summary.columns, values, strict=True)) for values in summary.itertuples(index=False)]
    details = _details(rows, folds, scores, context)
    notes = list(dict.fromkeys([*context.notes, *(note for part in scores for note in part.notes)]))
    environment = report_environment()
    return environment.get_template("page.html.j2").render(
        title=context.title,
        opening=opening_lines(rows, scores),
        described=described(scores),
        tripod=TRIPOD_ITEMS,
        doubts=[note for note in notes if isinstance(note, Doubt)],
        remarks=[note for note in notes if not isinstance(note, Doubt)],
        most_censored=MOST_CENSORED_FOR_D_CALIBRATION,
        rows=rows,
        horizons=[c for c in summary.columns if c.startswith("auc_") and c.count("_") == 1],
        cohorts=[_cohort(name, rows, folds, context) for name in dict.fromkeys(str(row["cohort"]) for row in rows)],
        protocols={str(row["protocol"]): PROTOCOL_TEXTS[str(row["protocol"])] for row in rows},
        choices=_choices(rows, context),
        searches={", ".join(key): found for key, found in context.searches.items()},
        details=details,
        open_details=len(details) <= _OPEN_DETAILS,
        comparisons=comparisons.to_dict("records"),
        provenance=_flat_provenance(context),
        style=Markup(environment.get_template("style.css").render()),  # noqa: S704 - our own style sheet
        show={name: bool(summary[name].notna().any()) for name in ("permuted", "oracle", "optimism_gap", "ibs")}
        | {"clinical": "clinical_c" in summary and bool(summary["clinical_c"].notna().any())},
    )


def render_card(summary: pd.DataFrame, context: ReportContext) -> str:
    """Render the model card (Mitchell et al., FAT* 2019) as Markdown."""
    rows = [dict(zip(summary.columns, values, strict=True)) for values in summary.itertuples(index=False)]
    return report_environment().get_template("model_card.md.j2").render(
        title=context.title, rows=rows, notes=context.notes, audits=context.audits,
        endpoints={str(row["cohort"]): endpoint_words(context.endpoints.get(str(row["cohort"]))) for row in rows},
        protocols={str(row["protocol"]): PROTOCOL_TEXTS[str(row["protocol"])] for row in rows},
        provenance=_flat_provenance(context),
    )  # fmt: skip


def _choices(rows: list[dict], context: ReportContext) -> list[str]:
    """Say which epochs the nulls of the rows choose from; empty if none is chosen on the scored fold."""
    keys = [(str(row["cohort"]), str(row["model"]), str(row["protocol"])) for row in rows]
    chosen = [key for key in keys if key[2] in SCORED_FOLD_CHOOSES]
    return list(dict.fromkeys(str(context.choice(key)) for key in chosen))


def _forest_row(row: dict) -> dict[str, object]:
    return {
        "label": f"{row['model']} ({row['protocol']})", "c": row["cindex_within"], "low": row["within_low"],
        "high": row["within_high"], "null_low": row["null_low"], "null_high": row["null_high"],
    }  # fmt: skip


def _clinical_rows(rows: list[dict]) -> list[dict[str, object]]:
    """Return the row of the clinical model in a cohort's forest plot; empty where there is none."""
    known = [row for row in rows if isinstance(row.get("clinical_covariates"), str)]
    if not known:
        return []
    row = known[0]
    return [{
        "label": f"Cox: {covariate_words(row['clinical_covariates'])}", "c": row["clinical_c"],
        "low": row["clinical_c_low"], "high": row["clinical_c_high"], "null_low": math.nan, "null_high": math.nan,
    }]  # fmt: skip


def _cohort(name: str, rows: list[dict], folds: pd.DataFrame, context: ReportContext) -> dict[str, Any]:
    """Collect a cohort's flow, audit and forest plot."""
    mine = [row for row in rows if row["cohort"] == name]
    audit = context.audits.get(name)
    findings = audit["findings"] if audit else []
    counts = dict(Counter(finding["kind"] for finding in findings).most_common())
    span = figures.forest_range([*map(_forest_row, rows), *_clinical_rows(rows)])
    models = [*map(_forest_row, mine), *_clinical_rows(mine)]
    steps = audit["flow"] if audit else []
    first = folds[(folds[UNIT] == [mine[0][unit] for unit in UNIT]).all(axis=1)]
    first = first[(first["seed"] == first["seed"].iloc[0]) & (first["repeat"] == first["repeat"].iloc[0])]
    return {
        "name": name, "n": mine[0]["n"], "events": mine[0]["events"],
        "endpoint": endpoint_words(context.endpoints.get(name)),
        "forest": _wide_and_narrow(lambda narrow: figures.forest(models, span, name, narrow=narrow)),
        "flow": _wide_and_narrow(lambda narrow: figures.flow(steps, counts, name, narrow=narrow)) if steps else "",
        "audited": audit is not None, "joint": context.joint.get(name), "counts": counts,
        "findings": [{**f, "count": counts[f["kind"]]} for f in {f["kind"]: f for f in findings[::-1]}.values()],
        "folds": first[["fold", "n", "events"]].to_dict("records"),
    }  # fmt: skip


def _wide_and_narrow(draw: Callable[[bool], str]) -> Markup:
    """Return a figure for screens and paper, and one for phones; the style sheet shows one of them."""
    wide, narrow = draw(False), draw(True)
    return Markup(f'<div class="wide">{wide}</div><div class="phone">{narrow}</div>')  # noqa: S704 - figures escape their words


def _details(
    rows: list[dict], folds: pd.DataFrame, scores: Sequence[Scores], context: ReportContext
) -> list[dict[str, Any]]:
    """Collect the figures of every cohort, model and protocol."""
    patients = {key: value for part in scores for key, value in part.patients.items()}
    decisions = {key: found.curve for part in scores for key, found in part.added.items() if found.curve is not None}
    by_key = dict(list(folds.groupby(UNIT, sort=False)))
    curves = dict(list(context.curves.groupby(UNIT, sort=False))) if context.curves is not None else {}
    details = []
    for row in rows:
        key = (row["cohort"], row["model"], row["protocol"])
        where = ", ".join(key)
        drawn = {
            "Kaplan–Meier curves of the risk groups": figures.kaplan_meier_figure(patients[key], where),
            "C-index by fold and its mean, with the range of that mean without signal": figures.fold_points(
                by_key[key], (row["null_low"], row["null_high"]), where
            ),
            "AUC over time, mean of the folds": figures.auc_over_time(patients[key], where),
            "Brier score over time, mean of the folds": figures.brier_over_time(patients[key], where),
            "Calibration in fifths of the patients": figures.calibration(patients[key], where),
            "Decision curve: the covariates, and the covariates with the risk": figures.decision(decisions[key], where)
            if key in decisions
            else "",
            "Learning curves, a line per trained model": figures.learning_curves(curves[key], where)
            if key in curves
            else "",
        }
        svg = {caption: Markup(figure) for caption, figure in drawn.items() if figure}  # noqa: S704
        details.append({**row, "scores": patients[key], "figures": svg})
    return details


def _flat_provenance(context: ReportContext) -> dict[str, dict[str, str]]:
    """Return dotted names and plain values of each run's provenance."""
    flat = {}
    for run, values in context.provenance.items():
        table = pd.json_normalize(dict(values)).iloc[0]
        flat[str(run)] = {str(name): str(value) for name, value in table.items()}
    return flat
