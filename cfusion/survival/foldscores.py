"""Scores of one fold. Everything that must be estimated is estimated from the fold's training patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cfusion.errors import DataError, UndefinedMetricError
from cfusion.survival.bootstrap import Resamples, percentile_interval
from cfusion.survival.calibration import survival_at
from cfusion.survival.metrics import (
    Training,
    auc_at,
    brier_curve,
    brier_times,
    concordance,
    time_mean,
    uno_cindex,
)
from cfusion.survival.predictions import FOLD, survival_columns
from cfusion.survival.spreads import auc_replicates, brier_replicates, uno_replicates
from cfusion.types import Cohort, Split

_NAN = float("nan")


@dataclass
class References:
    """Training patients of each fold, and cached results shared by all models with the same folds.

    Attributes:
        cohort: Outcomes of all patients; None: the outcomes in the predictions are used.
        splits: Folds by (repeat, fold); if empty, a fold's training patients are those of the other folds.
    """

    cohort: Cohort | None = None
    splits: dict[tuple[int, int], Split] = field(default_factory=dict)
    _trainings: dict[tuple[str, tuple[str, ...]], Training] = field(default_factory=dict, repr=False)
    _nulls: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)

    def training(self, run: pd.DataFrame, fold: int) -> tuple[Training, str]:
        """Return the training outcomes of a fold of a run (one model, seed and repeat), and a note if approximate.

        Raises:
            DataError: The fold is not among the splits, or it scores patients used to train or choose its model.
        """
        name, inside = str(run["cohort"].iloc[0]), (run["fold"] == fold).to_numpy()
        case_ids = run["case_id"].to_numpy()
        if not self.splits:
            rows, remark = (~inside, "") if not inside.all() else (inside, "censoring model from the scored patients")
            return self._cached(name, tuple(case_ids[rows]), run), remark
        split = self._split(int(run["repeat"].iloc[0]), fold, case_ids[inside])
        if self.cohort is not None:
            own = self._own(self.cohort, split.train, name)
            if own:
                return self._cached(name, own, None), ""
            return self._cached(name, tuple(case_ids[inside]), run), "censoring model from the scored patients"
        known = set(split.train) & set(case_ids)
        return self._cached(name, tuple(case for case in split.train if case in known), run), ""

    @staticmethod
    def _own(cohort: Cohort, train: tuple[str, ...], name: str) -> tuple[str, ...]:
        """Return the training patients of one of the cohorts that are trained as one; of one cohort, all."""
        if cohort.strata is None:
            return train
        return tuple(case for case, of in zip(train, cohort.strata_of(train), strict=True) if of == name)

    def _split(self, repeat: int, fold: int, scored: np.ndarray) -> Split:
        split = self.splits.get((repeat, fold))
        if split is None:
            raise DataError(f"fold {fold} of repeat {repeat} is in the predictions, not in the splits.")
        seen = {"are training patients": split.train, "chose the model": set(split.validation) - set(split.test)}
        for words, patients in seen.items():
            if found := set(patients) & set(scored):
                raise DataError(
                    f"fold {fold}: {len(found)} scored patients {words}, such as {min(found)}.",
                    "Score each patient with a model that was not trained or chosen on that patient.",
                )
        return split

    def _cached(self, cohort: str, case_ids: tuple[str, ...], run: pd.DataFrame | None) -> Training:
        """Return the outcomes of the given patients from the run or, without one, from the cohort; cached."""
        key = (cohort, case_ids)
        if key not in self._trainings:
            if run is not None:
                outcomes = run.set_index("case_id").rename(columns={"survival_months": "time_months"})
            else:
                assert self.cohort is not None
                outcomes = self.cohort.cases
            rows = outcomes.loc[list(case_ids)]
            if rows.empty:
                raise DataError(f"{cohort}: no training patient has a known outcome.", "Pass the cohort.")
            self._trainings[key] = Training(rows["time_months"].to_numpy(float), rows["event"].to_numpy(bool))
        return self._trainings[key]

    def null_brier(self, training: Training, time: np.ndarray, event: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Compute the Brier score of the training patients' Kaplan–Meier curve, [time]."""
        key = (id(training), time.tobytes(), times.tobytes())
        if key not in self._nulls:
            self._nulls[key] = brier_curve(training, time, event, training.survival_at(times), times)
        return self._nulls[key]


