"""Features of other programs, in files made from the description of their layouts."""

from pathlib import Path

import h5py
import made_up_slides
import numpy as np
import openslide
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_features import (
    DIM,
    KNOWN,
    SIDES,
    features,
    grid,
    replace,
    set_attribute,
    write_clam,
    write_flat,
    write_plain,
    write_published,
    write_stamp,
    write_trident,
)

from cfusion.data.store import FeatureStore, write_slide
from cfusion.errors import ConfigError, DataError
from preprocess.importers import ImportOptions, import_features


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


UUID = "TCGA-2F-A9KO-01Z-00-DX1.195576CF-B739-4BD9-B15B-4A70AE287D3E"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("leading", [False, True])
def test_a_flat_tree_of_trident(tmp_path: Path, dtype, leading: bool):
    write_flat(tmp_path / f"in/TCGA-BLCA/{UUID}.h5", dtype=dtype, leading=leading, encoder="uni_v1", **KNOWN)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert (report.layout, report.imported) == ("trident", (UUID,))
    slide = FeatureStore.open(tmp_path / "store", "uni").read(UUID)
    np.testing.assert_array_equal(slide.features["x20"], features(9).astype(dtype).astype(np.float16))
    assert slide.attrs["tile_px_level0"] == {"x20": 512}
    assert slide.attrs["coords_space"] == "level-0 px"
    assert FeatureStore.open(tmp_path / "store", "uni_v1").encoder == "uni"


def test_a_flat_tree_that_states_nothing(tmp_path: Path):
    write_flat(tmp_path / "in/a.h5", leading=True, level0_magnification=-1, target_magnification=-1)
    with pytest.raises(ConfigError, match="do not name their encoder"):
        import_features(tmp_path / "in", tmp_path / "store")
    report = import_features(tmp_path / "in", tmp_path / "store", encoder="uni2-h")
    assert "does not state its magnification. Give --magnification" in report.refused["a"]
    options = ImportOptions(magnification=20)
    assert import_features(tmp_path / "in", tmp_path / "store", encoder="uni2-h", options=options).imported == ("a",)
    attrs = FeatureStore.open(tmp_path / "store").attrs("a")
    assert attrs["tile_px_level0"] == {"x20": 512}
    assert "the stride of its coordinates" in attrs["coords_from"]
    options = ImportOptions(magnification=10)
    write_flat(tmp_path / "other/a.h5", encoder="uni_v1", **KNOWN)
    report = import_features(tmp_path / "other", tmp_path / "o", options=options)
    assert "its attributes say 20x, but its folder or --magnification says 10x" in report.refused["a"]


def test_one_of_several_encoders_is_chosen_and_the_others_are_listed(tmp_path: Path):
    write_flat(tmp_path / "in/a.h5", encoder="uni_v1", **KNOWN)
    write_flat(tmp_path / "in/b.h5", encoder="conch_v1", **KNOWN)
    with pytest.raises(DataError, match=r"contains the encoders conch_v1, uni_v1. Choose one, such as --encoder"):
        import_features(tmp_path / "in", tmp_path / "store")
    report = import_features(tmp_path / "in", tmp_path / "store", encoder="conch")
    assert report.imported == ("b",)
    assert report.skipped == {str(tmp_path / "in/a.h5"): "features of uni_v1; --encoder uni_v1 imports them"}
    assert report.table.read_text().count("skipped") == 1
    with pytest.raises(DataError, match=r"are of conch_v1, uni_v1, but --encoder says virchow. .*conch_v1=virchow"):
        import_features(tmp_path / "in", tmp_path / "store", encoder="virchow")
    assert import_features(tmp_path / "in", tmp_path / "other", encoder="uni=my-uni").imported == ("a",)
    assert FeatureStore.open(tmp_path / "other").encoder == "my-uni"


