"""Features of other programs, in files made from the description of their layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cfusion.data.store import FeatureStore
from cfusion.errors import ConfigError, DataError
from preprocess.importers import import_features

h5py = pytest.importorskip("h5py")

DIM = 6
SIDES = {"x20": 512, "x10": 1024, "x5": 2048}
"""Tiles of a 40x slide in level-0 px."""


def grid(side: int, columns: int, rows: int, origin=(0, 0)) -> np.ndarray:
    return np.array([(origin[0] + c * side, origin[1] + r * side) for r in range(rows) for c in range(columns)])


def features(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def write_published(root: Path, slides=("a", "b")) -> None:
    for name, count in (("x20", 16), ("x10", 4), ("x5", 1)):
        folder = root / "resnet50" / name / "pt_files"
        folder.mkdir(parents=True)
        for number, slide in enumerate(slides):
            torch.save(torch.from_numpy(features(count, number)), folder / f"{slide}.pt")


def write_clam(root: Path, slides=("a",), aligned: bool = False, coords_in_features: bool = True) -> None:
    for number, (name, columns, rows) in enumerate((("x20", 8, 8), ("x10", 4, 4), ("x5", 2, 2))):
        run = root / name
        for sub in ("patches", "h5_files", "pt_files"):
            (run / sub).mkdir(parents=True)
        level, downsample = (0, 1.0) if name == "x20" else (1, 4.0)
        coords = grid(SIDES[name], columns, rows, (0, 0) if aligned else (300 * number, 11 * number))
        for slide in slides:
            with h5py.File(run / "patches" / f"{slide}.h5", "w") as file:
                dataset = file.create_dataset("coords", data=coords)
                dataset.attrs["patch_size"] = SIDES[name] / downsample
                dataset.attrs["patch_level"] = level
                dataset.attrs["downsample"] = (downsample, downsample)
                dataset.attrs["level_dim"] = (4096, 4096)
            with h5py.File(run / "h5_files" / f"{slide}.h5", "w") as file:
                file["features"] = features(len(coords))
                if coords_in_features:
                    file["coords"] = coords
            torch.save(torch.from_numpy(features(len(coords))), run / "pt_files" / f"{slide}.pt")


def write_trident(root: Path, slides=("a",), overlap: int = 0, attrs_in_features: bool = True) -> None:
    for name, columns, rows in (("x20", 8, 8), ("x10", 4, 4), ("x5", 2, 2)):
        folder = root / f"{name[1:]}x_256px_{overlap}px_overlap"
        (folder / "patches").mkdir(parents=True)
        (folder / "features_uni_v1").mkdir()
        coords = grid(SIDES[name], columns, rows).astype(np.int64)
        attrs = {
            "patch_size": 256, "patch_size_level0": SIDES[name], "level0_magnification": 40,
            "target_magnification": int(name[1:]), "overlap": overlap, "savetodir": "None",
        }  # fmt: skip
        for slide in slides:
            with h5py.File(folder / "patches" / f"{slide}_patches.h5", "w") as file:
                file.create_dataset("coords", data=coords).attrs.update(attrs)
            with h5py.File(folder / "features_uni_v1" / f"{slide}.h5", "w") as file:
                file.create_dataset("features", data=features(len(coords))).attrs["encoder"] = "uni_v1"
                dataset = file.create_dataset("coords", data=coords)
                if attrs_in_features:
                    dataset.attrs.update(attrs)


def write_stamp(root: Path, slides=("a",)) -> None:
    for slide in slides:
        with h5py.File(root / f"{slide}.h5", "w") as file:
            file["coords"] = (grid(256, 3, 3)).astype(np.float32)
            file["feats"] = features(9).astype(np.float16)
            file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "virchow2"})


def test_published_layout_has_features_and_no_places(tmp_path: Path):
    write_published(tmp_path / "in")
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert (report.layout, report.imported, report.refused) == ("published", ("a", "b"), {})
    assert "no coordinates" in report.alignment
    slide = FeatureStore.open(tmp_path / "store", "resnet50").read("b")
    np.testing.assert_array_equal(slide.features["x20"], features(16, 1).astype(np.float16))
    assert slide.coords == {}
    assert slide.parents == {}
    assert slide.attrs["alignment"] == "none"


def test_trident_lies_on_one_grid(tmp_path: Path):
    write_trident(tmp_path / "in")
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert (report.layout, report.imported) == ("trident", ("a",))
    slide = FeatureStore.open(tmp_path / "store", "uni_v1").read("a")
    assert slide.attrs["alignment"] == "grid"
    assert slide.attrs["tile_px_level0"] == SIDES
    for fine, coarse in (("x20", "x10"), ("x10", "x5")):
        np.testing.assert_array_equal(
            slide.coords[coarse][slide.parents[fine]] // SIDES[coarse], slide.coords[fine] // SIDES[coarse]
        )


def test_trident_takes_the_size_from_its_patches(tmp_path: Path):
    write_trident(tmp_path / "in", attrs_in_features=False)
    assert import_features(tmp_path / "in", tmp_path / "store").imported == ("a",)


def test_trident_with_overlap_is_not_called_aligned(tmp_path: Path):
    write_trident(tmp_path / "in", overlap=64)
    assert "not aligned" in import_features(tmp_path / "in", tmp_path / "store").alignment


@pytest.mark.parametrize("shape", [(0, DIM), (0,)])
def test_an_empty_slide_of_trident_is_refused_and_the_rest_goes_on(tmp_path: Path, shape):
    write_trident(tmp_path / "in", slides=("a", "empty"))
    for path in (tmp_path / "in").glob("*/features_uni_v1/empty.h5"):
        path.unlink()
        with h5py.File(path, "w") as file:
            file["features"] = np.zeros(shape, np.float32)
            file.create_dataset("coords", data=np.zeros((0, 2), np.int64)).attrs["patch_size_level0"] = 512
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("a",)
    assert "has no tiles" in report.refused["empty"]


@pytest.mark.parametrize("tensors", [False, True])
def test_clam_is_linked_by_centres_and_says_so(tmp_path: Path, tensors: bool):
    write_clam(tmp_path / "in")
    if tensors:
        for path in (tmp_path / "in").glob("*/h5_files/*"):
            path.unlink()
    report = import_features(tmp_path / "in", tmp_path / "store", encoder="resnet50")
    assert report.layout == "clam"
    assert "not aligned" in report.alignment
    slide = FeatureStore.open(tmp_path / "store").read("a")
    assert slide.attrs["tile_px_level0"] == SIDES
    assert 0 < len(slide.features["x20"]) < 64
    for fine, coarse in (("x20", "x10"), ("x10", "x5")):
        centre = slide.coords[fine] + SIDES[fine] / 2
        inside = centre - slide.coords[coarse][slide.parents[fine]]
        assert (inside >= 0).all()
        assert (inside <= SIDES[coarse]).all()


def test_clam_does_not_tell_its_encoder(tmp_path: Path):
    write_clam(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"do not name their encoder. Give --encoder"):
        import_features(tmp_path / "in", tmp_path / "store")


def test_one_run_of_clam_does_not_tell_its_magnification(tmp_path: Path):
    write_clam(tmp_path / "in")
    with pytest.raises(DataError, match=r"do not name their magnification. Name its folder .* x20"):
        import_features(tmp_path / "in/x20", tmp_path / "store", "clam", "resnet50")


def test_clam_with_coordinates_of_another_run_is_refused(tmp_path: Path):
    write_clam(tmp_path / "in")
    with h5py.File(tmp_path / "in/x10/h5_files/a.h5", "r+") as file:
        file["coords"][0] = (5, 5)
    report = import_features(tmp_path / "in", tmp_path / "store", encoder="resnet50")
    assert "its coords are not those of" in report.refused["a"]


def test_stamp(tmp_path: Path):
    (tmp_path / "in").mkdir()
    write_stamp(tmp_path / "in")
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert (report.layout, report.imported) == ("stamp", ("a",))
    slide = FeatureStore.open(tmp_path / "store", "virchow2").read("a")
    assert list(slide.features) == ["x8.75"]
    assert slide.coords["x8.75"][1].tolist() == [224, 0]


def test_a_pickled_object_is_not_opened(tmp_path: Path):
    write_published(tmp_path / "in", slides=("a", "evil"))
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    for path in (tmp_path / "in").rglob("evil.pt"):
        torch.save(Evil(), path)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("a",)
    assert "contains a pickled object, not a plain tensor, so it is not opened" in report.refused["evil"]
    assert not marker.exists()


def test_files_that_cannot_be_read_are_named_and_the_rest_goes_on(tmp_path: Path):
    write_published(tmp_path / "in", slides=("a", "cut", "flat"))
    for path in (tmp_path / "in").rglob("cut.pt"):
        path.write_bytes(path.read_bytes()[:50])
    for path in (tmp_path / "in").rglob("flat.pt"):
        torch.save(torch.zeros(5), path)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("a",)
    assert "cut.pt: cannot be read" in report.refused["cut"]
    assert "contains a tensor [5], torch.float32, expected a tensor [N, d] of floats" in report.refused["flat"]


def test_input_that_fits_no_layout_or_several_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        import_features(tmp_path / "none", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no features of published, trident, clam, stamp"):
        import_features(tmp_path / "empty", tmp_path / "store")
    with pytest.raises(ConfigError, match=r"layout 'hipt' is unknown. Known: auto, published"):
        import_features(tmp_path / "empty", tmp_path / "store", "hipt")
    write_published(tmp_path / "in")
    write_trident(tmp_path / "in")
    with pytest.raises(DataError, match="fits the layouts published, trident"):
        import_features(tmp_path / "in", tmp_path / "store")
    assert import_features(tmp_path / "in", tmp_path / "store", "trident").imported == ("a",)


def replace(name: str, value):
    def change(file) -> None:
        attrs = dict(file[name].attrs)
        del file[name]
        (file.create_group(name) if value is None else file.create_dataset(name, data=value)).attrs.update(attrs)

    return change


def set_attribute(key: str, value):
    return lambda file: file["coords"].attrs.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("features", None), "its 'features' is not an array of numbers"),
        (replace("features", 3.0), "its 'features' is not an array of numbers"),
        (replace("features", [b"x"] * 64), "its 'features' is not an array of numbers"),
        (
            replace("coords", np.full((64, 2), 2**40)),
            "a tile lies at [1099511627776, 1099511627776], which cannot be on a slide",
        ),
        (replace("coords", np.full((64, 2), np.nan)), "a tile lies at [nan, nan], which cannot be on a slide"),
        (set_attribute("patch_size_level0", np.nan), "patch_size_level0 is nan, expected a positive number"),
        (set_attribute("patch_size_level0", "large"), "patch_size_level0 is large, expected a positive number"),
    ],
)
def test_an_odd_file_is_refused_and_the_rest_goes_on(tmp_path: Path, change, message: str):
    write_trident(tmp_path / "in", slides=("a", "b"))
    with h5py.File(tmp_path / "in/20x_256px_0px_overlap/features_uni_v1/a.h5", "r+") as file:
        change(file)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert message in report.refused["a"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(6).to_sparse(), "contains a tensor [6, 6], torch.float32"),
        (torch.ones(4, 6, dtype=torch.complex64), "contains a tensor [4, 6], torch.complex64"),
        (torch.ones(4, 6, dtype=torch.int64), "contains a tensor [4, 6], torch.int64"),
        (torch.ones(0, 6), "has no tiles"),
    ],
    ids=["sparse", "complex", "whole numbers", "empty"],
)
def test_an_odd_tensor_is_refused_and_the_rest_goes_on(tmp_path: Path, tensor: torch.Tensor, message: str):
    write_published(tmp_path / "in")
    torch.save(tensor, tmp_path / "in/resnet50/x20/pt_files/a.pt")
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert message in report.refused["a"]
