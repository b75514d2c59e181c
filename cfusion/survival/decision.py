"""Decision curves: the net benefit of treating patients whose predicted risk exceeds a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cfusion.survival.curves import step_values
from cfusion.survival.groups import kaplan_meier

_FOLLOWED = 0.1
"""Minimum share of patients still at risk at the horizon of a decision curve."""

_THRESHOLDS = np.round(np.arange(0.02, 0.81, 0.02), 2)


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit at one horizon (Vickers and Elkin, 2006; with censoring Vickers et al., 2008).

    Attributes:
        months: The horizon.
        thresholds: Probabilities of the event from which a patient would be treated, up to the highest predicted one.
        benefit: By model, and for treating `everyone`, [threshold]: true less weighted false positives, per patient.
    """

    months: float
    thresholds: tuple[float, ...]
    benefit: dict[str, tuple[float, ...]]


def decision_curve(
    time: np.ndarray,
    event: np.ndarray,
    survival: Mapping[str, np.ndarray],
    months: np.ndarray,
    horizons: Sequence[float],
) -> DecisionCurve | None:
    """Compute the decision curves of several models at one horizon.

    The horizon is the one nearest to the median event time among those with a tenth of the patients still at risk.

    Args:
        time: [case], months.
        event: [case], true where the event happened.
        survival: By model, [case, time].
        months: [time], months of the predicted survival, the candidates among them.
        horizons: Candidates, in months.

    Returns:
        None if no horizon lies within the follow-up.
    """
    possible = [h for h in horizons if (time >= h).mean() >= _FOLLOWED and event[time <= h].any()]
    if not possible:
        return None
    horizon = min(possible, key=lambda h: abs(h - float(np.median(time[event]))))
    at = int(np.flatnonzero(months == horizon)[0])
    predicted = {name: 1 - values[:, at] for name, values in survival.items()}
    highest = max(float(values.max()) for values in predicted.values())
    thresholds = _THRESHOLDS[highest >= _THRESHOLDS]
    benefit = {
        name: tuple(_benefit(time, event, values >= threshold, horizon, threshold) for threshold in thresholds)
        for name, values in {**predicted, "everyone": np.ones(len(time))}.items()
    }
    return DecisionCurve(float(horizon), tuple(thresholds.tolist()), benefit)


def mean_decision_curve(curves: Sequence[DecisionCurve | None]) -> DecisionCurve | None:
    """Return the mean of the curves of several runs at the first one's horizon; None if there are none.

    Above its highest predicted probability a model treats nobody, so its net benefit there is 0.
    """
    known = [curve for curve in curves if curve is not None]
    same = [curve for curve in known if curve.months == known[0].months]
    if not same:
        return None
    longest = max(same, key=lambda curve: len(curve.thresholds))
    benefit = {"everyone": longest.benefit["everyone"]}
    for name in same[0].benefit.keys() - benefit.keys():
        values = np.zeros((len(same), len(longest.thresholds)))
        for row, curve in zip(values, same, strict=True):
            row[: len(curve.thresholds)] = curve.benefit[name]
        benefit[name] = tuple(values.mean(axis=0).tolist())
    return DecisionCurve(same[0].months, longest.thresholds, {name: benefit[name] for name in same[0].benefit})


def _benefit(time: np.ndarray, event: np.ndarray, treated: np.ndarray, horizon: float, threshold: float) -> float:
    if not treated.any():
        return 0.0
    curve = kaplan_meier(time[treated], event[treated])
    alive = float(step_values(curve.months, curve.survival, horizon, before=1.0))
    return float(treated.mean() * ((1 - alive) - alive * threshold / (1 - threshold)))
