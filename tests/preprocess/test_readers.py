"""Two readers, the same pixels; and the filters between magnifications against their definitions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_factory import break_tile, tile_bytes, tissue_picture, write_slide

from cfusion.errors import DataError
from preprocess import readers
from preprocess.grid import make_grid
from preprocess.readers import OpenSlideReader, RawTileReader, choose_reader
from preprocess.resample import area_average, area_tiles, bicubic_tiles
from preprocess.slides import open_slide


@pytest.mark.parametrize("name", ["cmu_small_region", "tcga-cr-7395-01a-01-ts1"])
def test_raw_tiles_are_the_pixels_of_openslide(shared: Path, name: str):
    slide = open_slide(shared / "slides" / f"{name}.svs", default_mpp=0.25)
    raw, reference = RawTileReader(slide), OpenSlideReader(slide)
    rng = np.random.default_rng(0)
    width, height = slide.size_px
    corners = [(0, 0), (width - 300, height - 200), (width - 64, 0)]
    corners += [tuple(2 * rng.integers(0, (width // 2, height // 2))) for _ in range(3)]
    for x, y in corners:
        for shrink in (1, 2, 4):
            ours = raw.region(int(x), int(y), 512, 512, shrink)
            np.testing.assert_array_equal(ours, reference.region(int(x), int(y), 512, 512, shrink))
            assert ours.shape == (512 // shrink, 512 // shrink, 3)
    assert choose_reader(slide, [(0, 0), (1024, 1024)]).name == "raw-tiles"


@pytest.mark.parametrize("compression", ["jpeg", "aperio_jp2000_rgb"])
@pytest.mark.parametrize("tile", [240, 256])
def test_made_slides_too(tmp_path: Path, compression: str, tile: int):
    picture = tissue_picture(1100, 900)
    slide = open_slide(write_slide(tmp_path / "a.svs", picture, compression=compression, tile=tile))
    raw, reference = RawTileReader(slide), OpenSlideReader(slide)
    for x, y, side, shrink in ((0, 0, 1024, 2), (512, 256, 512, 1), (900, 700, 512, 4), (3, 5, 64, 1)):
        np.testing.assert_array_equal(raw.region(x, y, side, side, shrink), reference.region(x, y, side, side, shrink))


def test_a_slide_whose_raw_tiles_differ_is_read_through_openslide(tmp_path: Path, monkeypatch, caplog):
    slide = open_slide(write_slide(tmp_path / "a.svs", tissue_picture(1100, 900)))
    decode = readers.RawTileReader._decode
    monkeypatch.setattr(readers.RawTileReader, "_decode", lambda self, *args: decode(self, *args) ^ 1)
    with caplog.at_level("INFO"):
        assert choose_reader(slide, [(0, 0)]).name == "openslide"
    assert "raw tiles differ from OpenSlide's pixels" in caplog.text


def test_raw_tiles_that_never_decode_are_not_taken_for_equal(tmp_path: Path, monkeypatch, caplog):
    def fails(self, *args):
        raise RuntimeError("no such codec")

    slide = open_slide(write_slide(tmp_path / "a.svs", tissue_picture(1100, 900)))
    monkeypatch.setattr(readers.RawTileReader, "_decode", fails)
    with caplog.at_level("INFO"):
        assert choose_reader(slide, [(0, 0), (512, 512)]).name == "openslide"
    assert "no raw tile could be compared" in caplog.text


def test_broken_tiles_are_no_comparison(tmp_path: Path, caplog):
    path = write_slide(tmp_path / "a.svs", tissue_picture(2048, 1024))
    corners = [(x, y) for y in range(0, 1024, 256) for x in range(0, 2048, 256)]
    for number in range(16):
        break_tile(path, number)
    reader = choose_reader(open_slide(path), corners)
    assert reader.name == "raw-tiles"
    with caplog.at_level("INFO"):
        for _ in range(3):
            with pytest.raises(DataError, match="cannot be read"):
                reader.region(0, 0, 512, 512)
    assert caplog.text.count("because its raw tiles do not decode") == 1
    for number in range(16, 32):
        break_tile(path, number)
    assert choose_reader(open_slide(path), corners).name == "openslide"


def test_a_jpeg_2000_tile_without_its_end_is_an_error_and_no_picture(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1024, 1024), compression="aperio_jp2000_rgb")
    undamaged = RawTileReader(open_slide(path)).region(512, 512, 512, 512)
    offset, length = tile_bytes(path)[5]
    with path.open("r+b") as stream:
        stream.seek(offset + length // 2)
        stream.write(bytes(length - length // 2))
    slide = open_slide(path)
    # OpenSlide gives a picture all the same, half of it made up.
    assert OpenSlideReader(slide).region(256, 256, 256, 256).shape == (256, 256, 3)
    with pytest.raises(DataError, match=r"a.svs: a JPEG 2000 tile is truncated"):
        RawTileReader(slide).region(256, 256, 256, 256)
    np.testing.assert_array_equal(RawTileReader(slide).region(512, 512, 512, 512), undamaged)


def test_other_layouts_are_read_through_openslide(tmp_path: Path):
    slide = open_slide(write_slide(tmp_path / "a.svs", tissue_picture(600, 600), compression="deflate"))
    assert choose_reader(slide, [(0, 0)]).name == "openslide"


def test_a_broken_tile_is_an_error_and_the_others_stay_exact(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1024, 1024))
    undamaged = RawTileReader(open_slide(path)).region(512, 512, 512, 512)
    break_tile(path, 5)
    raw = RawTileReader(open_slide(path))
    with pytest.raises(DataError, match="the region at 0, 0 cannot be read"):
        raw.region(0, 0, 1024, 1024)
    np.testing.assert_array_equal(raw.region(512, 512, 512, 512), undamaged)


def test_scrambled_jpeg_data_is_an_error_and_no_picture(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1024, 1024))
    offset, length = tile_bytes(path)[5]
    with path.open("r+b") as stream:
        stream.seek(offset + length // 2)
        stream.write(np.random.default_rng(0).integers(0, 255, length // 4, dtype=np.uint8).tobytes())
    with pytest.raises(DataError, match="cannot be read"):
        RawTileReader(open_slide(path)).region(256, 256, 256, 256)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(5, 40), st.integers(1, 5))
def test_area_average_is_the_mean_over_areas(seed: int, length: int, count: int):
    picture = np.random.default_rng(seed).integers(0, 256, (length, length, 3), dtype=np.uint8)
    edges = np.linspace(0, length, count + 1)
    # Weight of each pixel in each stretch: the length of their overlap.
    position = np.arange(length)
    weight = np.clip(np.minimum(position + 1, edges[1:, None]) - np.maximum(position, edges[:-1, None]), 0, None)
    weight /= weight.sum(axis=1, keepdims=True)
    expected = np.einsum("ay,bx,yxc->abc", weight, weight, picture.astype(float))
    assert np.abs(area_average(picture, count, count) - expected).max() <= 0.5 + 1e-3


def test_tiles_of_a_40x_cell_are_averages_of_their_children_down_to_level_0():
    region = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3), dtype=np.uint8)
    grid = make_grid(np.ones((4, 4), bool), (2048, 2048), 2.0, (20, 10, 5))
    tiles = area_tiles(area_average(region, 1024, 1024), grid, grid.tiles)
    for name, count in (("x20", 16), ("x10", 4), ("x5", 1)):
        assert tiles[name].shape == (count, 256, 256, 3)
        step = 2 * 4 // grid.factor(name)
        true = region.reshape(2048 // step, step, 2048 // step, step, 3).mean(axis=(1, 3))
        for tile, (column, row) in zip(tiles[name], grid.tiles[name], strict=True):
            own = true[row * 256 : (row + 1) * 256, column * 256 : (column + 1) * 256]
            # Each magnification is rounded once more than the one before.
            assert np.abs(tile - own).max() <= 0.5 * np.log2(step) + 1e-9


def test_published_rule_a_20x_patch_of_a_40x_slide_is_512_px_resized_to_256():
    region = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3), dtype=np.uint8)
    grid = make_grid(np.ones((4, 4), bool), (2048, 2048), 2.0, (20, 10, 5))
    tiles = bicubic_tiles(region, grid, grid.tiles)
    for name, side in (("x20", 512), ("x10", 1024), ("x5", 2048)):
        for tile, (column, row) in zip(tiles[name], grid.tiles[name], strict=True):
            patch = region[row * side : (row + 1) * side, column * side : (column + 1) * side]
            np.testing.assert_array_equal(tile, np.asarray(Image.fromarray(patch).resize((256, 256))))
