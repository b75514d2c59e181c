"""Slides to a feature store."""

from pathlib import Path

import numpy as np
import pytest

from cfusion.data.store import FeatureStore
from preprocess.extraction import preprocess_slides
from preprocess.settings import PreprocessConfig


class MeanColour:
    """An encoder with predictable embeddings: the mean of each channel."""

    name = "mean-colour"
    dim = 3

    def __init__(self) -> None:
        self.identity = {"version": "1"}

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        return tiles.mean(axis=(1, 2), dtype=np.float32)


def test_real_slides_are_extracted_and_then_skipped(shared: Path, tmp_path: Path):
    config = PreprocessConfig(slides=shared / "slides", store=tmp_path, default_mpp=0.25)
    first = preprocess_slides(config, slots=[[MeanColour()]])
    assert [o.status for o in first.outcomes] == ["done", "done"]
    assert [o.mpp_source for o in first.outcomes] == ["mpp", "default"]
    store = FeatureStore.open(tmp_path, "mean-colour")
    for slide_id in store.slide_ids():
        read = store.read(slide_id)
        for fine, coarse in (("x20", "x10"), ("x10", "x5")):
            parents = read.parents[fine]
            assert set(parents) == set(range(len(read.features[coarse])))
            side = read.attrs["tile_px_level0"][coarse]
            inside = read.coords[fine] - read.coords[coarse][parents]
            assert ((inside >= 0) & (inside < side)).all()
    again = preprocess_slides(config, slots=[[MeanColour()]])
    assert [o.status for o in again.outcomes] == ["skipped", "skipped"]


def test_a_slide_without_resolution_fails_and_the_option_supplies_it(shared: Path, tmp_path: Path):
    config = PreprocessConfig(slides=shared / "slides", store=tmp_path)
    first = preprocess_slides(config, slots=[[MeanColour()]])
    assert {o.slide_id: o.status for o in first.outcomes} == {
        "cmu_small_region": "done",
        "tcga-cr-7395-01a-01-ts1": "failed",
    }
    assert "--default-mpp" in first.of("failed")[0].why
    supplied = preprocess_slides(config.model_copy(update={"default_mpp": 0.25}), slots=[[MeanColour()]])
    assert {o.slide_id: o.status for o in supplied.outcomes} == {
        "cmu_small_region": "skipped",
        "tcga-cr-7395-01a-01-ts1": "done",
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_a_mean_of_means_is_the_mean_of_the_parent(shared: Path, tmp_path: Path, threads: int):
    slide = shared / "slides" / "cmu_small_region.svs"
    config = PreprocessConfig(slides=slide, store=tmp_path, threads=threads, min_tissue=1e-9, batch_size=7)
    preprocess_slides(config, slots=[[MeanColour()]])
    read = FeatureStore.open(tmp_path).read("cmu_small_region")
    for fine, coarse in (("x20", "x10"), ("x10", "x5")):
        complete = [i for i in range(len(read.features[coarse])) if (read.parents[fine] == i).sum() == 4]
        assert complete
        for i in complete:
            mean = read.features[fine][read.parents[fine] == i].astype(np.float32).mean(axis=0)
            np.testing.assert_allclose(read.features[coarse][i], mean, atol=0.3)
