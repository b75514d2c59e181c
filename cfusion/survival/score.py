"""Turns predictions into scores: per fold, over the folds, and pooled over patients, with intervals.

The risks of different folds come from different models. `cindex_pooled` compares them without adjustment, as MCAT
published it. `cindex_within` compares only patients of the same fold, and is the better claim if models differ in
scale. Both intervals resample patients within folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from cfusion.cohort.findings import outcome_doubts
from cfusion.errors import DataError
from cfusion.machine_limits import usable_cores
from cfusion.survival.bootstrap import Resamples
from cfusion.survival.foldscores import FoldScores, References, interval_or_nan, score_fold
from cfusion.survival.metrics import concordance
from cfusion.survival.patients import PatientScores, score_patients
from cfusion.survival.predictions import UNIT, checked_predictions
from cfusion.types import Cohort, Split, titled_table

_SEED = 7
"""Seed of the bootstrap draws: the same for every model, so that intervals are reproducible and models comparable."""

_GRID = 12
"""Times of the AUC curve."""

_PARALLEL_FROM = 60
"""Number of models × cohorts from which processes are started; below it, starting them costs more than it saves."""

_MOST_PROCESSES = 8

_SHOWN = 3
"""Number of models named in the short form of scores."""

Key = tuple[str, str, str]
"""Cohort, model, protocol."""


@dataclass(frozen=True, repr=False)
class Scores:
    """All scores computed from one set of predictions.

    Attributes:
        predictions: The checked predictions, a row per patient.
        folds: A row per cohort, model, protocol, seed, repeat and fold.
        summary: A row per cohort, model and protocol.
        patients: Curves, groups and calibration, by cohort, model and protocol.
        notes: Remarks for the reader, for example that all risks of a fold are equal.
    """

    predictions: pd.DataFrame
    folds: pd.DataFrame
    summary: pd.DataFrame
    patients: dict[Key, PatientScores]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = [
            f"{row['cohort']} {row['model']} ({row['protocol']}): C {row['cindex_pooled']:.3f} "
            f"[{row['cindex_low']:.3f}, {row['cindex_high']:.3f}]"
            for row in self.summary.head(_SHOWN).to_dict("records")
        ]
        more = f"; and {len(self.summary) - _SHOWN} more" if len(self.summary) > _SHOWN else ""
        return f"Scores({'; '.join(shown)}{more})"

    def _repr_html_(self) -> str:
        columns = [*UNIT, "n", "events", "cindex_pooled", "cindex_low", "cindex_high", "cindex_mean", "null_high"]
        table = self.summary[[name for name in columns if name in self.summary.columns]]
        return titled_table(f"Scores of {len(self.predictions)} predictions. {' '.join(self.notes)}", table)


def score(
    predictions: pd.DataFrame,
    cohort: Cohort | None = None,
    splits: Split | Sequence[Split] | None = None,
    *,
    bootstrap: int = 1000,
    horizons: Sequence[float] = (12.0, 36.0, 60.0),
) -> Scores:
    """Score out-of-fold predictions per patient.

    Args:
        predictions: See `cfusion.survival.predictions.read_predictions` for the columns. The output of
            `cfusion.predict` has no outcomes; they are taken from the cohort.
        cohort: Its outcomes are the reference for the predictions and the training patients' outcomes; None: the
            outcomes in the predictions are used.
        splits: One fold or several; None: a fold's training patients are taken to be those of the other folds.
        bootstrap: Replicates of each interval; 0: no intervals.
        horizons: Months of the time-dependent AUC and of the calibration.

    Returns:
        The scores. A score that is undefined for a fold (a horizon past its follow-up, no survival columns) is NaN.

    Raises:
        DataError: The predictions contradict themselves, the cohort or the splits.
        UndefinedMetricError: A fold has no comparable pair; the message names cohort and fold.
    """
    folds_of = (splits,) if isinstance(splits, Split) else tuple(splits or ())
    frame = checked_predictions(_with_outcomes(predictions, cohort, folds_of))
    if cohort is not None:
        _check_against(frame, cohort)
    references = References(cohort, {(split.repeat, split.fold): split for split in folds_of})
    groups = [((str(c), str(m), str(p)), rows) for (c, m, p), rows in frame.groupby(UNIT, sort=False)]
    if len(groups) < _PARALLEL_FROM:
        results = _score_groups(groups, references, bootstrap, tuple(horizons))
    else:
        jobs = min(usable_cores(), _MOST_PROCESSES)
        chunks = [groups[i::jobs] for i in range(jobs)]
        run = delayed(_score_groups)
        parts = Parallel(n_jobs=jobs)(run(chunk, references, bootstrap, tuple(horizons)) for chunk in chunks)
        results = {key: value for part in parts for key, value in part.items()}
    ordered = [results[name] for name, _ in groups]
    folds = pd.DataFrame([row for result in ordered for row in result[0]])
    summary = pd.DataFrame([result[1] for result in ordered])
    patients = {name: results[name][2] for name, _ in groups}
    return Scores(frame, folds, summary, patients, _notes(frame, folds, summary if bootstrap else summary.head(0)))


def _with_outcomes(predictions: pd.DataFrame, cohort: Cohort | None, splits: Sequence[Split]) -> pd.DataFrame:
    """Add the cohort's outcomes to predictions without outcomes; return other predictions unchanged."""
    if cohort is None or "case_id" not in predictions or {"survival_months", "event"} & set(predictions):
        return predictions
    truth = _outcomes(cohort, predictions["case_id"].astype(str))
    added: dict[str, Any] = {} if "cohort" in predictions else {"cohort": cohort.name}
    repeats = {split.repeat for split in splits}
    if "repeat" not in predictions and len(repeats) == 1:
        added["repeat"] = repeats.pop()
    return predictions.assign(**added, survival_months=truth["time_months"].to_numpy(), event=truth["event"].to_numpy())


