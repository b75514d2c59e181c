"""Coverage of the intervals and type-I error of the paired test, over complete cross-validations of a Cox ridge model.

    python -m benchmarks.coverage [--quick] [--simulations N] [--case TEXT] [--json FILE]

Each simulation draws patients, cross-validates (5 folds, each trained again) and computes the interval of C within
folds as `cfusion score` does. `ours` is the share of intervals that cover the C of the retrained procedure: the mean
over simulations of the C that the fold models reach on new patients. `theirs` is the percentile bootstrap of the
trained models, which ignores the training. Type-I error: two feature sets that are equally good. Power: one model has
a feature more. The Monte-Carlo error of each share is printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.table import Row, options, present
from cfusion.survival.bootstrap import (
    Resamples,
    cross_validated_interval,
    cross_validated_p,
    percentile_interval,
)

FEATURES = 20
FOLDS = 5
RIDGE = 5.0
REPLICATES = 500
NEW_PATIENTS = 2000
TRUTH_FROM = 200
"""Simulations whose fold models are scored on new patients; their C varies little."""
BATCH = 50


@dataclass(frozen=True)
class Design:
    """A population and a cohort size.

    Attributes:
        patients: Patients of a cohort.
        censoring_months: Mean time to censoring, which decides the share of events.
        effects: [feature], log hazard per standard deviation.
    """

    patients: int
    censoring_months: float
    effects: tuple[float, ...]

    def draw(self, generator: np.random.Generator, cohorts: int, patients: int) -> Cohorts:
        """Draw cohorts."""
        features = generator.normal(size=(cohorts, patients, FEATURES))
        happens = generator.exponential(30 * np.exp(-features @ np.array(self.effects)))
        leaves = generator.exponential(self.censoring_months, (cohorts, patients))
        time, event = np.minimum(happens, leaves), happens <= leaves
        order = np.argsort(-time, axis=1)
        return Cohorts(
            np.take_along_axis(features, order[..., None], 1), np.take_along_axis(time, order, 1),
            np.take_along_axis(event, order, 1),
        )  # fmt: skip


@dataclass(frozen=True)
class Cohorts:
    """Several cohorts of one size, each by decreasing time.

    Attributes:
        features: [cohort, patient, feature].
        time: [cohort, patient], months.
        event: [cohort, patient].
    """

    features: np.ndarray
    time: np.ndarray
    event: np.ndarray


def cox_ridge(cohorts: Cohorts, training: np.ndarray, columns: slice) -> np.ndarray:
    """Fit a Cox model to the training patients of every cohort by Newton's method; coefficients [cohort, feature]."""
    x = cohorts.features[..., columns]
    event = (cohorts.event & training).astype(float)
    width = x.shape[2]
    beta = np.zeros((len(x), width))
    for _ in range(8):
        weight = np.exp(np.clip(np.einsum("cpf,cf->cp", x, beta), -20, 20)) * training
        total = np.maximum(np.cumsum(weight, axis=1), 1e-300)
        mean = np.cumsum(weight[..., None] * x, axis=1) / total[..., None]
        hazard = np.cumsum((event / total)[:, ::-1], axis=1)[:, ::-1]
        gradient = np.einsum("cp,cpf->cf", event, x - mean) - RIDGE * beta
        curvature = np.einsum("cpf,cpg->cfg", x * (weight * hazard)[..., None], x)
        curvature += RIDGE * np.eye(width) - np.einsum("cpf,cpg->cfg", mean * event[..., None], mean)
        beta = beta + np.linalg.solve(curvature, gradient[..., None])[..., 0]
    return beta


def folds_of(generator: np.random.Generator, event: np.ndarray) -> np.ndarray:
    """Draw folds stratified by event, [cohort, patient]."""
    order = np.lexsort((generator.random(event.shape), event), axis=1)
    fold = np.empty(event.shape, dtype=int)
    np.put_along_axis(fold, order, np.broadcast_to(np.arange(event.shape[1]) % FOLDS, event.shape), 1)
    return fold


