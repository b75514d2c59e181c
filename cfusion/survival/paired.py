"""Compares models on the same patients and seeds, corrected for the number of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cfusion.errors import DataError
from cfusion.survival.bootstrap import Resamples, cross_validated_interval, cross_validated_p
from cfusion.survival.predictions import STRATUM

COLUMNS = (
    "cohort", "protocol", "model", "reference", "patients", "seeds", "difference", "low", "high", "p", "p_holm",
)  # fmt: skip
"""Columns of a comparison table."""

_RUN = ["seed", "repeat"]
_SEED = 7


def holm(p_values: ArrayLike) -> np.ndarray:
    """Adjust p-values after Holm (1979), which keeps the chance of any false claim among them below the level.

    NaN marks a comparison that was not made: it stays NaN and does not count in the correction.

    Raises:
        DataError: A p-value is outside 0 … 1.
    """
    p = np.asarray(p_values, dtype=float)
    if ((p < 0) | (p > 1)).any():
        raise DataError("Holm's correction needs p-values between 0 and 1.")
    made = int(np.isfinite(p).sum())
    order = np.argsort(p, kind="stable")  # NaN sorts last
    adjusted = np.maximum.accumulate(p[order[:made]] * (made - np.arange(made)))
    result = np.full(len(p), np.nan)
    result[order[:made]] = np.minimum(adjusted, 1)
    return result


def compare(
    predictions: pd.DataFrame, *, reference: str | None = None, replicates: int = 1000, seed: int = _SEED
) -> pd.DataFrame:
    """Compare every model with a reference, within each cohort and protocol.

    The difference is that of the C-index within folds, averaged over the seeds both models have. Both models use the
    same resampled patients, so difficult patients affect both alike. The p-value is two-sided and normal, with the
    bootstrap's standard error, widened for the dependence between folds (`CROSS_VALIDATION`). `p_holm` corrects over
    all rows of the table, across cohorts and models. With a column `stratum` only pairs within a stratum count.

    Args:
        predictions: Checked predictions of several models.
        reference: The model to compare the others with; None: the first of each cohort and protocol.
        replicates: Bootstrap replicates.
        seed: Seed of the draws.

    Returns:
        Columns `cohort, protocol, model, reference, patients, seeds, difference, low, high, p, p_holm`; empty with
        one model. Two models cannot be compared without a common seed, or without a comparable pair of common
        patients; their row holds NaN.

    Raises:
        DataError: The reference is not among the models.
    """
    names = list(dict.fromkeys(predictions["model"]))
    if reference is not None and reference not in names:
        raise DataError(f"the reference {reference} is not among the models {', '.join(names)}.")
    rows = []
    for names_of, frame in predictions.groupby(["cohort", "protocol"], sort=False):
        cohort, protocol = (str(word) for word in names_of)
        models = {str(name): rows_of for name, rows_of in frame.groupby("model", sort=False)}
        base = next(iter(models)) if reference is None else reference
        if base not in models:
            continue
        bases: dict[tuple, _Scored] = {}
        for model, other in models.items():
            if model == base:
                continue
            runs, patients = _shared(models[base], other)
            if (runs, patients) not in bases:
                bases[runs, patients] = _Scored.of(models[base], runs, patients, replicates, seed)
            result = bases[runs, patients].against(other)
            rows.append({"cohort": cohort, "protocol": protocol, "model": model, "reference": base, **result})
    table = pd.DataFrame(rows, columns=list(COLUMNS[:-1]))
    return table.assign(p_holm=holm(table["p"]) if len(table) else [])


@dataclass(frozen=True)
class _Scored:
    """The reference on shared runs and patients: its C-index within folds, and that of every replicate."""

    runs: tuple[tuple[int, int], ...]
    patients: tuple[str, ...]
    draws: Resamples
    once: Resamples
    value: float
    replicates: np.ndarray
    folds: int

    @classmethod
    def of(cls, base: pd.DataFrame, runs: tuple, patients: tuple[str, ...], replicates: int, seed: int) -> _Scored:
        outcomes = base.drop_duplicates("case_id").set_index("case_id").loc[list(patients)]
        draws = Resamples.draw(
            outcomes["survival_months"], outcomes["event"], replicates=replicates, seed=seed,
            strata=outcomes.get(STRATUM),
        )  # fmt: skip
        once = Resamples(draws.time, draws.event, np.ones((1, len(patients)), dtype=np.float32))
        value, spread = _within_folds(base, runs, patients, draws, once)
        return cls(runs, patients, draws, once, value, spread, base["fold"].nunique())

    def against(self, other: pd.DataFrame) -> dict[str, object]:
        value, spread = _within_folds(other, self.runs, self.patients, self.draws, self.once)
        difference, differences = value - self.value, spread - self.replicates
        shared = {"patients": len(self.patients), "seeds": len(self.runs)}
        if np.isfinite(differences).sum() * 2 < len(differences) or np.isnan(difference):
            return {**shared, **dict.fromkeys(("difference", "low", "high", "p"), float("nan"))}
        low, high = cross_validated_interval(difference, differences, folds=self.folds, bounded=False)
        p = cross_validated_p(difference, differences, folds=self.folds)
        return {**shared, "difference": difference, "low": low, "high": high, "p": p}


def _shared(base: pd.DataFrame, other: pd.DataFrame) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """Return the runs (seed, repeat) that both have, and the patients that both score in all of these runs."""
    runs = tuple(sorted(set(_runs(base)) & set(_runs(other))))
    scored = [set(rows["case_id"]) for frame in (base, other) for run, rows in frame.groupby(_RUN) if run in runs]
    return runs, tuple(sorted(set.intersection(*scored))) if scored else ()


def _within_folds(
    frame: pd.DataFrame, runs: tuple, patients: tuple[str, ...], draws: Resamples, once: Resamples
) -> tuple[float, np.ndarray]:
    """Return the C-index within folds, averaged over runs, and that of each replicate; NaN without runs or patients."""
    value, spread = 0.0 if runs else float("nan"), np.zeros(len(draws.counts))
    for run in runs:
        rows = frame[(frame["seed"] == run[0]) & (frame["repeat"] == run[1])]
        rows = rows.set_index("case_id").loc[list(patients)]
        risk = rows["risk"].to_numpy()
        fold = rows.groupby([name for name in ("fold", STRATUM) if name in rows]).ngroup().to_numpy()
        value += float(once.cindex(risk, within=fold)[0]) / len(runs)
        spread += draws.cindex(risk, within=fold) / len(runs)
    return value, spread


def _runs(frame: pd.DataFrame) -> Sequence[tuple[int, int]]:
    return list(frame[_RUN].drop_duplicates().itertuples(index=False, name=None))
