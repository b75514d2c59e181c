"""Test the files of an explanation: GeoJSON, pictures, page, deletion curves; all are written or none."""

import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from planted_bags import planted_slide

from cfusion.explanation import explain
from cfusion.explanation.colour import Scale
from cfusion.explanation.explanation_files import write_results
from cfusion.explanation.faithfulness import RANDOM, deletion_areas, deletion_curves, draw_deletion
from cfusion.explanation.geojson import write_geojson
from cfusion.explanation.overlays import draw_overlay, extreme_tiles
from cfusion.explanation.result import read_explanation


class MadeUpPictures:
    """A stand-in for a slide whose colour depends on the position."""

    size_px = (4096, 3072)

    def overview(self, side_px: int) -> np.ndarray:
        return np.full((side_px * 3 // 4, side_px, 3), 200, np.uint8)

    def region(self, x_px: int, y_px: int, side_px: int, out_px: int) -> np.ndarray:
        return np.full((out_px, out_px, 3), (x_px // 32, y_px // 32, 90), np.uint8)


@pytest.fixture(scope="module")
def slide():
    return planted_slide(8)[0]


@pytest.fixture(scope="module")
def found(folds, slide):
    return explain(folds, slide, occlusion="tiles")


@pytest.fixture(scope="module")
def curves(folds, slide, found):
    return deletion_curves(folds, slide, found, steps=6, seeds=8)


@pytest.fixture(scope="module")
def written(found, curves, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "slide"
    write_results(found, folder, pictures=MadeUpPictures(), curves=curves)
    return folder


def test_geojson_is_what_qupath_reads(written, found):
    features = json.loads((written / "x10.geojson").read_text())["features"]
    level = found.levels["x10"]
    assert len(features) == len(level.coords)
    scores = found.scores("x10", "occlusion")
    for row, feature in enumerate(features):
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] == level.coords[row].tolist()
        assert ring[2] == (level.coords[row] + level.side_px).tolist()
        properties = feature["properties"]
        assert properties["objectType"] == "tile"
        assert properties["classification"]["name"] == ("Raises risk" if scores[row] > 0 else "Lowers risk")
        assert all(0 <= channel <= 255 for channel in properties["color"])
        assert properties["measurements"]["occlusion (risk)"] == pytest.approx(scores[row])
        assert set(properties["measurements"]) == {
            f"{method}{sd} ({unit})"
            for method, unit in (("attention", "× the mean tile"), ("gradient", "risk"), ("occlusion", "risk"))
            for sd in ("", " sd over folds")
        }
    assert len({feature["id"] for feature in features}) == len(features)


def test_a_score_that_does_not_exist_is_left_out_of_the_geojson(folds, tmp_path):
    one = explain(folds.models[0], planted_slide(3)[0], occlusion="none")
    write_geojson(one, "x5", tmp_path / "x5.geojson")
    text = (tmp_path / "x5.geojson").read_text()
    assert "NaN" not in text
    assert set(json.loads(text)["features"][0]["properties"]["measurements"]) == {
        "attention (× the mean tile)", "gradient (risk)",
    }  # fmt: skip


def test_there_is_an_overlay_for_every_method_and_magnification(written, found):
    for name in found.levels:
        for method in found.methods:
            with Image.open(written / "overlays" / f"{name}-{method}.png") as picture:
                assert min(picture.size) > 300


def test_an_overlay_shows_the_sign_by_its_colour(found):
    png = draw_overlay(found, "x5", "occlusion", None)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    reddish, bluish = pixels[..., 0] - pixels[..., 2] > 90, pixels[..., 2] - pixels[..., 0] > 90
    assert reddish.sum() > 1000
    assert bluish.sum() > 1000


def test_the_scale_of_signed_scores_is_symmetric_and_zero_is_white():
    scale = Scale.of("occlusion", np.array([-0.1, 0.4, np.nan]))
    assert (scale.low, scale.high, scale.clipped) == (-0.4, 0.4, False)
    assert scale.colours(np.array([0.0]))[0, :3].min() > 0.95
    assert scale.colours(np.array([np.nan]))[0, 3] == 0
    assert Scale.of("attention", np.array([0.2, 3.0])).low == 0
    assert Scale.of("gradient", np.zeros(3)).high == 1
    outlier = np.r_[np.ones(999), 50.0]
    assert Scale.of("gradient", outlier).clipped


def test_the_gallery_has_no_tile_on_the_wrong_side():
    assert extreme_tiles(np.array([0.1, -0.2, np.nan, 0.3, 0.0])) == [3, 0]
    assert extreme_tiles(-np.array([0.1, -0.2, np.nan, 0.3, 0.0])) == [1]


def test_the_page_is_one_file_and_shows_the_risk(written, found):
    page = (written / "index.html").read_text()
    assert f"{found.risk:.3f}" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert page.count("<img") == 9 + 3
    assert page.count("<svg") == 1 + 3
    assert "Research use only" in page


@pytest.mark.parametrize(("above", "group"), [(0.0, "high"), (1e-9, "low")])
def test_the_page_names_the_group_by_the_same_cutoff_as_a_prediction(found, tmp_path, above, group):
    attrs = {**found.attrs, "risk_cutoff": found.risk + above}
    page = write_results(dataclasses.replace(found, attrs=attrs), tmp_path / "slide").read_text()
    assert f"<b>{group}-risk</b>" in page


def test_without_the_slide_there_is_no_gallery_and_the_page_says_so(found, tmp_path):
    page = write_results(found, tmp_path / "slide")
    assert not (page.parent / "gallery").exists()
    assert not (page.parent / "deletion.csv").exists()
    assert "no gallery of tiles" in page.read_text()


def test_a_failure_leaves_the_old_folder_as_it_was(written, found, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("cfusion.explanation.explanation_files.write_geojson", fail)
    before = sorted(p.name for p in written.parent.rglob("*"))
    with pytest.raises(OSError, match="disk full"):
        write_results(found, written)
    assert sorted(p.name for p in written.parent.rglob("*")) == before
    assert read_explanation(written).slide_id == found.slide_id


def test_deletion_curves_begin_at_the_risk_and_the_best_method_beats_chance(curves, found):
    starts = curves[curves["removed"] == 0]["risk"]
    np.testing.assert_allclose(starts, found.risk, atol=1e-4)
    assert set(curves["method"]) == {*found.methods, RANDOM}
    for name, level in found.levels.items():
        assert curves[curves["magnification"] == name]["removed"].max() == len(level.coords) - 1
    random = curves[curves["method"] == RANDOM]
    assert (random["low"] <= random["risk"] + 1e-9).all()
    assert (random["risk"] <= random["high"] + 1e-9).all()
    areas = deletion_areas(curves)
    assert areas["area"].max() > 0
    best = areas.set_index(["magnification", "method"]).loc[("x5", "occlusion")]
    assert best["area"] > 0
    assert best["below_band"] > 0


def test_a_shuffled_score_does_not_beat_chance_as_the_score_does(folds, slide, found, curves):
    import dataclasses

    order = np.random.default_rng(3).permutation(len(found.levels["x5"].coords))
    level = dataclasses.replace(found.levels["x5"], mean=found.levels["x5"].mean[:, order])
    shuffled = dataclasses.replace(found, levels={"x5": level})
    areas = deletion_areas(deletion_curves(folds, slide, shuffled, steps=6, seeds=8)).set_index("method")["area"]
    real = deletion_areas(curves).set_index(["magnification", "method"])["area"]
    assert areas["occlusion"] < 0.5 * real["x5", "occlusion"]


def test_deletion_curves_are_drawn_and_tabled(written):
    for name in ("x20", "x10", "x5"):
        root = ET.parse(written / "deletion" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
    header = (written / "deletion-areas.csv").read_text().splitlines()[0]
    assert header == "magnification,method,area,below_band"
    ET.parse(written / "survival.svg")


def test_the_same_explanation_gives_the_same_curves(folds, slide, found, curves):
    assert deletion_curves(folds, slide, found, steps=6, seeds=8).equals(curves)


@pytest.mark.parametrize("width", [1e-4, 1.0])
def test_ticks_of_the_risk_are_distinct_for_small_ranges(curves, width):
    risks = curves[["risk", "low", "high"]]
    near = curves.assign(**(risks - risks.min().min()) / (risks.max().max() - risks.min().min()) * width - 2)
    root = ET.fromstring(draw_deletion(near, "x20", "here"))
    ticks = [node.text for node in root.iter() if node.text and re.fullmatch(r"[-−]\d+\.\d+", node.text)]
    assert len(ticks) == len(set(ticks)) > 1
