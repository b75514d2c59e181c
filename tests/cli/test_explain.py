"""`cfusion explain` on slides and stores, and the bad input it is given."""

import dataclasses
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from factories import slide_features
from made_up_features import grid
from slide_factory import GLASS, tissue_picture
from slide_factory import write_slide as write_tiff
from typer.testing import CliRunner

from benchmarks.phantom_regions import draw_planted
from cfusion.apply.ensemble import FoldEnsemble
from cfusion.cli.main import app
from cfusion.config import ModelConfig
from cfusion.data.store import FeatureStore, write_slide
from cfusion.errors import CfusionError, ConfigError, DataError, PartialResultError
from cfusion.explanation.result import read_explanation
from cfusion.training.fitted import FittedModel, ModelCard, StratumCard, build
from cfusion.training.seen import Seen, digest_case
from preprocess.descriptor import DIM
from preprocess.importers import ImportOptions, import_features

MAGNIFICATIONS = (20.0, 10.0, 5.0)


def save_models(
    folder: Path,
    encoder: str,
    dim: int,
    magnifications=MAGNIFICATIONS,
    folds: int = 2,
    name: str = "crossfusion",
    **card_facts,
) -> Path:
    """Untrained models of some folds: what they say means nothing, which these tests do not ask."""
    model = ModelConfig(name=name, embed_dim=16, num_heads=2)
    for fold in range(folds):
        torch.manual_seed(fold)
        module = build(model, dim, 4, magnifications)
        card = ModelCard(
            model.model_dump(mode="json"), dim, magnifications, (0.0, 6.0, 12.0, 24.0, 60.0), encoder, "made_up", "OS",
            fold, -2.0, **card_facts,
        )  # fmt: skip
        FittedModel(module.eval(), card).save(folder / f"fold_{fold}")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("run"), "stain-texture", DIM)


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    draw_planted(folder, "planted", np.array([[True, False]]))
    return folder


