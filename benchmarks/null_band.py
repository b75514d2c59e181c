"""How many models without signal lie within the limits of the simulated null.

    python -m benchmarks.null_band [--quick] [--case TEXT] [--models NAME ...] [--protocol NAME] [--json FILE]

Models learn from features without any relation to the outcomes, in five folds; the statistic is the mean of C over
folds and repeats. Linear models (Cox ridge, and the first step of a Cox gradient) learn from new features each time, on
a few cohorts and their folds. With `--models`, models of this program are trained on made-up shards, each time on other
permuted outcomes, which takes seconds a training.

`ours` is the share by the nulls of a report. `theirs` is the share by a null whose folds are independent of each other,
as those of random numbers, and in the rows that say so, by one of twice its variance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

import cfusion
from benchmarks.coverage import FOLDS, Cohorts, cox_ridge, folds_of
from benchmarks.planted import PlantedSlides
from benchmarks.table import Row, options, present
from cfusion.cohort.audited import audited
from cfusion.config import Config, load_config
from cfusion.report.evidence import CohortNull, cohort_null
from cfusion.survival.metrics import concordance
from cfusion.survival.null import EpochChoice, Outcomes, comparable_pairs
from cfusion.types import SlideFeatures
from preprocess.packing import pack_store

COHORTS = 8
"""Cohorts of a linear case: outcomes and folds are drawn for each."""

BATCH = 250
LIMIT = float(norm.ppf(0.975))
LEVEL = 0.05

NETWORK_PATIENTS = 100
PERMUTATIONS = 200
NETWORK: dict[str, object] = {
    "model.embed_dim": 16, "model.num_heads": 2, "train.epochs": 20, "train.lr": 1e-2, "train.micro_batch": 16,
    "parallel.global_batch": 16, "data.encoder": "made-up",
}  # fmt: skip

Learner = Callable[[Cohorts, np.ndarray], np.ndarray]
"""From features and outcomes and the training patients [cohort, patient] to coefficients [cohort, feature]."""


def ridge(cohorts: Cohorts, training: np.ndarray) -> np.ndarray:
    """Fit a Cox model with a ridge penalty."""
    return cox_ridge(cohorts, training, slice(None))


def first_step(cohorts: Cohorts, training: np.ndarray) -> np.ndarray:
    """Return the gradient that a Cox model starts with; patients are in order of decreasing time."""
    at_risk = np.maximum(np.cumsum(training, axis=1), 1)
    event = cohorts.event & training
    hazard = np.cumsum((event / at_risk)[:, ::-1], axis=1)[:, ::-1]
    return np.einsum("cpf,cp->cf", cohorts.features, (event - hazard) * training)


LEARNERS: dict[str, tuple[Learner, int]] = {
    "Cox ridge, 2 features": (ridge, 2),
    "Cox ridge, 10 features": (ridge, 10),
    "first step, 20 features": (first_step, 20),
    "first step, 100 features": (first_step, 100),
}


@dataclass(frozen=True)
class Found:
    """Scores of models without signal, and two nulls for each.

    Attributes:
        scores: Mean C over folds and repeats.
        ours: The nulls of each.
        independent: Standard deviation of each if the folds were independent.
    """

    scores: np.ndarray
    ours: Sequence[CohortNull]
    independent: np.ndarray

    def rows(self, case: str) -> list[Row]:
        """Return the shares within the limits and below the level."""
        pairs = list(zip(self.scores, self.ours, strict=True))
        within = np.mean([null.unchanged.low <= c <= null.independent.high for c, null in pairs])
        below = np.mean([null.independent.p_above(c) <= LEVEL for c, null in pairs])
        centre = np.array([null.independent.mean for null in self.ours])
        z = (self.scores - centre) / self.independent
        case = f"{case} (variance {np.mean(z**2):.2f} of independent folds')"
        return [
            Row(f"{case}: within the 95% limits", float(within), float(np.mean(np.abs(z) <= LIMIT)), "share"),
            Row(
                f"{case}: the same, twice the variance", float(within), float(np.mean(np.abs(z) <= LIMIT * 2**0.5)),
                "share",
            ),
            Row(f"{case}: p ≤ .05", float(below), float(np.mean(norm.sf(z) <= LEVEL)), "share", "lower"),
        ]  # fmt: skip


def independent_sd(folds: Sequence[Outcomes], choice: EpochChoice | None = None) -> float:
    """Return the standard deviation of the mean of C over folds whose risks are independent."""
    single = [cohort_null([fold], choice).independent.sd for fold in folds]
    return float(np.sqrt(np.square(single).sum()) / len(folds))


def mean_c(risk: np.ndarray, time: np.ndarray, event: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Return the mean over folds of C, [draw]; risk [draw, patient]."""
    found = []
    for number in range(FOLDS):
        rows = np.flatnonzero(fold == number)
        first, second = comparable_pairs(time[rows], event[rows])
        found.append((risk[:, rows[first]] > risk[:, rows[second]]).mean(axis=1))
    return np.mean(found, axis=0)


