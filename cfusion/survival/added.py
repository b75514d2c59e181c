"""What a risk adds to the clinical covariates: Cox models with and without it, on the folds of the predictions.

Both models are fitted again for every fold, on the patients of the other folds, whose risks are out of fold too. The
model "both" has the covariates and the risk, standardised within each fold because each fold has another network. A
risk of the other folds may come from a network that was trained on the scored fold; one coefficient depends on it. All
scores are averaged over seeds and repeats on one draw of patients, as those of the risk itself are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cfusion.errors import UndefinedMetricError
from cfusion.survival.bootstrap import Resamples, cross_validated_interval, cross_validated_p
from cfusion.survival.decision import DecisionCurve, decision_curve, mean_decision_curve
from cfusion.survival.metrics import Training, brier_times, concordance, integrated_brier
from cfusion.survival.regression import AdjustedRatio, adjusted_ratio, cox_log_likelihood, mean_ratio, predicted_by_cox
from cfusion.survival.spreads import brier_replicates

Spread = tuple[float, np.ndarray | None]
"""A score, and its bootstrap replicates, [replicate], if there are any."""

_NAN = float("nan")
_CONSTANT = 1e-6
"""Standard deviation, relative to the risks' size, below which 32-bit risks are all the same."""

COX_FOLDS = 5
"""Folds of the Cox models where the patients have none, as in an external cohort."""

EVENTS_PER_COVARIATE = 5
"""Fewest events per covariate for which such Cox models are fitted: with 2 to 4 they often go wrong, with 5 to 9 rarely
(Vittinghoff and McCulloch, Am J Epidemiol 165:710, 2007)."""


@dataclass(frozen=True)
class Estimate:
    """A score with its 95% interval.

    Attributes:
        value: The score.
        low: Lower limit; NaN without a bootstrap.
        high: Upper limit.
    """

    value: float = _NAN
    low: float = _NAN
    high: float = _NAN


@dataclass(frozen=True)
class AddedValue:
    """What a risk adds to the clinical covariates, mean over seeds and repeats.

    Attributes:
        covariates: The columns of the clinical model.
        runs: Number of seeds times repeats.
        clinical: C within folds of the clinical model.
        clinical_mean: Mean over the folds of its C.
        both: C within folds of the covariates and the risk together.
        difference: `both` minus `clinical`, on the same resampled patients.
        p: P-value of the difference.
        against: C of the risk by itself minus that of the clinical model.
        ratio: Hazard ratio of the risk per standard deviation, adjusted; None for a constant risk.
        unadjusted: The same without the covariates.
        brier: Integrated Brier score of the clinical model.
        brier_difference: That of both minus that of the clinical model; below 0 is better.
        curve: Decision curve of both models; None if no horizon has followed patients and events.
    """

    covariates: tuple[str, ...]
    runs: int
    clinical: Estimate
    clinical_mean: float
    both: Estimate
    difference: Estimate
    p: float
    against: Estimate
    ratio: AdjustedRatio | None
    unadjusted: AdjustedRatio | None
    brier: float
    brier_difference: Estimate
    curve: DecisionCurve | None

    def columns(self) -> dict[str, object]:
        """Return the scalar scores as columns of the summary."""
        found: dict[str, object] = {"clinical_covariates": ", ".join(self.covariates)}
        named = {
            "clinical_c": self.clinical, "both_c": self.both, "added_c": self.difference,
            "risk_less_clinical_c": self.against, "added_brier": self.brier_difference,
        }  # fmt: skip
        for name, estimate in named.items():
            found |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        found |= {"clinical_c_mean": self.clinical_mean, "added_c_p": self.p, "clinical_brier": self.brier}
        for name, ratio in (("hr_sd_unadjusted", self.unadjusted), ("hr_sd_adjusted", self.ratio)):
            found |= {
                name: ratio.ratio if ratio else _NAN, f"{name}_low": ratio.low if ratio else _NAN,
                f"{name}_high": ratio.high if ratio else _NAN, f"{name}_p": ratio.wald_p if ratio else _NAN,
            }  # fmt: skip
        found |= {
            "added_runs": self.runs, "added_lr": self.ratio.chi2 if self.ratio else _NAN,
            "added_lr_p": self.ratio.p if self.ratio else _NAN,
        }  # fmt: skip
        return found


@dataclass(frozen=True, eq=False)
class AddedInRun:
    """What the risk of one seed and repeat adds: the parts of `AddedValue` with their bootstrap replicates."""

    covariates: tuple[str, ...]
    clinical: Spread
    clinical_mean: float
    both: Spread
    risk: Spread
    ratio: AdjustedRatio | None
    unadjusted: AdjustedRatio | None
    brier: float
    brier_change: Spread
    curve: DecisionCurve | None


