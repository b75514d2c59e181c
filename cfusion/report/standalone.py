"""Figures as separate SVG files, for viewers that show a run without its report."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Add the SVG name space and the report's style sheet to a figure, so that any viewer draws it as the page does."""
    style = files("cfusion.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    # The figure needs its background, since in a viewer the dark style would otherwise be light on white.
    inner = f"<style><![CDATA[{style}\nsvg.plot {{ background: var(--paper) }}]]></style>"
    opening, rest = svg.split(">", 1)
    named = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{named}>{inner}{rest}\n"