@dataclass(frozen=True)
class FoldScores:
    """One fold's row of `scores.csv`, its time-dependent AUC over the grid, and its bootstrap replicates.

    Attributes:
        row: The scores with their intervals.
        auc_curve: [time].
        brier_curves: [2, time], of the model and of Kaplan–Meier; NaN outside of the times of the Brier score.
        spreads: By score, [replicate]; empty without a bootstrap.
    """

    row: dict[str, object]
    auc_curve: np.ndarray
    brier_curves: np.ndarray
    spreads: Mapping[str, np.ndarray]


def score_fold(
    run: pd.DataFrame,
    fold: int,
    references: References,
    counts: np.ndarray | None,
    horizons: Sequence[float],
    grid: np.ndarray,
) -> FoldScores:
    """Score one fold of one run.

    Args:
        run: Checked predictions of one cohort, model, protocol, seed and repeat.
        fold: Number of the fold.
        references: Training outcomes.
        counts: [replicate, patient of the fold], bootstrap draws, or None for no interval.
        horizons: Months of the AUC columns.
        grid: [time], months of the curves of AUC and Brier score.

    Raises:
        UndefinedMetricError: The fold has no comparable pair; the message names model, cohort and fold.
        DataError: The predicted survival curves are invalid.
    """
    rows = run[run["fold"] == fold]
    named = {name: rows[name].iloc[0] for name in FOLD}
    where = f"{named['model']}, {named['cohort']}, fold {fold}"
    time, event, risk = (rows[c].to_numpy() for c in ("survival_months", "event", "risk"))
    try:
        harrell = concordance(time, event, risk)
    except UndefinedMetricError as error:
        raise UndefinedMetricError(f"{where}: {error.message}", "Draw folds that hold events.") from error
    training, remark = references.training(run, fold)
    notes = [remark] if remark else []
    if np.ptp(risk) == 0:
        notes.append("all risks are equal")
    times = np.concatenate([horizons, grid])
    auc = auc_at(training, time, event, risk, times)
    values = {"harrell": harrell.cindex, "uno": uno_cindex(training, time, event, risk)}
    values |= {f"auc_{h:g}": auc[i] for i, h in enumerate(horizons)}
    spreads: dict[str, np.ndarray] = {}
    if counts is not None:
        by_horizon = auc_replicates(training, time, event, risk, counts, np.asarray(horizons, dtype=float))
        spreads = {"harrell": Resamples(time, event, counts).cindex(risk)}
        spreads |= {"uno": uno_replicates(training, time, event, risk, counts)}
        spreads |= {f"auc_{h:g}": by_horizon[:, i] for i, h in enumerate(horizons)}
    brier = _brier(rows, training, references, counts, grid, where)
    spreads |= brier.spread
    limits = {name: interval_or_nan(spreads.get(name)) for name in (*values, "ibs")}
    row = {
        "model": named["model"], "cohort": named["cohort"], "fold": named["fold"], "n": len(rows),
        "events": int(event.sum()), "harrell_c": harrell.cindex, "harrell_low": limits["harrell"][0],
        "harrell_high": limits["harrell"][1], "protocol": named["protocol"], "seed": named["seed"],
        "repeat": named["repeat"], "concordant": harrell.concordant, "discordant": harrell.discordant,
        "tied_risk": harrell.tied_risk, "uno_c": values["uno"], "uno_low": limits["uno"][0],
        "uno_high": limits["uno"][1], "truncation_months": training.truncation_months,
        "ibs": brier.value, "ibs_low": limits["ibs"][0], "ibs_high": limits["ibs"][1], "ibs_null": brier.null,
        "ibs_months": brier.months,
    }  # fmt: skip
    for name in (f"auc_{h:g}" for h in horizons):
        row |= {name: values[name], f"{name}_low": limits[name][0], f"{name}_high": limits[name][1]}
    return FoldScores({**row, "note": "; ".join(notes)}, auc[len(horizons) :], brier.curves, spreads)


