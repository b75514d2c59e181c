"""Models compared on the same patients and seeds, corrected for how many comparisons were made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import norm

from cfusion.errors import DataError
from cfusion.survival.bootstrap import Resamples, percentile_interval

_RUN = ["seed", "repeat"]
_SEED = 7


def holm(p_values: ArrayLike) -> np.ndarray:
    """P-values adjusted after Holm (1979): the chance of any false claim among them stays below the level.

    Raises:
        DataError: A p-value is NaN or outside 0 … 1.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("Holm's correction needs p-values between 0 and 1.")
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    result = np.empty(len(p))
    result[order] = np.minimum(adjusted, 1)
    return result


def compare(
    predictions: pd.DataFrame, *, reference: str | None = None, replicates: int = 1000, seed: int = _SEED
) -> pd.DataFrame:
    """Hold every model against a reference, within each cohort and protocol.

    The difference is that of the C-index within folds, averaged over the seeds both models have. Both models are
    resampled with the same patients, so what is hard for both cancels. The p-value is two-sided, normal, with the
    bootstrap's standard error; `p_holm` corrects over all rows of the table, cohorts and models alike.

    Args:
        predictions: Checked predictions of several models.
        reference: The model the others are held against; none: the first in the table.
        replicates: Bootstrap replicates.
        seed: Of the draws.

    Returns:
        Columns `cohort, protocol, model, reference, patients, seeds, difference, low, high, p, p_holm`; empty with
        one model.

    Raises:
        DataError: The reference is not among the models, or two models share no patient or seed.
    """
    names = list(dict.fromkeys(predictions["model"]))
    reference = reference or names[0]
    if reference not in names:
        raise DataError(f"the reference {reference} is not among the models {', '.join(names)}.")
    rows = []
    for (cohort, protocol), frame in predictions.groupby(["cohort", "protocol"], sort=False):
        base = frame[frame["model"] == reference]
        if base.empty:
            continue
        draws: dict[tuple, Resamples] = {}
        for model, other in frame[frame["model"] != reference].groupby("model", sort=False):
            where = f"{cohort}, {model} against {reference}"
            result = _paired(base, other, where, draws, replicates, seed)
            rows.append({"cohort": cohort, "protocol": protocol, "model": model, "reference": reference, **result})
    table = pd.DataFrame(rows, columns=[
        "cohort", "protocol", "model", "reference", "patients", "seeds", "difference", "low", "high", "p",
    ])  # fmt: skip
    return table.assign(p_holm=holm(table["p"]) if len(table) else [])


def _paired(
    base: pd.DataFrame, other: pd.DataFrame, where: str, draws: dict[tuple, Resamples], replicates: int, seed: int
) -> dict[str, object]:
    runs = sorted(set(_runs(base)) & set(_runs(other)))
    patients = sorted(set(base["case_id"]) & set(other["case_id"]))
    if not runs or not patients:
        raise DataError(f"{where}: the two share no {'patient' if runs else 'seed'}.", "Score both on the same splits.")
    key = tuple(patients)
    if key not in draws:
        outcomes = base.drop_duplicates("case_id").set_index("case_id").loc[patients]
        time, event = outcomes["survival_months"], outcomes["event"]
        draws[key] = Resamples.draw(time, event, replicates=replicates, seed=seed)
    once = Resamples(draws[key].time, draws[key].event, np.ones((1, len(patients)), dtype=np.float32))
    difference = np.zeros(1)
    spread = np.zeros(replicates)
    for run in runs:
        for sign, frame in ((1, other), (-1, base)):
            rows = frame[(frame[_RUN] == list(run)).all(axis=1)].set_index("case_id").reindex(patients)
            if rows["risk"].isna().any():
                raise DataError(f"{where}: seed {run[0]} does not score every shared patient.")
            risk, fold = rows["risk"].to_numpy(), rows["fold"].to_numpy()
            difference += sign * once.cindex(risk, within=fold) / len(runs)
            spread += sign * draws[key].cindex(risk, within=fold) / len(runs)
    error = float(np.nanstd(spread))
    p = float(2 * norm.sf(abs(difference[0]) / error)) if error > 0 else 1.0
    low, high = percentile_interval(spread)
    return {
        "patients": len(patients), "seeds": len(runs), "difference": float(difference[0]), "low": low, "high": high,
        "p": p,
    }  # fmt: skip


def _runs(frame: pd.DataFrame) -> Sequence[tuple[int, int]]:
    return list(frame[_RUN].drop_duplicates().itertuples(index=False, name=None))
