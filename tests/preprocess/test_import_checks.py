"""Features that contradict themselves, the rest of their folder or the store: refused, both sides named."""

import collections
import csv
import errno
import os
import unicodedata
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from made_up_features import (
    DIM,
    KNOWN,
    features,
    grid,
    replace,
    write_clam,
    write_flat,
    write_published,
    write_stamp,
    write_trident,
)
from slide_factory import tissue_picture, write_slide

from cfusion.cohort.identifiers import slide_stem
from cfusion.data.store import FeatureStore
from cfusion.errors import DataError
from preprocess.importers import ImportOptions, ImportReport, import_features


def rows(report: ImportReport) -> list[dict[str, str]]:
    """The table of an import."""
    with report.table.open() as stream:
        return list(csv.DictReader(stream))


def warnings_of(report: ImportReport, name: str) -> str:
    """What the table says is suspicious of a file."""
    (row,) = (row for row in rows(report) if Path(row["path"]).name == name)
    assert row["status"] == "done"
    return row["warnings"]


def change(path: Path, function) -> None:
    with h5py.File(path, "r+") as file:
        function(file)


def test_an_embedding_of_another_width_is_refused_with_both_files(tmp_path: Path):
    write_published(tmp_path / "in", slides=("a", "b", "odd"))
    torch.save(torch.ones(4, DIM + 1), tmp_path / "in/resnet50/x10/pt_files/odd.pt")
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("a", "b")
    assert "x10/pt_files/odd.pt: has embeddings of width 7, but" in report.refused["odd"]
    assert "a.pt and most others have width 6" in report.refused["odd"]
    assert {row["status"] for row in rows(report) if row["slide_id"] == "odd"} == {"failed"}


def test_two_widths_of_which_none_prevails_are_refused(tmp_path: Path):
    for name, width in (("a", 6), ("b", 8)):
        folder = tmp_path / "in/resnet50/x20/pt_files"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.ones(4, width), folder / f"{name}.pt")
    with pytest.raises(DataError, match=r"a\.pt has embeddings of width 6, but .*b\.pt of width 8") as refused:
        import_features(tmp_path / "in", tmp_path / "store")
    assert "--only" in refused.value.remedy
    assert import_features(tmp_path / "in", tmp_path / "store", options=ImportOptions(only=("a.pt",))).imported == (
        "a",
    )


def test_the_width_of_the_store_counts_unless_all_is_replaced(tmp_path: Path):
    write_published(tmp_path / "in", slides=("a",))
    import_features(tmp_path / "in", tmp_path / "store")
    for path in (tmp_path / "in").rglob("a.pt"):
        torch.save(torch.ones(4, 3), path)
    with pytest.raises(DataError, match=r"slide a has embeddings of width 6, but .*a\.pt has width 3") as refused:
        import_features(tmp_path / "in", tmp_path / "store")
    assert "--encoder resnet50=NAME" in refused.value.remedy
    assert import_features(tmp_path / "in", tmp_path / "store", encoder="resnet50=other").imported == ("a",)
    options = ImportOptions(overwrite=True)
    assert import_features(tmp_path / "in", tmp_path / "store", options=options).imported == ("a",)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"patch_size": 512}, "say tiles of 512 px with an overlap of 0, its folder 256 px with 0"),
        ({"overlap": 64}, "say tiles of 256 px with an overlap of 64, its folder 256 px with 0"),
        ({"level0_magnification": 20}, "are 256 px of level 0, but patch_size_level0 is 512"),
        ({"patch_size_level0": 1024}, "are 512 px of level 0, but patch_size_level0 is 1024"),
        ({"overlap": 300}, "with an overlap of 300"),
        ({"target_magnification": 10}, "attributes say 10x, but its folder or --magnification says 20x"),
        (
            {"level0_width": 4096, "level0_height": 1024},
            "its tiles reach 4096 × 4096 px, but the slide has 4096 × 1024",
        ),
    ],
)
def test_attributes_that_contradict_each_other_or_their_folder(tmp_path: Path, attrs: dict[str, int], message: str):
    write_trident(tmp_path / "in", slides=("a", "b"))
    change(tmp_path / "in/20x_256px_0px_overlap/features_uni_v1/a.h5", lambda file: file["coords"].attrs.update(attrs))
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert message in report.refused["a"]
    assert {(row["slide_id"], row["status"]) for row in rows(report)} == {("a", "failed"), ("b", "done")}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (grid(512, 8, 8) - (512, 0), "a tile lies at [-512, 0], which cannot be on a slide"),
        (grid(128, 8, 8), "its tiles lie 128 px apart, but its attributes say 512 px"),
        (grid(512, 8, 8) // 512, "its tiles lie 1 px apart, but its attributes say 512 px"),
        (np.repeat(grid(512, 8, 4), 2, axis=0), "its tiles lie 0 px apart"),
    ],
)
def test_coordinates_in_another_unit_or_off_the_slide(tmp_path: Path, places: np.ndarray, message: str):
    write_trident(tmp_path / "in", slides=("a", "b"))
    change(tmp_path / "in/20x_256px_0px_overlap/features_uni_v1/a.h5", replace("coords", places))
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert message in report.refused["a"]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (grid(224, 3, 3), "its tiles lie 224 µm apart, but its attributes say 256 µm"),
        (grid(256, 3, 3) - (300, 0), "a tile lies at [-300.0, 0.0], which cannot be on a slide"),
    ],
)
def test_coordinates_of_stamp_that_are_no_micrometres(tmp_path: Path, places: np.ndarray, message: str):
    (tmp_path / "in").mkdir()
    write_stamp(tmp_path / "in", slides=("a", "b"))
    change(tmp_path / "in/a.h5", replace("coords", places.astype(np.float32)))
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert message in report.refused["a"]