@pytest.fixture(scope="module")
def explained(run, slides, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    result = call(slides / "planted.svs", "--model", run, "--out", out, "--faithfulness", "--heatmap-slides")
    assert result.exit_code == 0, result.output
    assert "planted: risk " in result.output
    assert "below_band" in result.output
    return out


@pytest.fixture
def made_up(tmp_path) -> Path:
    """A store of three small slides of an encoder that only these tests know, and models that read it."""
    rng = np.random.default_rng(0)
    for name, cells in (("a", 2), ("b", 1), ("c", 3)):
        write_slide(tmp_path / "store", slide_features(name, cells, 8, rng))
    save_models(tmp_path / "run", "made-up", 8)
    return tmp_path


def call(*arguments: str | Path):
    return CliRunner().invoke(app, ["explain", *(str(a) for a in arguments)])


def words(output: str) -> str:
    """The output without its line breaks, which depend on the terminal."""
    return " ".join(output.split())


def refusal(*arguments: str | Path) -> CfusionError:
    error = call(*arguments).exception
    assert isinstance(error, CfusionError), error
    return error


@pytest.mark.slow
def test_a_slide_is_preprocessed_and_explained(explained):
    found = read_explanation(explained / "planted")
    assert found.attrs["encoder"] == "stain-texture"
    assert found.attrs["slide_size_px"] == [2048, 1024]
    assert len(found.risks) == 2
    # There is a gallery if tiles are coloured, which models without training leave to chance.
    assert {p.name for p in (explained / "planted").iterdir()} - {"gallery"} == {
        "explanation.zarr", "x20.geojson", "x10.geojson", "x5.geojson", "overlays", "survival.svg", "index.html",
        "deletion.csv", "deletion-areas.csv", "deletion", "heatmaps",
    }  # fmt: skip
    assert (explained / "planted/heatmaps/x5-occlusion.ome.tif").is_file()
    ring = json.loads((explained / "planted/x5.geojson").read_text())["features"][1]["geometry"]["coordinates"][0]
    assert ring[0] == [1024, 0]
    assert ring[2] == [2048, 1024]


@pytest.mark.slow
def test_a_store_gives_the_same_scores_as_the_slide(explained, run, slides, tmp_path):
    result = call(explained / "features", "--slides", slides, "--model", run / "fold_0", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    full, one = read_explanation(explained / "planted"), read_explanation(tmp_path / "planted")
    assert one.risks == full.risks[:1]
    assert (tmp_path / "planted/gallery/x5-raises-1.jpg").is_file() or (
        tmp_path / "planted/gallery/x5-lowers-1.jpg"
    ).is_file()


@pytest.mark.slow
def test_slides_of_a_store_are_chosen(made_up):
    store, model = made_up / "store", made_up / "run"
    assert call(store, "--model", model, "--out", made_up / "one", "--slide", "c").exit_code == 0
    assert [p.name for p in (made_up / "one").iterdir()] == ["c"]
    group = FeatureStore.open(store).group_path("b")
    assert call(group, "--model", model, "--out", made_up / "group").exit_code == 0
    assert [p.name for p in (made_up / "group").iterdir()] == ["b"]
    result = call(store / "made-up", "--model", model, "--out", made_up / "all", "--magnification", "10")
    assert result.exit_code == 0
    assert list(read_explanation(made_up / "all" / "a").levels) == ["x10"]
    assert not (made_up / "all/a/gallery").exists()


def test_a_model_of_several_cohorts_explains_with_the_months_of_the_patients(made_up):
    strata = {
        "short": StratumCard((0.0, 6.0, 12.0, 24.0, 60.0), -1.0),
        "long": StratumCard((0.0, 9.0, 18.0, 36.0, 90.0), -3.0),
    }
    save_models(made_up / "joint", "made-up", 8, folds=1, name="amil", strata=strata)
    common = (made_up / "store", "--model", made_up / "joint", "--slide", "b", "--occlusion", "none", "--out")
    found = {}
    for name in strata:
        result = call(*common, made_up / name, "--cohort", name)
        assert result.exit_code == 0
        assert "mean of long, short" not in words(result.output)
        found[name] = read_explanation(made_up / name / "b")
        assert found[name].attrs["cohort"] == name
        assert found[name].attrs["risk_cutoff"] == strata[name].risk_cutoff
    assert found["short"].risks == found["long"].risks, "the risk has no months"
    result = call(*common, made_up / "mean")
    assert result.exit_code == 0
    assert "survival curves and the cut-off are a mean of long, short. --cohort NAME chooses one" in words(
        result.output
    )
    assert "it has long, short" in refusal(*common, made_up / "other", "--cohort", "lng").message


@pytest.mark.slow
def test_a_registered_model_explains_as_the_folder_it_came_from(made_up):
    from cfusion.tracking.address import connect
    from cfusion.tracking.model_registry import register_ensemble

    client = connect(f"sqlite:///{made_up / 'mlflow.db'}")
    register_ensemble(client, client.create_run("0").info.run_id, made_up / "run", "made_up", {"cohort": "made_up"})
    options = ("--slide", "b", "--out", made_up / "out")
    named = ("--model", "models:/made_up@candidate", "--uri", client.tracking_uri)
    result = call(made_up / "store", *named, *options)
    assert result.exit_code == 0, result.output
    registered = read_explanation(made_up / "out" / "b")
    assert call(made_up / "store", "--model", made_up / "run", *options).exit_code == 0
    assert read_explanation(made_up / "out" / "b").risks == registered.risks
    error = refusal(made_up / "store", "--model", "models:/made_up@champion", "--uri", client.tracking_uri, *options)
    assert "has no version champion of a model made_up" in str(error)


@pytest.mark.slow
def test_a_slide_that_cannot_be_explained_does_not_stop_the_others(made_up):
    poor = dataclasses.replace(slide_features("poor", 2, 8, np.random.default_rng(1)), coords={}, parents={})
    write_slide(made_up / "store", poor)
    error = refusal(made_up / "store", "--model", made_up / "run", "--out", made_up / "out")
    assert isinstance(error, PartialResultError)
    assert "1 of 4 slides were not explained: poor" in str(error)
    assert "no coordinates" in str(error)
    assert sorted(p.name for p in (made_up / "out").iterdir()) == ["a", "b", "c"]


@pytest.fixture
def imported_from(tmp_path):
    """Import features of a slide of 2220 × 2967 px at .499 µm/px, which is in `slides`."""
    write_tiff(tmp_path / "slides/a.svs", tissue_picture(2220, 2967), mpp=0.499)

    def imported(name: str, coords: np.ndarray, values: np.ndarray, attrs: dict) -> Path:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file[name] = values
            (file.create_dataset("coords", data=coords) if name == "features" else file).attrs.update(attrs)
            if name != "features":
                file["coords"] = coords
        import_features(tmp_path, tmp_path / "store", encoder="made-up", options=ImportOptions(only=("a.h5",)))
        return tmp_path

    return imported


@pytest.mark.slow
def test_tiles_of_stamp_are_drawn_where_they_lie_on_the_slide(imported_from):
    """Tiles of 256 µm: five columns and six rows reach 5 · 256 / .499 and 6 · 256 / .499 px."""
    values = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float16)
    attrs = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224}
    folder = imported_from("feats", grid(256, 5, 6).astype(np.float32), values, attrs)
    models = save_models(folder / "run", "made-up", 8, (8.75,), name="amil")
    result = call(folder / "store", "--slides", folder / "slides", "--model", models, "--out", folder / "out")
    assert result.exit_code == 0, result.output
    tiles = json.loads((folder / "out/a/x8.75.geojson").read_text())["features"]
    corners = np.array([corner for tile in tiles for corner in tile["geometry"]["coordinates"][0]])
    np.testing.assert_allclose(corners.max(axis=0), [5 * 256 / 0.499, 6 * 256 / 0.499], atol=1)