def test_a_folder_of_stamp_with_two_extractors_is_chosen_from(tmp_path: Path):
    (tmp_path / "in").mkdir()
    write_stamp(tmp_path / "in", slides=("a", "b"))
    with h5py.File(tmp_path / "in/b.h5", "r+") as file:
        file.attrs["extractor"] = "ctranspath-abc"
    with pytest.raises(DataError, match="contains the encoders ctranspath-abc, virchow2"):
        import_features(tmp_path / "in", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert import_features(tmp_path / "in", tmp_path / "store", encoder="virchow2").imported == ("a",)


def test_two_backbones_of_the_published_program_are_chosen_from(tmp_path: Path):
    write_published(tmp_path / "in")
    (tmp_path / "in/resnet50").rename(tmp_path / "in/uni")
    write_published(tmp_path / "in")
    with pytest.raises(DataError, match="contains the encoders resnet50, uni"):
        import_features(tmp_path / "in", tmp_path / "store")
    assert import_features(tmp_path / "in", tmp_path / "store", encoder="uni").imported == ("a", "b")


def test_an_encoder_attribute_that_contradicts_its_folder_is_refused(tmp_path: Path):
    write_trident(tmp_path / "in", slides=("a", "b"))
    with h5py.File(tmp_path / "in/20x_256px_0px_overlap/features_uni_v1/a.h5", "r+") as file:
        file["features"].attrs["encoder"] = "conch_v1"
    with h5py.File(tmp_path / "in/20x_256px_0px_overlap/features_uni_v1/b.h5", "r+") as file:
        file["coords"].attrs["target_magnification"] = 10
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert "its attribute says the encoder conch_v1, its folder uni_v1" in report.refused["a"]
    assert "its attributes say 10x, but its folder or --magnification says 20x" in report.refused["b"]


@pytest.mark.parametrize("other", ["20x_512px_0px_overlap", "20x_256px_64px_overlap"])
def test_one_magnification_twice_is_refused_until_one_is_chosen(tmp_path: Path, other: str):
    write_trident(tmp_path / "in")
    folder = tmp_path / "in" / other / "features_uni_v1"
    write_flat(folder / "b.h5", encoder="uni_v1", **KNOWN)
    with pytest.raises(DataError, match=rf"20x_256px_0px_overlap.*{other}|{other}.*20x_256px_0px_overlap") as refused:
        import_features(tmp_path / "in", tmp_path / "store")
    assert "--only" in refused.value.remedy
    report = import_features(tmp_path / "in", tmp_path / "store", options=ImportOptions(only=("*_256px_0px_overlap",)))
    assert report.imported == ("a",)
    assert "one grid" in report.alignment
    assert str(folder / "b.h5") in report.skipped


def test_one_slide_twice_is_refused_with_both_files(tmp_path: Path):
    for folder in ("one", "two"):
        write_flat(tmp_path / "in" / folder / "a.h5", encoder="uni_v1", **KNOWN)
    write_flat(tmp_path / "in/two/b.h5", encoder="uni_v1", **KNOWN)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert "one/a.h5 and" in report.refused["a"]
    assert "two/a.h5 are both slide a at x20" in report.refused["a"]


@pytest.mark.parametrize("attrs", [{"tile_size": 256.0, "unit": "um", "stamp_version": "2.0.1"}, None])
def test_older_files_of_stamp_in_subfolders(tmp_path: Path, attrs):
    """Before 2.1 the side was `tile_size`; the first version counted px of 256 / 224 µm and wrote no attributes."""
    path = tmp_path / "in/ABCD-UUID/a.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["coords"] = grid(256 if attrs else 224, 3, 3).astype(np.float32)
        file["feats"] = features(9).astype(np.float16)
        file.attrs.update({"extractor": "uni", **(attrs or {})})
    assert import_features(tmp_path / "in", tmp_path / "store").imported == ("a",)
    slide = FeatureStore.open(tmp_path / "store").read("a")
    (name,) = slide.features
    side_px = slide.attrs["tile_px_level0"][name]
    assert slide.attrs["coords_um_px"] * side_px == pytest.approx(256)
    assert slide.coords[name].max(axis=0) * slide.attrs["coords_um_px"] == pytest.approx([512, 512])


def test_stamp_is_placed_on_the_slides(tmp_path: Path, shared: Path):
    """The right places: µm over the µm/px that OpenSlide reads."""
    (tmp_path / "in").mkdir()
    write_stamp(tmp_path / "in", slides=("cmu_small_region", "elsewhere"))
    mpp = float(openslide.OpenSlide(shared / "slides/cmu_small_region.svs").properties["openslide.mpp-x"])
    options = ImportOptions(slides=shared / "slides")
    import_features(tmp_path / "in", tmp_path / "store", options=options)
    slide = FeatureStore.open(tmp_path / "store").read("cmu_small_region")
    np.testing.assert_array_equal(slide.coords["x8.75"], np.rint(grid(256, 3, 3) / mpp))
    assert slide.attrs["tile_px_level0"]["x8.75"] == pytest.approx(256 / mpp)
    assert (slide.attrs["coords_space"], slide.attrs["mpp"]) == ("level-0 px", mpp)
    assert slide.attrs["slide_size_px"] == [2220, 2967]
    other = FeatureStore.open(tmp_path / "store").attrs("elsewhere")
    assert other["coords_space"] == "tile px"


def test_features_of_a_larger_slide_are_refused_with_both_sizes(tmp_path: Path, shared: Path):
    write_flat(tmp_path / "in/cmu_small_region.h5", 30, encoder="uni_v1", **KNOWN)
    stated = {**KNOWN, "level0_width": 9000, "level0_height": 9000}
    write_flat(tmp_path / "stated/cmu_small_region.h5", encoder="uni_v1", **stated)
    options = ImportOptions(slides=shared / "slides")
    report = import_features(tmp_path / "in", tmp_path / "store", options=options)
    assert "its tiles reach 1536 × 5120 px, but the slide has 2220 × 2967 px" in report.refused["cmu_small_region"]
    report = import_features(tmp_path / "stated", tmp_path / "store", options=options)
    assert "of a slide of 9000 × 9000 px, but" in report.refused["cmu_small_region"]
    write_flat(tmp_path / "no/other.h5", encoder="uni_v1", **KNOWN)
    with pytest.raises(ConfigError, match="none of its slides has the name of one of the features, such as other"):
        import_features(tmp_path / "no", tmp_path / "store", options=options)


def test_clam_slides_with_half_their_files_are_refused_by_name(tmp_path: Path):
    write_clam(tmp_path / "in", slides=("a", "patches_only", "features_only"))
    for path in (tmp_path / "in").rglob("patches_only.*"):
        if path.parent.name != "patches":
            path.unlink()
    for path in (tmp_path / "in").glob("*/patches/features_only.h5"):
        path.unlink()
    report = import_features(tmp_path / "in", tmp_path / "store", encoder="resnet50")
    assert report.imported == ("a",)
    assert "no features in h5_files/ or pt_files/" in report.refused["patches_only"]
    assert "its patches/ file with the coordinates is missing" in report.refused["features_only"]


def test_a_tensor_that_requires_grad_is_imported(tmp_path: Path):
    write_published(tmp_path / "in")
    path = tmp_path / "in/resnet50/x20/pt_files/a.pt"
    torch.save(torch.load(path).requires_grad_(), path)
    assert import_features(tmp_path / "in", tmp_path / "store").imported == ("a", "b")


def flip_a_bit(path: Path, values: np.ndarray) -> None:
    """Change one of the stored values."""
    data = bytearray(path.read_bytes())
    data[data.index(values.tobytes()) + 5] ^= 1
    path.write_bytes(data)


def test_a_tensor_whose_bytes_changed_is_refused_by_its_checksum(tmp_path: Path):
    """torch reads such a file without a word."""
    write_published(tmp_path / "in")
    path = tmp_path / "in/resnet50/x20/pt_files/a.pt"
    flip_a_bit(path, features(16, 0))
    assert torch.load(path).shape == (16, DIM)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert "a.pt: cannot be read (its part a/data/0 is damaged: the checksum" in report.refused["a"]


def test_a_tensor_that_its_archive_calls_a_folder_is_refused(tmp_path: Path):
    """torch reads no byte of it, and returns memory that was never written."""
    write_published(tmp_path / "in")
    path = tmp_path / "in/resnet50/x20/pt_files/a.pt"
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"a/data/0"))
    data[entry + 38] |= 0x10  # external attributes
    path.write_bytes(data)
    assert torch.load(path).shape == (16, DIM)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert "its part a/data/0 is damaged" in report.refused["a"]


