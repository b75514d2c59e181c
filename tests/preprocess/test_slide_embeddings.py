"""Embeddings of slides, one file of each layout, as bags of one tile that mean MIL reads."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from factories import CohortFiles

from cfusion.cohort.read import read_cohort
from cfusion.cohort.splits import make_splits
from cfusion.data.store import FeatureStore
from cfusion.errors import ConfigError, DataError
from cfusion.survival.metrics import concordance
from cfusion.training.folds import fit
from preprocess.importers import import_features
from preprocess.packing import pack_store


def features(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)


WIDTHS = {"titan": 768, "prism": 1280, "chief": 768, "gigapath": 768, "feather_24k": 512}
"""Widths of the slide encoders that TRIDENT runs."""


def write_slide_h5(path: Path, values: np.ndarray) -> None:
    """A file as TRIDENT writes it: the vector, and the coordinates of the tiles that it was made from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = values
        file.create_dataset("coords", data=np.zeros((7, 2), np.int64)).attrs["patch_size_level0"] = 512


@pytest.mark.parametrize(("encoder", "width"), WIDTHS.items())
@pytest.mark.parametrize("leading", [False, True])
def test_tridents_folders_of_slide_encoders(tmp_path: Path, encoder: str, width: int, leading: bool):
    values = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    folder = tmp_path / "job/20x_512px_0px_overlap" / f"slide_features_{encoder}"
    write_slide_h5(folder / "a.h5", values[None] if leading else values)
    report = import_features(tmp_path / "job", tmp_path / "store")
    assert (report.layout, report.imported) == ("slide", ("a",))
    name = "gigapath-slide" if encoder == "gigapath" else encoder
    slide = FeatureStore.open(tmp_path / "store", name).read("a")
    assert list(slide.features) == ["slide"]
    np.testing.assert_array_equal(slide.features["slide"], values[None].astype(np.float16))
    assert slide.coords == {}


def test_what_the_encoders_own_programs_save(tmp_path: Path):
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal(8).astype(np.float32) for name in "abcd"}
    tensors = {name: torch.from_numpy(array) for name, array in values.items()}
    chief = tmp_path / "CHIEF/WSI_level_feature/test_set"
    giga, prism, titan = (tmp_path / name / f"slide_features_{name}" for name in ("gigapath", "prism", "titan"))
    for folder in (chief, giga, prism, titan):
        folder.mkdir(parents=True)
    torch.save(tensors["a"][None], chief / "a.pt")
    torch.save({"layer_11_embed": tensors["c"][None], "last_layer_embed": tensors["b"][None]}, giga / "b.pt")
    torch.save({"image_embedding": tensors["c"][None], "image_latents": torch.zeros(1, 4, 8)}, prism / "c.pt")
    np.savez(titan / "d.npz", features=values["d"], filenames=np.array(["d"]))
    for slide, encoder in (("a", "chief"), ("b", "gigapath-slide"), ("c", "prism"), ("d", "titan")):
        report = import_features(tmp_path, tmp_path / "store", "slide", encoder)
        assert report.imported == (slide,), report.refused
        found = FeatureStore.open(tmp_path / "store", encoder).read(slide)
        np.testing.assert_array_equal(found.features["slide"][0], values[slide].astype(np.float16))
        assert len(report.skipped) == 3
        assert all("--encoder" in why for why in report.skipped.values())


def test_titans_pickled_table_is_named_and_not_opened(tmp_path: Path):
    write_slide_h5(tmp_path / "job/slide_features_titan/a.h5", features(1)[0])
    (tmp_path / "job/TCGA_TITAN_features.pkl").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    report = import_features(tmp_path / "job", tmp_path / "store")
    assert report.imported == ("a",)
    assert "not opened; save its vectors as SLIDE.npy" in report.refused["TCGA_TITAN_features"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((5, 8), np.float32), r"contains float32 \[5, 8\], expected one vector \[d\] of floats"),
        (np.zeros(8, np.int64), "contains int64"),
        (np.full(6, np.nan, np.float32), "not finite"),
        (np.full(6, 1e6, np.float32), r"reach 1e\+06, more than f16 can hold"),
    ],
)
def test_what_is_no_vector_is_refused_by_name(tmp_path: Path, values: np.ndarray, message: str):
    write_slide_h5(tmp_path / "job/slide_features_titan/a.h5", features(1)[0])
    write_slide_h5(tmp_path / "job/slide_features_titan/bad.h5", values)
    report = import_features(tmp_path / "job", tmp_path / "store")
    assert report.imported == ("a",)
    with pytest.raises(DataError, match=message):
        raise DataError(report.refused["bad"])