def _outcomes(cohort: Cohort, case_ids: pd.Index | pd.Series) -> pd.DataFrame:
    """Return the patients' rows of a cohort.

    Raises:
        DataError: Some patients are not in the cohort.
    """
    unknown = pd.Index(case_ids).difference(cohort.cases.index)
    if len(unknown):
        raise DataError(f"predictions: {len(unknown)} patients are not in cohort {cohort.name}, such as {unknown[0]}.")
    return cohort.cases.loc[list(case_ids)]


def _check_against(frame: pd.DataFrame, cohort: Cohort) -> None:
    mine = frame.drop_duplicates("case_id").set_index("case_id")
    truth = _outcomes(cohort, mine.index)
    wrong = (mine["event"] != truth["event"]) | ~np.isclose(mine["survival_months"], truth["time_months"])
    if wrong.any():
        raise DataError(
            f"predictions: {int(wrong.sum())} patients have different outcomes in cohort {cohort.name}, such as "
            f"{wrong.index[wrong][0]}.", "Check the unit of the times and the polarity of the events.",
        )  # fmt: skip


def _notes(frame: pd.DataFrame, folds: pd.DataFrame, resampled: pd.DataFrame) -> tuple[str, ...]:
    notes = []
    for name, rows in frame.groupby("cohort", sort=False):
        cases = rows.drop_duplicates("case_id")
        doubts = outcome_doubts(str(name), cases["survival_months"], cases["event"])
        notes += [f"{doubt.subject}: {doubt.message}." for doubt in doubts]
    for words, rows in folds[folds["note"] != ""].groupby(["model", "note"], sort=False):
        counts = ", ".join(f"{count} of {cohort}" for cohort, count in rows["cohort"].value_counts(sort=False).items())
        notes.append(f"{words[0]}: {words[1]} in folds ({counts}).")
    for row in resampled[resampled["cindex_low"].isna()].to_dict("records"):
        notes.append(
            f"{row['cohort']}, {row['model']}: no interval; most bootstrap replicates have no comparable pair."
        )
    return tuple(notes)


Result = tuple[list[dict[str, object]], dict[str, object], PatientScores]


def _score_groups(
    groups: Sequence[tuple[Key, pd.DataFrame]], references: References, bootstrap: int, horizons: tuple[float, ...]
) -> dict[Key, Result]:
    draws: dict[tuple, Resamples] = {}
    return {key: _score_group(rows, references, draws, bootstrap, horizons) for key, rows in groups}


