"""The figures of the report, each with a text alternative that describes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from cfusion.cohort.audit import LOST
from cfusion.report.number_words import decimal, p_text
from cfusion.report.svg import Plot, nice_ticks, number, shortened
from cfusion.survival.decision import DecisionCurve
from cfusion.survival.groups import Curve
from cfusion.survival.patients import PatientScores

_LONGEST_LABEL = 36
_PHONE_PX, _LONGEST_PHONE_LABEL, _LONGEST_PHONE_REASON = 350, 25, 44
"""Maximum letters of a label in a forest plot; longer ones are shortened there, but not in the table and tooltip."""


def _two_decimals(value: float) -> str:
    return decimal(value, 2)


def kaplan_meier_figure(scores: PatientScores, where: str) -> str:
    """Draw survival of the two risk groups, with numbers at risk and the log-rank test."""
    if scores.low is None or scores.high is None:
        return ""
    end = scores.risk_months[-1]
    plot = Plot((0, end), (0, 1), height=336, margins=(52, 42, 14, 92))
    plot.axes("months", "survival", x_ticks=scores.risk_months)
    for curve, css in ((scores.low, "low"), (scores.high, "high")):
        plot.step_band(curve.months, curve.low, curve.high, f"band {css}")
        plot.steps(curve.months, curve.survival, f"line {css}")
    plot.text(52, 14, "low risk", "note low", "start")
    plot.text(52, 30, "high risk", "note high", "start")
    plot.text(plot.px(end), 14, f"log-rank by fold {p_text(scores.log_rank_p)}", "note", "end")
    if scores.ratio is not None:
        ratio = scores.ratio
        words = f"hazard ratio {ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        plot.text(plot.px(end), 30, words, "note", "end")
    plot.text(4, 286, "at risk", "tick", "start")
    for y, name, counts in ((302, "low", scores.low_at_risk), (318, "high", scores.high_at_risk)):
        plot.text(4, y, name, f"tick {name}", "start")
        for month, count in zip(scores.risk_months, counts, strict=True):
            plot.text(plot.px(month), y, str(count), f"tick {name}")
    return plot.finish(f"Kaplan–Meier, {where}", _km_words(scores.low, scores.high, scores))


def _km_words(low: Curve, high: Curve, scores: PatientScores) -> str:
    return (
        f"{low.size} low-risk patients with {low.events} events end at survival {low.survival[-1]:.2f}; {high.size} "
        f"high-risk patients with {high.events} events end at {high.survival[-1]:.2f}; groups by the "
        f"{scores.cutoff_rule}; log-rank stratified by fold {p_text(scores.log_rank_p)}."
    )


def calibration(scores: PatientScores, where: str) -> str:
    """Draw predicted against observed survival at the first three horizons."""
    if scores.calibration is None or not scores.calibration.points:
        return ""
    plot = Plot((0, 1), (0, 1), height=280)
    plot.axes("predicted survival", "observed survival")
    plot.segment((0, 0), (1, 1), "rule")
    words = []
    for number_, (horizon, points) in enumerate(list(scores.calibration.points.items())[:3]):
        css = f"series{number_}"
        for point in points:
            plot.segment((point.predicted, point.low), (point.predicted, point.high), f"whisker {css}")
            tip = f"{horizon:g} months: predicted {point.predicted:.2f}, observed {point.observed:.2f}, n={point.size}"
            plot.dot(point.predicted, point.observed, f"dot {css}", tip=tip)
        plot.line([(point.predicted, point.observed) for point in points], f"line thin {css}")
        plot.text(plot.px(1), plot.py(0.02 + 0.07 * number_), f"{horizon:g} months", f"note {css}", "end")
        pairs = ", ".join(f"{p.predicted:.2f} against {p.observed:.2f}" for p in points)
        words.append(f"at {horizon:g} months predicted against observed {pairs}")
    return plot.finish(f"Calibration, {where}", "; ".join(words) + ".")


def auc_over_time(scores: PatientScores, where: str) -> str:
    """Draw the time-dependent AUC, mean over the folds."""
    known = [(m, a) for m, a in zip(scores.auc_months, scores.auc, strict=True) if not math.isnan(a)]
    if len(known) < 2:
        return ""
    values = [a for _, a in known]
    plot = Plot((0, known[-1][0]), (min(0.4, *values) - 0.02, max(0.8, *values) + 0.02), height=240)
    plot.axes("months", "AUC", y_format=_two_decimals)
    plot.segment((0, 0.5), (known[-1][0], 0.5), "rule")
    plot.line(zip(scores.auc_months, scores.auc, strict=True), "line series0")
    return plot.finish(
        f"Time-dependent AUC, {where}",
        f"Between {known[0][0]:.0f} and {known[-1][0]:.0f} months the AUC lies between {min(values):.2f} and "
        f"{max(values):.2f}; chance is 0.5.",
    )


def brier_over_time(scores: PatientScores, where: str) -> str:
    """Draw the Brier score of the model and of Kaplan–Meier over time, mean over the folds."""
    rows = list(zip(scores.auc_months, scores.brier, scores.brier_null, strict=True))
    known = [row for row in rows if not math.isnan(row[1])]
    if len(known) < 2:
        return ""
    highest = max(0.25, *(value for _, *values in known for value in values))
    plot = Plot((0, known[-1][0]), (0, highest + 0.02), height=240)
    plot.axes("months", "Brier score", y_format=_two_decimals)
    for series, name in enumerate(("model", "Kaplan–Meier")):
        plot.line([(row[0], row[1 + series]) for row in known], f"line series{series}")
        plot.text(plot.width - 8, plot.height - 72 + 15 * series, name, f"note series{series}", "end")
    months, model, null = known[-1]
    return plot.finish(
        f"Brier score over time, {where}",
        f"At {months:.0f} months the Brier score is {model:.3f}, and {null:.3f} for the Kaplan–Meier curve of the "
        "training patients; lower is better.",
    )


def fold_points(folds: pd.DataFrame, null: tuple[float, float] | None, where: str) -> str:
    """Draw Harrell's C of every fold with its interval and their mean, over the range of that mean without signal."""
    rows = folds.reset_index(drop=True)
    values = rows[["harrell_c", "harrell_low", "harrell_high"]].to_numpy().ravel()
    finite = [float(v) for v in values if not math.isnan(v)]
    plot = Plot((-0.6, len(rows) - 0.4), (min(0.4, *finite) - 0.02, max(0.75, *finite) + 0.02), height=240)
    plot.axes("fold", "C-index", x_ticks=[], y_format=_two_decimals)
    if null is not None:
        top, bottom = plot.py(null[1]), plot.py(null[0])
        plot.add(
            f'<rect class="null" x="{number(plot.px(plot.x[0]))}" y="{number(top)}" '
            f'width="{number(plot.px(plot.x[1]) - plot.px(plot.x[0]))}" height="{number(max(bottom - top, 1))}"/>'
        )
    plot.segment((plot.x[0], 0.5), (plot.x[1], 0.5), "rule")
    for i, row in rows.iterrows():
        at = float(str(i))
        if not math.isnan(row["harrell_low"]):
            plot.segment((at, row["harrell_low"]), (at, row["harrell_high"]), "whisker series0")
        tip = f"fold {row['fold']}, seed {row['seed']}: {row['harrell_c']:.3f}, {row['events']} events of {row['n']}"
        plot.dot(at, row["harrell_c"], "dot series0", tip=tip)
        if len(rows) <= 12:
            plot.text(plot.px(at), plot.height - 24, str(row["fold"]))
    mean = rows["harrell_c"].mean()
    plot.segment((plot.x[0], mean), (plot.x[1], mean), "mean")
    scores = ", ".join(f"{c:.3f}" for c in rows["harrell_c"])
    return plot.finish(f"C-index by fold, {where}", f"{scores}; mean {mean:.3f}.")


