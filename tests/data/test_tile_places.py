"""Where tiles lie: spaces of coordinates, and tiles that are on a slide or not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfusion.data.tile_places import check_level_0, check_on_slide, coords_space, on_slide
from cfusion.errors import StoreError
from cfusion.types import SlideFeatures


def slide(coords, side: float, **attrs) -> SlideFeatures:
    places = np.asarray(coords, np.int32)
    attrs = {"tile_px_level0": {"x8.75": side}, **attrs}
    return SlideFeatures("a", {"x8.75": np.zeros((len(places), 2), np.float16)}, {"x8.75": places}, {}, attrs)


def test_version_0_1_0_stored_stamp_in_tile_pixels_and_the_rest_in_level_0_px():
    assert coords_space({"imported_from": "stamp"}) == "tile px"
    assert coords_space({"imported_from": "stamp", "coords_space": "level-0 px"}) == "level-0 px"
    assert coords_space({"imported_from": "trident"}) == coords_space({}) == "level-0 px"


@given(st.floats(0.1, 1.5), st.integers(0, 20), st.integers(0, 20))
def test_tile_pixels_become_level_0_px(mpp: float, column: int, row: int):
    """The right place: columns and rows of 256 µm over the slide's µm/px."""
    stored = slide([(column * 224, row * 224)], 224.0, coords_space="tile px", coords_um_px=256 / 224)
    size = (int(22 * 256 / mpp), int(22 * 256 / mpp))
    placed = on_slide(stored, size, mpp)
    assert placed.coords["x8.75"][0] == pytest.approx([column * 256 / mpp, row * 256 / mpp], abs=0.51)
    assert placed.attrs["tile_px_level0"]["x8.75"] == pytest.approx(256 / mpp)
    check_level_0(placed)
    with pytest.raises(StoreError, match=r"in tile px, not in level-0 px.*--slides"):
        check_level_0(stored)


def test_a_store_of_version_0_1_0_is_placed_too():
    placed = on_slide(slide([(224, 448)], 224.0, imported_from="stamp"), (4000, 4000), 0.499)
    assert placed.coords["x8.75"][0].tolist() == [round(256 / 0.499), round(512 / 0.499)]


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ([(0, 0), (900, 100)], r"x8.75: its tiles reach 1156 × 356 px, but the slide has 900 × 800 px; 1 of 2 tiles"),
        ([(0, 0), (100, 800)], r"its tiles reach 356 × 1056 px, but the slide has 900 × 800 px"),
        ([(-1, 0), (100, 100)], r"1 of 2 tiles lie outside"),
    ],
)
def test_tiles_outside_the_slide_are_refused_with_both_sizes(coords, message: str):
    with pytest.raises(StoreError, match=message):
        check_on_slide(slide(coords, 256.0), (900, 800))


def test_a_tile_may_reach_over_the_edge_and_a_recorded_size_must_be_that_of_the_slide():
    check_on_slide(slide([(899, 799)], 256.0, slide_size_px=[900, 800]), (900, 800))
    with pytest.raises(StoreError, match="900 × 800 px, but the features of a are of a slide of 901 × 800 px"):
        check_on_slide(slide([(0, 0)], 256.0, slide_size_px=[901, 800]), (900, 800))