def test_sides_that_contradict_the_magnifications_are_refused(tmp_path: Path):
    """A folder under the name of another magnification: its tiles have the side of the other's."""
    write_clam(tmp_path / "in")
    for sub in ("patches", "h5_files", "pt_files"):
        (tmp_path / "in/x10" / sub / "a.h5").unlink(missing_ok=True)
        (tmp_path / "in/x10" / sub / "a.pt").unlink(missing_ok=True)
        for path in (tmp_path / "in/x20" / sub).iterdir():
            (tmp_path / "in/x10" / sub / path.name).write_bytes(path.read_bytes())
    report = import_features(tmp_path / "in", tmp_path / "store", encoder="resnet50")
    assert "its tiles have 512 px of level 0 at x20 and 512 px at x10" in report.refused["a"]


def test_tiles_of_another_size_in_px_at_another_magnification_are_no_contradiction(tmp_path: Path):
    for folder, side, px in (("20x_256px_0px_overlap", 512, 256), ("10x_512px_0px_overlap", 2048, 512)):
        attrs = {"patch_size": px, "patch_size_level0": side, "target_magnification": int(folder[:2]), "overlap": 0}
        path = tmp_path / "in" / folder / "features_e/a.h5"
        write_flat(path, encoder="e", **attrs)
        change(path, replace("coords", grid(side, 3, 3)))
    assert import_features(tmp_path / "in", tmp_path / "store").imported == ("a",)


def test_a_slide_that_was_scanned_at_another_magnification_is_refused(tmp_path: Path):
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides/a.svs", tissue_picture(1600, 1600), mpp=0.5)
    write_flat(tmp_path / "in/a.h5", encoder="uni_v1", **KNOWN, level0_magnification=40)
    report = import_features(tmp_path / "in", tmp_path / "store", options=ImportOptions(slides=tmp_path / "slides"))
    assert "its file says that the slide was scanned at 40x, but" in report.refused["a"]
    assert "has 0.5 µm/px (mpp), which is 20x" in report.refused["a"]
    (tmp_path / "t.csv").write_text("slide_id,mpp\na,0.25\n")
    options = ImportOptions(slides=tmp_path / "slides", mpp_table=tmp_path / "t.csv")
    assert import_features(tmp_path / "in", tmp_path / "store", options=options).imported == ("a",)


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "the features of tile 3 are not finite (1 of 16 tiles)"), (-7e4, "reach 7e+04, more than f16 can hold")],
)
def test_features_that_are_not_finite(tmp_path: Path, value: float, message: str):
    write_published(tmp_path / "in")
    values = torch.from_numpy(features(16))
    values[3, 2] = value
    torch.save(values, tmp_path / "in/resnet50/x20/pt_files/a.pt")
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert message in report.refused["a"]


HUGE = (2**40, DIM)


