"""Turns predictions into scores: per fold, within folds, and pooled over patients, with intervals.

The risks of different folds come from different models. `cindex_within`, the headline, compares only patients of the
same fold. `cindex_pooled` compares all of them as they are, as MCAT published it, and depends on the scale of each
fold's model. One draw of patients serves all seeds, repeats and models, so that repetitions of what is known narrow no
interval.

Cohorts that are trained as one are scored each by itself, and together in a row of their common name: its C compares
patients of the same cohort only (stratified), and its bootstrap keeps the number of patients of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from cfusion.cohort.identifiers import patient_of
from cfusion.errors import DataError, UndefinedMetricError
from cfusion.machine_limits import usable_cores
from cfusion.survival.added import AddedInRun, AddedValue, ClinicalModel, mean_added
from cfusion.survival.bootstrap import Resamples, cross_validated_interval
from cfusion.survival.foldscores import FoldScores, References, score_fold, score_joint_fold
from cfusion.survival.metrics import concordance
from cfusion.survival.notes import score_notes
from cfusion.survival.patients import PatientScores, score_patients
from cfusion.survival.predictions import JOINT, STRATUM, UNIT, checked_predictions
from cfusion.types import Cohort, Split, titled_table

_SEED = 7
"""Seed of the bootstrap draws: the same for every model, so that intervals are reproducible and models comparable."""

_GRID = 12
"""Times of the curves of AUC and Brier score."""

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
        added: What each adds to the clinical covariates; without an entry where they are unknown.
        notes: Remarks for the reader, for example that all risks of a fold are equal.
        horizons: Months of the time-dependent AUC and of the calibration.
        covariates: The clinical covariates, if they are known.
        joint: Name of cohorts that were trained as one; their common rows come first. None: each cohort is by itself.
    """

    predictions: pd.DataFrame
    folds: pd.DataFrame
    summary: pd.DataFrame
    patients: dict[Key, PatientScores]
    added: dict[Key, AddedValue] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    horizons: tuple[float, ...] = ()
    covariates: pd.DataFrame | None = None
    joint: str | None = None

    def groups(self) -> list[tuple[Key, pd.DataFrame]]:
        """Return the predictions behind each row of the summary; those of `joint` have a column `stratum`."""
        return _groups(self.predictions, self.joint)

    def __repr__(self) -> str:
        shown = [
            f"{row['cohort']} {row['model']} ({row['protocol']}): C {row['cindex_within']:.3f} "
            f"[{row['within_low']:.3f}, {row['within_high']:.3f}]"
            for row in self.summary.head(_SHOWN).to_dict("records")
        ]
        more = f"; and {len(self.summary) - _SHOWN} more" if len(self.summary) > _SHOWN else ""
        return f"Scores({'; '.join(shown)}{more})"

    def _repr_html_(self) -> str:
        columns = [*UNIT, "n", "events", "cindex_within", "within_low", "within_high", "cindex_pooled", "null_high"]
        table = self.summary[[name for name in columns if name in self.summary.columns]]
        return titled_table(f"Scores of {len(self.predictions)} predictions. {' '.join(self.notes)}", table)