def mean_added(runs: Sequence[AddedInRun]) -> AddedValue:
    """Average over seeds and repeats; intervals are those of the replicates' mean, so that repeats narrow none."""
    clinical, both, risk, change = (
        _mean_spread([getattr(run, name) for run in runs]) for name in ("clinical", "both", "risk", "brier_change")
    )
    difference, p = _difference(both, clinical)
    return AddedValue(
        covariates=runs[0].covariates, runs=len(runs), clinical=_estimate(clinical),
        clinical_mean=float(np.mean([run.clinical_mean for run in runs])), both=_estimate(both),
        difference=difference, p=p, against=_difference(risk, clinical)[0],
        ratio=mean_ratio([run.ratio for run in runs]), unadjusted=mean_ratio([run.unadjusted for run in runs]),
        brier=float(np.mean([run.brier for run in runs])),
        brier_difference=Estimate(change[0], *cross_validated_interval(*change, bounded=False)),
        curve=mean_decision_curve([run.curve for run in runs]),
    )  # fmt: skip


def _mean_spread(scores: Sequence[Spread]) -> Spread:
    replicates = [spread for _, spread in scores if spread is not None]
    mean = np.mean(replicates, axis=0) if len(replicates) == len(scores) else None
    return float(np.mean([value for value, _ in scores])), mean


