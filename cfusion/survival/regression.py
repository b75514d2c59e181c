"""Cox regressions: one that predicts other patients (scikit-survival), one that reports coefficients (lifelines).

Where a combination of columns orders all events, the likelihood rises without end and has no maximum: monotone
likelihood, or separation (Heinze and Schemper, Biometrics 57, 2001). Then only the penalty bounds the predicting
regression, and the reporting one has no finite coefficient.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from cfusion.cohort.covariates import filled
from cfusion.errors import UndefinedMetricError

_NORMAL = float(norm.ppf(0.975))

_ROUNDING = 1e-9
"""Differences of risks, relative to their range, that are rounding."""

RIDGE = 0.01
"""Penalty of the predicting regression, on standardised columns: enough for a level that only one patient has."""


@dataclass(frozen=True)
class CoxPrediction:
    """Predictions of a Cox model for patients that it was not fitted on.

    Attributes:
        risk: [case], log hazard relative to the training patients' mean.
        survival: [case, time].
        training_risk: [training case], of the patients it was fitted on.
        separated: The covariates, in words, that order all events of the training patients, so that only the penalty
            bounds their coefficients; None if there are none.
    """

    risk: np.ndarray
    survival: np.ndarray
    training_risk: np.ndarray
    separated: str | None


def predicted_by_cox(
    values: pd.DataFrame, time: np.ndarray, event: np.ndarray, training: np.ndarray, months: np.ndarray
) -> CoxPrediction:
    """Fit a Cox model (Efron's ties, ridge) on training patients and predict the rest.

    Missing values, means and scales come from the training patients only.

    Args:
        values: [case, column], with NaN where missing.
        time: [case], months.
        event: [case], true where the event happened.
        training: [case], true for training patients.
        months: [time], months at which survival is predicted.

    Returns:
        Predictions of the other patients, in their order. Without a column that varies, all risks are 0.

    Raises:
        UndefinedMetricError: There is no event among the training patients, or the likelihood is monotone and the
            penalty too weak to keep the coefficients finite.
    """
    if not event[training].any():
        raise UndefinedMetricError(f"Cox model: none of the {int(training.sum())} training patients has an event.")
    complete = filled(values, training)
    if complete.columns.empty:
        complete = pd.DataFrame({"constant": np.zeros(len(values))}, index=values.index)
    mean, scale = complete[training].mean(), complete[training].std(ddof=0).replace(0, 1)
    columns = ((complete - mean) / scale).to_numpy(float)
    model: Any = CoxPHSurvivalAnalysis(alpha=RIDGE, ties="efron", n_iter=200)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused below
            model.fit(columns[training], Surv.from_arrays(event[training], time[training]))
    except (ValueError, np.linalg.LinAlgError) as error:
        raise _no_maximum(complete[training], time[training], event[training]) from error
    if not np.isfinite(model.coef_).all():
        raise _no_maximum(complete[training], time[training], event[training])
    risk, fitted = (columns[rows] @ model.coef_ for rows in (~training, training))
    baseline = _log_baseline_hazard(fitted, time[training], event[training], months)
    with np.errstate(over="ignore"):  # a hazard that is too large gives a survival of 0
        survival = np.exp(-np.exp(risk[:, None] + baseline[None]))
    separated = _ordering_columns(complete[training], time[training], event[training])
    if separated is None and orders_all_events(fitted, time[training], event[training]):
        separated = _combination(complete)
    return CoxPrediction(risk, survival, fitted, separated)


def _log_baseline_hazard(risk: np.ndarray, time: np.ndarray, event: np.ndarray, months: np.ndarray) -> np.ndarray:
    """Return the logarithm of Breslow's cumulative baseline hazard at some months, [time].

    scikit-survival subtracts from the sum over all patients those who have left, which leaves only rounding errors
    where log hazards differ by more than 30, as after a separation. Here patients are added from the last time on.
    """
    order = np.argsort(-time, kind="stable")
    moments, counts = np.unique(time[event], return_counts=True)
    last = np.searchsorted(-time[order], -moments, side="right") - 1
    followed = np.logaddexp.accumulate(risk[order])[last]
    cumulative = np.logaddexp.accumulate(np.log(counts) - followed)
    return np.concatenate([[-np.inf], cumulative])[np.searchsorted(moments, months, side="right")]


def orders_all_events(risk: np.ndarray, time: np.ndarray, event: np.ndarray, stratum: np.ndarray | None = None) -> bool:
    """Return whether each event has the highest risk of all patients of its stratum who were still followed then.

    Scaling such a risk up raises each factor of the partial likelihood, so the likelihood has no maximum.

    Args:
        risk: [case], log hazard.
        time: [case], months.
        event: [case], true where the event happened.
        stratum: [case], such as the fold; None: all in one.
    """
    strata = np.zeros(len(time), dtype=int) if stratum is None else stratum
    rounding, varies = _ROUNDING * float(np.ptp(risk)), False
    for of_stratum in (strata == number for number in np.unique(strata[event])):
        own, months, happened = risk[of_stratum], time[of_stratum], event[of_stratum]
        varies |= bool(np.ptp(own[months >= months[happened].min()]) > rounding)
        order = np.argsort(-months, kind="stable")
        last = np.searchsorted(-months[order], -months[happened], side="right") - 1
        if (own[happened] < np.maximum.accumulate(own[order])[last] - rounding).any():
            return False
    return varies


def _ordering_columns(columns: pd.DataFrame, time: np.ndarray, event: np.ndarray) -> str | None:
    """Return the columns that order all events by themselves, in words; None if there are none.

    Columns of few values are no concern: a level without events has a coefficient that the penalty bounds, and says
    nothing about the other patients.
    """
    names = [
        str(name)
        for name, cells in columns.items()
        if 2 * cells[event].nunique() > event.sum()
        and any(orders_all_events(sign * cells.to_numpy(float), time, event) for sign in (1, -1))
    ]
    return " and ".join(names) or None


def _combination(columns: pd.DataFrame) -> str:
    return f"a combination of {', '.join(map(str, columns.columns))}"


def _no_maximum(columns: pd.DataFrame, time: np.ndarray, event: np.ndarray) -> UndefinedMetricError:
    """Return the error of a monotone likelihood."""
    which = _ordering_columns(columns, time, event) or _combination(columns)
    return UndefinedMetricError(
        f"Cox model: monotone likelihood (separation) by {which}: all or nearly all {int(event.sum())} events of the "
        "training patients are ordered, so no finite coefficient exists.",
        "Leave out a covariate that knows the outcome, such as a date of death, or one of very few events.",
    )


@dataclass(frozen=True)
class AdjustedRatio:
    """Hazard ratio of one column, adjusted for others, and the likelihood-ratio test that it adds to them.

    Attributes:
        ratio: exp(coefficient), per standard deviation of the column.
        low: Lower limit of the 95% Wald interval.
        high: Upper limit.
        wald_p: P-value of the coefficient.
        chi2: Twice the difference of the log partial likelihoods, 1 degree of freedom.
        p: P-value of the likelihood-ratio test.
    """

    ratio: float
    low: float
    high: float
    wald_p: float
    chi2: float
    p: float


def mean_ratio(ratios: Sequence[AdjustedRatio | None]) -> AdjustedRatio | None:
    """Return the mean over runs on the same patients: of the log ratios, and of the likelihood-ratio statistic.

    The standard error of a mean is at most the mean of the standard errors, and is that where the runs agree. So the
    limits are averaged as the log ratios are, and repetitions narrow no interval. None if a run has none.
    """
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios) or len(known) < 2:
        return known[0] if len(known) == len(ratios) == 1 else None
    log, low, high = (float(np.mean(np.log([getattr(r, name) for r in known]))) for name in ("ratio", "low", "high"))
    gained = float(np.mean([ratio.chi2 for ratio in known]))
    error = (high - low) / (2 * _NORMAL)
    ratio, lowest, highest = (float(value) for value in np.exp([log, low, high]))
    p = float(2 * norm.sf(abs(log) / error))
    return AdjustedRatio(ratio, lowest, highest, p, gained, float(chi2.sf(gained, 1)))


def cox_log_likelihood(values: pd.DataFrame, time: np.ndarray, event: np.ndarray, stratum: np.ndarray) -> float:
    """Return the log partial likelihood of a Cox model of all patients, fitted as in `adjusted_ratio`."""
    return float(_fitted(_everyones(values), time, event, stratum).log_likelihood_)


def adjusted_ratio(
    column: np.ndarray,
    others: pd.DataFrame,
    time: np.ndarray,
    event: np.ndarray,
    stratum: np.ndarray,
    log_likelihood: float | None = None,
) -> AdjustedRatio:
    """Fit Cox models of the patients (Efron's ties, a baseline hazard per stratum) with and without a column.

    Agrees with R's `coxph(Surv(time, event) ~ others + column + strata(stratum))`. Missing values of the others are
    filled with the median of all patients: these coefficients describe, they predict nobody.

    Args:
        column: [case], standardised to mean 0 and standard deviation 1.
        others: [case, column].
        time: [case], months.
        event: [case], true where the event happened.
        stratum: [case], such as the fold.
        log_likelihood: Of the model of the others (`cox_log_likelihood`); None: there are no others.

    Raises:
        UndefinedMetricError: The column is constant, or no finite estimate exists.
    """
    if not np.ptp(column) > 0:
        raise UndefinedMetricError("adjusted hazard ratio: the risk is constant.")
    columns = _everyones(others).assign(_column=column)
    full = _fitted(columns, time, event, stratum)
    log_hazard = columns.to_numpy(float) @ full.params_[columns.columns].to_numpy(float)
    if orders_all_events(log_hazard, time, event, stratum):
        raise UndefinedMetricError(
            "adjusted hazard ratio: monotone likelihood (separation): the model orders all events, so no finite "
            "coefficient exists."
        )
    if log_likelihood is None:
        gained = float(full.log_likelihood_ratio_test().test_statistic)
    else:
        gained = max(0.0, 2 * (float(full.log_likelihood_) - log_likelihood))
    row = full.summary.loc["_column"]
    return AdjustedRatio(
        float(row["exp(coef)"]), float(row["exp(coef) lower 95%"]), float(row["exp(coef) upper 95%"]), float(row["p"]),
        gained, float(chi2.sf(gained, 1)),
    )  # fmt: skip


def proportional_hazards_p(column: np.ndarray, time: np.ndarray, event: np.ndarray, stratum: np.ndarray) -> float:
    """Return the p-value of the test on scaled Schoenfeld residuals that a hazard ratio is constant over time.

    Grambsch and Therneau (Biometrika 81, 1994), over the ranks of the event times; a small value means that it changes.

    Args:
        column: [case], such as the risk.
        time: [case], months.
        event: [case], true where the event happened.
        stratum: [case], such as the fold.

    Raises:
        UndefinedMetricError: The column is constant, or no finite estimate exists.
    """
    from lifelines.statistics import proportional_hazard_test

    if not column.std() > 0:
        raise UndefinedMetricError("proportional hazards: the risk is constant.")
    columns = pd.DataFrame({"_column": (column - column.mean()) / column.std()})
    fitted = _fitted(columns, time, event, stratum)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = columns.assign(_time=time, _event=event.astype(int), _stratum=stratum)
        found = proportional_hazard_test(fitted, table, time_transform="rank")
    return float(np.ravel(found.p_value)[0])


def _everyones(values: pd.DataFrame) -> pd.DataFrame:
    return filled(values, np.ones(len(values), dtype=bool)).reset_index(drop=True)


def _fitted(columns: pd.DataFrame, time: np.ndarray, event: np.ndarray, stratum: np.ndarray) -> Any:
    # lifelines takes a second to import, which only these regressions need
    from lifelines import CoxPHFitter
    from lifelines.exceptions import ConvergenceError

    table = columns.assign(_time=time, _event=event.astype(int), _stratum=stratum)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CoxPHFitter().fit(table, "_time", "_event", strata=["_stratum"])
    except (ConvergenceError, np.linalg.LinAlgError) as error:
        raise UndefinedMetricError(f"adjusted hazard ratio: no finite estimate exists ({error}).") from error
