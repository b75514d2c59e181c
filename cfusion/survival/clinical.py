"""The clinical model by itself: out-of-fold predictions of a Cox model of age, sex, stage and grade."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cfusion.errors import DataError, UndefinedMetricError
from cfusion.survival.predictions import curve_table, fold_predictions
from cfusion.survival.regression import predicted_by_cox
from cfusion.types import Cohort, Split

logger = logging.getLogger(__name__)

CLINICAL = "clinical"
"""Name of the clinical model in tables of predictions."""


_STEPS = 20
"""Number of times at which survival is predicted; it is interpolated in between, so few times would bend the curve."""


def clinical_predictions(cohort: Cohort, splits: Sequence[Split]) -> pd.DataFrame:
    """Fit a Cox model on the training patients of every fold and predict its test patients.

    A model without settings chooses nothing, so validation patients train too (protocol `fixed-epoch`).

    Args:
        cohort: The cohort with its covariates.
        splits: The folds.

    Returns:
        Checked predictions of the model `clinical`.

    Raises:
        DataError: The cohort has no covariates.
        UndefinedMetricError: A fold's Cox model has no finite coefficients; the message names cohort and fold.
    """
    if cohort.covariates is None:
        raise DataError(
            f"cohort {cohort.name}: there are no clinical covariates.",
            "Name a table with age, sex, stage or grade in cohort.covariates_table, or columns in cohort.covariates.",
        )
    return pd.concat([_fold(cohort, cohort.covariates, split) for split in splits], ignore_index=True)


def _fold(cohort: Cohort, covariates: pd.DataFrame, split: Split) -> pd.DataFrame:
    scored = set(split.test)
    train = [case for case in (*split.train, *split.validation) if case not in scored]
    patients = [*train, *split.test]
    cases = cohort.cases.loc[patients]
    time, event = cases["time_months"].to_numpy(float), cases["event"].to_numpy(bool)
    training = np.arange(len(patients)) < len(train)
    edges = _edges(time[training], event[training])
    where = f"cohort {cohort.name}, fold {split.fold}"
    try:
        predicted = predicted_by_cox(covariates.loc[patients], time, event, training, edges)
    except UndefinedMetricError as error:
        raise UndefinedMetricError(f"{where}: {error.message}", error.remedy) from error
    if predicted.separated:
        logger.warning(
            "%s: all %d events of the training patients are ordered by %s (monotone likelihood, separation). Only the "
            "penalty bounds the coefficients: read the survival curves with care, and check that no covariate knows "
            "the outcome.", where, int(event[training].sum()), predicted.separated,
        )  # fmt: skip
    curves = curve_table(split.test, predicted.survival, edges.tolist(), risk=predicted.risk)
    shared = {"model": CLINICAL, "protocol": "fixed-epoch", "seed": 0, "repeat": split.repeat, "fold": split.fold}
    return fold_predictions(curves, cohort, {**shared, "risk_cutoff": float(np.median(predicted.training_risk))})


def _edges(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Return increasing times [step] at which survival is predicted: quantiles of the events, and the follow-up's end.

    Every fold has as many, so tied quantiles are kept apart by a millionth of a month.
    """
    quantiles = np.quantile(time[event] if event.any() else time, np.linspace(1 / _STEPS, 1, _STEPS))
    return np.append(quantiles + 1e-6 * np.arange(1, _STEPS + 1), time.max() + 1e-3)
