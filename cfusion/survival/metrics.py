"""Discrimination and error of survival predictions: Harrell, Uno, Brier, time-dependent AUC.

All of these are computed by scikit-survival; only this module calls it. It validates the input once and estimates the
censoring model, truncation time and Kaplan–Meier null from training patients only. An undefined score is an error or
NaN, never 0 or 0.5.

Ties: risks are tied if they are equal; a difference counts however small, because the scale of a risk has no meaning.
The event of a patient at time t is weighted by the probability of being uncensored just before t, G(t−), so a censoring
at the same time does not count as earlier (R's `concordance` with `timewt="n/G2"`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sksurv.exceptions import NoComparablePairException
from sksurv.metrics import (
    brier_score,
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
)
from sksurv.nonparametric import CensoringDistributionEstimator, kaplan_meier_estimator
from sksurv.util import Surv

from cfusion.cohort.findings import has_comparable_pair
from cfusion.errors import DataError, UndefinedMetricError
from cfusion.survival.curves import step_values

__all__ = [
    "Concordance", "Training", "auc_at", "brier_times", "checked", "concordance",
    "integrated_brier", "uno_cindex",
]  # fmt: skip

_AT_RISK = 0.1
"""Share of the patients that must be at risk at the horizon of the Brier score."""

_BRIER_TIMES = 30
"""Number of times over which the Brier score is integrated."""

SMALLEST_CENSORING_SURVIVAL = 0.1
"""IPCW stops where fewer than 10% would still be uncensored; beyond that one patient weighs as much as a hundred."""


@dataclass(frozen=True)
class Concordance:
    """Harrell's C and the pairs it counts.

    Attributes:
        cindex: (concordant + tied_risk / 2) / comparable pairs, 0 … 1; 0.5 without signal.
        concordant: Pairs where the patient with the earlier event has the higher risk.
        discordant: Pairs where that patient has the lower risk.
        tied_risk: Comparable pairs of equal risk.
        tied_time: Comparable pairs of an event and a censoring at the same time.
    """

    cindex: float
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int


@dataclass(frozen=True, eq=False)
class Training:
    """Outcomes of a fold's training patients, and the estimates that scores need from them.

    Attributes:
        time: [case], months.
        event: [case], true where the event happened.
    """

    time: np.ndarray
    event: np.ndarray

    @functools.cached_property
    def outcomes(self) -> np.ndarray:
        """Outcomes as scikit-survival's structured array, with censorings moved to the next number after their time.

        scikit-survival weights an event at t by G(t). With the censorings at t moved, that is G(t−).
        """
        return Surv.from_arrays(self.event, np.where(self.event, self.time, np.nextafter(self.time, np.inf)))

    @functools.cached_property
    def truncation_months(self) -> float:
        """Last time at which at least 10% of patients would be uncensored; IPCW scores ignore anything later.

        NaN if the share is lower from the first time on: then no IPCW score is defined.
        """
        times, uncensored = kaplan_meier_estimator(self.event, self.time, reverse=True)
        left = times[uncensored >= SMALLEST_CENSORING_SURVIVAL]
        return float(left.max()) if len(left) else float("nan")

    def uncensored_before(self, times: np.ndarray) -> np.ndarray:
        """Return the probability of being uncensored just before each time, [time]: G(t−), the weight of an event."""
        return self._censoring.predict_proba(times)

    def uncensored_at(self, times: np.ndarray) -> np.ndarray:
        """Return the probability of being uncensored at each time, [time]: G(t), the weight of a patient alive at t."""
        return self._censoring.predict_proba(np.nextafter(times, np.inf))

    @functools.cached_property
    def _censoring(self) -> CensoringDistributionEstimator:
        return CensoringDistributionEstimator().fit(self.outcomes)

    def survival_at(self, times: ArrayLike) -> np.ndarray:
        """Return the Kaplan–Meier survival of the training patients, [time]."""
        steps, survival = kaplan_meier_estimator(self.event, self.time)
        return step_values(steps, survival, np.asarray(times, dtype=float), before=1.0)

    def truncated(self, time: np.ndarray, event: np.ndarray) -> np.ndarray:
        """Censor outcomes at the truncation time, so that none lies beyond the training patients' follow-up."""
        limit = self.truncation_months
        return Surv.from_arrays(event & (time <= limit), np.minimum(time, limit))


def checked(time: ArrayLike, event: ArrayLike, *values: ArrayLike) -> tuple[np.ndarray, ...]:
    """Convert outcomes and values to arrays of equal length.

    Raises:
        DataError: Lengths differ, a time is negative, or anything is NaN or infinite.
    """
    arrays = [np.asarray(time, dtype=float), np.asarray(event), *(np.asarray(v, dtype=float) for v in values)]
    if len({len(array) for array in arrays}) != 1:
        raise DataError(f"times, events and risks differ in length: {', '.join(str(len(a)) for a in arrays)}.")
    if arrays[1].dtype != bool:
        if not np.isin(arrays[1], [0, 1]).all():
            raise DataError("events hold values other than 0 and 1.")
        arrays[1] = arrays[1].astype(bool)
    for name, array in zip(("time", "event", *["risk"] * len(values)), arrays, strict=True):
        if not np.isfinite(array).all():
            raise DataError(f"{int((~np.isfinite(array)).sum())} of {array.size} values of {name} are not finite.")
    if (arrays[0] < 0).any():
        raise DataError(f"a time is negative ({arrays[0].min():g} months).")
    return tuple(arrays)