def test_features_of_another_larger_slide_are_not_explained_on_this_one(imported_from):
    values = np.random.default_rng(0).standard_normal((320, 8)).astype(np.float32)
    attrs = {"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20, "overlap": 0}
    folder = imported_from("features", grid(512, 16, 20), values, attrs)
    models = save_models(folder / "run", "made-up", 8, (20.0,), name="amil")
    error = refusal(folder / "store", "--slides", folder / "slides", "--model", models, "--out", folder / "out")
    assert "its tiles reach 8192 × 10240 px, but the slide has 2220 × 2967 px" in str(error)
    assert error.topic == "geometry"
    assert not (folder / "out/a").exists()


def test_another_encoder_is_refused(made_up, run):
    error = refusal(made_up / "store", "--model", run, "--out", made_up / "out")
    assert "holds embeddings of made-up, but the model reads stain-texture" in str(error)
    assert error.topic == "encoder"
    assert not (made_up / "out").exists()


def test_a_magnification_that_the_model_or_the_store_lacks_is_refused(made_up):
    store = made_up / "store"
    error = refusal(store, "--model", made_up / "run", "--out", made_up / "out", "--magnification", "40")
    assert isinstance(error, ConfigError)
    assert "x40: the model does not read it" in str(error)
    models = save_models(made_up / "wide", "made-up", 8, (40.0, 20.0, 10.0))
    error = refusal(store, "--slide", "a", "--model", models, "--out", made_up / "out")
    assert "but the model also reads x40" in str(error)
    assert "Extract the slides at 40,20,10" in str(error)


def test_the_error_for_imported_features_without_coordinates_names_an_import_that_has_them(made_up):
    published = slide_features("p", 2, 8, np.random.default_rng(1))
    attrs = {"encoder": "made-up", "imported_from": "published"}
    write_slide(made_up / "imported", dataclasses.replace(published, coords={}, parents={}, attrs=attrs))
    error = refusal(made_up / "imported", "--model", made_up / "run", "--out", made_up / "out")
    assert isinstance(error, DataError)
    assert "no heatmap can be drawn: the published layout, from which it was imported, has none" in str(error)
    assert "Import CLAM, TRIDENT or STAMP files" in str(error)


def test_a_slide_without_tissue_is_refused(run, tmp_path):
    blank = write_tiff(tmp_path / "blank.svs", np.full((1024, 1024, 3), GLASS, np.uint8))
    error = refusal(blank, "--model", run, "--out", tmp_path / "out")
    assert "blank.svs: no tissue was found" in str(error)
    assert not (tmp_path / "out" / "blank").exists()


def test_pictures_of_another_slide_are_refused(explained, run, tmp_path):
    draw_planted(tmp_path / "other", "planted", np.array([[True], [False]]))
    error = refusal(
        explained / "features", "--slides", tmp_path / "other", "--model", run, "--out", tmp_path / "out"
    )  # fmt: skip
    assert "has 1024 × 2048 px, but the features of planted are of a slide of 2048 × 1024 px" in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("store", "--slide", "z"), "has no slide z"),
        (("nothing.svs",), r"nothing\.svs: no such file or folder"),
        (
            ("run",),
            r"run: is not a feature store\. Give one slide.* first cfusion preprocess import .*run --store features",
        ),
        (("store", "--device", "abacus"), "--device abacus: cannot be used"),
    ],
    ids=["slide", "source", "folder", "device"],
)
def test_what_is_not_there_is_named(arguments, message, made_up):
    source, *options = arguments
    error = refusal(made_up / source, *options, "--model", made_up / "run", "--out", made_up / "out")
    assert re.search(message, str(error))