def out_of_fold(cohorts: Cohorts, fold: np.ndarray, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return out-of-fold risks [cohort, patient] and the fold models [fold, cohort, feature]."""
    risk, models = np.empty(fold.shape), []
    for number in range(FOLDS):
        beta = cox_ridge(cohorts, fold != number, columns)
        scored = np.einsum("cpf,cf->cp", cohorts.features[..., columns], beta)
        risk[fold == number] = scored[fold == number]
        models.append(beta)
    return risk, np.array(models)


@dataclass(frozen=True)
class CrossValidation:
    """One simulated cross-validation.

    Attributes:
        draws: Resampled patients.
        once: The patients as they are.
        fold: [patient].
        risks: For each procedure, [patient].
        truths: For each procedure, C of its fold models on new patients; NaN where not computed.
    """

    draws: Resamples
    once: Resamples
    fold: np.ndarray
    risks: tuple[np.ndarray, ...]
    truths: tuple[float, ...]

    def cindex(self, number: int) -> tuple[float, np.ndarray]:
        """Return C within folds of a procedure, and of every replicate."""
        risk = self.risks[number]
        return float(self.once.cindex(risk, within=self.fold)[0]), self.draws.cindex(risk, within=self.fold)


def cross_validations(design: Design, columns: tuple[slice, ...], simulations: int) -> Iterator[CrossValidation]:
    """Simulate cross-validations of several procedures on the same patients and folds."""
    generator = np.random.default_rng(7)
    new = design.draw(np.random.default_rng(99), 1, NEW_PATIENTS)
    once_new = Resamples(new.time[0], new.event[0], np.ones((1, NEW_PATIENTS), dtype=np.float32))
    counts = np.ones((1, design.patients), dtype=np.float32)
    for start in range(0, simulations, BATCH):
        cohorts = design.draw(generator, BATCH, design.patients)
        fold = folds_of(generator, cohorts.event)
        fitted = [out_of_fold(cohorts, fold, chosen) for chosen in columns]
        for i in range(BATCH):
            time, event = cohorts.time[i], cohorts.event[i]
            truths = tuple(
                float(np.mean([once_new.cindex(new.features[0][:, chosen] @ beta[i])[0] for beta in models[:2]]))
                if start < TRUTH_FROM
                else float("nan")
                for chosen, (_, models) in zip(columns, fitted, strict=True)
            )
            seed = int(generator.integers(1 << 31))
            draws = Resamples.draw(time, event, replicates=REPLICATES, seed=seed)
            yield CrossValidation(
                draws, Resamples(time, event, counts), fold[i], tuple(risk[i] for risk, _ in fitted), truths
            )


def coverage_row(case: str, design: Design, simulations: int) -> Row:
    """Simulate the coverage of the interval of C within folds."""
    ours, theirs, truths = [], [], []
    for found in cross_validations(design, (slice(None),), simulations):
        value, spread = found.cindex(0)
        ours.append(cross_validated_interval(value, spread, folds=FOLDS))
        theirs.append(percentile_interval(spread))
        truths += [truth for truth in found.truths if not np.isnan(truth)]
    truth = float(np.mean(truths))
    share, other_share = (float(np.mean([low <= truth <= high for low, high in limits])) for limits in (ours, theirs))
    return Row(f"coverage, {case} (C {truth:.3f}; ± {_error(share, simulations):.3f})", share, other_share, "share")


def rejection_row(case: str, design: Design, columns: tuple[slice, slice], simulations: int) -> Row:
    """Simulate how often the paired test rejects at .05, and the spread of the difference."""
    rejected, plain, differences, truths = [], [], [], []
    for found in cross_validations(design, columns, simulations):
        (one, one_spread), (other, other_spread) = found.cindex(0), found.cindex(1)
        spread = one_spread - other_spread
        rejected.append(cross_validated_p(one - other, spread, folds=FOLDS) < 0.05)
        plain.append(cross_validated_p(one - other, spread, folds=1) < 0.05)
        differences.append(one - other)
        truths.append(found.truths[0] - found.truths[1])
    share, other_share = float(np.mean(rejected)), float(np.mean(plain))
    words = f"true difference {np.nanmean(truths):+.3f}, sd {np.std(differences):.3f}"
    return Row(f"{case} ({words}; ± {_error(share, simulations):.3f})", share, other_share, "share", "lower")


def _error(share: float, simulations: int) -> float:
    return float(np.sqrt(share * (1 - share) / simulations))


def effects(*pairs: tuple[int, float]) -> tuple[float, ...]:
    """Return the effects of all features, 0 for those that are not named."""
    values = np.zeros(FEATURES)
    for feature, value in pairs:
        values[feature] = value
    return tuple(values.tolist())


def rows(simulations: int, wanted: str) -> list[Row]:
    """Run the cases whose name holds a word."""
    five = effects(*((i, 0.35) for i in range(5)))
    strong, none = effects(*((i, 0.875) for i in range(5))), effects()
    halves = effects(*((i, 0.3) for i in (0, 1, 2, 10, 11, 12)))
    nested = effects(*((i, 0.35) for i in (0, 1, 2, 3, 10)))
    covered = {
        "120 patients, 42 events": Design(120, 15, five), "80 patients, 19 events": Design(80, 8, five),
        "240 patients, 135 events": Design(240, 40, five), "120 patients, 65 events, strong": Design(120, 40, strong),
        "240 patients, 136 events, no signal": Design(240, 40, none),
    }  # fmt: skip
    rivals, more = (slice(0, 10), slice(10, 20)), (slice(0, 11), slice(0, 10))
    tested = {
        "type-I error, 200 patients, 110 events": (Design(200, 40, halves), rivals),
        "type-I error, 100 patients, 25 events": (Design(100, 10, halves), rivals),
        "power, 120 patients, 66 events": (Design(120, 40, nested), more),
        "power, 480 patients, 265 events": (Design(480, 40, nested), more),
        "power, 480 patients, 110 events": (Design(480, 10, nested), more),
        "power, 960 patients, 530 events": (Design(960, 40, nested), more),
    }  # fmt: skip
    found = [
        coverage_row(name, design, simulations) for name, design in covered.items() if wanted in f"coverage, {name}"
    ]
    for name, (design, columns) in tested.items():
        if wanted in name:
            found.append(rejection_row(name, design, columns, max(simulations // (4 if "power" in name else 1), BATCH)))
    return found


def main() -> None:
    """Measure, print and, where asked for, write JSON."""
    parser = options(__doc__)
    parser.add_argument("--simulations", type=int, default=2000, help="cross-validations a case; a multiple of 50")
    parser.add_argument("--case", default="", help="only the cases whose name holds this")
    chosen = parser.parse_args()
    simulations = BATCH if chosen.quick else chosen.simulations // BATCH * BATCH
    present("Coverage", rows(simulations, chosen.case), chosen.json)


if __name__ == "__main__":
    main()
