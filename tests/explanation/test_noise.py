"""Test which tiles may be noise: all of a run that does not rank held-out patients; those on which models disagree."""

import dataclasses

import numpy as np
import pytest
from planted_bags import planted_slide, ranked

from cfusion.apply.ranking import RunRanking
from cfusion.explanation import explain
from cfusion.explanation.noise import LEVEL, p_values
from cfusion.explanation.result import read_explanation, write_explanation

ABOVE, BELOW = (RunRanking(cindex, 0.5, p, 100, 60) for cindex, p in ((0.71, 0.001), (0.52, 0.31)))


def with_p(found, p: float, ranking: RunRanking | None = ABOVE):
    levels = {name: dataclasses.replace(level, p=np.full_like(level.mean, p)) for name, level in found.levels.items()}
    record = None if ranking is None else ranking.record()
    return dataclasses.replace(found, levels=levels, attrs={**found.attrs, "ranking": record})


@pytest.mark.parametrize("models", [2, 3, 5, 10])
def test_models_without_common_patients_agree_on_noise_as_often_as_the_level_says(models):
    departure = np.random.default_rng(0).normal(size=(models, 20000))
    assert (p_values(departure) <= LEVEL).mean() == pytest.approx(LEVEL, abs=0.005)
    assert (p_values(departure + 8) <= LEVEL).mean() > (0.3 if models == 2 else 0.9)


def test_a_tile_without_effect_has_p_1_and_one_of_equal_scores_p_0():
    assert p_values(np.array([[0.0, 1.0, 1.0], [0.0, 1.0, -1.0]])).tolist() == [1, 0, 1]
    assert p_values(np.zeros((3, 2))).tolist() == [1, 1]


def test_a_model_of_larger_risks_does_not_hide_that_all_agree():
    rng = np.random.default_rng(0)
    scores = np.r_[np.full(10, 3.0), np.zeros(90)] + rng.normal(size=(5, 100)) / 2
    larger = scores * np.array([[1], [100], [1], [0.01], [1]])
    assert p_values(larger) == pytest.approx(p_values(scores), abs=1e-6)
    assert (p_values(larger)[:10] <= LEVEL).mean() > 0.8
    assert (p_values(larger)[10:] <= LEVEL).mean() < 0.1


def test_p_values_are_stored(found, tmp_path):
    write_explanation(with_p(found, 0.25), tmp_path / "explanation.zarr")
    back = read_explanation(tmp_path)
    assert back.ranking == ABOVE
    assert (back.levels["x10"].p == 0.25).all()


def test_a_run_that_ranks_nobody_colours_nothing_whatever_its_models_agree_on(found):
    assert with_p(found, 0.0).stands_out("x5", "occlusion").all()
    chance = with_p(found, 0.0, BELOW)
    assert not chance.stands_out("x5", "occlusion").any()
    assert chance.verdict("x5", "occlusion") == (
        "The run does not rank held-out patients better than chance (C .520 of 100 held-out patients; chance .500, "
        "p .310): every score may be noise."
    )


def test_an_unknown_ranking_is_said_and_tiles_are_tested(found):
    unknown = with_p(found, 0.0, None)
    assert unknown.stands_out("x5", "occlusion").all()
    assert "not known whether the run ranks" in unknown.ranking_text
    assert not with_p(found, 0.2, None).stands_out("x5", "occlusion").any()


def test_words_count_the_tiles_on_which_models_agree(found):
    tiles = len(found.levels["x5"].coords)
    assert with_p(found, 0.2).verdict("x5", "occlusion").startswith("No tile at 5x matters: the 2 models agree on 0 of")
    clear = f"The 2 models agree on {tiles} of {tiles} tiles at 5x; chance gives 5%."
    assert with_p(found, 0.0).verdict("x5", "occlusion") == clear


def test_one_model_is_not_tested_and_says_so(folds, found, slide):
    one = explain(folds.models[0], slide, occlusion="tiles", ranking=ABOVE)
    assert not one.tested
    assert one.stands_out("x5", "occlusion").all()
    assert "one model" in one.verdict("x5", "occlusion")
    chance = explain(folds.models[0], slide, occlusion="none", ranking=BELOW)
    assert chance.tested
    assert not chance.stands_out("x5", "gradient").any()


def test_an_older_explanation_is_coloured_throughout_and_says_what_to_do(found, tmp_path):
    levels = {name: dataclasses.replace(level, p=None) for name, level in found.levels.items()}
    attrs = {key: value for key, value in found.attrs.items() if key != "ranking"} | {"training_ratio": 4.0}
    write_explanation(dataclasses.replace(found, levels=levels, attrs=attrs), tmp_path / "explanation.zarr")
    older = read_explanation(tmp_path)
    assert not older.tested
    assert older.stands_out("x5", "occlusion").all()
    assert "run `cfusion explain` again" in older.verdict("x5", "occlusion")


@pytest.mark.slow
def test_hardly_a_tile_is_coloured_for_models_of_permuted_outcomes(tmp_path):
    coloured, rankings = [], []
    for seed in range(2):
        models, ranking = ranked(tmp_path / str(seed), folds=5, epochs=6, permute=seed)
        found = explain(models, planted_slide(12)[0], occlusion="tiles", ranking=ranking)
        coloured += [found.stands_out(name, method) for name in found.levels for method in found.methods]
        rankings.append(ranking)
    assert np.concatenate(coloured).mean() <= 0.05
    assert not any(ranking.above_chance for ranking in rankings)


@pytest.mark.slow
def test_models_that_learnt_a_signal_rank_held_out_patients(tmp_path):
    assert ranked(tmp_path, folds=3, epochs=16)[1].above_chance
