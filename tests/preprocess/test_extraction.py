"""Slides to a feature store."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cfusion.data.store import FeatureStore
from preprocess import encoders
from preprocess.encoders.network_clock import NetworkClock
from preprocess.extraction import _busy_seconds, preprocess_slides
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


def test_two_threads_that_share_an_encoder_write_the_same_features(shared: Path, tmp_path: Path):
    slide = shared / "slides" / "cmu_small_region.svs"
    found = []
    for slots in (1, 2):
        config = PreprocessConfig(slides=slide, store=tmp_path / str(slots), min_tissue=1e-9, batch_size=7)
        preprocess_slides(config, slots=[[MeanColour()]] * slots)
        found.append(FeatureStore.open(config.store).read("cmu_small_region"))
    for name, features in found[0].features.items():
        np.testing.assert_array_equal(features, found[1].features[name])


def test_a_gpu_has_two_slots_only_where_batches_are_uploaded_ahead(monkeypatch):
    monkeypatch.setattr(encoders, "_devices", lambda wanted: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(encoders, "load_encoder", lambda name, config, device: SimpleNamespace(device=device))
    plain = encoders.load_slots(PreprocessConfig(encoders=("uni",)))
    ahead = encoders.load_slots(PreprocessConfig(encoders=("uni",), upload_ahead=True))
    assert [slot[0].device for slot in plain] == ["cuda:0", "cuda:1"]
    assert [slot[0].device for slot in ahead] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert ahead[0] is ahead[1]


def test_the_time_of_a_network_is_counted_once_where_calls_overlap():
    clock = NetworkClock(torch.device("cpu"))
    origin = clock._origin
    for start, end, seconds in ((0.0, 2.0, 2.0), (1.0, 3.0, 3.0), (5.0, 6.0, 4.0)):
        clock.add(origin + start, origin + end)
        assert clock.seconds == pytest.approx(seconds)


def test_the_busy_time_is_that_of_the_networks_where_all_encoders_are_networks():
    one, two = (SimpleNamespace(clock=SimpleNamespace(seconds=seconds)) for seconds in (4.0, 8.0))
    assert _busy_seconds([[one], [one]], 100.0) == 4.0, "two slots of one device"
    assert _busy_seconds([[one], [two]], 100.0) == 6.0
    assert _busy_seconds([[one, MeanColour()]], 100.0) == 100.0
    assert _busy_seconds([[MeanColour()]] * 4, 100.0) == 25.0


def test_a_real_slide_as_dicom_gives_the_same_tiles(shared: Path, tmp_path: Path):
    wsidicomizer = pytest.importorskip("wsidicomizer", reason="wsidicomizer is not installed")
    original = shared / "slides" / "cmu_small_region.svs"
    (tmp_path / "slides/cmu").mkdir(parents=True)
    wsidicomizer.WsiDicomizer.convert(original, tmp_path / "slides/cmu", include_label=False, include_overview=False)
    settings = {"store": tmp_path / "store", "threads": 1}
    for slides in (tmp_path / "slides", original):
        preprocess_slides(PreprocessConfig(slides=slides, **settings), slots=[[MeanColour()]], strict=True)
        (row,) = csv.DictReader((tmp_path / "store/summary.csv").open())
        assert (row["status"], row["mpp"], row["mpp_source"], row["taken_as"]) == ("done", "0.499", "mpp", "20x")
        assert 30 < float(row["tissue_percent"]) < 46
    dicom, svs = (FeatureStore.open(tmp_path / "store").read(name) for name in ("cmu", original.stem))
    for name in ("x20", "x10", "x5"):
        np.testing.assert_array_equal(dicom.coords[name], svs.coords[name])
        np.testing.assert_allclose(dicom.features[name], svs.features[name], atol=1)
