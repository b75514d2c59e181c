"""Folds and blurred areas: found in synthetic ones, drawn, and left out of the tissue only if asked."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.tissue import quality
from benchmarks.tissue_cases import BLUR_UM, UM_PX, Source, drawn_sources, with_blur, with_fold
from preprocess.annotation import draw_sheet, write_sheets
from preprocess.artefacts import find_artefacts
from preprocess.extraction import preprocess_slides
from preprocess.grid import make_grid
from preprocess.phantom.draw import write_drawn_slide
from preprocess.settings import PreprocessConfig
from preprocess.slides import Overview
from preprocess.tissue import find_tissue, without_artefacts


@pytest.fixture(scope="module", params=[0, 1], ids=["phantom-a", "phantom-b"])
def phantom(request) -> Source:
    return drawn_sources(2048)[request.param]


def overview_of(rgb: np.ndarray) -> Overview:
    yes = np.ones(rgb.shape[:2], bool)
    return Overview(rgb, yes, ~yes, (16.0, 16.0))


def test_a_slide_without_artefacts_keeps_its_tissue(phantom: Source):
    assert not find_artefacts(phantom.rgb, phantom.true, UM_PX).mask.any()


def test_a_fold_is_found(phantom: Source):
    rgb, fold = with_fold(phantom)
    found = find_artefacts(rgb, phantom.true, UM_PX)
    recall, precision = quality(found.folds, fold)
    assert recall > 0.7
    assert precision > 0.8
    assert not (found.folds & found.blurred).any()


@pytest.mark.parametrize("sigma_um", BLUR_UM)
def test_a_blurred_area_is_found(phantom: Source, sigma_um: float):
    rgb, blurred = with_blur(phantom, sigma_um)
    recall, precision = quality(find_artefacts(rgb, phantom.true, UM_PX).blurred, blurred)
    assert recall > 0.85
    assert precision > 0.85


def test_a_slide_that_is_blurred_everywhere_is_its_own_measure(phantom: Source):
    """A known limit: the measure is relative to the slide."""
    image = Image.fromarray(phantom.rgb).resize((64, 64)).resize(phantom.rgb.shape[1::-1], Image.Resampling.BICUBIC)
    assert find_artefacts(np.asarray(image), phantom.true, UM_PX).blurred.sum() < 0.1 * phantom.true.sum()


def test_artefacts_are_left_out_drawn_and_reported(phantom: Source, tmp_path: Path):
    rgb, _ = with_fold(phantom)
    overview = overview_of(rgb)
    tissue = find_tissue(overview, UM_PX)
    artefacts = find_artefacts(rgb, tissue.mask, UM_PX)
    kept = without_artefacts(tissue, artefacts)
    assert not (kept.mask & artefacts.mask).any()
    assert kept.tissue_percent < tissue.tissue_percent
    assert [w.split("% ")[1] for w in kept.warnings] == ["of the tissue was left out as folded"]
    grid = make_grid(kept.mask, (2048, 2048), 1.0, (20, 10, 5))
    sheet = draw_sheet(overview, kept.mask, grid, artefacts)
    assert (sheet == (220, 30, 30)).all(axis=2).any()
    write_sheets(tmp_path, "a", overview, kept.mask, grid, artefacts)
    features = json.loads((tmp_path / "a.artefacts.geojson").read_text())["features"]
    assert {f["properties"]["classification"]["name"] for f in features} == {"Fold"}


def test_the_option_changes_tiles_and_makes_a_store_stale(tmp_path: Path):
    rgb, _ = with_fold(drawn_sources(2048)[0])
    large = np.kron(rgb, np.ones((16, 16, 1), np.uint8))
    write_drawn_slide(tmp_path / "a.svs", large, 20)
    store = tmp_path / "store"
    config = PreprocessConfig(slides=tmp_path / "a.svs", store=store, threads=1, magnifications=(20.0,))
    before = preprocess_slides(config).outcomes[0]
    assert before.status == "done"
    assert not (store / "sheets" / "a.artefacts.geojson").exists()
    asked = config.model_copy(update={"artefacts": True})
    assert preprocess_slides(asked).outcomes[0].status == "stale"
    after = preprocess_slides(asked, overwrite=True).outcomes[0]
    assert after.tiles < before.tiles
    assert "left out as folded" in after.warnings
    assert (store / "sheets" / "a.artefacts.geojson").is_file()
    assert preprocess_slides(asked).outcomes[0].status == "skipped"
