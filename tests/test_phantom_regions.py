"""Planted slides: the region differs from its surroundings in the planted signal, and is where its file says."""

import json

import numpy as np
import openslide
import pytest

from benchmarks.phantom_regions import HIGH, LOW, draw_planted, read_planted
from cfusion.errors import ConfigError, DataError
from preprocess.phantom.histology import Stain, draw_tissue

PLANTED = np.array([[True, False], [False, False]])


def drawn(path) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"), np.float32)


@pytest.mark.slow
def test_each_side_of_the_region_is_the_tissue_it_should_be(tmp_path):
    files = draw_planted(tmp_path, "planted", PLANTED, signal="nuclei", seed=4)
    image = drawn(files.slide)
    fine, coarse = (
        draw_tissue(2048, 2048, LOW, nuclei, Stain(), np.random.default_rng([4, 1])).astype(np.float32)
        for nuclei in (LOW, HIGH)
    )
    where = PLANTED.repeat(1024, axis=0).repeat(1024, axis=1)
    for region, expected, other in ((where, coarse, fine), (~where, fine, coarse)):
        assert np.abs(image - expected)[region].mean() < np.abs(image - other)[region].mean()
    assert np.abs(fine - coarse).mean() > 0.5


def test_the_region_is_read_back(tmp_path):
    files = draw_planted(tmp_path, "planted", PLANTED)
    x, y = np.meshgrid(np.arange(128, 2048, 256), np.arange(128, 2048, 256))
    inside = read_planted(files.region, np.stack([x.ravel(), y.ravel()], axis=1)).reshape(x.shape)
    np.testing.assert_array_equal(inside, PLANTED.repeat(4, axis=0).repeat(4, axis=1))
    properties = json.loads(files.region.read_text())["features"][0]["properties"]
    assert properties["objectType"] == "annotation"


@pytest.mark.parametrize("planted", [np.zeros((2, 2), bool), np.ones((1, 2), bool)])
def test_a_region_of_nothing_or_everything_is_refused(planted, tmp_path):
    with pytest.raises(ConfigError, match="cells are planted; both kinds are needed"):
        draw_planted(tmp_path, "planted", planted)
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.geojson"
    path.write_text('{"features": [{"type": "Feature"}]}')
    with pytest.raises(DataError, match="is not the region of a planted slide"):
        read_planted(path, np.zeros((1, 2)))