def score_joint_fold(rows: pd.DataFrame, stratum: np.ndarray, counts: np.ndarray | None) -> dict[str, object]:
    """Return the row of `scores.csv` of a fold of cohorts that were trained as one.

    Args:
        rows: Checked predictions of one fold, model, protocol, seed and repeat.
        stratum: [case], number of the cohort; only pairs within a cohort count.
        counts: [replicate, case], bootstrap draws, or None for no interval.
    """
    time, event, risk = (rows[c].to_numpy() for c in ("survival_months", "event", "risk"))
    found = concordance(time, event, risk, stratum)
    spread = None if counts is None else Resamples(time, event, counts).cindex(risk, within=stratum)
    low, high = interval_or_nan(spread)
    named = {name: rows[name].iloc[0] for name in FOLD}
    return {
        **{name: named[name] for name in ("model", "cohort", "fold")}, "n": len(rows), "events": int(event.sum()),
        "harrell_c": found.cindex, "harrell_low": low, "harrell_high": high, "protocol": named["protocol"],
        "seed": named["seed"], "repeat": named["repeat"], "concordant": found.concordant,
        "discordant": found.discordant, "tied_risk": found.tied_risk, "note": "",
    }  # fmt: skip


def interval_or_nan(replicates: np.ndarray | None) -> tuple[float, float]:
    """Return the percentile interval, or NaN if there are no replicates or too few finite ones."""
    try:
        return (_NAN, _NAN) if replicates is None else percentile_interval(replicates)
    except UndefinedMetricError:
        return _NAN, _NAN


@dataclass(frozen=True)
class _Brier:
    value: float
    null: float
    months: float
    curves: np.ndarray
    spread: dict[str, np.ndarray]


def _brier(
    rows: pd.DataFrame,
    training: Training,
    references: References,
    counts: np.ndarray | None,
    grid: np.ndarray,
    where: str,
) -> _Brier:
    columns = survival_columns(rows)
    if columns is None:
        return _Brier(_NAN, _NAN, _NAN, np.full((2, len(grid)), _NAN), {})
    survival, edges = columns
    if (edges != edges[0]).any() or (np.diff(edges[0]) <= 0).any():
        raise DataError(f"{where}: edge_1, edge_2, … must increase and be the same for all patients of a fold.")
    if ((survival < 0) | (survival > 1)).any() or (np.diff(survival, axis=1) > 1e-6).any():
        raise DataError(f"{where}: survival_1, survival_2, … must lie between 0 and 1 and not increase.")
    time, event = rows["survival_months"].to_numpy(), rows["event"].to_numpy()
    times = brier_times(training, time, float(edges[0, -1]))
    predicted = np.array([survival_at(survival, edges, np.full(len(time), month)) for month in times]).T
    spread = {} if counts is None else {"ibs": brier_replicates(training, time, event, predicted, counts, times)}
    curves = [
        brier_curve(training, time, event, predicted, times), references.null_brier(training, time, event, times),
    ]  # fmt: skip
    on_grid = np.full((2, len(grid)), _NAN)
    if len(times):
        on_grid = np.array([np.interp(grid, times, curve, left=_NAN, right=_NAN) for curve in curves])
    model, null = (time_mean(curve, times) for curve in curves)
    return _Brier(model, null, float(times[-1]) if len(times) else _NAN, on_grid, spread)
