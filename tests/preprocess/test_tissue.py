"""Tissue on slides as they are: pale, fragmented, pen-marked, with holes, with nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from cfusion.errors import ConfigError, DataError
from preprocess.annotation import check_masks, contours_geojson, draw_sheet, find_mask, read_mask
from preprocess.grid import make_grid
from preprocess.slides import Overview, open_slide
from preprocess.tissue import MIN_TISSUE_UM2, pen_mask, tissue_mask

UM_PX = 8.0
GLASS = (242, 241, 243)


def overview_of(rgb: np.ndarray, noise: float = 1.5, seed: int = 0) -> Overview:
    noisy = rgb + np.random.default_rng(seed).normal(0, noise, rgb.shape)
    yes = np.ones(rgb.shape[:2], bool)
    return Overview(np.clip(noisy, 0, 255).astype(np.uint8), yes, ~yes, (16.0, 16.0))


def glass(height: int = 200, width: int = 300, colour=GLASS) -> np.ndarray:
    return np.full((height, width, 3), colour, np.float64)


def disk(rgb: np.ndarray, row: int, column: int, radius: float, colour) -> np.ndarray:
    y, x = np.ogrid[: rgb.shape[0], : rgb.shape[1]]
    inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
    rgb[inside] = colour
    return inside


def agreement(found: np.ndarray, true: np.ndarray) -> float:
    return (found & true).sum() / (found | true).sum()


@pytest.mark.parametrize(
    "colour", [(200, 110, 170), (236, 222, 232), (150, 110, 190), (228, 205, 215), (90, 40, 110)],
    ids=["eosin", "very pale", "haematoxylin", "fat and stroma", "dense"],
)  # fmt: skip
@pytest.mark.parametrize("light", [GLASS, (255, 255, 255), (225, 228, 222)], ids=["usual", "white", "tinted"])
def test_tissue_of_any_stain_on_any_glass(colour, light):
    rgb = glass(colour=light)
    true = disk(rgb, 100, 150, 60, np.array(colour) * np.array(light) / 245)
    assert agreement(tissue_mask(overview_of(rgb), UM_PX), true) > 0.9


def test_fragments_of_a_needle_biopsy_stay_and_dust_goes():
    rgb = glass()
    radius = np.sqrt(2 * MIN_TISSUE_UM2 / np.pi) / UM_PX
    kept = [disk(rgb, 50, 40 + 60 * i, radius, (205, 130, 180)) for i in range(4)]
    dust = disk(rgb, 150, 150, radius / 4, (120, 60, 120))
    mask = tissue_mask(overview_of(rgb), UM_PX)
    for fragment in kept:
        assert (mask & fragment).sum() > 0.8 * fragment.sum()
    assert not mask[dust].any()


def test_lumina_belong_to_the_tissue_and_large_holes_do_not():
    rgb = glass()
    tissue = disk(rgb, 100, 150, 90, (205, 130, 180))
    lumen, hole = disk(rgb, 70, 120, 9, GLASS), disk(rgb, 115, 170, 30, GLASS)
    mask = tissue_mask(overview_of(rgb), UM_PX)
    assert mask[lumen].mean() > 0.95
    assert mask[ndimage.binary_erosion(hole, iterations=5)].mean() < 0.05
    assert mask[tissue].mean() > 0.8


@pytest.mark.parametrize(
    "ink", [(30, 120, 60), (30, 60, 170), (200, 20, 35), (25, 25, 28), (40, 150, 140)],
    ids=["green", "blue", "red", "black", "teal"],
)  # fmt: skip
def test_pen_is_not_tissue(ink):
    rgb = glass()
    tissue = disk(rgb, 100, 220, 60, (205, 130, 180))
    rgb[20:180, 40:56] = ink
    blurred = ndimage.gaussian_filter(rgb, (1.0, 1.0, 0))
    mask = tissue_mask(overview_of(blurred), UM_PX)
    assert mask[:, :80].sum() == 0
    assert agreement(mask, tissue) > 0.9
    assert not pen_mask(overview_of(rgb).rgb, UM_PX)[tissue].any()


def test_a_slide_of_glass_or_of_pen_has_no_tissue():
    assert not tissue_mask(overview_of(glass()), UM_PX).any()
    rgb = glass()
    rgb[10:190, 30:60] = (30, 120, 60)
    rgb[10:190, 200:230] = (20, 20, 24)
    assert not tissue_mask(overview_of(rgb), UM_PX).any()


def test_a_slide_that_is_all_tissue_is_not_split():
    rgb = np.random.default_rng(0).choice([[205, 130, 180], [160, 110, 180], [230, 190, 215]], (200, 300))
    assert tissue_mask(overview_of(rgb.astype(float)), UM_PX).mean() > 0.95


def test_shadows_and_dirt_without_colour_are_not_tissue():
    rgb = glass()
    disk(rgb, 100, 150, 60, (190, 189, 191))
    assert tissue_mask(overview_of(rgb), UM_PX).mean() < 0.02


def test_what_was_not_scanned_is_not_tissue_and_what_cannot_be_read_is_left_to_the_cells():
    overview = overview_of(glass())
    overview.rgb[:, :100] = (205, 130, 180)
    overview.scanned[:, :50] = False
    overview.unread[:, 250:] = True
    mask = tissue_mask(overview, UM_PX)
    assert not mask[:, :50].any()
    assert mask[:, 52:98].all()
    assert mask[:, 250:].all()


def test_real_slides(shared: Path):
    for name, share in (("cmu_small_region", 0.38), ("tcga-cr-7395-01a-01-ts1", 0.66)):
        slide = open_slide(shared / "slides" / f"{name}.svs", default_mpp=0.25)
        assert tissue_mask(slide.overview(), UM_PX).mean() == pytest.approx(share, abs=0.05)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(1, 40), st.floats(1, 40))
def test_contours_and_mask_are_the_same_tissue(tmp_path_factory, seed, px_x, px_y):
    mask = ndimage.gaussian_filter(np.random.default_rng(seed).random((40, 60)), 2) > 0.5
    path = tmp_path_factory.mktemp("contours") / "a.geojson"
    path.write_text(json.dumps(contours_geojson(mask, (px_x, px_y))))
    if mask.any():
        found = read_mask(path, mask.shape, (px_x, px_y))
        # Coordinates are rounded to a tenth of a pixel.
        assert (found != mask).mean() < 0.01


def test_a_users_mask_is_found_and_read(tmp_path: Path):
    assert find_mask(tmp_path, "a") is None
    Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((50, 50), np.uint8))).save(tmp_path / "a.png")
    mask = read_mask(find_mask(tmp_path, "a"), (20, 20), (8.0, 8.0))
    np.testing.assert_array_equal(mask, np.kron(np.eye(2), np.ones((10, 10))).astype(bool))
    square = {"type": "Polygon", "coordinates": [[[80, 0], [160, 0], [160, 160], [80, 160], [80, 0]]]}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "Feature", "geometry": square}))
    mask = read_mask(find_mask(tmp_path, "a"), (20, 20), (8.0, 8.0))
    assert mask[:, 10:].all()
    assert not mask[:, :10].any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.geojson", b"{", "not readable GeoJSON"),
        ("a.geojson", b'{"type": "FeatureCollection", "features": []}', "contains no polygon"),
        ("a.geojson", b'{"type": "Polygon", "coordinates": [["x"]]}', "not readable GeoJSON"),
        ("a.png", b"no picture", "not a readable mask"),
    ],
)
def test_a_mask_that_cannot_be_read_is_named(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        read_mask(tmp_path / name, (20, 20), (8.0, 8.0))


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "RGB", "RGBA", "LA", "white glass P", "grey P"])
def test_a_mask_is_read_as_painted(tmp_path: Path, mode: str):
    """The upper left quarter is tissue, in every way a picture can say so."""
    right = np.zeros((100, 100), bool)
    right[:50, :50] = True
    image = Image.fromarray(right.astype(np.uint8) * 255)
    if mode == "white glass P":
        image = Image.fromarray(right.astype(np.uint8))
        image.putpalette([255] * 3 + [0] * 765)
    elif mode == "I;16":
        image = Image.fromarray(right.astype(np.uint16))
    elif mode in ("RGBA", "LA"):  # white everywhere, but transparent on the glass
        image = Image.new("L", (100, 100), 255).convert(mode)
        image.putalpha(Image.fromarray(right.astype(np.uint8) * 255))
    else:
        image = image.convert(mode.split()[-1])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", (100, 100), (8.0, 8.0)), right)


def test_a_mask_of_another_shape_is_refused_with_both_sizes(tmp_path: Path):
    Image.new("L", (100, 50), 255).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png: the mask has 100 × 50 px, but the slide has 160 × 160 px"):
        read_mask(tmp_path / "a.png", (20, 20), (8.0, 8.0))
    Image.new("L", (7, 7), 255).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png", (20, 21), (8.0, 8.0)).all()


@pytest.mark.parametrize("name", ["a.png", "a.svs.png", "a.SVS.geojson"])
def test_masks_are_found_by_name(tmp_path: Path, name: str):
    (tmp_path / name.replace("SVS", "svs")).touch()
    assert find_mask(tmp_path, "a") is not None


def test_masks_that_fit_no_slide_are_refused_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(ConfigError, match="no such folder"):
        check_masks(tmp_path / "none", ["a"])
    for name in ("a_mask.png", "Jose\u0301.png"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"none of its files has the name of a slide, such as Jos.*SLIDE_ID"):
        check_masks(tmp_path, ["a"])
    check_masks(tmp_path, ["a", "Jos\u00e9"])
    assert "1 masks are used for no slide: a_mask.png" in caplog.text


def test_the_sheet_shows_contours_and_cells():
    overview = overview_of(glass(100, 100))
    mask = np.zeros((100, 100), bool)
    mask[30:70, 30:70] = True
    sheet = draw_sheet(overview, mask, make_grid(mask, (1600, 1600), 1.0, (20, 10, 5)))
    assert sheet.shape[0] >= 400
    assert (sheet == (0, 160, 60)).all(axis=2).sum() > 100
    assert (sheet == (30, 90, 220)).all(axis=2).sum() > 100