def huge_h5(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        attrs = dict(file["features"].attrs)
        del file["features"]
        file.create_dataset("features", HUGE, np.float32, chunks=(1024, DIM)).attrs.update(attrs)


def huge_npy(path: Path) -> None:
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": HUGE})


def huge_npz(path: Path) -> None:
    huge_npy(path.with_suffix(".npy"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path.with_suffix(".npy"), "features.npy")
    path.with_suffix(".npy").unlink()


def expanded(path: Path) -> None:
    torch.save(torch.zeros(1).expand(HUGE), path)


def packed_zeros(path: Path) -> None:
    """An archive of 300 kB that unpacks to 300 MB."""
    source = path.with_suffix(".plain")
    torch.save(torch.zeros(12_800_000, DIM), source)
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in plain.infolist():
            archive.writestr(part.filename, plain.read(part))
    source.unlink()


@pytest.mark.parametrize(
    ("suffix", "make"),
    [(".h5", huge_h5), (".npy", huge_npy), (".npz", huge_npz), (".pt", expanded), (".pt", packed_zeros)],
    ids=["h5", "npy", "npz", "expanded tensor", "packed zeros"],
)
def test_an_array_of_an_absurd_size_is_refused_before_it_is_read(tmp_path: Path, suffix: str, make):
    if suffix == ".h5":
        write_trident(tmp_path / "in", slides=("a", "b"))
        path = tmp_path / "in/20x_256px_0px_overlap/features_uni_v1/a.h5"
    else:
        write_published(tmp_path / "in")
        (tmp_path / "in/resnet50/x20/pt_files/a.pt").unlink()
        path = tmp_path / f"in/resnet50/x20/pt_files/a{suffix}"
    make(path)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert "a" in report.refused
    assert "GB of numbers, but stores" in report.refused["a"] or "is expanded from 4 bytes" in report.refused["a"]


def test_a_dataset_that_was_never_written_is_no_zeros(tmp_path: Path):
    """HDF5 reads zeros for chunks that an interrupted program did not write."""
    write_trident(tmp_path / "in", slides=("a", "b", "c"))
    folder = tmp_path / "in/20x_256px_0px_overlap/features_uni_v1"
    for name, layout in (("a", {"chunks": (16, DIM)}), ("b", {})):
        with h5py.File(folder / f"{name}.h5", "r+") as file:
            del file["features"]
            stored = file.create_dataset("features", (64, DIM), np.float32, **layout)
            if name == "a":
                stored[:48] = features(48)
            stored.attrs["encoder"] = "uni_v1"
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("c",)
    assert "25% of its 'features' were never written" in report.refused["a"]
    assert "100% of its 'features' were never written" in report.refused["b"]


def test_features_that_are_whole_numbers_are_refused(tmp_path: Path):
    write_trident(tmp_path / "in", slides=("a", "b"))
    values = np.arange(64 * DIM).reshape(64, DIM)
    change(tmp_path / "in/20x_256px_0px_overlap/features_uni_v1/a.h5", replace("features", values))
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert "its features are int64, expected floats" in report.refused["a"]


def test_the_table_has_a_row_for_each_file_and_says_what_is_suspicious(tmp_path: Path):
    write_trident(tmp_path / "in", slides=("a", "b", "c", "sparse"))
    (tmp_path / "in/5x_256px_0px_overlap/features_uni_v1/c.h5").unlink()
    (tmp_path / "in/other.npy").touch()
    folder = tmp_path / "in/20x_256px_0px_overlap/features_uni_v1"
    change(folder / "b.h5", replace("features", np.ones((64, DIM), np.float32)))
    change(folder / "sparse.h5", replace("coords", grid(1024, 4, 16)))
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("a", "b", "c", "sparse")
    listed = collections.Counter((row["slide_id"], row["status"]) for row in rows(report))
    assert listed == {
        ("a", "done"): 3, ("b", "done"): 3, ("c", "done"): 2, ("sparse", "done"): 3,
        ("other", "skipped"): 1, ("c_patches", "skipped"): 1,
    }  # fmt: skip
    found = {(row["slide_id"], Path(row["path"]).parts[-3].split("_")[0]): row for row in rows(report)}
    assert (found["a", "20x"]["warnings"], found["a", "20x"]["tiles"]) == ("", "64")
    assert "all 64 tiles have the same features" in found["b", "20x"]["warnings"]
    assert "has the features of slide a" in found["b", "10x"]["warnings"]
    assert "lacks x5, which most slides have" in found["c", "20x"]["warnings"]
    assert "no two tiles touch: tiles of 512 px lie at least 1024 px apart" in found["sparse", "20x"]["warnings"]
    assert "48 of 64 tiles of x20 lie in no tile of x10 and were left out" in found["sparse", "20x"]["warnings"]


def test_overlapping_tiles_of_clam_and_twins_are_suspicious(tmp_path: Path):
    """CLAM's files do not state their step."""
    write_clam(tmp_path / "in", coords_in_features=False)
    path = tmp_path / "in/x20/patches/a.h5"
    places = grid(256, 8, 8)
    places[1] = places[0]
    change(path, replace("coords", places))
    report = import_features(tmp_path / "in/x20", tmp_path / "store", "clam", "r", ImportOptions(magnification=20))
    text = warnings_of(report, "a.h5")
    assert "tiles of 512 px lie 256 px apart, so they overlap" in text
    assert "2 tiles lie at the place of another tile" in text


def test_clam_files_of_one_slide_that_differ_are_refused(tmp_path: Path):
    write_clam(tmp_path / "in", slides=("a", "b", "c"))
    torch.save(torch.ones(63, DIM), tmp_path / "in/x20/pt_files/a.pt")
    folder = tmp_path / "in/x20/pt_files"
    (folder / "b.svs.pt").write_bytes((folder / "b.pt").read_bytes())
    report = import_features(tmp_path / "in", tmp_path / "store", encoder="resnet50")
    assert report.imported == ("c",)
    assert "a.h5 has features [64, 6], but" in report.refused["a"]
    assert "b.pt and" in report.refused["b"]
    assert "b.svs.pt are both slide b" in report.refused["b"]
    assert {row["status"] for row in rows(report) if row["slide_id"] == "b"} == {"failed", "skipped"}


@pytest.mark.parametrize("magnification", [1e9, 1e-9])
def test_an_impossible_magnification_refuses_one_slide(tmp_path: Path, magnification: float):
    for name, value in (("a", magnification), ("b", 20)):
        write_flat(tmp_path / f"in/{name}.h5", encoder="uni_v1", **{**KNOWN, "target_magnification": value})
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("b",)
    assert "expected 0.1 to 200" in report.refused["a"]


def test_odd_places_end_no_import(tmp_path: Path):
    """A loop of links, a link to itself, a folder with the name of a file, and a damaged group in the store."""
    for name in ("a", "50%", "x" * 250):
        write_flat(tmp_path / f"in/{name}.h5", encoder="uni_v1", **KNOWN)
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/self.h5").symlink_to(tmp_path / "in/self.h5")
    (tmp_path / "in/folder.h5").mkdir()
    (tmp_path / "store/uni").mkdir(parents=True)
    (tmp_path / "store/uni/other.zarr").touch()
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("50%", "a")
    assert set(report.refused) == {"self", "x" * 250}
    with pytest.raises(DataError, match="a file, expected a folder"):
        import_features(tmp_path / "in/a.h5", tmp_path / "store")


def test_a_folder_that_cannot_be_searched_is_listed_and_a_pipe_is_no_file(tmp_path: Path, monkeypatch):
    write_flat(tmp_path / "in/a.h5", encoder="uni_v1", **KNOWN)
    write_flat(tmp_path / "in/locked/b.h5", encoder="uni_v1", **KNOWN)
    os.mkfifo(tmp_path / "in/pipe.h5")
    search = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return search(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("a",)
    assert "in/locked: the folder cannot be searched" in report.refused["locked"]


@pytest.mark.parametrize("name", ["s.svs.h5", "s.SVS.h5", "s.h5"])
def test_features_may_keep_the_suffix_of_their_slide(tmp_path: Path, name: str):
    write_flat(tmp_path / "in" / name, encoder="uni_v1", **KNOWN)
    assert import_features(tmp_path / "in", tmp_path / "store").imported == ("s",)
    assert FeatureStore.open(tmp_path / "store").slide_ids() == [slide_stem(name)] == [slide_stem("s.svs")]


def test_two_spellings_of_one_slide_are_refused_with_both_files(tmp_path: Path):
    accents = [unicodedata.normalize(form, "José") for form in ("NFC", "NFD")]
    for name in ("s.h5", "s.svs.h5", "t.h5", *(f"{accent}.h5" for accent in accents)):
        write_flat(tmp_path / "in" / name, encoder="uni_v1", **KNOWN)
    report = import_features(tmp_path / "in", tmp_path / "store")
    assert report.imported == ("t",)
    assert "s.h5 and" in report.refused["s"]
    assert "s.svs.h5 are both slide s at x20" in report.refused["s"]
    assert "are both slide José" in report.refused[accents[0]]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.svs", "a"), ("a.svs.h5", "a"), ("a.npz", "a"), ("A.b.c.SVS.PT", "A.b.c"), ("a.b", "a.b"), ("x/a.kfb", "a"),
        ("a.ome.tif", "a.ome"), ("a.svs.tif", "a.svs"), ("a.zarr", "a"),
    ],
)  # fmt: skip
def test_tables_and_features_spell_a_slide_alike(name: str, stem: str):
    assert slide_stem(name) == stem