def test_a_folder_of_something_else_is_not_replaced(made_up):
    precious = made_up / "out" / "b" / "slide.svs"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    error = refusal(made_up / "store", "--slide", "b", "--model", made_up / "run", "--out", made_up / "out")
    assert "exists and contains no explanation, so it is not replaced" in str(error)
    assert precious.read_text() == "years of work"


def test_a_folder_without_a_model_is_refused(made_up):
    (made_up / "empty").mkdir()
    error = refusal(made_up / "store", "--model", made_up / "empty", "--out", made_up / "out")
    assert "holds no model.json" in str(error)


@pytest.mark.slow
def test_a_patient_of_the_training_is_explained_by_the_models_that_have_not_seen_them(run, slides, tmp_path):
    """Otherwise risk and heatmap are those of slides the models know, and differ from the out-of-fold prediction."""
    models = FoldEnsemble.load(run).models
    table = tmp_path / "cases.csv"
    table.write_text("slide_id,case_id\nplanted.svs,patient-1\n")
    seen, other = Seen(frozenset({digest_case("patient-1")}), None), Seen(frozenset(), None)
    for name, records in (("one", (seen, other)), ("both", (seen, seen))):
        for fold, record in enumerate(records):
            dataclasses.replace(models[fold], seen=record).save(tmp_path / name / f"fold_{fold}")
    arguments = [slides / "planted.svs", "--cases", table, "--occlusion", "none"]
    assert (
        "1 of 2 models have not seen the patient, and only they are used (fold 1)"
        in call(*arguments, "--model", tmp_path / "one", "--out", tmp_path / "a").output
    )
    found = read_explanation(tmp_path / "a" / "planted")
    single = call(*arguments, "--model", run / "fold_1", "--out", tmp_path / "single")
    assert single.exit_code == 0, single.output
    assert found.risks == read_explanation(tmp_path / "single" / "planted").risks
    assert "(fold 1)" in (tmp_path / "a" / "planted" / "index.html").read_text()
    call(*arguments, "--model", tmp_path / "both", "--out", tmp_path / "b")
    assert len(read_explanation(tmp_path / "b" / "planted").risks) == 2
    assert "Every model has seen this patient" in (tmp_path / "b" / "planted" / "index.html").read_text()