def decision(curve: DecisionCurve, where: str) -> str:
    """Draw the net benefit of the clinical model with and without the risk, and of treating everyone."""
    if len(curve.thresholds) < 2:
        return ""
    top = max(max(values) for values in curve.benefit.values())
    plot = Plot((0, curve.thresholds[-1]), (min(-0.02, -top / 4), top * 1.05 + 0.01), height=240)
    plot.axes("threshold probability", "net benefit", y_format=_two_decimals)
    plot.segment((0, 0), (curve.thresholds[-1], 0), "rule")
    words = []
    for number_, (name, values) in enumerate(curve.benefit.items()):
        kept = [(t, v) for t, v in zip(curve.thresholds, values, strict=True) if v >= plot.y[0]]
        plot.line(kept, f"line series{number_}")
        plot.text(plot.width - 8, 16 + 15 * number_, name, f"note series{number_}", "end")
        words.append(f"{name} {max(values):.3f} at most")
    return plot.finish(
        f"Decision curve at {curve.months:g} months, {where}", f"Net benefit per patient: {'; '.join(words)}."
    )


def learning_curves(curves: pd.DataFrame, where: str) -> str:
    """Draw the validation C-index by epoch, a line per trained model; without validation, the training loss.

    Args:
        curves: Metrics by `epoch` and `trained`, the folder of the trained model; by `fold` if there is no folder.
        where: The cohort, the model and the protocol.
    """
    metric = next((m for m in ("validation_cindex", "validation_loss", "train_loss") if m in curves.columns), None)
    if metric is None or curves[metric].notna().sum() < 2:
        return ""
    unit = "trained" if "trained" in curves.columns else "fold"
    table = curves[[unit, "epoch", metric]].dropna()
    low, high = float(table[metric].min()), float(table[metric].max())
    pad = max((high - low) * 0.06, 1e-3)
    plot = Plot((0, max(float(table["epoch"].max()), 1)), (low - pad, high + pad), height=240)
    words = metric.replace("_", " ").replace("cindex", "C-index")
    plot.axes("epoch", words, y_format=_two_decimals)
    for i, (_, model) in enumerate(table.groupby(unit)):
        rows = model.sort_values("epoch")
        plot.line(zip(rows["epoch"], rows[metric], strict=True), f"line thin series{i % 6}")
    last = table.sort_values("epoch").groupby(unit)[metric].last()
    return plot.finish(
        f"Learning curves, {where}",
        f"{words} over {int(table['epoch'].max()) + 1} epochs of {len(last)} models, ending between "
        f"{last.min():.2f} and {last.max():.2f}.",
    )


