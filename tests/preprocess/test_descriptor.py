"""The fixed descriptor: same tile, same numbers; each of its parts answers to what it is named for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.errors import DataError
from preprocess.descriptor import DIM, NAME, describe_tiles
from preprocess.phantom.histology import Stain, draw_tissue

OCTAVE_H = 11
"""Index of the finest octave's haematoxylin energy; the next octaves follow in steps of 2."""
COHERENCE_H = 11 + 14
"""Index of haematoxylin's coherence at half the resolution; the next levels follow in steps of 4."""


SCALE = 5
"""The descriptor's gain."""


def noise_tiles(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 250, (count, 256, 256, 3), dtype=np.uint8)


def purple_where(mask: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None], np.uint8([110, 70, 150]), np.uint8([225, 150, 200]))[None]


def test_numbers_are_finite_and_of_order_one() -> None:
    extremes = [np.full((256, 256, 3), value, np.uint8) for value in (0, 128, 255)]
    numbers = describe_tiles(np.stack([*extremes, *noise_tiles(2)]))
    assert numbers.shape == (5, DIM)
    assert numbers.dtype == np.float32
    assert np.isfinite(numbers).all()
    tissue = draw_tissue(1024, 1024, 0.5, 0.5, Stain(), np.random.default_rng(0))[256:512, 256:512]
    assert np.abs(describe_tiles(tissue[None])).max() < 6
    assert np.isfinite(numbers.astype(np.float16)).all()


def test_no_tiles_give_no_rows() -> None:
    assert describe_tiles(np.empty((0, 256, 256, 3), np.uint8)).shape == (0, DIM)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000), st.data())
def test_companions_do_not_matter(count: int, seed: int, data: st.DataObject) -> None:
    tiles = noise_tiles(count, seed)
    order = data.draw(st.permutations(range(count)))
    together = describe_tiles(tiles[list(order)])
    for row, number in zip(together, order, strict=True):
        np.testing.assert_array_equal(row, describe_tiles(tiles[number : number + 1])[0])


def test_strided_views_give_the_same_numbers() -> None:
    image = noise_tiles(4).reshape(2, 2, 256, 256, 3).swapaxes(1, 2).reshape(512, 512, 3)
    view = image.reshape(2, 256, 2, 256, 3).swapaxes(1, 2)[1]
    np.testing.assert_array_equal(describe_tiles(view), describe_tiles(np.ascontiguousarray(view)))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_quarter_turn_changes_nothing(turns: int) -> None:
    y, x = np.mgrid[:256, :256]
    tile = purple_where(np.sin(x / 9 + y / 23) + 0.3 * np.sin(y / 7) > 0.2)
    np.testing.assert_allclose(describe_tiles(np.rot90(tile, turns, (1, 2))), describe_tiles(tile), atol=1e-3)


def coherence(tile: np.ndarray) -> float:
    """Of haematoxylin at half the resolution, relative to that of noise, which has none."""
    blobs = purple_where(np.random.default_rng(1).random((256, 256)) > 0.5)
    return float((describe_tiles(tile) - describe_tiles(blobs))[0, COHERENCE_H] / SCALE / 2)


@pytest.mark.parametrize("angle", [0.0, 0.4, 0.8, 1.3])
def test_stripes_are_coherent(angle: float) -> None:
    y, x = np.mgrid[:256, :256]
    assert coherence(purple_where(np.sin((x * np.cos(angle) + y * np.sin(angle)) / 6) > 0)) > 0.8


def test_rings_are_not_coherent() -> None:
    y, x = np.mgrid[-128:128, -128:128]
    assert abs(coherence(purple_where(np.sin(np.hypot(x, y) / 6) > 0))) < 0.1


def test_the_border_of_glass_has_no_say_in_direction() -> None:
    half = purple_where(np.random.default_rng(1).random((256, 256)) > 0.5)
    half[:, :, 128:] = 250
    assert abs(coherence(half)) < 0.1


@pytest.mark.parametrize("octave", [0, 1, 2, 3, 4])
def test_energy_stands_in_its_octave(octave: int) -> None:
    y, x = np.mgrid[:256, :256] >> octave
    energies = describe_tiles(purple_where((x + y) % 2 == 0))[0, OCTAVE_H : OCTAVE_H + 14 : 2]
    assert energies.argmax() == octave
    others = np.delete(energies, octave)
    assert energies[octave] > others.max() + SCALE


def test_more_stain_raises_the_mean_of_its_dye() -> None:
    pale, purple, pink = (
        describe_tiles(np.full((1, 256, 256, 3), colour, np.uint8))[0, 3:5]
        for colour in ((235, 225, 235), (110, 80, 160), (235, 140, 225))
    )
    assert purple[0] > pale[0] + 0.3 * SCALE
    assert pink[1] > pale[1] + 0.3 * SCALE
    assert purple[0] > pink[0] + 0.3 * SCALE


@pytest.mark.parametrize("tiles", [noise_tiles(1).astype(np.float32), noise_tiles(1)[:, :128], noise_tiles(1)[0]])
def test_other_arrays_are_refused(tiles: np.ndarray) -> None:
    with pytest.raises(DataError, match=rf"{NAME}: expected tiles u8 \[n, 256, 256, 3\], found"):
        describe_tiles(tiles)