@pytest.mark.parametrize("zipped", [False, True])
def test_tensors_without_checksums_are_imported(tmp_path: Path, zipped: bool):
    """The format before torch 1.6, and archives that were saved without checksums."""
    write_published(tmp_path / "in")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        for path in (tmp_path / "in").rglob("a.pt"):
            torch.save(torch.load(path), path, _use_new_zipfile_serialization=zipped)
    finally:
        torch.serialization.set_crc32_options(before)
    assert import_features(tmp_path / "in", tmp_path / "store").imported == ("a", "b")


def test_coordinates_are_rounded_and_other_units_are_refused(tmp_path: Path):
    write_trident(tmp_path / "in", slides=("near", "um"))
    for name, shift in (("near", -1e-4), ("um", 0.3)):
        for path in (tmp_path / "in").glob(f"*/features_uni_v1/{name}.h5"):
            with h5py.File(path, "r+") as file:
                replace("coords", file["coords"][:] + shift)(file)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("near",)
    assert "expected integer pixels of level 0" in report.refused["um"]
    assert FeatureStore.open(tmp_path / "store").read("near").coords["x20"][1].tolist() == [512, 0]


def test_features_that_f16_would_lose_are_refused(tmp_path: Path):
    write_published(tmp_path / "in")
    path = tmp_path / "in/resnet50/x20/pt_files/a.pt"
    torch.save(torch.load(path) * 1e-9, path)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert "too small for f16" in report.refused["a"]


