"""Scores over all out-of-fold patients together: risk groups, calibration, AUC over time.

With several seeds or repeats only the first one is used, so that every patient counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import pandas as pd

from cfusion.errors import UndefinedMetricError
from cfusion.survival.calibration import (
    MOST_CENSORED_FOR_D_CALIBRATION,
    CalibrationPoint,
    calibration_intercept,
    calibration_points,
    calibration_slope,
    d_calibration,
    integrated_calibration_index,
    observed_over_expected,
    survival_at,
)
from cfusion.survival.curves import is_high_risk
from cfusion.survival.groups import Curve, HazardRatio, at_risk, hazard_ratio, kaplan_meier, log_rank
from cfusion.survival.predictions import survival_columns

_NAN = float("nan")
_AT_RISK = 0.1
"""Share of the patients that must be at risk at the horizon of the mean calibration."""


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed survival.

    Attributes:
        points: By horizon in months, groups of rising predicted survival.
        slope: Cox coefficient of the predicted log cumulative hazard at the median event time; 1 is ideal.
        slope_low: Lower 95% limit.
        slope_high: Upper 95% limit.
        months: Horizon of the observed over the expected events and of the ICI: the last of the report's horizons at
            which a tenth of the patients are at risk and that the model predicts, or else the median time of events.
        observed_expected: Observed over expected share of events at the horizon, with its 95% limits.
        intercept: Log of observed over expected events during the follow-up, with its 95% limits.
        ici: Mean absolute difference of predicted and observed probability of the event at the horizon.
        d_calibration_p: P-value of D-calibration; small where predictions are off. NaN where more than a fifth of the
            patients are censored, because the test then hardly ever rejects.
    """

    points: dict[float, list[CalibrationPoint]]
    slope: float
    slope_low: float
    slope_high: float
    months: float
    observed_expected: tuple[float, float, float]
    intercept: tuple[float, float, float]
    ici: float
    d_calibration_p: float

    def columns(self) -> dict[str, object]:
        """Return the scores as columns of the summary."""
        named = {
            "calibration_slope": (self.slope, self.slope_low, self.slope_high),
            "calibration_intercept": self.intercept,
            "observed_expected": self.observed_expected,
        }
        limits = {
            f"{name}{end}": value
            for name, values in named.items() for end, value in zip(("", "_low", "_high"), values, strict=True)
        }  # fmt: skip
        return {
            "calibration_months": self.months, **limits, "ici": self.ici, "d_calibration_p": self.d_calibration_p,
        }  # fmt: skip


_UNDEFINED = (_NAN, _NAN, _NAN)
_NO_CALIBRATION = Calibration({}, _NAN, _NAN, _NAN, _NAN, _UNDEFINED, _UNDEFINED, _NAN, _NAN)


@dataclass(frozen=True)
class PatientScores:
    """Scores of one cohort, model and protocol that the report shows in addition to the table.

    Attributes:
        low: Kaplan–Meier curve of the low-risk group; None if all risks are on one side.
        high: Kaplan–Meier curve of the high-risk group.
        risk_months: Times of the numbers at risk.
        low_at_risk: Patients of the low-risk group still followed at those times.
        high_at_risk: The same for the high-risk group.
        cutoff_rule: How the groups were formed.
        ratio: Hazard ratio of high against low risk, stratified by fold.
        log_rank_p: P-value of the log-rank test between the groups, stratified by fold.
        median_split_p: The same, unstratified, for the split at the median of the pooled risks (risk ≥ median is
            high), the rule behind MCAT's published p-values.
        calibration: None without survival columns.
        auc_months: Times of the AUC curve.
        auc: Mean over folds of the time-dependent AUC; NaN where no fold has one.
        brier: Mean over folds of the Brier score at the same times; NaN where no fold has one.
        brier_null: The same of the training patients' Kaplan–Meier curve.
    """

    low: Curve | None
    high: Curve | None
    risk_months: tuple[float, ...]
    low_at_risk: tuple[int, ...]
    high_at_risk: tuple[int, ...]
    cutoff_rule: str
    ratio: HazardRatio | None
    log_rank_p: float
    median_split_p: float
    calibration: Calibration | None
    auc_months: tuple[float, ...]
    auc: tuple[float, ...]
    brier: tuple[float, ...]
    brier_null: tuple[float, ...]

    def columns(self) -> dict[str, object]:
        """Return the scalar scores as columns of the summary."""
        ratio, calibration = self.ratio, self.calibration
        return {
            "logrank_p": self.median_split_p,
            "logrank_by_fold_p": self.log_rank_p,
            "hazard_ratio": ratio.ratio if ratio else _NAN,
            "hazard_ratio_low": ratio.low if ratio else _NAN,
            "hazard_ratio_high": ratio.high if ratio else _NAN,
            "hazard_ratio_ties": ratio.ties if ratio else "",
            **(calibration or _NO_CALIBRATION).columns(),
        }


