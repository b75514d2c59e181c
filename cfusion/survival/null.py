"""Scores of a model without signal under a given protocol: the baseline for every C-index.

Reports, `cfusion null` and explanations take chance from here. The scores are simulated in seconds;
`evaluation.permute_outcomes` is the null of the complete training, and the better one.

Choosing the epoch on the reported fold turns noise into a C-index above 0.5. The bias depends on the fold's size, on
its events and on how fast the scores change between epochs.

The folds of a cross-validation are not independent: fold j trains the model that scores fold k, and the other way
round. If features and outcomes are related by chance alike in j and k, both models gain. So the mean over folds spreads
more for models that have learnt noise than for random numbers, by up to twice the variance. The simulated risks are
therefore those of models that have learnt noise: linear ones of random features, trained on the other folds.
`python -m benchmarks.null_band` measures how many models without signal lie within the limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from cfusion.config import TrainConfig
from cfusion.errors import ConfigError, DataError, UndefinedMetricError
from cfusion.recipe import PUBLISHED_RECIPE
from cfusion.types import Cohort, Split

Outcomes = tuple[np.ndarray, ...]
"""Times in months [row] and events [row] of one fold's scored rows; of several cohorts, also the cohort's number."""

SCORED_FOLD_CHOOSES = ("published", "unknown")
"""Protocols whose null assumes that the epoch was chosen on the scored fold; unknown takes the worst case."""

REPETITIONS = {False: 2000, True: 40}
"""Simulated cross-validations; fewer where the epoch is chosen on the scored fold: each draws risks for all epochs."""

_FEATURES = 20
"""Number of random features. The spread hardly depends on it."""

_COMPARISONS_PER_CHUNK = 1 << 24
_LEVEL = 0.975


@dataclass(frozen=True)
class EpochChoice:
    """Which epochs of a training run may be chosen.

    Attributes:
        epochs: Maximum number of epochs.
        min_epoch: First epoch, from 0, that may be chosen.
        patience: Epochs without a better score before training stops; None: it never stops early.
    """

    epochs: int = PUBLISHED_RECIPE["epochs"]
    min_epoch: int = PUBLISHED_RECIPE["min_epoch"]
    patience: int | None = PUBLISHED_RECIPE["patience"]

    @classmethod
    def of(cls, train: TrainConfig) -> EpochChoice:
        """Return the choice that a run with these settings makes."""
        return cls(train.epochs, train.min_epoch, train.patience)

    def __str__(self) -> str:
        """Return it in words, for captions."""
        patience = "no early stop" if self.patience is None else f"patience {self.patience}"
        epochs = "1 epoch" if self.epochs == 1 else f"at most {self.epochs} epochs"
        return f"{epochs}, {patience}, from epoch {self.min_epoch} on"


@dataclass(frozen=True)
class Null:
    """Distribution, over many repetitions, of the mean C-index over the folds for risks without signal.

    Attributes:
        mean: Its mean; 0.5 if nothing is chosen on the scored fold.
        sd: Its standard deviation over repetitions.
        low: 2.5% quantile.
        high: 97.5% quantile: models without signal stay below it 39 times out of 40.
        high_error: Standard error of that limit, because the number of repetitions is finite.
        repetitions: Number of repetitions.
    """

    mean: float
    sd: float
    low: float
    high: float
    high_error: float
    repetitions: int

    def p_above(self, cindex: float) -> float:
        """Return the one-sided p-value that a model without signal reaches a mean C-index over the folds."""
        return float(norm.sf((cindex - self.mean) / self.sd))


def simulate_null(
    folds: Sequence[Outcomes],
    *,
    chosen_on_scored_fold: bool,
    autocorrelation: float = 0.0,
    choice: EpochChoice = EpochChoice(),
    repetitions: int | None = None,
    seed: int = 7,
) -> Null:
    """Score the risks of models that have learnt noise as a protocol would.

    The model of each fold has learnt from the other folds; that of a single fold, from other patients. If the epoch is
    chosen on the scored fold (`published`), each epoch's risks are new, or an AR(1) series over the epochs. The best
    epoch that `choice` allows is kept. Otherwise (`strict`, `fixed-epoch`) the choice does not depend on the scored
    rows, so a single draw is scored. The order of a fold's rows makes no difference.

    Args:
        folds: Outcomes of the scored rows of each fold.
        chosen_on_scored_fold: Whether the epoch is chosen on the rows that are scored.
        autocorrelation: Correlation of a row's risk between epochs, 0 ≤ r < 1.
        choice: Which epochs may be chosen; by default those of the published recipe.
        repetitions: Number of simulated cross-validations; None: `REPETITIONS`.
        seed: Seed of the draws.

    Raises:
        UndefinedMetricError: A fold has no comparable pair.
        DataError: There are no folds.
        ConfigError: No epoch may be chosen.
    """
    if not folds:
        raise DataError("the null needs at least one fold.")
    if chosen_on_scored_fold and choice.min_epoch >= choice.epochs:
        raise ConfigError(
            f"No epoch may be chosen: train.min_epoch={choice.min_epoch}, and train.epochs={choice.epochs} ends "
            "training before it.",
            "Raise train.epochs or lower train.min_epoch.",
        )
    repetitions = repetitions or REPETITIONS[chosen_on_scored_fold]
    length = choice.epochs if chosen_on_scored_fold else 1
    compared = [comparable_pairs(*_ordered(fold)) for fold in folds]
    for number, (first, _) in enumerate(compared):
        if not len(first):
            raise UndefinedMetricError(f"null: fold {number} has no comparable pair.")
    toward = [_toward_events(pairs, len(fold[0])) for pairs, fold in zip(compared, folds, strict=True)]
    agreement = _agreement(toward, (repetitions, length), autocorrelation, seed) if len(folds) > 1 else None
    generator = np.random.default_rng(seed)
    means = np.zeros(repetitions)
    for number, pairs in enumerate(compared):
        risks = _series(generator, repetitions, length, len(toward[number]), autocorrelation)
        if agreement is not None:
            unit = toward[number] / np.linalg.norm(toward[number])
            risks += (agreement[number] - risks @ unit)[..., None] * unit
        scores = _cindex(risks.reshape(-1, risks.shape[-1]), pairs).reshape(repetitions, length)
        if chosen_on_scored_fold:
            means += [_kept(row, choice.min_epoch, choice.patience) for row in scores]
        else:
            means += scores[:, 0]
    means /= len(folds)
    low, high = np.quantile(means, [1 - _LEVEL, _LEVEL])
    sd = float(means.std())
    # Standard error of the 97.5% quantile of a normal sample: sqrt(p (1 - p) / n) over the density at the quantile.
    error = sd * math.sqrt(_LEVEL * (1 - _LEVEL) / repetitions) / float(norm.pdf(norm.ppf(_LEVEL)))
    return Null(float(means.mean()), sd, float(low), float(high), error, repetitions)


def scored_outcomes(cohort: Cohort, splits: Sequence[Split], unit: str = "case") -> list[Outcomes]:
    """Return the outcomes of each fold's test side, one row per patient (`case`) or per slide (`slide`).

    Only the first repeat counts: the others score the same patients again, so that the mean over all folds would seem
    more certain than it is. Patients are left out if they are not in the clinical table, or if their time or event is
    missing or negative.
    """
    repeat = min((split.repeat for split in splits), default=0)
    known = cohort.cases[(cohort.cases["time_months"] >= 0) & cohort.cases["event"].notna()]
    folds: list[Outcomes] = []
    for split in splits:
        if split.repeat != repeat:
            continue
        rows = [case for case in split.test if case in known.index]
        if unit == "slide":
            rows = cohort.slides.loc[cohort.slides["case_id"].isin(rows), "case_id"].tolist()
        cases = known.loc[rows]
        outcomes = cases["time_months"].to_numpy(float), cases["event"].to_numpy(bool)
        numbers = np.unique(cohort.strata_of(rows).astype(str), return_inverse=True)[1]
        folds.append(outcomes if cohort.strata is None else (*outcomes, numbers))
    return folds


def _series(generator: np.random.Generator, repetitions: int, epochs: int, rows: int, memory: float) -> np.ndarray:
    """Draw [repetition, epoch, row] standard normal values, AR(1) over the epochs."""
    risks = generator.standard_normal((repetitions, epochs, rows), dtype=np.float32)
    for epoch in range(1, epochs if memory else 1):
        risks[:, epoch] = memory * risks[:, epoch - 1] + np.sqrt(1 - memory**2) * risks[:, epoch]
    return risks


def _ordered(fold: Outcomes) -> Outcomes:
    """Return the rows of a fold by time, then by event and cohort."""
    order = np.lexsort(fold[::-1])
    return tuple(values[order] for values in fold)


def _toward_events(pairs: tuple[np.ndarray, np.ndarray], rows: int) -> np.ndarray:
    """Return, for each row, in how many pairs its risk should be the higher one, minus in how many the lower."""
    first, second = (np.bincount(side, minlength=rows) for side in pairs)
    return (first - second).astype(np.float32)


def _agreement(toward: Sequence[np.ndarray], shape: tuple[int, int], memory: float, seed: int) -> np.ndarray:
    """Draw the component of each fold's risks along `toward`, [fold, repetition, epoch].

    Let X be the random features of fold k and t its row of `toward`. The fold teaches the coefficients X't, and the
    model that scores it has the sum of those of the other folds, w. Its risks Xw, scaled to unit variance, depend on
    the other folds only through their component along t, which is (X't)'w / (|t| |w|); all others are independent
    standard normal values. So X't is all that has to be drawn.
    """
    generator = np.random.default_rng([seed, 1])
    # A risk is the product of two series, so each has the square root of the correlation that the risk shall have.
    taught = np.stack([_series(generator, *shape, _FEATURES, math.sqrt(memory)) for _ in toward])
    taught *= np.array([np.linalg.norm(one) for one in toward], dtype=np.float32)[:, None, None, None]
    learnt = taught.sum(axis=0) - taught
    along = np.einsum("fres,fres->fre", taught, learnt) / np.linalg.norm(learnt, axis=-1)
    return along / np.array([np.linalg.norm(one) for one in toward], dtype=np.float32)[:, None, None]


def comparable_pairs(
    time: np.ndarray, event: np.ndarray, stratum: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of each pair whose first patient is known to have had the event earlier."""
    comparable = event[:, None] & ((time[:, None] < time) | ((time[:, None] == time) & ~event))
    if stratum is not None:
        comparable &= stratum[:, None] == stratum
    first, second = np.nonzero(comparable)
    return first, second


def _cindex(risks: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Compute Harrell's C of each draw, [draw]; normal draws have no ties."""
    chunk = max(1, _COMPARISONS_PER_CHUNK // len(pairs[0]))
    parts = [risks[i : i + chunk] for i in range(0, len(risks), chunk)]
    return np.concatenate([(part[:, pairs[0]] > part[:, pairs[1]]).mean(axis=1) for part in parts])


def _kept(scores: np.ndarray, min_epoch: int, patience: int | None) -> float:
    best = min_epoch
    for epoch in range(min_epoch, len(scores)):
        if scores[epoch] > scores[best]:
            best = epoch
        if patience is not None and epoch - best >= patience:
            break
    return float(scores[best])
