"""Derived magnifications: means of children, found by loops over the tiles."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_slides import make_slide

from cfusion.data.store import FeatureStore, write_slide
from cfusion.errors import ConfigError, StoreError
from cfusion.types import SlideFeatures
from preprocess.derive import derive_slide, derive_store


def finest(coords: np.ndarray, side: float, seed: int = 0) -> SlideFeatures:
    features = np.random.default_rng(seed).standard_normal((len(coords), 5)).astype(np.float16)
    attrs = {"encoder": "e", "tile_px_level0": {"x20": side}}
    return SlideFeatures("a", {"x20": features}, {"x20": coords.astype(np.int32)}, {}, attrs)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60, unique=True),
    st.sampled_from([256.0, 512.0, 768.0, 247.3]),
    st.tuples(st.integers(0, 100), st.integers(0, 100)),
)
def test_a_cell_is_the_mean_of_the_children_that_are_there(places, side: float, offset: tuple[int, int]):
    corners = np.rint(np.array(places) * side + (np.array(offset) if side.is_integer() else 0))
    slide = finest(corners, side)
    found = derive_slide(slide, (10, 5))
    values = {(c, r): slide.features["x20"][i].astype(np.float64) for i, (c, r) in enumerate(places)}
    for name, factor in (("x10", 2), ("x5", 4)):
        children: dict[tuple[int, int], list[np.ndarray]] = {}
        for (column, row), value in values.items():
            children.setdefault((column // 2, row // 2), []).append(value)
        values = {at: np.mean(some, axis=0).astype(np.float16).astype(np.float64) for at, some in children.items()}
        assert len(found.features[name]) == len(values)
        assert found.attrs["tile_px_level0"][name] == factor * side
        assert found.attrs["derived_share"][name] == pytest.approx(
            np.mean([len(some) / 4 for some in children.values()]), abs=1e-4
        )
        for corner, row in zip(found.coords[name], found.features[name], strict=True):
            at = np.rint((corner - (np.array(offset) if side.is_integer() else 0)) / (factor * side)).astype(int)
            np.testing.assert_allclose(row.astype(np.float64), values[tuple(at.tolist())], atol=2e-3)
    for name, coarser, factor in (("x20", "x10", 2), ("x10", "x5", 4)):
        inside = found.coords[name] + side * factor / 4 - found.coords[coarser][found.parents[name]]
        assert (inside > 0).all()
        assert (inside < side * factor).all()


def test_a_store_is_derived_into_another_and_packs(tmp_path: Path):
    for name in ("a", "b"):
        slide = make_slide(name)
        write_slide(tmp_path / "store", slide)
    write_slide(tmp_path / "store", make_slide("flat", coords=False))
    found = derive_store(tmp_path / "store", tmp_path / "derived", (10, 5))
    assert sorted(found.done) == ["a", "b"]
    assert found.done["a"] == {"x10": 1, "x5": 1}
    assert "no coordinates" in found.refused["flat"]
    slide = FeatureStore.open(tmp_path / "derived").read("a")
    true = make_slide("a")
    assert slide.attrs["coarser"] == "mean of x20"
    for name in ("x10", "x5"):
        assert len(slide.features[name]) == len(true.features[name])
    cell = slide.features["x10"][0].astype(np.float32)
    np.testing.assert_allclose(cell, slide.features["x20"][slide.parents["x20"] == 0].mean(axis=0), atol=2e-3)


def test_a_derivation_replaces_nothing(tmp_path: Path):
    for name in ("a", "b"):
        write_slide(tmp_path / "store", make_slide(name))
    derive_store(tmp_path / "store", tmp_path / "derived", (10, 5))
    group = next((tmp_path / "derived").glob("*/a.zarr"))
    before = {path: path.stat().st_mtime_ns for path in group.rglob("*")}
    assert sorted(derive_store(tmp_path / "store", tmp_path / "derived", (10, 5)).done) == ["a", "b"]
    other = make_slide("a")
    other.features["x20"][0] += 1
    write_slide(tmp_path / "store", other)
    found = derive_store(tmp_path / "store", tmp_path / "derived", (10, 5))
    assert sorted(found.done) == ["b"]
    assert "already has other derived features of slide a. Give another --out" in found.refused["a"]
    assert {path: path.stat().st_mtime_ns for path in group.rglob("*")} == before
    write_slide(tmp_path / "extracted", make_slide("c"))
    with pytest.raises(StoreError, match=r"slide c of .* is not derived"):
        derive_store(tmp_path / "store", tmp_path / "extracted", (10, 5))
    assert FeatureStore.open(tmp_path / "extracted").slide_ids() == ["c"]


def test_what_cannot_be_derived_is_refused(tmp_path: Path):
    slide = finest(np.array([(0, 0), (256, 0)]), 256.0)
    with pytest.raises(StoreError, match=r"its finest magnification is x20, so 5x is not the next.*from 10 on"):
        derive_slide(slide, (5,))
    with pytest.raises(StoreError, match="derived already"):
        derive_slide(derive_slide(slide, (10,)), (10,))
    (tmp_path / "s").mkdir()
    with pytest.raises(ConfigError, match="another store"):
        derive_store(tmp_path / "s", tmp_path / "s", (10,))
    with pytest.raises(ConfigError, match="half the one before"):
        derive_store(tmp_path / "s", tmp_path / "t", (10, 2))
