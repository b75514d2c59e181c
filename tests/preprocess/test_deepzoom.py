"""Deep zoom: the tiles that OpenSlide's generator gives, in bounded memory whatever the slide's pyramid."""

import contextlib
from pathlib import Path

import numpy as np
import openslide
import pytest
from openslide.deepzoom import DeepZoomGenerator
from slide_factory import break_tile, tissue_picture, write_slide

from cfusion.errors import DataError
from preprocess import deepzoom
from preprocess.deepzoom import OVERLAP_PX, TILE_PX, DeepZoom, NotReadyError
from preprocess.slides import Slide, open_slide

SIZE = (1700, 1100)


@contextlib.contextmanager
def zoomed(path: Path):
    zoom = DeepZoom(open_slide(path))
    with contextlib.closing(zoom):
        yield zoom


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "pyramid.svs"
    return write_slide(path, tissue_picture(*SIZE), level_sizes=((425, 275),))


def test_tiles_are_those_of_openslides_generator(pyramid: Path):
    with openslide.OpenSlide(pyramid) as reference, zoomed(pyramid) as zoom:
        expected = DeepZoomGenerator(reference, TILE_PX, OVERLAP_PX)
        assert zoom.levels == expected.level_count
        for level, (columns, rows) in enumerate(expected.level_tiles):
            for address in np.ndindex(columns, rows):
                want, found = expected.get_tile(level, address), zoom.tile(level, *address)
                assert found.size == expected.get_tile_dimensions(level, address)
                if want.size == found.size:  # the generator keeps a small picture's shape and may lose a px of a side
                    np.testing.assert_array_equal(np.asarray(found), np.asarray(want))
                else:
                    assert max(np.subtract(found.size, want.size)) == 1


def test_a_slide_from_a_scanner(shared: Path):
    path = shared / "slides" / "cmu_small_region.svs"
    with openslide.OpenSlide(path) as reference, zoomed(path) as zoom:
        expected = DeepZoomGenerator(reference, TILE_PX, OVERLAP_PX)
        for level in (zoom.levels - 1, zoom.levels - 2, zoom.levels - 3):
            columns, rows = expected.level_tiles[level]
            for address in {(0, 0), (columns - 1, rows - 1)}:
                want = np.asarray(expected.get_tile(level, address))
                np.testing.assert_array_equal(np.asarray(zoom.tile(level, *address)), want)


def test_coarse_tiles_of_a_slide_without_a_pyramid_read_few_pixels_at_once(tmp_path: Path, monkeypatch):
    picture = tissue_picture(4096, 3072)
    path = write_slide(tmp_path / "flat.svs", picture)
    read = Slide.read_rgba
    sizes = []

    def counted(self, x, y, width, height, level=0):
        sizes.append(width * height)
        return read(self, x, y, width, height, level)

    monkeypatch.setattr(Slide, "read_rgba", counted)
    monkeypatch.setattr(deepzoom, "OVERVIEW_PX", 1024)
    monkeypatch.setattr(deepzoom, "DIRECT_PX", 600)
    monkeypatch.setattr(deepzoom, "QUICK_PX", 1e6)
    with zoomed(path) as zoom:
        level = zoom.levels - 1 - 4
        assert not zoom.is_ready
        for ask in (lambda: zoom.tile(level, 0, 0), lambda: zoom.still(160)):
            with pytest.raises(NotReadyError, match="has no pyramid"):
                ask()
        assert zoom.tile(zoom.levels - 1, 0, 0).size == (255, 255)
        zoom.prepare()
        assert zoom.is_ready
        tile = np.asarray(zoom.tile(level, 0, 0))
        second = np.asarray(zoom.tile(level, 1, 0))
        count = len(sizes)
        zoom.tile(level - 1, 0, 0)
        zoom.still(160)
        assert len(sizes) == count, "the overview is read once"
    assert max(sizes) <= 2048**2, "the overview is read in blocks"
    expected = picture.reshape(192, 16, 256, 16, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(tile, expected[:, :255], atol=3)
    np.testing.assert_allclose(second, expected[:, 253:], atol=3)


@pytest.mark.parametrize("address", [(-1, 0, 0), (99, 0, 0), (11, 7, 0), (11, 0, 5), (11, -1, 0)])
def test_a_tile_that_does_not_exist(pyramid: Path, address: tuple[int, int, int]):
    with zoomed(pyramid) as zoom, pytest.raises(IndexError, match="expected"):
        zoom.tile(*address)


def test_a_patch_is_an_area_average_and_may_hang_over_the_edge(pyramid: Path):
    with zoomed(pyramid) as zoom:
        inside = np.asarray(zoom.patch(600, 400, 512))
        level0 = zoom.slide.composite(zoom.slide.read_rgba(600, 400, 512, 512)).astype(float)
        np.testing.assert_allclose(inside, level0.reshape(256, 2, 256, 2, 3).mean(axis=(1, 3)), atol=1)
        edge = np.asarray(zoom.patch(1600, 1000, 512))
        assert (edge[200:, 200:] == zoom.slide.background).all()


@pytest.mark.parametrize("square", [(0, 0, 0), (0, 0, 4200), (5000, 0, 256), (0, -256, 256), (0, 0, float("nan"))])
def test_a_patch_that_cannot_be_shown(pyramid: Path, square: tuple[int, int, float]):
    with zoomed(pyramid) as zoom, pytest.raises(DataError, match="cannot be shown"):
        zoom.patch(*square)


def test_a_broken_tile_does_not_take_its_neighbours(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(*SIZE), level_sizes=((425, 275),))
    break_tile(path, 0)
    with zoomed(path) as zoom:
        with pytest.raises(DataError, match="cannot be read"):
            zoom.tile(zoom.levels - 1, 0, 0)
        assert zoom.tile(zoom.levels - 1, 4, 2).size == (256, 256)
        assert max(zoom.still(300).size) == 300
