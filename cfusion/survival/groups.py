"""Risk groups: Kaplan–Meier curves, log-rank tests and hazard ratios, with or without stratification by fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import chi2
from sksurv.nonparametric import kaplan_meier_estimator

from cfusion.errors import UndefinedMetricError


@dataclass(frozen=True)
class Curve:
    """Kaplan–Meier survival of a group (Kaplan and Meier, JASA 53, 1958).

    Attributes:
        months: Times of the steps, from 0.
        survival: Survival from each step on, with its 95% interval (log-log) in `low` and `high`.
        low: Lower limit.
        high: Upper limit.
        size: Patients in the group.
        events: Events among them.
    """

    months: tuple[float, ...]
    survival: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    size: int
    events: int


@dataclass(frozen=True)
class HazardRatio:
    """Exponentiated Cox coefficient of a covariate with its 95% Wald interval.

    Attributes:
        ratio: exp(coefficient).
        low: Lower limit.
        high: Upper limit.
        coefficient: On the log scale.
        error: Standard error of the coefficient.
        ties: How tied event times were handled: `Efron`, or `none` if there are none, where every method is the same.
    """

    ratio: float
    low: float
    high: float
    coefficient: float
    error: float
    ties: Literal["Efron", "none"]


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> Curve:
    """Estimate the Kaplan–Meier curve of a group.

    Args:
        time: [case], months.
        event: [case], true where the event happened.
    """
    months, survival, limits = kaplan_meier_estimator(event, time, conf_type="log-log")
    steps = np.flatnonzero(np.diff(survival, prepend=1.0) != 0)
    if not len(steps) or steps[-1] != len(months) - 1:
        steps = np.append(steps, len(months) - 1)
    # The log-log interval is undefined where survival is 0 or still 1.
    low, high = np.nan_to_num(limits[0], nan=0.0), np.nan_to_num(limits[1], nan=1.0)
    low = np.where(survival == 1, 1.0, low)
    high = np.where(survival == 0, 0.0, high)

    def steps_of(start: float, values: np.ndarray) -> tuple[float, ...]:
        return (start, *values[steps].tolist())

    return Curve(
        months=steps_of(0.0, months), survival=steps_of(1.0, survival), low=steps_of(1.0, low),
        high=steps_of(1.0, high), size=len(time), events=int(event.sum()),
    )  # fmt: skip


def at_risk(time: np.ndarray, months: Sequence[float]) -> list[int]:
    """Count the patients still followed at each of the given months."""
    return [int((time >= month).sum()) for month in months]


def log_rank(time: np.ndarray, event: np.ndarray, group: np.ndarray, stratum: np.ndarray | None = None) -> float:
    """Return the p-value of the log-rank test (Mantel, 1966) that two groups survive alike; strata are tested within.

    The tests of scikit-survival and lifelines have no strata. Without strata all give the same value.

    Args:
        time: [case], months.
        event: [case], true where the event happened.
        group: [case], true in one of the groups.
        stratum: [case] or None, such as the fold.

    Raises:
        UndefinedMetricError: No stratum holds both groups and an event.
    """
    strata = np.zeros(len(time), dtype=int) if stratum is None else stratum
    member = np.asarray(group, dtype=bool)
    parts = [_log_rank_part(time[strata == s], event[strata == s], member[strata == s]) for s in np.unique(strata)]
    difference, variance = np.sum(parts, axis=0)
    if variance <= 0:
        raise UndefinedMetricError("log-rank: no fold holds both risk groups and an event.")
    return float(chi2.sf(difference**2 / variance, df=1))


def _log_rank_part(time: np.ndarray, event: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """Return observed minus expected events of the group and the hypergeometric variance, within one stratum."""
    moments = np.unique(time[event])
    ordered, ordered_group = np.sort(time), np.sort(time[group])
    followed = len(time) - np.searchsorted(ordered, moments, side="left")
    of_group = group.sum() - np.searchsorted(ordered_group, moments, side="left")
    events = np.bincount(np.searchsorted(moments, time[event]), minlength=len(moments))
    share = of_group / followed
    variance = share * (1 - share) * events * (followed - events) / np.maximum(followed - 1, 1)
    return float((event & group).sum() - (share * events).sum()), float(variance.sum())


def hazard_ratio(
    time: np.ndarray, event: np.ndarray, covariate: np.ndarray, stratum: np.ndarray | None = None
) -> HazardRatio:
    """Fit a Cox regression on one covariate: ties after Efron, a separate baseline hazard in each stratum.

    With tied times Breslow's approximation draws the coefficient towards 0 (Hertz-Picciotto and Rockhill, Biometrics
    53, 1997).

    scikit-survival's Cox model has neither strata nor standard errors. lifelines gives the same numbers in 200
    times the time, and a sweep's report fits thousands.

    Args:
        time: [case], months.
        event: [case], true where the event happened.
        covariate: [case], such as membership in the high-risk group.
        stratum: [case] or None, such as the fold.

    Raises:
        UndefinedMetricError: The covariate is constant, or it separates the events from the rest, so no finite
            coefficient exists.
    """
    value = np.asarray(covariate, dtype=float)
    scale = value.std()
    if not np.ptp(value) > 0:
        raise UndefinedMetricError("hazard ratio: the covariate is constant.")
    strata = np.zeros(len(time), dtype=int) if stratum is None else stratum
    parts = [_risk_sets(time[strata == s], event[strata == s], value[strata == s] / scale) for s in np.unique(strata)]
    beta = 0.0
    for _ in range(50):
        gradient, information = np.sum([_score(part, beta) for part in parts], axis=0)
        if not information > 1e-10:
            break
        step = float(np.clip(gradient / information, -2, 2))
        beta += step
        if abs(step) < 1e-9:
            coefficient, error = float(beta / scale), float(1 / np.sqrt(information) / scale)
            low, high = coefficient - 1.959964 * error, coefficient + 1.959964 * error
            with np.errstate(over="ignore"):  # with few patients the ratio is unbounded and its interval ends at inf
                ratio, lowest, highest = (float(np.exp(value)) for value in (coefficient, low, high))
            tied = any((part[3] > 0).any() for part in parts)
            return HazardRatio(ratio, lowest, highest, coefficient, error, "Efron" if tied else "none")
    raise UndefinedMetricError("hazard ratio: no finite estimate exists; a group has no event.")


def _risk_sets(time: np.ndarray, event: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return what the partial likelihood needs of a stratum, ordered by decreasing time.

    Returns:
        The values of all; and for each event: its row, the size of its risk set, the part of the tied events that Efron
        removes from the risk set (0, 1/m, 2/m, … for m ties), and the first and last row of the tied events.
    """
    # Within tied times the events come first, so that they are neighbours.
    order = np.lexsort((~event, -time))
    time, event, value = time[order], event[order], value[order]
    rows = np.flatnonzero(event)
    size = np.searchsorted(-time, -time[rows], side="right")
    first = np.searchsorted(-time[rows], -time[rows], side="left")
    count = np.searchsorted(-time[rows], -time[rows], side="right") - first
    return value, rows, size, (np.arange(len(rows)) - first) / np.maximum(count, 1), rows[first], rows[first] + count


def _score(part: tuple[np.ndarray, ...], beta: float) -> tuple[float, float]:
    """Return gradient and information of the log partial likelihood at `beta`."""
    value, rows, size, share, first, end = part
    weight = np.exp(beta * value - np.max(beta * value, initial=0.0))
    sums = []
    for power in range(3):
        running = np.concatenate([[0.0], np.cumsum(weight * value**power)])
        sums.append(running[size] - share * (running[end] - running[first]))
    mean = sums[1] / sums[0]
    return float((value[rows] - mean).sum()), float((sums[2] / sums[0] - mean**2).sum())