def test_an_import_does_not_replace_what_was_extracted_from_the_slide(tmp_path: Path):
    extracted = made_up_slides.make_slide("a")
    encoder, dim = extracted.attrs["encoder"], extracted.features["x20"].shape[1]
    write_slide(tmp_path / "store", extracted)
    folder = tmp_path / "in" / encoder / "x20/pt_files"
    folder.mkdir(parents=True)
    torch.save(torch.ones(9, dim), folder / "a.pt")
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert (
        f"has features of {encoder} of slide a, extracted from the slide. Give another --store" in report.refused["a"]
    )
    assert set(FeatureStore.open(tmp_path / "store").read("a").features) == set(extracted.features)


def test_an_import_replaces_nothing_unless_asked(tmp_path: Path):
    write_published(tmp_path / "in")
    assert import_features(tmp_path / "in", tmp_path / "store").imported == ("a", "b")
    assert import_features(tmp_path / "in", tmp_path / "store").imported == ("a", "b")
    torch.save(torch.ones(16, DIM), tmp_path / "in/resnet50/x20/pt_files/a.pt")
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert "already has features of resnet50 of slide a, imported from published" in report.refused["a"]
    assert import_features(tmp_path / "in", tmp_path / "store", options=ImportOptions(overwrite=True)).refused == {}
    assert (FeatureStore.open(tmp_path / "store").read("a").features["x20"] == 1).all()


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.sampled_from(["pt", "h5"]), st.integers(1, 8))
def test_changed_bytes_refuse_only_one_slide(tmp_path: Path, seed: int, kind: str, changes: int):
    rng, root = np.random.default_rng(seed), tmp_path / f"{seed}-{kind}-{changes}"
    if kind == "pt":
        write_published(root / "in", slides=("a", "b", "c"))
        (path,) = (root / "in").glob("*/x20/pt_files/b.pt")
    else:
        write_trident(root / "in", slides=("a", "b", "c"))
        (path,) = (root / "in").glob("20x*/features_uni_v1/b.h5")
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), changes):
        data[at] = rng.integers(0, 256)
    path.write_bytes(data)
    report = import_features(root / "in", root / "store")
    assert {"a", "c"} <= set(report.imported)
    assert set(report.imported) | set(report.refused) == {"a", "b", "c"}


def test_a_magnification_that_contradicts_the_folders_is_refused(tmp_path: Path):
    write_clam(tmp_path / "clam")
    write_trident(tmp_path / "trident")
    write_published(tmp_path / "published")
    for layout, encoder in (("clam", "resnet50"), ("trident", "uni"), ("published", "resnet50")):
        options = ImportOptions(magnification=20)
        with pytest.raises(DataError, match="its files are of x10, x5, but --magnification says 20"):
            import_features(tmp_path / layout, tmp_path / "store", layout, encoder, options)
    options = ImportOptions(magnification=20)
    assert import_features(tmp_path / "clam/x20", tmp_path / "store", "clam", "resnet50", options).imported == ("a",)
    with pytest.raises(DataError, match="its files are of x10, but --magnification says 20"):
        import_features(tmp_path / "clam/x10", tmp_path / "store", "clam", "resnet50", options)


def test_linked_folders_are_searched_and_dangling_links_are_refused(tmp_path: Path):
    write_flat(tmp_path / "elsewhere/a.h5", encoder="uni_v1", **KNOWN)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/gone.h5").symlink_to("nowhere.h5")
    (tmp_path / "in/other.npy").touch()
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("a",)
    assert "not a readable HDF5 file" in report.refused["gone"]
    assert report.skipped == {str(tmp_path / "in/other.npy"): "no features of the layout trident"}