def linear(patients: int, learner: str, repeats: int, trainings: int) -> Found:
    """Train linear models on features without signal."""
    generator = np.random.default_rng([patients, repeats])
    fit, width = LEARNERS[learner]
    scores: list[np.ndarray] = []
    nulls: list[CohortNull] = []
    spread: list[float] = []
    while len(scores) < COHORTS:
        death, leaves = generator.exponential(size=patients), 1.5 * generator.exponential(size=patients)
        time, event = np.minimum(death, leaves), death <= leaves
        order = np.argsort(-time)
        time, event = time[order], event[order]
        folds = [folds_of(generator, event[None])[0] for _ in range(repeats)]
        outcomes: list[Outcomes] = [(time[folds[0] == number], event[folds[0] == number]) for number in range(FOLDS)]
        nulls += [cohort_null(outcomes, None)] * trainings
        spread += [independent_sd(outcomes)] * trainings
        drawn = Cohorts(
            generator.standard_normal((trainings, patients, width)),
            np.tile(time, (trainings, 1)), np.tile(event, (trainings, 1)),
        )  # fmt: skip
        scores.append(np.mean([mean_c(out_of_fold(drawn, fold, fit), time, event, fold) for fold in folds], axis=0))
    return Found(np.concatenate(scores), nulls, np.array(spread))


def out_of_fold(cohorts: Cohorts, fold: np.ndarray, fit: Learner) -> np.ndarray:
    """Return out-of-fold risks [cohort, patient] of cohorts with the same folds."""
    risk = np.empty(cohorts.time.shape)
    for number in range(FOLDS):
        training = np.broadcast_to(fold != number, risk.shape)
        coefficients = fit(cohorts, training)
        risk[:, fold == number] = np.einsum("cpf,cf->cp", cohorts.features[:, fold == number], coefficients)
    return risk


class SlidesWithoutSignal(PlantedSlides):
    """Made-up slides whose tiles share what is typical of their patient, which says nothing about the outcome."""

    def __init__(self, patients: int) -> None:
        super().__init__("coarse", np.full(patients, 0.5))

    def read(self, slide_id: str) -> SlideFeatures:
        """Draw a slide; the same at each call."""
        slide = super().read(slide_id)
        generator = np.random.default_rng([1, int(slide_id[-3:])])
        features = {name: values + generator.normal(size=values.shape[1]) for name, values in slide.features.items()}
        return dataclasses.replace(
            slide, features={name: values.astype(np.float16) for name, values in features.items()}
        )


def write_cohort(folder: Path, patients: int) -> None:
    """Write the shards and the table of outcomes."""
    generator = np.random.default_rng(3)
    death, leaves = generator.exponential(40, size=patients), generator.exponential(60, size=patients)
    rows = {
        "patient": [f"PT-{row:03d}" for row in range(patients)],
        "slide": [f"slide-{row:03d}" for row in range(patients)],
        "time": np.minimum(death, leaves).round(2) + 0.1, "event": (death <= leaves).astype(int),
    }  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "clinical.csv", index=False)
    if not (folder / "shards").exists():
        pack_store(SlidesWithoutSignal(patients), folder / "shards")


def trained(config: Config) -> tuple[float, list[Outcomes]]:
    """Cross-validate on permuted outcomes; return the mean of C over folds, and the outcomes of the folds."""
    found = audited(config, cfusion.read_cohort(config.cohort))
    scores: list[float] = []
    outcomes: list[Outcomes] = []
    for split in found.splits:
        rows = cfusion.fit(config, found.cohort, split).predictions
        time, event = rows["survival_months"].to_numpy(), rows["event"].to_numpy()
        outcomes.append((time, event))
        scores.append(concordance(time, event, rows["risk"]).cindex)
    return float(np.mean(scores)), outcomes


def networks(folder: Path, model: str, protocol: str, permutations: int) -> Found:
    """Train a model of this program on permuted outcomes."""
    scores, nulls, spread = [], [], []
    for seed in range(permutations):
        settings = {
            "cohort.name": "made-up", "cohort.table": str(folder / "clinical.csv"),
            "data.shards": str(folder / "shards"), "output": str(folder / "run"), "model.name": model,
            "evaluation.protocol": protocol, "evaluation.permute_outcomes": seed, **NETWORK,
        }  # fmt: skip
        config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        score, folds = trained(config)
        choice = EpochChoice.of(config.train) if protocol == "published" else None
        scores.append(score)
        nulls.append(cohort_null(folds, choice))
        spread.append(independent_sd(folds, choice))
    return Found(np.array(scores), nulls, np.array(spread))


def rows_of(arguments: argparse.Namespace) -> list[Row]:
    """Run the cases whose name holds a text, and the models that are named."""
    found = []
    for patients in (60, 150, 400):
        for learner in LEARNERS:
            for repeats in (1, 3):
                case = f"{patients} patients, {learner}, {repeats} repeat{'s' if repeats > 1 else ''}"
                if arguments.case in case:
                    found += linear(patients, learner, repeats, 10 if arguments.quick else BATCH).rows(case)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.models:
            write_cohort(Path(folder), NETWORK_PATIENTS)
        for model in arguments.models:
            case = f"{NETWORK_PATIENTS} patients, {model}, {arguments.protocol}, permuted outcomes"
            permutations = 2 if arguments.quick else arguments.permutations
            found += networks(Path(folder), model, arguments.protocol, permutations).rows(case)
    return found


def main() -> None:
    """Measure, print and, where asked for, write JSON."""
    parser = options(__doc__)
    parser.add_argument("--case", default="", help="only the linear cases whose name holds this")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="also train these on permuted outcomes")
    parser.add_argument(
        "--protocol", default="strict", choices=("strict", "fixed-epoch", "published"), help="of these models"
    )
    parser.add_argument("--permutations", type=int, default=200, help="trainings of each of these models")
    chosen = parser.parse_args()
    present("Models without signal and the simulated null", rows_of(chosen), chosen.json)


if __name__ == "__main__":
    main()
