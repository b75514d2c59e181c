"""Test the files of an explanation: GeoJSON, pictures, page, deletion curves; all are written or none."""

import dataclasses
import io
import itertools
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from planted_bags import planted_slide

from cfusion.errors import DataError
from cfusion.explanation import explain
from cfusion.explanation.colour import FADED, Scale
from cfusion.explanation.explanation_files import write_results
from cfusion.explanation.faithfulness import RANDOM, deletion_areas, deletion_curves, draw_deletion
from cfusion.explanation.gallery import draw_gallery, extreme_tiles
from cfusion.explanation.geojson import write_geojson
from cfusion.explanation.heatmap_slides import write_heatmap
from cfusion.explanation.overlays import draw_overlay, paint
from cfusion.explanation.result import Explanation, TileScores, read_explanation
from cfusion.report.number_words import decimal


class MadeUpPictures:
    """A stand-in for a slide whose colour depends on the position."""

    size_px = (4096, 3072)

    def overview(self, side_px: int) -> np.ndarray:
        return np.full((side_px * 3 // 4, side_px, 3), 200, np.uint8)

    def region(self, x_px: int, y_px: int, side_px: int, out_px: int) -> np.ndarray:
        return np.full((out_px, out_px, 3), (x_px // 32, y_px // 32, 90), np.uint8)


@pytest.fixture(scope="module")
def certain(found):
    """The explanation, as if the models agreed on every tile."""
    return with_p(found, 0.0)


def with_p(found, p: float):
    levels = {name: dataclasses.replace(level, p=np.full_like(level.mean, p)) for name, level in found.levels.items()}
    return dataclasses.replace(found, levels=levels)


@pytest.fixture(scope="module")
def curves(folds, slide, found):
    return deletion_curves(folds, slide, found, steps=6, seeds=8)


@pytest.fixture(scope="module")
def written(certain, curves, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "slide"
    write_results(certain, folder, pictures=MadeUpPictures(), curves=curves, heatmap_slides=True)
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


def test_geojson_is_rfc_7946(written):
    collection = json.loads((written / "x20.geojson").read_text())
    assert set(collection) == {"type", "features"}, "no member of the old GeoJSON, such as crs"
    assert collection["type"] == "FeatureCollection"
    for feature in collection["features"]:
        assert set(feature) == {"type", "id", "geometry", "properties"}
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) >= 4
        assert ring[0] == ring[-1]
        (x, y), (x_next, y_next) = np.array(ring[:-1]).T, np.array(ring[1:]).T
        assert (x * y_next - x_next * y).sum() > 0, "an exterior ring is counterclockwise"


def test_a_tile_that_may_be_noise_has_its_own_class(found, tmp_path):
    write_geojson(with_p(found, 0.2), "x5", tmp_path / "x5.geojson")
    features = json.loads((tmp_path / "x5.geojson").read_text())["features"]
    assert {f["properties"]["classification"]["name"] for f in features} == {"May be noise"}
    assert {tuple(f["properties"]["color"]) for f in features} == {(140, 140, 140)}


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


def reddish_and_bluish(picture: np.ndarray) -> tuple[int, int]:
    redness = picture[..., 0].astype(int) - picture[..., 2]
    return int((redness > 10).sum()), int((redness < -10).sum())


def test_an_overlay_shows_the_sign_by_its_colour_and_noise_without(certain, found):
    assert min(reddish_and_bluish(paint(certain, "x5", "occlusion", None))) > 1000
    noise = with_p(found, 0.2)
    assert reddish_and_bluish(paint(noise, "x5", "occlusion", None)) == (0, 0)
    assert (paint(noise, "x5", "occlusion", None) < 255).any(), "grey: scored"


def test_a_title_of_any_length_is_inside_the_picture(found):
    long = dataclasses.replace(found, slide_id="a-name-of-a-slide-" * 12)
    pictures = [
        np.asarray(Image.open(io.BytesIO(draw_overlay(it, "x5", "gradient", paint(it, "x5", "gradient", None)))))
        for it in (found, long)
    ]
    assert pictures[0].shape == pictures[1].shape
    for edge in (pictures[1][:, :3], pictures[1][:, -3:], pictures[1][:3]):
        assert edge.min() == 255


def scored(method: str, *of_levels: np.ndarray) -> Explanation:
    """An explanation with only these scores, by magnification."""
    levels = {
        f"x{20 // 2**i}": TileScores(np.zeros((len(s), 2), np.int32), 1.0, s[None].astype(np.float32), s[None] * np.nan)
        for i, s in enumerate(of_levels)
    }
    return Explanation("made-up", (method,), levels, pd.DataFrame(), (0.0,), {})


def test_the_scale_is_that_of_all_magnifications_and_symmetric_and_zero_is_transparent():
    scale = Scale.of(scored("occlusion", np.array([-0.1, np.nan]), np.array([0.4])), "occlusion")
    assert (scale.low, scale.high, scale.clipped) == (pytest.approx(-0.4), pytest.approx(0.4), False)
    assert scale.colours(np.array([0.0]), np.array([True]))[0, 3] == 0, "no white veil over tiles without effect"
    assert scale.colours(np.array([0.04, 0.08, -0.1]), np.ones(3, bool))[:, 3] == pytest.approx([0.5, 1, 1])
    assert scale.colours(np.array([np.nan]), np.array([True]))[0, 3] == 0
    assert scale.colours(np.array([0.4]), np.array([False]))[0].tolist() == list(FADED)
    assert Scale.of(scored("attention", np.array([0.2, 3.0])), "attention").low == 0
    assert Scale.of(scored("gradient", np.zeros(3)), "gradient").high == 1
    assert Scale.of(scored("gradient", np.r_[np.ones(999), 50.0]), "gradient").clipped


def test_the_gallery_has_no_tile_on_the_wrong_side():
    assert extreme_tiles(np.array([0.1, -0.2, np.nan, 0.3, 0.0])) == [3, 0]
    assert extreme_tiles(-np.array([0.1, -0.2, np.nan, 0.3, 0.0])) == [1]


def test_a_tile_of_the_gallery_is_shown_in_its_lineage(certain):
    shown = []

    class Recorder(MadeUpPictures):
        def region(self, x_px: int, y_px: int, side_px: int, out_px: int) -> np.ndarray:
            shown.append((x_px, y_px, side_px))
            return super().region(x_px, y_px, side_px, out_px)

    for name in certain.levels:
        shown.clear()
        strips = draw_gallery(certain, name, Recorder())
        assert 2 <= len(strips) <= 12
        assert {strip.raises for strip in strips} == {True, False}
        assert strips[0].words == "5x → 10x → 20x"
        for first in range(0, len(shown), 3):
            for (x, y, side), (x_in, y_in, side_in) in itertools.pairwise(shown[first : first + 3]):
                assert x <= x_in < x + side, "each tile is inside the one before"
                assert y <= y_in < y + side
                assert side_in == side / 2
    best = int(np.argmax(certain.scores("x20", "occlusion")))
    corner = tuple(certain.levels["x20"].coords[best].tolist())
    shown.clear()
    draw_gallery(certain, "x20", Recorder())
    assert shown[2][:2] == corner


def test_noise_has_no_gallery(found, tmp_path):
    page = write_results(with_p(found, 0.2), tmp_path / "slide", pictures=MadeUpPictures()).read_text()
    assert page.count("by more than noise") == 6
    assert "No tile at 20x matters" in page
    assert not (tmp_path / "slide" / "gallery").exists()


def test_without_parents_a_tile_of_the_gallery_is_the_only_one_shown(certain):
    levels = {name: dataclasses.replace(level, parent=None) for name, level in certain.levels.items()}
    strips = draw_gallery(dataclasses.replace(certain, levels=levels), "x10", MadeUpPictures())
    assert strips[0].words == "10x"


def on_white(rgba: np.ndarray) -> np.ndarray:
    return (255 * (1 + rgba[:, 3:] * (rgba[:, :3] - 1))).round().astype(int)


def test_a_heatmap_slide_is_read_by_tifffile_and_openslide(written, certain):
    openslide = pytest.importorskip("openslide")
    path = written / "heatmaps" / "x5-occlusion.ome.tif"
    level, scores = certain.levels["x5"], certain.scores("x5", "occlusion")
    scale = Scale.of(certain, "occlusion")
    wanted = on_white(scale.colours(scores, np.ones(len(scores), bool)))
    with tifffile.TiffFile(path) as tiff, openslide.OpenSlide(path) as slide:
        assert tiff.is_ome
        (series,) = tiff.series
        assert [step.shape for step in series.levels] == [(3072, 4096, 3), (768, 1024, 3)]
        assert slide.dimensions == MadeUpPictures.size_px
        pixels, small = series.levels[0].asarray(), series.levels[1].asarray()
        for (x, y), colour in zip(level.coords, wanted, strict=True):
            inside = round(x + level.side_px / 2), round(y + level.side_px / 2)
            assert pixels[y, x].tolist() == pixels[inside[::-1]].tolist() == colour.tolist()
            assert small[inside[1] // 4, inside[0] // 4].tolist() == colour.tolist()
            assert np.asarray(slide.read_region(inside, 0, (1, 1)))[0, 0, :3].tolist() == colour.tolist()
        assert pixels[-1, -1].tolist() == [255] * 3
        pixel = ET.fromstring(tiff.ome_metadata).find(".//{*}Pixels")
        assert ("PhysicalSizeX" in pixel.attrib) == bool(certain.attrs.get("mpp"))


def test_tiles_off_the_grid_of_a_heatmap_slide_are_where_they_are(certain, tmp_path):
    coords = np.array([[300, 333], [1111, 777], [1400, 900]], np.int32)
    level = TileScores(coords, 270.5, np.array([[0.5, -0.5, 1.0]], np.float32), np.full((1, 3), 1e-9, np.float32))
    attrs = {"slide_size_px": [2050, 1300], "mpp": 0.25}
    made_up = Explanation("off", ("gradient",), {"x20": level}, certain.curve, (1.0, 2.0), attrs)
    write_heatmap(made_up, "x20", "gradient", tmp_path / "off.ome.tif")
    expected = np.full((1300, 2050, 3), 255, int)
    colours = Scale.of(made_up, "gradient").colours(level.mean[0], np.ones(3, bool))[:, :3] * 255
    for (x, y), colour in zip(coords, colours.round(), strict=True):
        expected[y : y + 270, x : x + 270] = colour
    with tifffile.TiffFile(tmp_path / "off.ome.tif") as tiff:
        pixels = tiff.series[0].levels[0].asarray()
        assert 'PhysicalSizeX="0.25"' in tiff.ome_metadata
    assert (pixels != expected).any(axis=2).mean() < 1e-3, "half a pixel at the sides of a tile"


def test_a_heatmap_slide_needs_the_size_of_the_slide(found, tmp_path):
    unknown = dataclasses.replace(found, attrs={**found.attrs, "slide_size_px": None})
    with pytest.raises(DataError, match="its size is unknown"):
        write_results(unknown, tmp_path / "slide", heatmap_slides=True)
    assert not (tmp_path / "slide").exists()


def test_the_page_is_one_file_and_shows_the_risk(written, found):
    page = (written / "index.html").read_text()
    assert "<th>sd over folds</th>" in page
    assert re.findall(r"<tr>\s*<td[^>]*>(\w+)</td>\s*<td[^>]*>occlusion</td>", page)[:3] == ["20x", "10x", "5x"]
    assert decimal(found.risk) in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    strips = list((written / "gallery").iterdir())
    assert {path.name for path in strips} >= {
        f"{name}-{side}-1.jpg" for name in found.levels for side in ("raises", "lowers")
    }
    assert page.count("<img") == 2 * 9 + len(strips), "each heatmap also with what may be noise"
    assert page.index(">occlusion<") < page.index(">gradient<") < page.index(">attention<"), "attention is last"
    assert page.index("<b>5x</b>") < page.index("<b>20x</b>")
    assert page.count("<svg") == 1 + 3
    assert page.count('class="scale"') == 3, "one colour scale for all magnifications of a method"
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