def test_features_of_tiles_come_first_and_those_of_slides_are_listed(tmp_path: Path):
    tiles = tmp_path / "job/20x_256px_0px_overlap/features_uni_v1"
    tiles.mkdir(parents=True)
    with h5py.File(tiles / "a.h5", "w") as file:
        file["features"] = features(4)
        places = file.create_dataset("coords", data=np.array([(0, 0), (512, 0), (0, 512), (512, 512)]))
        places.attrs["patch_size_level0"] = 512
    write_slide_h5(tmp_path / "job/20x_256px_0px_overlap/slide_features_titan/a.h5", features(1)[0])
    report = import_features(tmp_path / "job", tmp_path / "store")
    assert report.layout == "trident"
    (why,) = [why for path, why in report.skipped.items() if "slide_features_titan" in path]
    assert "--from slide imports it" in why
    report = import_features(tmp_path / "job", tmp_path / "store", "slide")
    assert FeatureStore.open(tmp_path / "store", "titan").slide_ids() == ["a"]


@pytest.mark.slow
def test_mean_mil_learns_from_one_vector_per_slide(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        hazard = rng.normal() * 2.5
        vector = rng.standard_normal(8)
        vector[0] += hazard
        write_slide_h5(tmp_path / f"job/slide_features_titan/s{i}.h5", vector.astype(np.float32))
        time = rng.exponential() * 20 * np.exp(-hazard)
        rows.append(
            {"patient": f"p{i}", "slide": f"s{i}", "time": round(min(time, 200) + 0.1, 3), "event": int(i % 4 > 0)}
        )
    pd.DataFrame(rows).to_csv(tmp_path / "clinical.csv", index=False)
    import_features(tmp_path / "job", tmp_path / "store")
    index = pack_store(FeatureStore.open(tmp_path / "store"), tmp_path / "shards")
    assert index.magnifications == ("slide",)
    files = CohortFiles(tmp_path / "clinical.csv", tmp_path / "shards")
    sections = {"data": {"encoder": "titan"}, "train": {"epochs": 12, "lr": 1e-2}}
    config = files.config(tmp_path / "run", model={"name": "mean_mil"}, **sections)
    cohort = read_cohort(config.cohort)
    split = make_splits(cohort, config.splits, "strict")[0]
    run = fit(config, cohort, split)
    assert concordance(*(run.predictions[name] for name in ("survival_months", "event", "risk"))).cindex > 0.7
    assert run.model.card.magnifications == (0.0,)
    wrong = files.config(tmp_path / "run2", model={"name": "crossfusion"}, data={"encoder": "titan"})
    with pytest.raises((ConfigError, DataError), match="slide"):
        fit(wrong, cohort, split)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_plain_arrays_are_imported(tmp_path: Path, suffix: str):
    for name, count in (("x20", 16), ("x10", 4), ("x5", 1)):
        folder = tmp_path / "job/e" / name / f"{suffix[1:]}_files"
        folder.mkdir(parents=True)
        values = features(count)
        if suffix == ".npy":
            np.save(folder / "a.npy", values[None] if name == "x20" else values)
            np.save(folder / "pickled.npy", np.array([{}]), allow_pickle=True)
        else:
            np.savez(folder / "a.npz", values)
            np.savez(folder / "pickled.npz", one=values, two=values)
    report = import_features(tmp_path / "job", tmp_path / "store")
    assert report.imported == ("a",)
    assert ("cannot be read" if suffix == ".npy" else "none named features") in report.refused["pickled"]
    slide = FeatureStore.open(tmp_path / "store").read("a")
    np.testing.assert_array_equal(slide.features["x20"], features(16).astype(np.float16))