def concordance(time: ArrayLike, event: ArrayLike, risk: ArrayLike, strata: ArrayLike | None = None) -> Concordance:
    """Compute Harrell's concordance index (Harrell et al., Stat. Med. 15, 1996); ties in risk count half.

    Args:
        time: [case], months, ≥ 0.
        event: [case], true where the event happened.
        risk: [case], higher is worse.
        strata: [case]; only pairs within a stratum count, as in R's `concordance` with `strata`. None: all pairs.

    Raises:
        DataError: The arrays differ in length or hold non-finite values.
        UndefinedMetricError: There is no comparable pair.
    """
    time, event, risk = checked(time, event, risk)
    names = np.zeros(len(time)) if strata is None else np.asarray(strata)
    groups = [rows for name in dict.fromkeys(names) if has_comparable_pair(time[rows := names == name], event[rows])]
    if not groups:
        raise UndefinedMetricError(f"no comparable pair among {len(time)} patients with {int(event.sum())} events.")
    found = [concordance_index_censored(event[rows], time[rows], risk[rows], tied_tol=0) for rows in groups]
    concordant, discordant, tied_risk, tied_time = (sum(int(one[i]) for one in found) for i in range(1, 5))
    if len(found) == 1:
        return Concordance(float(found[0][0]), concordant, discordant, tied_risk, tied_time)
    cindex = (concordant + tied_risk / 2) / (concordant + discordant + tied_risk)
    return Concordance(cindex, concordant, discordant, tied_risk, tied_time)


def uno_cindex(training: Training, time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    """Compute Uno's concordance index (Stat. Med. 30, 2011); training gives the censoring model and truncation.

    Returns:
        0 … 1; NaN where no pair is comparable before the truncation time.
    """
    limit = training.truncation_months
    test = training.truncated(time, event)
    if not (event & (time < limit)).any():
        return float("nan")
    try:
        return float(concordance_index_ipcw(training.outcomes, test, risk, tau=limit, tied_tol=0)[0])
    except NoComparablePairException:
        return float("nan")


def auc_at(training: Training, time: np.ndarray, event: np.ndarray, risk: np.ndarray, times: ArrayLike) -> np.ndarray:
    """Compute the cumulative/dynamic AUC at given times (Uno et al., JASA 102, 2007; Hung and Chiang, 2010).

    Args:
        training: Gives the censoring model and the truncation time.
        time: [case], months.
        event: [case], true where the event happened.
        risk: [case], higher is worse.
        times: [time], months, in any order.

    Returns:
        [time], 0 … 1; NaN at times beyond the truncation time, and at times without both a patient who had the event
        and a patient still followed.
    """
    # scikit-survival returns values in sorted order
    wanted, back = np.unique(np.asarray(times, dtype=float), return_inverse=True)
    limit = training.truncation_months
    test = training.truncated(time, event)
    cases = np.array([(event & (time <= t)).any() for t in wanted], dtype=bool)
    controls = np.array([(np.minimum(time, limit) > t).any() for t in wanted], dtype=bool)
    defined = cases & controls & (wanted < limit)
    result = np.full(len(wanted), np.nan)
    if defined.any():
        result[defined] = cumulative_dynamic_auc(training.outcomes, test, risk, wanted[defined], tied_tol=0)[0]
    return result[back]


def brier_times(training: Training, time: np.ndarray, last: float) -> np.ndarray:
    """Return the times over which the Brier score is integrated, [time], months; empty if no follow-up allows any.

    They run from the first follow-up time to the horizon: the last time at which a tenth of the patients (and at least
    two) are at risk, within the training patients' follow-up and the times that the model predicts.

    Args:
        training: Gives the truncation time.
        time: [case], months.
        last: Last time that the model predicts, the largest edge.
    """
    followed = np.sort(np.minimum(time, training.truncation_months))
    within = followed[followed < followed[-1]]
    if not len(within) or not last > within[0]:
        return np.zeros(0)
    tenth = followed[-max(2, math.ceil(len(time) * _AT_RISK))]
    horizon = min(tenth, within[-1], last)
    return np.linspace(within[0], horizon, _BRIER_TIMES) if horizon > within[0] else np.zeros(0)


def brier_curve(
    training: Training, time: np.ndarray, event: np.ndarray, survival: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """Compute the Brier score at given times (Graf et al., Stat. Med. 18, 1999), [time].

    Args:
        training: Gives the censoring model and the truncation time.
        time: [case], months.
        event: [case], true where the event happened.
        survival: [case, time], predicted survival; a single row applies to all cases, as for the Kaplan–Meier null.
        times: [time], months, from `brier_times`.

    Returns:
        0 (best) … 1 at each time.
    """
    if not len(times):
        return np.zeros(0)
    test = training.truncated(time, event)
    predicted = np.broadcast_to(survival, (len(time), len(times)))
    # A patient alive at t is weighted by G(t); with the censorings at t moved, that is the value just after t.
    return np.asarray(brier_score(training.outcomes, test, predicted, np.nextafter(times, np.inf))[1])


def time_mean(curve: np.ndarray, times: np.ndarray) -> float:
    """Return the mean over time of a curve [time] by the trapezoidal rule; NaN with fewer than two times."""
    return float("nan") if len(times) < 2 else float(np.trapezoid(curve, times) / (times[-1] - times[0]))


def integrated_brier(
    training: Training, time: np.ndarray, event: np.ndarray, survival: np.ndarray, times: np.ndarray
) -> float:
    """Return the mean over time of the Brier score; see `brier_curve`. NaN with fewer than two times."""
    if len(times) < 2:
        return float("nan")
    return time_mean(brier_curve(training, time, event, survival, times), times)
