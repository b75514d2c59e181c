"""From predictions to scores: per fold, over the folds, pooled, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cfusion.errors import UndefinedMetricError
from cfusion.survival.bootstrap import Resamples, percentile_interval
from cfusion.survival.metrics import concordance
from cfusion.survival.predictions import UNIT, checked_predictions
from cfusion.types import Cohort, Split

_SEED = 7


@dataclass(frozen=True)
class Scores:
    """Everything that was computed from one set of predictions.

    Attributes:
        predictions: The checked predictions, a row per patient.
        folds: A row per model, cohort, protocol, seed and fold.
        summary: A row per model, cohort and protocol.
    """

    predictions: pd.DataFrame
    folds: pd.DataFrame
    summary: pd.DataFrame


def score(
    predictions: pd.DataFrame,
    cohort: Cohort | None = None,
    splits: Sequence[Split] | None = None,
    *,
    bootstrap: int = 1000,
    horizons: Sequence[float] = (12.0, 36.0, 60.0),
) -> Scores:
    """Score out-of-fold predictions, patient by patient.

    Raises:
        DataError: The predictions contradict themselves; see `checked_predictions`.
        UndefinedMetricError: A fold has no comparable pair; cohort and fold are named.
    """
    frame = checked_predictions(predictions)
    folds = pd.DataFrame([_fold(keys, rows) for keys, rows in frame.groupby([*UNIT, "seed", "repeat", "fold"])])
    summary = pd.DataFrame([
        _summary(keys, rows, folds[(folds[UNIT] == list(keys)).all(axis=1)], bootstrap)
        for keys, rows in frame.groupby(UNIT)
    ])  # fmt: skip
    return Scores(frame, folds, summary)


def _fold(keys: tuple, rows: pd.DataFrame) -> dict[str, object]:
    named = dict(zip([*UNIT, "seed", "repeat", "fold"], keys, strict=True))
    try:
        harrell = concordance(rows["survival_months"], rows["event"], rows["risk"])
    except UndefinedMetricError as error:
        raise UndefinedMetricError(
            f"{named['model']}, {named['cohort']}, fold {named['fold']}: {error.message}", "Draw folds with events."
        ) from error
    return {**named, "n": len(rows), "events": int(rows["event"].sum()), "harrell_c": harrell.cindex}


def _summary(keys: tuple, rows: pd.DataFrame, folds: pd.DataFrame, bootstrap: int) -> dict[str, object]:
    named = dict(zip(UNIT, keys, strict=True))
    time, event, risk = rows["survival_months"], rows["event"], rows["risk"]
    out = {
        **named, "n": rows["case_id"].nunique(), "events": int(rows.drop_duplicates("case_id")["event"].sum()),
        "cindex_mean": folds["harrell_c"].mean(), "cindex_std": folds["harrell_c"].std(ddof=0),
        "cindex_pooled": concordance(time, event, risk).cindex, "cindex_low": float("nan"), "cindex_high": float("nan"),
    }  # fmt: skip
    if bootstrap:
        resamples = Resamples.draw(time, event, replicates=bootstrap, seed=_SEED, stratum=rows["fold"])
        out["cindex_low"], out["cindex_high"] = percentile_interval(resamples.cindex(risk))
    return out
