"""Cox regressions: one that predicts other patients (scikit-survival), one that reports coefficients (lifelines)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from cfusion.cohort.covariates import filled
from cfusion.errors import UndefinedMetricError

RIDGE = 0.01
"""Penalty of the predicting regression, on standardised columns: enough for a level that only one patient has."""


@dataclass(frozen=True)
class CoxPrediction:
    """Predictions of a Cox model for patients that it was not fitted on.

    Attributes:
        risk: [case], log hazard relative to the training patients' mean.
        survival: [case, time].
        training_risk: [training case], of the patients it was fitted on.
    """

    risk: np.ndarray
    survival: np.ndarray
    training_risk: np.ndarray


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
        UndefinedMetricError: There is no event among the training patients.
    """
    if not event[training].any():
        raise UndefinedMetricError(f"Cox model: none of the {int(training.sum())} training patients has an event.")
    complete = filled(values, training)
    if complete.columns.empty:
        complete = pd.DataFrame({"constant": np.zeros(len(values))}, index=values.index)
    mean, scale = complete[training].mean(), complete[training].std(ddof=0).replace(0, 1)
    columns = ((complete - mean) / scale).to_numpy(float)
    model: Any = CoxPHSurvivalAnalysis(alpha=RIDGE, ties="efron", n_iter=200)
    model.fit(columns[training], Surv.from_arrays(event[training], time[training]))
    risk = np.asarray(model.predict(columns[~training]), dtype=float)
    hazard = model.cum_baseline_hazard_
    steps = np.concatenate([[0.0], hazard.y])[np.searchsorted(hazard.x, months, side="right")]
    fitted = np.asarray(model.predict(columns[training]), dtype=float)
    return CoxPrediction(risk, np.exp(-np.exp(risk)[:, None] * steps[None]), fitted)


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
    full = _fitted(_everyones(others).assign(_column=column), time, event, stratum)
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
