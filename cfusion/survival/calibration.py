"""Calibration of predicted survival: D-calibration, calibration slope, and predicted against observed survival."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from cfusion.survival.curves import step_values
from cfusion.survival.groups import Curve, hazard_ratio, kaplan_meier

_DECILES = 10


@dataclass(frozen=True)
class CalibrationPoint:
    """Predicted against observed survival in one group of patients with similar predictions.

    Attributes:
        predicted: Mean predicted survival at the horizon.
        observed: Kaplan–Meier survival at the horizon, with its 95% interval in `low` and `high`.
        low: Lower limit.
        high: Upper limit.
        size: Patients in the group.
    """

    predicted: float
    observed: float
    low: float
    high: float
    size: int


def survival_at(survival: np.ndarray, edges: np.ndarray, months: np.ndarray) -> np.ndarray:
    """Evaluate the predicted survival of each case at that case's time.

    S_k applies at the right edge of bin k, and S is 1 at time 0. Between edges S is interpolated linearly (constant
    density, Kvamme and Borgan, 2021). Past the last edge it stays constant.

    Predictions, explanations and the viewer draw the same survival as steps (`step_values`): what the model says and
    nothing more. Calibration compares probabilities at the patients' own times, which mostly lie within a bin; read as
    steps they would be that of the bin's start, too high for all of them, and D-calibration would find a few values
    instead of a uniform distribution and reject every model.

    Args:
        survival: [case, bin].
        edges: [case, bin], right edges in months, increasing.
        months: [case].
    """
    start = np.zeros((len(survival), 1))
    x, y = np.hstack([start, edges]), np.hstack([start + 1, survival])
    inside = np.clip(months, 0, x[:, -1])
    right = np.clip((x <= inside[:, None]).sum(axis=1), 1, x.shape[1] - 1)
    row = np.arange(len(x))
    x0, x1, y0, y1 = x[row, right - 1], x[row, right], y[row, right - 1], y[row, right]
    return y0 + (y1 - y0) * (inside - x0) / (x1 - x0)


def d_calibration(event: np.ndarray, survival_at_time: np.ndarray) -> float:
    """Compute the p-value of D-calibration (Haider et al., JMLR 21, 2020); small means poor calibration.

    Predicted survival at the patients' follow-up times should be uniform. A censored patient is spread over the tenths
    at or below the survival at censoring.

    Args:
        event: [case], true where the event happened.
        survival_at_time: [case], predicted survival at each patient's follow-up time.
    """
    lower = np.arange(_DECILES) / _DECILES
    upper = lower + 1 / _DECILES
    reached = np.clip(survival_at_time, 1e-12, 1)[:, None]
    holds = (reached > lower) & (reached <= upper)
    # A tenth below the censored value counts fully; the tenth that contains it counts only the part under it.
    share = np.clip(np.minimum(reached, upper) - lower, 0, None) / reached
    counts = np.where(event[:, None], holds, share).sum(axis=0)
    expected = len(event) / _DECILES
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), df=_DECILES - 1))


def calibration_slope(
    time: np.ndarray, event: np.ndarray, survival: np.ndarray, fold: np.ndarray
) -> tuple[float, float, float]:
    """Fit the Cox coefficient of the predicted log cumulative hazard, with 95% interval (ideal: 1, overconfident: < 1).

    Args:
        time: [case], months.
        event: [case], true where the event happened.
        survival: [case], predicted survival at one horizon.
        fold: [case]; each fold has a separate baseline hazard.

    Raises:
        UndefinedMetricError: The predictions are all equal.
    """
    clipped = np.clip(survival, 1e-7, 1 - 1e-7)
    fitted = hazard_ratio(time, event, np.log(-np.log(clipped)), fold)
    margin = 1.959964 * fitted.error
    return fitted.coefficient, fitted.coefficient - margin, fitted.coefficient + margin


def calibration_points(
    time: np.ndarray,
    event: np.ndarray,
    predicted: Mapping[float, np.ndarray],
    ranked_by: np.ndarray,
    groups: int = 5,
) -> dict[float, list[CalibrationPoint]]:
    """Compare predicted and observed survival at each horizon, in groups of increasing prediction.

    Args:
        time: [case], months.
        event: [case], true where the event happened.
        predicted: By horizon in months, [case], predicted survival.
        ranked_by: [case], predicted survival used to form the groups, the same at all horizons.
        groups: Number of groups; fewer where predictions are tied.

    Returns:
        By horizon, the groups with follow-up that reaches it; horizons that no group reaches are left out.
    """
    cuts = np.unique(np.quantile(ranked_by, np.arange(1, groups) / groups))
    label = np.searchsorted(cuts, ranked_by, side="right")
    members = [label == group for group in np.unique(label)]
    curves = [kaplan_meier(time[rows], event[rows]) for rows in members]
    points = {}
    for horizon, survival in predicted.items():
        found = [
            _point(survival[rows], curve, horizon)
            for rows, curve in zip(members, curves, strict=True) if curve.months[-1] >= horizon
        ]  # fmt: skip
        if found:
            points[horizon] = found
    return points


def _point(predicted: np.ndarray, curve: Curve, horizon: float) -> CalibrationPoint:
    observed, low, high = (
        float(step_values(curve.months, values, horizon, before=1.0))
        for values in (curve.survival, curve.low, curve.high)
    )
    return CalibrationPoint(float(predicted.mean()), observed, low, high, len(predicted))