def _score_group(
    rows: pd.DataFrame, references: References, draws: dict, bootstrap: int, horizons: tuple[float, ...]
) -> Result:
    """Score all seeds and repeats of one cohort, model and protocol."""
    happened = rows.loc[rows["event"], "survival_months"]
    grid = np.linspace(happened.quantile(0.05), happened.quantile(0.9), _GRID) if len(happened) else np.zeros(0)
    folds: list[FoldScores] = []
    pooled, within, spreads = [], [], []
    for _, run in rows.groupby(["seed", "repeat"]):
        resamples = _draw(run, draws, bootstrap)
        for fold in sorted(run["fold"].unique()):
            counts = resamples.counts[:, (run["fold"] == fold).to_numpy()] if resamples else None
            folds.append(score_fold(run, int(fold), references, counts, horizons, grid))
        risk, of_fold = run["risk"].to_numpy(), run["fold"].to_numpy()
        once = Resamples(run["survival_months"].to_numpy(), run["event"].to_numpy(), np.ones((1, len(run)), np.float32))
        pooled.append(concordance(run["survival_months"], run["event"], risk).cindex)
        within.append(float(once.cindex(risk, within=of_fold)[0]))
        if resamples:
            spreads.append((resamples.cindex(risk), resamples.cindex(risk, within=of_fold)))
    table = pd.DataFrame([fold.row for fold in folds])
    patients = score_patients(rows, horizons, grid, np.array([fold.auc_curve for fold in folds]))
    summary = _summary(rows, table, pooled, within, spreads) | _mean_scores(folds) | patients.columns()
    return [fold.row for fold in folds], summary, patients


def _draw(run: pd.DataFrame, draws: dict, bootstrap: int) -> Resamples | None:
    """Return the draws; models that score the same patients in the same folds share them."""
    if not bootstrap:
        return None
    key = (tuple(run["case_id"]), run["fold"].to_numpy().tobytes())
    if key not in draws:
        draws[key] = Resamples.draw(
            run["survival_months"], run["event"], replicates=bootstrap, seed=_SEED, stratum=run["fold"]
        )
    return draws[key]


def _summary(
    rows: pd.DataFrame, folds: pd.DataFrame, pooled: list[float], within: list[float], spreads: list[tuple]
) -> dict[str, object]:
    """Average over folds, seeds and repeats; intervals are those of the replicates' mean over seeds and repeats."""
    cases = rows.drop_duplicates("case_id")
    replicates = [np.mean([spread[i] for spread in spreads], axis=0) if spreads else None for i in range(2)]
    limits = [interval_or_nan(values) for values in replicates]
    return {
        **{name: rows[name].iloc[0] for name in UNIT}, "n": len(cases), "events": int(cases["event"].sum()),
        "folds": len(folds), "seeds": rows["seed"].nunique(),
        "cindex_mean": folds["harrell_c"].mean(), "cindex_std": folds["harrell_c"].std(ddof=0),
        "cindex_pooled": float(np.mean(pooled)), "cindex_low": limits[0][0], "cindex_high": limits[0][1],
        "cindex_within": float(np.mean(within)), "within_low": limits[1][0], "within_high": limits[1][1],
    }  # fmt: skip


def _mean_scores(folds: list[FoldScores]) -> dict[str, float]:
    """Average the other scores over the folds that have them; each interval is that of the mean's replicates."""
    table = pd.DataFrame([fold.row for fold in folds])
    scores = {"uno": "uno_c", "ibs": "ibs"} | {
        name: name for name in table.columns if name.startswith("auc_") and not name.endswith(("_low", "_high"))
    }
    means = {"ibs_null": float(table["ibs_null"].mean())}
    for name, column in scores.items():
        there = table[column].notna()
        known = [fold.spreads[name] for fold, has in zip(folds, there, strict=True) if has and name in fold.spreads]
        low, high = interval_or_nan(np.mean(known, axis=0) if known else None)
        means |= {column: float(table[column].mean()), f"{name}_low": low, f"{name}_high": high}
    return means
