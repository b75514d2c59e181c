"""One grid for all magnifications: no child without a parent, no parent without a child."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.errors import ConfigError
from preprocess.grid import TILE_PX, make_grid

MAGNIFICATIONS = (20.0, 10.0, 5.0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60), st.floats(1, 4), st.floats(0.01, 1),
    st.floats(0.0, 1.0),
)  # fmt: skip
def test_every_tile_has_its_parent_and_every_parent_a_child(seed, height, width, scale, min_tissue, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    size_px = (width * 37, height * 41)
    grid = make_grid(mask, size_px, scale, MAGNIFICATIONS, min_tissue)
    assert len({tuple(t) for t in grid.tiles["x20"]}) == len(grid.tiles["x20"])
    np.testing.assert_array_equal(grid.tiles["x5"], grid.cells)
    for fine, coarse in (("x20", "x10"), ("x10", "x5")):
        parents = grid.parents(fine)
        np.testing.assert_array_equal(grid.tiles[coarse][parents], grid.tiles[fine] // 2)
        assert set(parents) == set(range(len(grid.tiles[coarse])))
        offset = grid.coords(fine) - grid.coords(coarse)[parents]
        assert (offset >= 0).all()
        assert (offset < TILE_PX * scale * grid.cell_px / TILE_PX / grid.factor(coarse)).all()
    for name in grid.names:
        np.testing.assert_array_equal(grid.cells[grid.cell_of(name)], grid.tiles[name] // grid.factor(name))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(1, 3), st.floats(0.05, 1))
def test_a_tile_is_kept_by_the_share_of_its_area(seed, scale, min_tissue):
    mask = np.kron(np.random.default_rng(seed).random((5, 6)) < 0.5, np.ones((16, 16), bool))
    size_px = (mask.shape[1] * 16, mask.shape[0] * 16)
    grid = make_grid(mask, size_px, scale, MAGNIFICATIONS, min_tissue)
    side = TILE_PX * scale
    fine = np.kron(mask, np.ones((16, 16), bool))
    kept = {tuple(t) for t in grid.tiles["x20"]}
    for column in range(int(size_px[0] / side)):
        for row in range(int(size_px[1] / side)):
            y, x = (slice(round(v * side), round((v + 1) * side)) for v in (row, column))
            share = fine[y, x].mean()
            if abs(share - min_tissue) > 0.02:
                assert ((column, row) in kept) == (share > min_tissue)


def test_coordinates_are_level_0_px_on_one_origin():
    grid = make_grid(np.ones((10, 10), bool), (5000, 3000), 2.0, MAGNIFICATIONS)
    assert grid.cell_px == 1024
    np.testing.assert_array_equal(grid.coords("x5")[:3], [[0, 0], [2048, 0], [4096, 0]])
    np.testing.assert_array_equal(grid.coords("x20")[:3], [[0, 0], [512, 0], [1024, 0]])
    assert grid.coords("x10").dtype == np.int32


def test_without_cells_drops_them_and_what_they_hold():
    grid = make_grid(np.ones((8, 8), bool), (4096, 2048), 1.0, MAGNIFICATIONS)
    assert {n: len(t) for n, t in grid.tiles.items()} == {"x20": 128, "x10": 32, "x5": 8}
    left = grid.without_cells([0, 5])
    assert {n: len(t) for n, t in left.tiles.items()} == {"x20": 96, "x10": 24, "x5": 6}
    assert left.parents("x20").max() == 23
    assert not (left.tiles["x5"] == grid.cells[5]).all(axis=1).any()


@pytest.mark.parametrize("magnifications", [(20, 5), (5, 10, 20), (), (20, 10, 6)])
def test_magnifications_that_are_not_halves_are_refused(magnifications):
    with pytest.raises(ConfigError, match="expected each to be half the one before"):
        make_grid(np.ones((4, 4), bool), (1024, 1024), 1.0, magnifications)


def test_one_magnification_and_others_than_the_usual():
    grid = make_grid(np.ones((4, 4), bool), (1024, 1024), 1.0, (40.0,))
    assert grid.names == ["x40"]
    assert grid.cell_px == TILE_PX
    assert make_grid(np.ones((4, 4), bool), (1024, 1024), 1.0, (5.0, 2.5)).names == ["x5", "x2.5"]
