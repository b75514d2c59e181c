"""Test the feature store: slides read back as written, and a failed write leaves nothing."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from cfusion.data.store import FeatureStore, array_digest, write_slide
from cfusion.errors import DataError
from cfusion.types import SlideFeatures


def made_features(slide_id: str = "a", cells: int = 300, dim: int = 8, encoder: str = "e", **attrs) -> SlideFeatures:
    rng = np.random.default_rng(1)
    counts = {"x20": 16 * cells, "x10": 4 * cells, "x5": cells}
    return SlideFeatures(
        slide_id,
        {n: rng.standard_normal((c, dim)).astype(np.float16) for n, c in counts.items()},
        {n: rng.integers(0, 99999, (c, 2)).astype(np.int32) for n, c in counts.items()},
        {n: (np.arange(counts[n]) // 4).astype(np.int32) for n in ("x20", "x10")},
        {"encoder": encoder, "config_digest": "d", **attrs},
    )


def test_what_is_written_is_read_back(tmp_path):
    features = made_features(mpp=0.25)
    write_slide(tmp_path, features)
    store = FeatureStore.open(tmp_path)
    read = store.read("a")
    assert store.slide_ids() == ["a"]
    assert list(read.features) == ["x20", "x10", "x5"]
    for name in features.features:
        np.testing.assert_array_equal(read.features[name], features.features[name])
        np.testing.assert_array_equal(read.coords[name], features.coords[name])
        assert read.features[name].dtype == np.float16
        assert read.coords[name].dtype == np.int32
    np.testing.assert_array_equal(read.parents["x20"], features.parents["x20"])
    assert set(read.parents) == {"x20", "x10"}
    assert read.attrs["mpp"] == 0.25
    assert read.attrs["digests"]["x5/features"] == array_digest(features.features["x5"])


def test_layout_is_zarr_v3_in_uncompressed_chunks_of_1024_rows(tmp_path):
    path = write_slide(tmp_path, made_features())
    assert path == tmp_path / "e" / "a.zarr"
    group = zarr.open_group(path, mode="r")
    assert group.metadata.zarr_format == 3
    array = group["x20/features"]
    assert array.chunks == (1024, 8)
    assert array.compressors == ()
    assert (path / "x20/features/c/0/0").stat().st_size == 1024 * 8 * 2


def test_attributes_are_those_of_an_existing_group(tmp_path):
    store = FeatureStore(tmp_path / "e")
    assert store.attrs_if_complete("a") is None
    path = write_slide(tmp_path, made_features())
    assert store.attrs_if_complete("a") == store.attrs("a")
    (path / "zarr.json").unlink()
    assert store.attrs_if_complete("a") is None


def test_a_slide_is_replaced_completely_and_a_failed_write_leaves_nothing(tmp_path):
    write_slide(tmp_path, made_features(dim=8))
    write_slide(tmp_path, made_features(dim=4))
    assert FeatureStore.open(tmp_path).read("a").features["x5"].shape == (300, 4)
    broken = dataclasses.replace(made_features("b"), attrs={"encoder": "e", "bad": object()})
    with pytest.raises(TypeError):
        write_slide(tmp_path, broken)
    assert [p.name for p in (tmp_path / "e").iterdir()] == ["a.zarr"]


def test_features_that_are_not_finite_or_do_not_agree_are_refused(tmp_path):
    good = made_features()
    features = good.features["x10"].copy()
    features[7, 3] = np.inf
    with pytest.raises(DataError, match="slide a, x10: the features of tile 7 are not finite"):
        write_slide(tmp_path, dataclasses.replace(good, features={**good.features, "x10": features}))
    with pytest.raises(DataError, match="parents point outside the rows of x5"):
        write_slide(tmp_path, dataclasses.replace(good, parents={"x10": good.parents["x10"] + 1}))
    with pytest.raises(DataError, match="300 features, but coordinates of shape"):
        write_slide(tmp_path, dataclasses.replace(good, coords={"x5": good.coords["x5"][:-1]}))
    with pytest.raises(DataError, match="expected float16"):
        write_slide(tmp_path, dataclasses.replace(good, features={"x5": np.zeros((3, 2), np.float32)}))
    assert not list(tmp_path.rglob("zarr.json"))


@pytest.mark.parametrize("name", ["../a", "", ".hidden", "a/b", "..", "a\\b"])
def test_no_name_leads_out_of_the_store(tmp_path, name):
    with pytest.raises(DataError, match="not a valid name for a slide or an encoder"):
        write_slide(tmp_path / "store", made_features(name))
    with pytest.raises(DataError, match="not a valid name for a slide or an encoder"):
        write_slide(tmp_path / "store", made_features(encoder=name))
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no such feature store"):
        FeatureStore.open(tmp_path / "none")
    with pytest.raises(DataError, match="holds no encoder's features"):
        FeatureStore.open(tmp_path)
    write_slide(tmp_path, made_features(encoder="one"))
    with pytest.raises(DataError, match=r"no features of the encoder 'two'.*It has: one"):
        FeatureStore.open(tmp_path, "two")
    with pytest.raises(DataError, match="contains no slide 'z'"):
        FeatureStore.open(tmp_path).read("z")
    write_slide(tmp_path, made_features(encoder="two"))
    with pytest.raises(DataError, match=r"holds the encoders one, two.*Name the encoder"):
        FeatureStore.open(tmp_path)


def test_writers_of_one_slide_at_once_leave_one_whole_slide(tmp_path):
    errors: list[Exception] = []

    def write() -> None:
        try:
            for _ in range(5):
                write_slide(tmp_path, made_features(cells=3))
        except Exception as error:  # noqa: BLE001 (asserted below)
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [p.name for p in Path(tmp_path / "e").iterdir()] == ["a.zarr"]
    assert FeatureStore.open(tmp_path).read("a").features["x20"].shape == (48, 8)