def forest_range(rows: Sequence[Mapping[str, object]]) -> tuple[float, float]:
    """Return the horizontal range that covers every interval and null of the given rows."""
    values = [float(str(row[k])) for row in rows for k in ("c", "low", "high", "null_low", "null_high")]
    finite = [value for value in values if not math.isnan(value)]
    return min(0.45, *finite) - 0.01, max(0.7, *finite) + 0.01


def forest(rows: Sequence[Mapping[str, object]], x: tuple[float, float], where: str, *, narrow: bool = False) -> str:
    """Draw the C-index of every model of a cohort with its interval, over the range of models without signal.

    Args:
        rows: `label, c, low, high, null_low, null_high` of each model.
        x: Range of the horizontal axis, see `forest_range`.
        where: The cohort.
        narrow: For a phone: label and number stand above the interval instead of at its sides.
    """
    left = 20 + 7.2 * min(max(len(str(row["label"])) for row in rows), _LONGEST_LABEL)
    height, sides = (44, (6.0, 6.0)) if narrow else (26, (left, 156.0))
    width = _PHONE_PX if narrow else 720
    plot = Plot(x, (0, len(rows)), width, height * len(rows) + 46, margins=(sides[0], 6, sides[1], 38))
    base = plot.height - 38
    for tick in nice_ticks(*plot.x):
        plot.segment((tick, 0), (tick, len(rows)), "grid")
        plot.text(plot.px(tick), base + 15, f"{tick:g}")
    plot.text((plot.px(plot.x[0]) + plot.px(plot.x[1])) / 2, base + 31, "C-index within folds", "label")
    plot.segment((0.5, 0), (0.5, len(rows)), "rule")
    for i, row in enumerate(rows):
        _forest_row(plot, row, len(rows) - i - (0.72 if narrow else 0.5))
        _forest_words(plot, row, 6 + (i + 0.5) * height, left, narrow)
    words = "; ".join(f"{row['label']} {row['c']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in rows)
    return plot.finish(f"C-index of all models, {where}", f"{words}. Shaded: 95% range of models without signal.")


def _forest_row(plot: Plot, row: Mapping[str, object], y: float) -> None:
    c, low, high, null_low, null_high = (float(str(row[k])) for k in ("c", "low", "high", "null_low", "null_high"))
    if not math.isnan(null_low):
        x = plot.px(null_low)
        plot.add(
            f'<rect class="null" x="{number(x)}" y="{number(plot.py(y) - 8)}" width="{number(plot.px(null_high) - x)}" '
            f'height="16"/>'
        )
    if not math.isnan(low):
        plot.segment((low, y), (high, y), "whisker series0 thick")
    plot.dot(c, y, "dot series0", 4.5, f"{row['label']}: {c:.3f}")


def _forest_words(plot: Plot, row: Mapping[str, object], middle: float, left: float, narrow: bool) -> None:
    """Add the label and the number of a row whose middle is at a height in px."""
    c, low, high = (float(str(row[k])) for k in ("c", "low", "high"))
    label, interval = str(row["label"]), "" if math.isnan(low) else f" ({low:.3f}–{high:.3f})"
    if narrow:
        plot.text(4, middle - 8, shortened(label, _LONGEST_PHONE_LABEL), "row", "start")
        plot.text(plot.width - 4, middle - 8, f"{c:.3f}{interval}", "value", "end")
    else:
        plot.text(left - 10, middle + 4, shortened(label, _LONGEST_LABEL), "row", "end")
        plot.text(plot.width - 4, middle + 4, f"{c:.3f}{interval}", "value", "end")


def flow(steps: Sequence[Mapping[str, object]], dropped: Mapping[str, int], where: str, *, narrow: bool = False) -> str:
    """Draw the cohort flow diagram, from the tables to the scored patients; `narrow`: losses are between the boxes."""
    height, gap, words_x = (92, 50, 76) if narrow else (62, 20, 292)
    most = _LONGEST_PHONE_REASON if narrow else 74
    plot = Plot((0, 1), (0, 1), width=_PHONE_PX if narrow else 720, height=height * len(steps) - gap + 10)
    for i, step in enumerate(steps):
        top = i * height + 2
        plot.add(f'<rect class="box" x="2" y="{top}" width="270" height="42" rx="5"/>')
        plot.text(16, top + 18, str(step["step"]), "row", "start")
        plot.text(16, top + 34, f"{step['patients']} patients, {step['slides']} slides", "tick", "start")
        if i + 1 < len(steps):
            plot.add(f'<path class="axis" d="M60 {top + 42}v{gap - 3}m-4 -5l4 5l4 -5"/>')
            lost_patients = int(str(step["patients"])) - int(str(steps[i + 1]["patients"]))
            lost_slides = int(str(step["slides"])) - int(str(steps[i + 1]["slides"]))
            if lost_patients or lost_slides:
                kinds = [kind for kind in LOST.get(str(steps[i + 1]["step"]), ()) if kind in dropped]
                why = ", ".join(f"{kind.replace('_', ' ')} {dropped[kind]}" for kind in kinds)
                line = top + (64 if narrow else 51)
                plot.add(f'<path class="axis" d="M60 {line}h{words_x - 66}"/>')
                plot.text(words_x, line - 2, f"− {lost_patients} patients, {lost_slides} slides", "tick", "start")
                plot.text(words_x, line + 12, shortened(why, most), "tick", "start")
    words = "; ".join(f"{step['step']}: {step['patients']} patients, {step['slides']} slides" for step in steps)
    reasons = ", ".join(f"{count} {kind}" for kind, count in dropped.items())
    return plot.finish(f"Cohort flow, {where}", f"{words}. {'Findings: ' + reasons + '.' if reasons else ''}")