def standardised(risk: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Return risks with mean 0 and standard deviation 1 in each fold; 0 in a fold where all risks are the same."""
    result = np.zeros(len(risk))
    for number in np.unique(fold):
        rows = fold == number
        if not is_constant(risk[rows]):
            result[rows] = (risk[rows] - risk[rows].mean()) / risk[rows].std(ddof=1)
    return result


def is_constant(risk: np.ndarray) -> bool:
    """Return whether risks differ by no more than 32-bit numbers round."""
    return len(risk) < 2 or bool(risk.std(ddof=1) <= _CONSTANT * float(np.abs(risk).max()))


@dataclass(frozen=True, eq=False)
class ClinicalModel:
    """The clinical model on the folds of a run, to be compared with several risks.

    Attributes:
        values: [case, column], the covariates, NaN where missing.
        patients: Outcomes, folds and draws, in the same order.
        network: [case], number of the network whose risk a patient has: the fold, or 0 in an external cohort.
        risk: [case], log hazard, out of fold.
        survival: [case, time], out of fold.
        months: [time].
        log_likelihood: Of the Cox model of all patients with the covariates only.
    """

    values: pd.DataFrame
    patients: FoldedPatients
    network: np.ndarray
    risk: np.ndarray
    survival: np.ndarray
    months: np.ndarray
    log_likelihood: float

    @classmethod
    def fit(
        cls, run: pd.DataFrame, covariates: pd.DataFrame, draws: Resamples | None, horizons: Sequence[float]
    ) -> ClinicalModel | None:
        """Fit the clinical model on the folds of a run.

        Patients of one fold have one network, as in an external cohort: the Cox models get folds drawn among them.

        Args:
            run: Checked predictions of one cohort, model, protocol, seed and repeat.
            covariates: [case, column], indexed by `case_id`, NaN where missing.
            draws: Bootstrap draws of these patients, in the order of `run`, or None for no interval.
            horizons: Months, one of which the decision curve takes.

        Returns:
            None if no covariate is known for these patients.

        Raises:
            UndefinedMetricError: The events are too few for drawn folds, or no Cox model can be fitted.
        """
        values = covariates.reindex(run["case_id"])
        values = values.loc[:, values.nunique() > 1]
        time, event, network = (run[name].to_numpy() for name in ("survival_months", "event", "fold"))
        one_network = len(np.unique(network)) < 2
        if values.columns.empty:
            return None
        needed = max(2 * COX_FOLDS, EVENTS_PER_COVARIATE * len(values.columns))
        if one_network and event.sum() < needed:
            raise UndefinedMetricError(
                f"{event.sum()} events are too few for Cox models of {', '.join(values.columns)} in drawn folds; "
                f"{needed} are needed."
            )
        fold = _drawn_folds(time, event) if one_network else network
        patients = FoldedPatients(time, event, fold, draws)
        months = np.unique([*np.linspace(np.quantile(time[event], 0.05), np.quantile(time[event], 0.9), 12), *horizons])
        risk, survival = _out_of_fold(values, patients, months)
        log_likelihood = cox_log_likelihood(values, time, event, network)
        return cls(values, patients, network, risk, survival, months, log_likelihood)

    def with_risk(self, risk: np.ndarray, horizons: Sequence[float]) -> AddedInRun:
        """Compute what a risk [case] adds.

        Raises:
            UndefinedMetricError: No Cox model can be fitted with it.
        """
        time, event, network = self.patients.time, self.patients.event, self.network
        z = standardised(risk, network)
        both, survival = _out_of_fold(self.values.assign(image_risk=z), self.patients, self.months)
        of_clinical, of_both, of_risk = (self.patients.cindex(values) for values in (self.risk, both, risk))
        brier, brier_change = _brier(self.patients, self.survival, survival, self.months)
        probabilities = {"covariates": self.survival, "covariates and risk": survival}
        return AddedInRun(
            covariates=tuple(str(name) for name in self.values.columns),
            clinical=of_clinical, clinical_mean=self.patients.mean(self.risk), both=of_both, risk=of_risk,
            ratio=_ratio(z, self.values, time, event, network, self.log_likelihood),
            unadjusted=_ratio(z, self.values[[]], time, event, network), brier=brier, brier_change=brier_change,
            curve=decision_curve(time, event, probabilities, self.months, horizons),
        )  # fmt: skip


def _drawn_folds(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Return folds [case] with equal shares of events and similar times."""
    fold = np.empty(len(time), dtype=int)
    fold[np.lexsort((time, event))] = np.arange(len(time)) % COX_FOLDS
    return fold


def _ratio(
    z: np.ndarray, others: pd.DataFrame, time: np.ndarray, event: np.ndarray, fold: np.ndarray,
    log_likelihood: float | None = None,
) -> AdjustedRatio | None:  # fmt: skip
    try:
        return adjusted_ratio(z, others, time, event, fold, log_likelihood)
    except UndefinedMetricError:
        return None


@dataclass(frozen=True, eq=False)
class FoldedPatients:
    """Outcomes, folds and bootstrap draws of the patients of a run.

    Attributes:
        time: [case], months.
        event: [case], true where the event happened.
        fold: [case].
        draws: Draws of these patients; None: no intervals.
    """

    time: np.ndarray
    event: np.ndarray
    fold: np.ndarray
    draws: Resamples | None
    _known: dict[bytes, Spread] = field(default_factory=dict, init=False, repr=False)

    def cindex(self, risk: np.ndarray) -> Spread:
        """Return C within folds, and that of every replicate; the clinical risk's is computed once."""
        key = risk.tobytes()
        if key not in self._known:
            once = Resamples(self.time, self.event, np.ones((1, len(self.time)), dtype=np.float32))
            spread = None if self.draws is None else self.draws.cindex(risk, within=self.fold)
            self._known[key] = float(once.cindex(risk, within=self.fold)[0]), spread
        return self._known[key]

    def mean(self, risk: np.ndarray) -> float:
        """Return the mean over the folds of C."""
        folds = [self.fold == number for number in np.unique(self.fold)]
        return float(np.mean([concordance(self.time[f], self.event[f], risk[f]).cindex for f in folds]))


def _estimate(score: Spread) -> Estimate:
    return Estimate(score[0], *cross_validated_interval(*score))


def _difference(one: Spread, other: Spread) -> tuple[Estimate, float]:
    """Return one score minus the other on the same draws, and the p-value of the difference."""
    spread = None if one[1] is None or other[1] is None else one[1] - other[1]
    difference = one[0] - other[0]
    limits = cross_validated_interval(difference, spread, bounded=False)
    return Estimate(difference, *limits), cross_validated_p(difference, spread)


def _out_of_fold(values: pd.DataFrame, patients: FoldedPatients, months: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log hazard [case] and survival [case, time], each patient from the model of the other folds' patients."""
    time, event, fold = patients.time, patients.event, patients.fold
    risk, survival = np.zeros(len(time)), np.ones((len(time), len(months)))
    for number in np.unique(fold):
        rows = fold == number
        predicted = predicted_by_cox(values, time, event, ~rows, months)
        risk[rows], survival[rows] = predicted.risk, predicted.survival
    return risk, survival


def _at(survival: np.ndarray, months: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return survival [case, time] at other times, linear in between and 1 at time 0."""
    steps, start = np.concatenate([[0.0], months]), np.ones((len(survival), 1))
    return np.array([np.interp(times, steps, curve) for curve in np.hstack([start, survival])])


def _brier(
    patients: FoldedPatients, clinical: np.ndarray, both: np.ndarray, months: np.ndarray
) -> tuple[float, Spread]:
    """Return the integrated Brier score of the clinical model and the change by the risk, mean over the folds."""
    time, event, values, changes, spreads = patients.time, patients.event, [], [], []
    for number in np.unique(patients.fold):
        rows = patients.fold == number
        training = Training(time[~rows], event[~rows])
        times = brier_times(training, time[rows], float(months[-1]))
        if len(times) < 2:
            continue
        predicted = [_at(survival[rows], months, times) for survival in (clinical, both)]
        scores = [integrated_brier(training, time[rows], event[rows], survival, times) for survival in predicted]
        values.append(scores[0])
        changes.append(scores[1] - scores[0])
        if patients.draws is not None:
            counts = patients.draws.counts[:, rows]
            first, second = (
                brier_replicates(training, time[rows], event[rows], survival, counts, times) for survival in predicted
            )
            spreads.append(second - first)
    if not values:
        return _NAN, (_NAN, None)
    return float(np.mean(values)), (float(np.mean(changes)), np.mean(spreads, axis=0) if spreads else None)
