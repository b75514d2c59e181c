"""Test the scores of tiles against direct computations, and the inputs that are refused."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from factories import slide_features
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_bags import DIM, ensemble, planted_slide
from sklearn.metrics import roc_auc_score

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.errors import ConfigError, DataError
from cfusion.explanation import explain
from cfusion.explanation.removal import Lineage, risks_without
from cfusion.explanation.result import METHODS, read_explanation, write_explanation
from cfusion.explanation.scoring import slide_bag


@pytest.fixture(scope="module")
def explained(folds):
    slide, truth = planted_slide()
    return explain(folds, slide, occlusion="tiles"), slide, truth


def test_every_tile_has_every_score(explained, folds):
    found, slide, _ = explained
    assert list(found.levels) == ["x20", "x10", "x5"]
    assert found.methods == tuple(METHODS)
    for name, level in found.levels.items():
        tiles = len(slide.features[name])
        assert level.mean.shape == level.sd.shape == (3, tiles)
        assert np.isfinite(level.mean).all()
        assert (level.sd >= 0).all()
        np.testing.assert_array_equal(level.coords, slide.coords[name])
        assert found.scores(name, "attention").mean() == pytest.approx(1, abs=1e-5)
    assert found.risk == pytest.approx(folds.predict_bag(slide.features)["risk"].iloc[0], rel=1e-5)
    assert found.risk_sd == pytest.approx(folds.predict_bag(slide.features)["risk_sd"].iloc[0], rel=1e-4)
    assert found.curve["survival"].is_monotonic_decreasing
    assert found.curve["survival"].iloc[0] == 1


@pytest.mark.slow
def test_the_kept_models_are_what_training_gives(explained, folds, tmp_path):
    kept, slide, _ = explained
    retrained = explain(ensemble(tmp_path, epochs=16), slide, occlusion="tiles")
    assert retrained.risk == pytest.approx(kept.risk, abs=0.5)
    for name in kept.levels:
        assert np.corrcoef(retrained.scores(name, "occlusion"), kept.scores(name, "occlusion"))[0, 1] > 0.9


def test_planted_tiles_are_ranked(tmp_path):
    """Test a model that reads only one magnification; test_planted.py tests CrossFusion."""
    models = ensemble(tmp_path, "amil", epochs=8)
    for seed in (0, 1):
        slide, truth = planted_slide(seed=seed)
        found = explain(models, slide, occlusion="tiles")
        auroc = {method: roc_auc_score(truth["x20"], found.scores("x20", method)) for method in found.methods}
        assert auroc["occlusion"] >= 0.9, auroc
        assert auroc["gradient"] >= 0.9, auroc


def test_occlusion_is_the_risk_of_the_bag_without_the_tile(explained, folds):
    found, slide, _ = explained
    cell = 3
    children = {"x5": np.arange(len(slide.features["x5"])) == cell}
    children["x10"] = children["x5"][slide.parents["x10"]]
    children["x20"] = children["x10"][slide.parents["x20"]]
    changes = []
    for model in folds.models:
        bag = slide_bag(slide, model)
        without = {name: bag.features[name][:, torch.from_numpy(~gone)] for name, gone in children.items()}
        with torch.inference_mode():
            changes.append(
                (model.module(bag).risk - model.module(dataclasses.replace(bag, features=without)).risk).item()
            )
    assert found.scores("x5", "occlusion")[cell] == pytest.approx(np.mean(changes), abs=1e-5)
    assert found.levels["x5"].sd[found.methods.index("occlusion")][cell] == pytest.approx(np.std(changes), abs=1e-5)


def test_small_and_large_batches_give_the_same_risks(folds, monkeypatch):
    slide, _ = planted_slide(6)
    bag, lineage = slide_bag(slide, folds.models[0]), Lineage(slide, ["x20", "x10", "x5"])
    rng = np.random.default_rng(1)
    keeps = [partial(lineage.without, "x5", rng.random(6) < 0.5) for _ in range(9)]
    full = risks_without(folds.models[0].module, bag, keeps)
    monkeypatch.setattr("cfusion.explanation.removal.TOKEN_BUDGET", 1)
    np.testing.assert_allclose(full, risks_without(folds.models[0].module, bag, keeps), atol=1e-5)


def test_the_only_cell_cannot_be_removed(folds):
    slide = slide_features("lone", 1, DIM, np.random.default_rng(0))
    found = explain(folds, slide)
    assert np.isnan(found.scores("x5", "occlusion")).all()
    assert not found.has("x5", "occlusion")
    assert "occlusion" not in set(found.summary()["method"])


def test_occlusion_covers_cells_or_all_tiles_or_nothing(folds):
    slide, _ = planted_slide(4)
    assert [explain(folds, slide).has(name, "occlusion") for name in ("x20", "x10", "x5")] == [False, False, True]
    assert "occlusion" not in explain(folds, slide, occlusion="none").methods


def test_a_single_model_has_no_spread(folds):
    slide, _ = planted_slide(3)
    found = explain(folds.models[0], slide, occlusion="none")
    assert np.isnan(found.risk_sd)
    assert all(np.isnan(level.sd).all() for level in found.levels.values())


@pytest.mark.parametrize("name", ["amil", "mean_mil", "transmil", "dsmil", "crossfusion_single"])
def test_baselines_are_explained_at_the_magnification_they_read(name, tmp_path):
    slide, _ = planted_slide(3)
    found = explain(ensemble(tmp_path, name, folds=1), slide, occlusion="tiles")
    assert list(found.levels) == ["x20"]
    assert ("attention" in found.methods) == (name != "mean_mil")
    assert np.isfinite(found.levels["x20"].mean).all()


def test_cells_are_removed_from_a_model_that_does_not_read_them(tmp_path):
    slide, _ = planted_slide(4)
    amil = ensemble(tmp_path, "amil", folds=1)
    found = explain(amil, slide)
    assert list(found.levels) == ["x20", "x5"]
    assert [found.has("x20", method) for method in found.methods] == [False, True, True]
    assert [found.has("x5", method) for method in found.methods] == [True, False, False]
    bag = slide_bag(slide, amil.models[0])
    rest = dataclasses.replace(bag, features={"x20": bag.features["x20"][:, 16:]})
    with torch.inference_mode():
        change = amil.models[0].module(bag).risk - amil.models[0].module(rest).risk
    assert found.scores("x5", "occlusion")[0] == pytest.approx(change.item(), abs=1e-5)


def test_many_cells_are_removed_in_squares(folds):
    slide, _ = planted_slide(12)
    found = explain(folds.models[0], slide, most_removals=5).scores("x5", "occlusion")
    corner = np.isin(np.arange(12), (0, 1, 4, 5))
    assert len(set(found[corner])) == 1
    assert len(set(found)) <= 5
    bag, lineage = slide_bag(slide, folds.models[0]), Lineage(slide, ["x20", "x10", "x5"])
    full, without = (
        risks_without(folds.models[0].module, bag, [partial(lineage.without, "x5", gone)])[0]
        for gone in (np.zeros(12, bool), corner)
    )
    assert found[corner].sum() == pytest.approx(full - without, abs=1e-5)


def test_a_spatial_grid_is_explained_where_tiles_lie(tmp_path):
    slide, _ = planted_slide(5)
    found = explain(ensemble(tmp_path, folds=1, grid="spatial"), slide, occlusion="tiles")
    assert all(np.isfinite(level.mean).all() for level in found.levels.values())


def test_an_explanation_is_read_as_written(explained, tmp_path):
    found, _, _ = explained
    write_explanation(found, tmp_path / "explanation.zarr")
    again = read_explanation(tmp_path)
    assert (again.slide_id, again.methods, again.risks) == (found.slide_id, found.methods, found.risks)
    for name, level in found.levels.items():
        for field in ("coords", "mean", "sd"):
            np.testing.assert_array_equal(getattr(again.levels[name], field), getattr(level, field))
        assert again.levels[name].side_px == level.side_px
        assert (again.levels[name].parent is None) == (level.parent is None)
    assert again.curve.equals(found.curve)
    assert again.attrs["encoder"] == "made-up"


def test_a_folder_without_an_explanation_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"explanation\.zarr: is not an explanation"):
        read_explanation(tmp_path)


def test_results_are_pandas_objects_and_have_a_notebook_view(explained):
    found, _, _ = explained
    table = found.table("x10")
    assert list(table.columns[:4]) == ["x_px", "y_px", "occlusion", "occlusion_sd"]
    assert len(table) == len(found.levels["x10"].coords)
    assert repr(found).startswith("Explanation(planted-0: risk ")
    assert "<table" in found._repr_html_()


def broken(**changes):
    slide, _ = planted_slide(3)
    return dataclasses.replace(slide, **changes)


def without_coords(source: str | None = None):
    attrs = {"encoder": "made-up", **({"imported_from": source} if source else {})}
    return broken(coords={}, parents={}, attrs=attrs)


def with_nan():
    slide = broken()
    slide.features["x10"][2, 1] = np.nan
    return slide


def without_x10():
    slide = broken()
    return dataclasses.replace(slide, features={n: f for n, f in slide.features.items() if n != "x10"})


@pytest.mark.parametrize(
    ("slide", "message"),
    [
        (
            broken(attrs={"encoder": "uni"}),
            r"embeddings of uni \(8 wide\), but the model reads made-up \(8",
        ),
        (without_x10(), "but the model also reads x10.*Extract the slides at 20,10,5"),
        (
            without_coords("published"),
            "no coordinates.*published layout.*imported, has none.*Import CLAM, TRIDENT or ST",
        ),
        (without_coords(), "no coordinates.*none were stored"),
        (with_nan(), "planted-0, x10: the features of tile 2 are not finite"),
        (slide_features("narrow", 2, 5, np.random.default_rng(0)), "5 wide.*8 wide"),
    ],
    ids=["encoder", "magnification", "published import", "no coordinates", "nan", "width"],
)
def test_a_slide_that_the_model_cannot_read_is_refused(slide, message, folds):
    with pytest.raises(DataError, match=message):
        explain(folds, slide)


def test_models_of_different_kinds_are_no_ensemble(folds, tmp_path):
    mixed = FoldEnsemble((*folds.models, *ensemble(tmp_path, "amil", folds=1).models))
    with pytest.raises(ConfigError, match="read different magnifications"):
        explain(mixed, planted_slide(3)[0])


def test_a_model_without_a_finite_answer_is_refused(folds, tmp_path):
    (broken_model,) = ensemble(tmp_path, "mean_mil", folds=1).models
    torch.nn.init.constant_(broken_model.module.head.bias, np.nan)
    with pytest.raises(DataError, match="planted-0: the risk is not finite"):
        explain(broken_model, planted_slide(3)[0])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["x20", "x10", "x5"]))
def test_a_tile_is_removed_with_exactly_the_tiles_inside_it(seed, name):
    rng = np.random.default_rng(seed)
    slide = slide_features("any", int(rng.integers(1, 6)), 2, rng)
    removed = rng.random(len(slide.features[name])) < rng.random()
    keep = Lineage(slide, ["x20", "x10", "x5"]).without(name, removed)
    order = ["x5", "x10", "x20"]
    for coarser in order[: order.index(name)]:
        assert keep[coarser].all()
    np.testing.assert_array_equal(keep[name], ~removed)
    for coarser, finer in zip(order[order.index(name) :], order[order.index(name) + 1 :], strict=False):
        np.testing.assert_array_equal(keep[finer], keep[coarser][slide.parents[finer]])


def test_a_magnification_that_the_model_does_not_read_is_refused(folds):
    slide, _ = planted_slide(3)
    with pytest.raises(ConfigError, match=r"x40: the model does not read it.*There are scores at x20, x10, x5"):
        explain(folds, slide, magnifications=["x40"])
    assert list(explain(folds, slide, magnifications=["x10"]).levels) == ["x10"]