def test_tiles_of_an_impossible_size_place_nothing(tmp_path: Path):
    (tmp_path / "in").mkdir()
    write_stamp(tmp_path / "in", slides=("a", "b", "c"))
    with h5py.File(tmp_path / "in" / "b.h5", "r+") as file:
        file.attrs["tile_size_px"] = 1e30
    with h5py.File(tmp_path / "in" / "c.h5", "r+") as file:
        file.attrs["tile_size_px"] = 2240
        file["coords"][0] = 2e9
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("a",)
    assert "says a magnification of 3.90625e+28, expected 0.1 to 200" in report.refused["b"]
    assert "µm per px a tile lies at" in report.refused["c"]


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz", ".h5"])
def test_plain_files_with_a_suffix_in_capitals_are_read(tmp_path: Path, suffix: str):
    (tmp_path / "20x").mkdir()
    write_plain(tmp_path / f"20x/a{suffix}", features(4))
    (tmp_path / f"20x/a{suffix}").rename(tmp_path / f"20x/a{suffix.upper()}")
    report = import_features(tmp_path / "20x", tmp_path / "store", encoder="uni")
    assert (report.layout, report.imported, report.refused) == ("plain", ("a",), {})


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz", ".h5"])
def test_plain_files_are_read_where_no_other_layout_fits(tmp_path: Path, suffix: str):
    for folder, count in (("uni_20x", 16), ("uni_10x", 4), ("uni_5x", 1)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for number, slide in enumerate("ab"):
            write_plain(tmp_path / "in" / folder / f"{slide}{suffix}", features(count, number))
    with pytest.raises(ConfigError, match="do not name their encoder"):
        import_features(tmp_path / "in", tmp_path / "store")
    report = import_features(tmp_path / "in", tmp_path / "store", encoder="uni")
    assert (report.layout, report.imported, report.refused) == ("plain", ("a", "b"), {})
    slide = FeatureStore.open(tmp_path / "store", "uni").read("b")
    assert {name: len(found) for name, found in slide.features.items()} == {"x20": 16, "x10": 4, "x5": 1}
    np.testing.assert_array_equal(slide.features["x20"], features(16, 1).astype(np.float16))
    assert (slide.coords, slide.parents) == ({}, {})


def test_one_folder_of_plain_files_needs_its_magnification(tmp_path: Path):
    (tmp_path / "pt_files").mkdir()
    write_plain(tmp_path / "pt_files/a.pt", features(4))
    torch.save({"features": torch.zeros(3, 2)}, tmp_path / "pt_files/other.pt")
    report = import_features(tmp_path / "pt_files", tmp_path / "store", encoder="uni")
    assert "does not state its magnification. Give --magnification" in report.refused["a"]
    options = ImportOptions(magnification=20)
    report = import_features(tmp_path / "pt_files", tmp_path / "store", encoder="uni", options=options)
    assert report.imported == ("a",)
    assert "contains dict, expected a tensor [N, d]" in report.refused["other"]
    (tmp_path / "x20").mkdir()
    (tmp_path / "pt_files").rename(tmp_path / "x20/pt_files")
    options = ImportOptions(magnification=10)
    with pytest.raises(DataError, match="its files are of x20, but --magnification says 10"):
        import_features(tmp_path / "x20", tmp_path / "o", "plain", encoder="uni", options=options)


@pytest.mark.parametrize("name", ["x20", "features"])
def test_coordinates_of_clam_are_not_lost_without_a_word(tmp_path: Path, name: str):
    write_clam(tmp_path / "clam")
    (tmp_path / "clam/x20/patches").rename(tmp_path / "elsewhere")
    (tmp_path / "clam/x20").rename(tmp_path / name)
    options = ImportOptions(magnification=20)
    report = import_features(tmp_path / name, tmp_path / "store", encoder=f"{tmp_path.name}=uni", options=options)
    assert report.imported == ("a",)
    why = report.skipped[str(tmp_path / name / "h5_files/a.h5")]
    assert "without its folder patches/" in why
    assert "link it next to h5_files/ to import coordinates" in why
    (tmp_path / name / "pt_files/a.pt").unlink()
    with pytest.raises(DataError, match=r"h5_files: features of CLAM without its folder patches/.*Link the folder"):
        import_features(tmp_path / name, tmp_path / "other", encoder="uni", options=options)


def test_what_a_folder_without_features_contains_is_said(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.csv", "c"):
        (tmp_path / "in" / name).write_text("")
    with pytest.raises(DataError, match=r"has no features of published.*; it contains 2 × \.csv, 1 × no suffix\."):
        import_features(tmp_path / "in", tmp_path / "store")
