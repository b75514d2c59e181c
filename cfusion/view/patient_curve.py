"""Draw a patient's predicted survival together with the cohort's Kaplan–Meier curve, from a finished run."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

from cfusion.cohort.identifiers import Names, slide_stem
from cfusion.cohort.joint import read_cohorts
from cfusion.cohort.slide_owners import SlideOwners
from cfusion.errors import CfusionError, DataError
from cfusion.explanation.result import Explanation
from cfusion.report.number_words import decimal
from cfusion.report.svg import Plot, nice_ticks
from cfusion.run_folder import PREDICTIONS, predictions_file, read_config
from cfusion.survival.groups import Curve, kaplan_meier
from cfusion.survival.predictions import read_predictions, survival_columns

logger = logging.getLogger(__name__)


class CohortCurves:
    """Outcomes and out-of-fold predictions of the patients of a run.

    Args:
        run: Output folder of `cfusion train`.

    Raises:
        DataError: The folder has no predictions, or they cannot be read.
    """

    def __init__(self, run: Path) -> None:
        if not (run / PREDICTIONS).is_file():
            raise DataError(
                f"{run}: has no {PREDICTIONS}.", "Give the output folder of `cfusion train`.", topic="viewer"
            )
        table = read_predictions(predictions_file(run))
        self.name = str(table["cohort"].iloc[0])
        folds = table.groupby(["cohort", "seed", "repeat", "fold"])["risk"]
        self.table = table.assign(percentile=100 * (folds.rank() - 1) / (folds.transform("size") - 1).clip(lower=1))
        self._predicted = survival_columns(table)
        self.cases = table.drop_duplicates("case_id").set_index("case_id")
        self._observed = {
            str(name): kaplan_meier(rows["survival_months"].to_numpy(float), rows["event"].to_numpy(bool))
            for name, rows in self.cases.groupby("cohort")
        }
        self._owners = SlideOwners(Names(map(str, self.cases.index)).find, _cases_of_slides(run))

    def case_of(self, slide_id: str) -> str | None:
        """Return the patient of a slide; None if the patient is not in the run."""
        case = self._owners.patient(slide_stem(slide_id))
        return case if case in self.cases.index else None

    def observed(self, case: str | None) -> tuple[str, int, Curve]:
        """Return the name, the number of patients and the Kaplan–Meier curve of a patient's cohort.

        Without a patient: of the run's first cohort.
        """
        name = self.name if case is None else str(self.cases.loc[case, "cohort"])
        return name, int((self.cases["cohort"] == name).sum()), self._observed[name]

    def predicted(self, case: str) -> list[list[tuple[float, float]]]:
        """Return the patient's predicted curves, one per repetition, as points (months, survival) from (0, 1) on."""
        if self._predicted is None:
            return []
        survival, edges = self._predicted
        rows = self.table.index[self.table["case_id"] == case]
        return [[(0.0, 1.0), *zip(edges[r].tolist(), survival[r].tolist(), strict=True)] for r in rows]

    def percentile(self, case: str) -> float:
        """Return the percentage of the other patients of the same cohort and fold with a lower risk."""
        return float(self.table.loc[self.table["case_id"] == case, "percentile"].mean())


def _cases_of_slides(run: Path) -> dict[str, str]:
    try:
        slides = read_cohorts(read_config(run)).slides
    except CfusionError as error:
        logger.info("%s: the slide table is unavailable, so patients are matched by slide names (%s)", run, error)
        return {}
    return {str(slide): str(case) for slide, case in slides["case_id"].items()}


def patient_panel(curves: CohortCurves | None, slide_id: str, explanation: Explanation | None) -> dict[str, Any] | None:
    """Return the figure of a slide's patient and its description; None if there is no run and no explanation."""
    case = curves.case_of(slide_id) if curves is not None else None
    if explanation is None and case is None:
        return None if curves is None else {"case": None, "words": f"The run has no patient for the slide {slide_id}."}
    words, lines = [], []
    if curves is not None and case is not None:
        row = curves.cases.loc[case]
        lines += [("patient", curve) for curve in curves.predicted(case)]
        outcome = "event" if row["event"] else "last seen without event"
        words.append(f"{outcome} at {row['survival_months']:.1f} months")
        words.append(f"out-of-fold risk above {curves.percentile(case):.0f}% of the patients of its fold")
    if explanation is not None:
        lines.append(("ensemble", list(zip(explanation.curve["months"], explanation.curve["survival"], strict=True))))
        models = f"fold ensemble of {len(explanation.risks)}" if len(explanation.risks) > 1 else "one model"
        number = f"risk {decimal(explanation.risk)}"
        words.append(f"{models}: {', '.join(filter(None, [number, explanation.meaning]))}")
        words += [explanation.attrs["note"]] if explanation.attrs.get("note") else []
    figure = _figure(curves, case, lines, "; ".join(words))
    return {"case": case, "words": "; ".join(words), "figure": figure}


def _figure(
    curves: CohortCurves | None, case: str | None, lines: list[tuple[str, list[tuple[float, float]]]], words: str
) -> str:
    cohort = None if curves is None else curves.observed(case)
    ends = [curve[-1][0] for _, curve in lines] + ([cohort[2].months[-1]] if cohort is not None else [])
    end = max((e for e in ends if math.isfinite(e)), default=1.0)
    plot = Plot((0, end), (0, 1), width=340, height=230)
    plot.axes("months", "survival", x_ticks=nice_ticks(0, end))
    if cohort is not None:
        observed = cohort[2]
        x = [min(m, end) for m in observed.months]
        plot.step_band(x, observed.low, observed.high, "band cohort")
        plot.steps(x, observed.survival, "line cohort")
    for css, curve in lines:
        plot.steps([min(m, end) for m, _ in curve], [s for _, s in curve], f"line {css}")
    if curves is not None and case is not None:
        row: Any = curves.cases.loc[case]
        at = min(float(row["survival_months"]), end)
        shift, anchor = (4, "start") if at < end / 2 else (-4, "end")
        plot.segment((at, 0), (at, 1), "rule")
        plot.text(plot.px(at) + shift, plot.py(0) - 5, "event" if row["event"] else "last seen", "tick", anchor)
    title = f"Survival predicted for {case or 'this slide'}"
    within = f", within the Kaplan–Meier curve of the {cohort[1]} patients of {cohort[0]}" if cohort else ""
    # The page's content security policy forbids inline styles; its style sheet sets the width.
    return re.sub(r' style="[^"]*"', "", plot.finish(title + within, f"{words}."), count=1)