def score_patients(
    rows: pd.DataFrame,
    horizons: Sequence[float],
    grid: np.ndarray,
    auc_curves: np.ndarray,
    brier_curves: np.ndarray | None = None,
) -> PatientScores:
    """Compute the scores from the predictions of one cohort, model and protocol.

    Args:
        rows: Checked predictions.
        horizons: Months of the calibration.
        grid: [time], months of the curves.
        auc_curves: [fold, time].
        brier_curves: [fold, 2, time], of the model and of Kaplan–Meier; None: there are none.
    """
    first = rows[(rows["seed"] == rows["seed"].iloc[0]) & (rows["repeat"] == rows["repeat"].iloc[0])]
    time, event, risk = (first[c].to_numpy() for c in ("survival_months", "event", "risk"))
    fold = first["fold"].to_numpy()
    median_high = is_high_risk(risk, np.median(risk))
    high, rule = median_high, "median of the pooled risks"
    if "risk_cutoff" in first.columns and first["risk_cutoff"].notna().all():
        high = is_high_risk(risk, first["risk_cutoff"].to_numpy(float))
        rule = "median risk of the training patients of each fold"
    both = high.any() and not high.all()
    months = tuple(float(m) for m in np.linspace(0, _round_up(time.max()), 6))
    brier = np.full((1, 2, len(grid)), _NAN) if brier_curves is None else brier_curves
    return PatientScores(
        low=kaplan_meier(time[~high], event[~high]) if both else None,
        high=kaplan_meier(time[high], event[high]) if both else None,
        risk_months=months,
        low_at_risk=tuple(at_risk(time[~high], months)),
        high_at_risk=tuple(at_risk(time[high], months)),
        cutoff_rule=rule,
        ratio=_or_none(hazard_ratio, time, event, high, fold) if both else None,
        log_rank_p=_or_nan(log_rank, time, event, high, fold),
        median_split_p=_or_nan(log_rank, time, event, median_high),
        calibration=_calibration(first, time, event, fold, horizons),
        auc_months=tuple(float(m) for m in grid),
        auc=_mean_curve(auc_curves),
        brier=_mean_curve(brier[:, 0]),
        brier_null=_mean_curve(brier[:, 1]),
    )


def _mean_curve(curves: np.ndarray) -> tuple[float, ...]:
    """Return the mean over folds of curves [fold, time] at each time; NaN where no fold has a value."""
    finite = [values[np.isfinite(values)] for values in curves.T]
    return tuple(float(values.mean()) if len(values) else _NAN for values in finite)


def _calibration(
    first: pd.DataFrame, time: np.ndarray, event: np.ndarray, fold: np.ndarray, horizons: Sequence[float]
) -> Calibration | None:
    columns = survival_columns(first)
    if columns is None:
        return None
    survival, edges = columns
    at_median = survival_at(survival, edges, np.full(len(time), np.median(time[event])))
    predicted = {float(h): survival_at(survival, edges, np.full(len(time), h)) for h in horizons}
    reached = [h for h in predicted if (time >= h).mean() >= _AT_RISK and h <= edges[:, -1].min()]
    months = max(reached, default=float(np.median(time[event])))
    there = survival_at(survival, edges, np.full(len(time), months))
    at_own_time = survival_at(survival, edges, time)
    hazard = -np.log(np.clip(at_own_time, 1e-7, 1))
    uncensored = event.mean() >= 1 - MOST_CENSORED_FOR_D_CALIBRATION
    return Calibration(
        calibration_points(time, event, predicted, at_median),
        *(_or_none(calibration_slope, time, event, at_median, fold) or _UNDEFINED),
        months=months,
        observed_expected=_or_none(observed_over_expected, time, event, there, months) or _UNDEFINED,
        intercept=_or_none(calibration_intercept, event, hazard) or _UNDEFINED,
        ici=_or_nan(integrated_calibration_index, time, event, there, months),
        d_calibration_p=d_calibration(event, at_own_time) if uncensored else _NAN,
    )


def _round_up(months: float) -> float:
    """Round up to a length that divides into five round steps."""
    steps = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 20, 24, 30, 36, 40, 48, 60, 80, 100, 120)
    return 5.0 * next(step for step in steps if months <= 5 * step or step == steps[-1])


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _or_none(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T | None:
    try:
        return function(*arguments, **named)
    except UndefinedMetricError:
        return None


def _or_nan(function: Callable[_P, float], *arguments: _P.args, **named: _P.kwargs) -> float:
    value = _or_none(function, *arguments, **named)
    return _NAN if value is None else value
