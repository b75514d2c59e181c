"""Figures as SVG files of their own, for whoever shows a run without the report around it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import pandas as pd

from cfusion.files import write_text
from cfusion.report import figures
from cfusion.survival.score import Scores


def write_figures(folder: Path, drawn: Mapping[str, str]) -> None:
    """Write figures, by file name, as `figures` draws them; empty ones are left out."""
    for name, svg in drawn.items():
        if svg:
            write_text(folder / f"{name}.svg", standalone(svg))


def run_figures(scores: Scores, curves: pd.DataFrame) -> dict[str, str]:
    """The figures of one run's scores: Kaplan–Meier, folds, AUC over time, calibration, learning curves.

    Args:
        scores: Of one cohort, model and protocol.
        curves: Metrics by `fold` and `epoch`.
    """
    ((key, patients),) = scores.patients.items()
    where = ", ".join(key)
    return {
        "kaplan_meier": figures.kaplan_meier_figure(patients, where),
        "folds": figures.fold_points(scores.folds, None, where),
        "auc": figures.auc_over_time(patients, where),
        "calibration": figures.calibration(patients, where),
        "learning_curves": figures.learning_curves(curves, where),
    }


def standalone(svg: str) -> str:
    """A figure with its name space and the report's style sheet inside: any viewer draws it as the page does."""
    style = files("cfusion.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    # The viewer's background is not the page's: without one of its own, the dark style would be light on white.
    inner = f"<style><![CDATA[{style}\nsvg.plot {{ background: var(--paper) }}]]></style>"
    opening, rest = svg.split(">", 1)
    named = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{named}>{inner}{rest}\n"