def score(
    predictions: pd.DataFrame,
    cohort: Cohort | None = None,
    splits: Split | Sequence[Split] | None = None,
    *,
    covariates: pd.DataFrame | None = None,
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
        covariates: Clinical covariates [case, column] by `case_id`, as in `Cohort.covariates`; None: the cohort's.
        bootstrap: Replicates of each interval; 0: no intervals.
        horizons: Months of the time-dependent AUC and of the calibration.

    Returns:
        The scores. A score that is undefined for a fold (a horizon past its follow-up, no survival columns) is NaN.

    Raises:
        DataError: The predictions contradict themselves, the cohort or the splits.
        UndefinedMetricError: A fold has no comparable pair; the message names cohort and fold.
    """
    folds_of = (splits,) if isinstance(splits, Split) else tuple(splits or ())
    frame = checked_predictions(_with_own_cohorts(_with_outcomes(predictions, cohort, folds_of), cohort))
    if cohort is not None:
        _check_against(frame, cohort)
    references = References(cohort, {(split.repeat, split.fold): split for split in folds_of})
    clinical = covariates if covariates is not None or cohort is None else cohort.covariates
    settings = _Settings(references, clinical, bootstrap, tuple(horizons))
    frame = frame.drop(columns=STRATUM, errors="ignore")  # a column that only this module sets
    joint = _joint_name(frame, cohort)
    groups = _groups(frame, joint)
    if len(groups) < _PARALLEL_FROM:
        results = _score_groups(groups, settings)
    else:
        jobs = min(usable_cores(), _MOST_PROCESSES)
        run = delayed(_score_groups)
        parts = Parallel(n_jobs=jobs)(run(groups[i::jobs], settings) for i in range(jobs))
        results = {key: value for part in parts for key, value in part.items()}
    ordered = [results[name] for name, _ in groups]
    folds = pd.DataFrame([row for result in ordered for row in result.folds])
    summary = pd.DataFrame([result.summary for result in ordered])
    patients = {name: results[name].patients for name, _ in groups}
    added = {name: found for name, _ in groups if (found := results[name].added) is not None}
    notes = (
        *_joint_notes(groups, joint),
        *score_notes(frame, folds, summary, bootstrap > 0),
        *(note for result in ordered for note in result.notes),
    )
    return Scores(frame, folds, summary, patients, added, notes, settings.horizons, clinical, joint)


def _joint_name(frame: pd.DataFrame, cohort: Cohort | None) -> str | None:
    """Return the name of cohorts that were trained as one; without a cohort, the only one that predictions name."""
    if cohort is not None:
        return None if cohort.strata is None else cohort.name
    names = set(frame[JOINT].dropna()) - {""} if JOINT in frame else set()
    return str(names.pop()) if len(names) == 1 else None


def _groups(frame: pd.DataFrame, joint: str | None) -> list[tuple[Key, pd.DataFrame]]:
    """Return the predictions of each cohort, model and protocol; with `joint` first those of all cohorts together."""
    groups = [((str(c), str(m), str(p)), rows) for (c, m, p), rows in frame.groupby(UNIT, sort=False)]
    if joint is None:
        return groups
    trained = frame[frame[JOINT] == joint] if JOINT in frame else frame
    renamed = trained.assign(cohort=joint)
    renamed[STRATUM] = trained["cohort"]
    together = [((joint, str(m), str(p)), rows) for (_, m, p), rows in renamed.groupby(UNIT, sort=False)]
    return [*((key, rows) for key, rows in together if rows[STRATUM].nunique() > 1), *groups]


def _joint_notes(groups: Sequence[tuple[Key, pd.DataFrame]], joint: str | None) -> tuple[str, ...]:
    """Say what the C of cohorts that were trained as one compares."""
    if joint is None or groups[0][0][0] != joint:
        return ()
    return (
        f"{joint}: one model of several cohorts. Its C compares patients within each cohort only (stratified by "
        "cohort); Uno's C, AUC, Brier score and what clinical covariates add stand in the rows of the cohorts.",
    )


def _with_own_cohorts(predictions: pd.DataFrame, cohort: Cohort | None) -> pd.DataFrame:
    """Name each patient's own cohort where several were trained as one."""
    if cohort is None or cohort.strata is None or "case_id" not in predictions:
        return predictions
    cases = predictions["case_id"].astype(str).str.strip().map(patient_of)
    _outcomes(cohort, cases)
    return predictions.assign(cohort=cohort.strata_of(list(cases)))


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


@dataclass(frozen=True, eq=False)
class _Settings:
    """What all groups are scored with."""

    references: References
    covariates: pd.DataFrame | None
    bootstrap: int
    horizons: tuple[float, ...]
    _drawn: dict[tuple, Resamples] = field(default_factory=dict)
    _clinical: dict[tuple, ClinicalModel | None] = field(default_factory=dict)

    def draws(self, patients: pd.DataFrame, scored: pd.Series) -> Resamples | None:
        """Return the one set of draws of a model's patients, for those that a run scores.

        Models on the same patients get the same object, which keeps the counts of comparable pairs. With a column
        `stratum` each draw keeps the number of patients of every stratum.
        """
        if not self.bootstrap:
            return None
        names = tuple(patients["case_id"])
        if names not in self._drawn:
            outcomes = patients["survival_months"], patients["event"]
            self._drawn[names] = Resamples.draw(
                *outcomes, replicates=self.bootstrap, seed=_SEED, strata=patients.get(STRATUM)
            )
        rows = pd.Index(names).get_indexer(scored)
        key = (names, rows.tobytes())
        if key not in self._drawn:
            self._drawn[key] = self._drawn[names].of(rows)
        return self._drawn[key]

    def added(self, run: pd.DataFrame, draws: Resamples | None) -> AddedInRun | None:
        """Return what a run's risk adds to the covariates; models on the same folds share the clinical model.

        Raises:
            UndefinedMetricError: No Cox model can be fitted.
        """
        if self.covariates is None:
            return None
        key = (*run["cohort"].iloc[:1], *run["case_id"], run["fold"].to_numpy().tobytes())
        if key not in self._clinical:
            self._clinical[key] = ClinicalModel.fit(run, self.covariates, draws, self.horizons)
        model = self._clinical[key]
        return None if model is None else model.with_risk(run["risk"].to_numpy(), self.horizons)


@dataclass(frozen=True, eq=False)
class _Result:
    """The scores of one cohort, model and protocol."""

    folds: list[dict[str, object]]
    summary: dict[str, object]
    patients: PatientScores
    added: AddedValue | None
    notes: list[str]


def _score_groups(groups: Sequence[tuple[Key, pd.DataFrame]], settings: _Settings) -> dict[Key, _Result]:
    return {key: (_score_joint if STRATUM in rows else _score_group)(rows, settings) for key, rows in groups}


def _score_group(unordered: pd.DataFrame, settings: _Settings) -> _Result:
    """Score all seeds and repeats of one cohort, model and protocol; the order of the rows decides nothing."""
    rows = unordered.sort_values(["seed", "repeat", "case_id"], kind="stable", ignore_index=True)
    happened = rows.loc[rows["event"], "survival_months"]
    grid = np.linspace(happened.quantile(0.05), happened.quantile(0.9), _GRID) if len(happened) else np.zeros(0)
    patients = rows.drop_duplicates("case_id").sort_values("case_id")
    folds: list[FoldScores] = []
    pooled, within, spreads, added, reasons = [], [], [], list[AddedInRun](), list[str]()
    for _, run in rows.groupby(["seed", "repeat"]):
        resamples = settings.draws(patients, run["case_id"])
        for fold in sorted(run["fold"].unique()):
            counts = resamples.counts[:, (run["fold"] == fold).to_numpy()] if resamples else None
            folds.append(score_fold(run, int(fold), settings.references, counts, settings.horizons, grid))
        risk, of_fold = run["risk"].to_numpy(), run["fold"].to_numpy()
        once = Resamples(run["survival_months"].to_numpy(), run["event"].to_numpy(), np.ones((1, len(run)), np.float32))
        pooled.append(concordance(run["survival_months"], run["event"], risk).cindex)
        within.append(float(once.cindex(risk, within=of_fold)[0]))
        if resamples:
            spreads.append((resamples.cindex(risk), resamples.cindex(risk, within=of_fold)))
        try:
            added += [found] if (found := settings.added(run, resamples)) else []
        except UndefinedMetricError as error:
            reasons.append(error.message)
    table = pd.DataFrame([fold.row for fold in folds])
    auc, brier = (np.array([getattr(fold, name) for fold in folds]) for name in ("auc_curve", "brier_curves"))
    curves = score_patients(rows, settings.horizons, grid, auc, brier)
    summary = _summary(rows, table, pooled, within, spreads) | _mean_scores(folds) | curves.columns()
    mean = mean_added(added) if added else None
    notes = [
        f"{rows['cohort'].iloc[0]}, {rows['model'].iloc[0]}: what the risk adds to the covariates is unknown in "
        f"{len(reasons)} of {len(pooled)} runs: {reasons[0]}"
    ] if reasons else []  # fmt: skip
    return _Result([fold.row for fold in folds], summary | (mean.columns() if mean else {}), curves, mean, notes)


def _score_joint(unordered: pd.DataFrame, settings: _Settings) -> _Result:
    """Score cohorts that were trained as one together: only pairs of patients of the same cohort are compared.

    Scores that need the censoring of one cohort (Uno's C, AUC, Brier score) stand in the rows of the cohorts.
    """
    rows = unordered.sort_values(["seed", "repeat", "case_id"], kind="stable", ignore_index=True)
    rows["cell"] = rows.groupby([STRATUM, "fold"]).ngroup()
    patients = rows.drop_duplicates("case_id").sort_values("case_id")
    folds: list[dict[str, object]] = []
    pooled, within, spreads = [], [], []
    for _, run in rows.groupby(["seed", "repeat"]):
        resamples = settings.draws(patients, run["case_id"])
        outcomes, risk = (run["survival_months"], run["event"]), run["risk"].to_numpy()
        stratum = np.unique(run[STRATUM].astype(str), return_inverse=True)[1]
        pooled.append(concordance(*outcomes, risk, stratum).cindex)
        within.append(concordance(*outcomes, risk, run["cell"]).cindex)
        if resamples:
            spreads.append((resamples.cindex(risk, within=stratum), resamples.cindex(risk, within=run["cell"])))
        for fold in sorted(run["fold"].unique()):
            inside = (run["fold"] == fold).to_numpy()
            counts = resamples.counts[:, inside] if resamples else None
            folds.append(score_joint_fold(run[inside], stratum[inside], counts))
    nothing = np.full((1, 0), np.nan)
    found = score_patients(rows.assign(fold=rows["cell"]), settings.horizons, np.zeros(0), nothing)
    # Risks of different cohorts have no common scale, so no split at the median of all means anything.
    found = replace(found, median_split_p=float("nan"))
    names = {"cohorts": ", ".join(dict.fromkeys(rows[STRATUM].astype(str)))}
    summary = _summary(rows, pd.DataFrame(folds), pooled, within, spreads)
    return _Result(folds, summary | names | found.columns(), found, None, [])


def _summary(
    rows: pd.DataFrame, folds: pd.DataFrame, pooled: list[float], within: list[float], spreads: list[tuple]
) -> dict[str, object]:
    """Average over folds, seeds and repeats; intervals are those of the replicates' mean over seeds and repeats."""
    cases = rows.drop_duplicates("case_id")
    values = [float(np.mean(pooled)), float(np.mean(within))]
    replicates = [np.mean([spread[i] for spread in spreads], axis=0) if spreads else None for i in range(2)]
    limits = [
        cross_validated_interval(value, found, folds=rows["fold"].nunique())
        for value, found in zip(values, replicates, strict=True)
    ]
    return {
        **{name: rows[name].iloc[0] for name in UNIT}, "n": len(cases), "events": int(cases["event"].sum()),
        "folds": len(folds), "seeds": rows["seed"].nunique(),
        "cindex_within": values[1], "within_low": limits[1][0], "within_high": limits[1][1],
        "cindex_mean": folds["harrell_c"].mean(), "cindex_std": folds["harrell_c"].std(ddof=0),
        "cindex_pooled": values[0], "cindex_low": limits[0][0], "cindex_high": limits[0][1],
    }  # fmt: skip


def _mean_scores(folds: list[FoldScores]) -> dict[str, float]:
    """Average the other scores over the folds that have them; each interval is that of the mean's replicates."""
    table = pd.DataFrame([fold.row for fold in folds])
    scores = {"uno": "uno_c", "ibs": "ibs"} | {
        name: name for name in table.columns if name.startswith("auc_") and not name.endswith(("_low", "_high"))
    }
    means = {name: float(table[name].mean()) for name in ("ibs_null", "ibs_months")}
    for name, column in scores.items():
        there = table[column].notna()
        known = [fold.spreads[name] for fold, has in zip(folds, there, strict=True) if has and name in fold.spreads]
        value = float(table[column].mean())
        spread = np.mean(known, axis=0) if known else None
        low, high = cross_validated_interval(value, spread, folds=table["fold"].nunique())
        means |= {column: value, f"{name}_low": low, f"{name}_high": high}
    return means
