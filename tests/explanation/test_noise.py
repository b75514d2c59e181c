"""Test which tiles stand out from their spread over folds: noise does not, whatever the overlap of the folds."""

import dataclasses

import numpy as np
import pytest

from cfusion.explanation import explain
from cfusion.explanation.noise import LEVEL, stands_out, training_ratio

TILES = 400


def fold_means(rng: np.random.Generator, folds: int, per_fold: int = 20, effect: float = 0.0) -> np.ndarray:
    """Scores [fold, tile] of models that each average over the patients of all folds but one, as linear models do."""
    patients = rng.normal(effect, 1, (folds, per_fold, TILES)).mean(axis=1)
    return (patients.sum(axis=0) - patients) / (folds - 1)


def verdict(scores: np.ndarray) -> np.ndarray:
    return stands_out(scores.mean(axis=0), scores.std(axis=0), len(scores), len(scores) - 1)


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_noise_does_not_stand_out(folds: int):
    shares = [verdict(fold_means(np.random.default_rng(seed), folds)).mean() for seed in range(50)]
    assert np.mean(shares) == pytest.approx(LEVEL, abs=0.01), "the interval is right, neither bold nor timid"
    # Without the overlap of the folds in the standard error, noise would pass.
    naive = [
        stands_out(s.mean(axis=0), s.std(axis=0), folds, 1 / (folds - 1)).mean()
        for s in (fold_means(np.random.default_rng(seed), folds) for seed in range(50))
    ]
    assert folds < 5 or np.mean(naive) > 0.1


@pytest.mark.parametrize("folds", [5, 10])
def test_an_effect_stands_out(folds: int):
    assert verdict(fold_means(np.random.default_rng(0), folds, effect=2.0)).mean() > 0.9


def test_a_tile_without_score_or_effect_never_stands_out():
    departure, sd = np.array([np.nan, 0.0, 1.0, 0.0]), np.array([np.nan, 0.0, 0.0, 0.1])
    assert stands_out(departure, sd, 5, 4.0).tolist() == [False, False, True, False]
    assert not stands_out(np.full(3, np.nan), np.full(3, np.nan), 5, 4.0).any()


def test_the_ratio_comes_from_the_patients():
    folds = [frozenset(range(10)) - frozenset(range(i, i + 2)) for i in range(0, 10, 2)]
    assert training_ratio(folds) == 4
    assert training_ratio([None, *folds[1:]]) == 4, "models that do not record their patients"
    assert training_ratio(folds[:1]) is None
    assert training_ratio([folds[0], folds[0]]) is None, "two seeds on the same patients"


def test_words_count_what_stands_out(found):
    level = found.levels["x5"]
    row = found.methods.index("occlusion")
    quiet, loud = (dataclasses.replace(level, sd=np.full_like(level.sd, sd)) for sd in (1e3, 1e-9))
    assert "No tile at 5x matters" in dataclasses.replace(found, levels={"x5": quiet}).verdict("x5", "occlusion")
    clear = dataclasses.replace(found, levels={"x5": loud})
    assert clear.verdict("x5", "occlusion").startswith(f"{len(level.coords)} of {len(level.coords)} tiles at 5x")
    assert level.mean[row].any()


def test_one_model_is_not_tested_and_says_so(folds, found, slide):
    one = explain(folds.models[0], slide, occlusion="tiles")
    assert not one.spread_known
    assert one.stands_out("x5", "occlusion").all()
    assert "no spread" in one.verdict("x5", "occlusion")
    assert found.spread_known
