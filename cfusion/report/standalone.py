"""Figures as separate SVG files, for viewers that show a run without its report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

import pandas as pd

from cfusion.files import write_text
from cfusion.report import figures
from cfusion.survival.predictions import UNIT
from cfusion.survival.score import Scores


def write_figures(folder: Path, drawn: Mapping[str, str]) -> None:
    """Write figures by file name, as drawn by `figures`; empty ones are skipped."""
    for name, svg in drawn.items():
        if svg:
            write_text(folder / f"{name}.svg", standalone(svg))


def run_figures(scores: Scores, curves: pd.DataFrame) -> dict[str, str]:
    """Draw the figures of one run's scores: Kaplan–Meier, folds, AUC over time, calibration, learning curves.

    Args:
        scores: Scores of one cohort, model and protocol; of cohorts that were trained as one, all together are drawn.
        curves: Metrics by `fold` and `epoch`.
    """
    key, patients = next(iter(scores.patients.items()))
    where = ", ".join(key)
    own = (scores.folds[UNIT] == list(key)).all(axis=1)
    return {
        "kaplan_meier": figures.kaplan_meier_figure(patients, where),
        "folds": figures.fold_points(scores.folds[own], None, where),
        "auc": figures.auc_over_time(patients, where),
        "calibration": figures.calibration(patients, where),
        "learning_curves": figures.learning_curves(curves, where),
    }


def standalone(svg: str) -> str:
    """Add name space, size and style to a figure, so that any program draws it as the light page does."""
    opening, rest = svg.split(">", 1)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
    attributes = '<svg xmlns="http://www.w3.org/2000/svg"' + (f' width="{size[1]}" height="{size[2]}"' if size else "")
    return f"{opening.replace('<svg', attributes, 1)}><style><![CDATA[{_figure_rules()}]]></style>{rest}\n"


@cache
def _figure_rules() -> str:
    """Return the style sheet's rules of figures without variables and `paint-order`, which many programs ignore."""
    sheet = files("cfusion.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): *([^;]+);", sheet[: sheet.index("}")]))
    rules = re.findall(r"svg[^{}]*\{[^}]*\}", sheet[sheet.index("svg.plot {") : sheet.index(".phone {")])
    kept = [rule.replace("width: 100%; height: auto; ", "") for rule in rules if "paint-order" not in rule]
    kept.append("svg.plot { background: var(--paper) }")
    return re.sub(r"var\(--([\w-]+)\)", lambda name: colours[name[1]], "\n".join(kept))
