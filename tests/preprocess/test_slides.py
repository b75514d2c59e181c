"""Slides as hospitals have them: resolution, pyramids, what is not scanned, what cannot be read."""

import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from slide_factory import GLASS, break_tile, drop_tile, tissue_picture, write_slide

from cfusion.errors import DataError
from preprocess.overview import read_overview
from preprocess.resolution import Resolution, read_mpp_table, resolve, scale_of
from preprocess.slide_files import find_slides, same_name, slide_id_of
from preprocess.slide_headers import SERIES, dicom_tags, impossible_tile, other_dicom_class, tiff_is_cut_short
from preprocess.slides import open_slide
from preprocess.tissue import tissue_mask

OME = (
    '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels SizeX="9" '
    'PhysicalSizeX="{}" PhysicalSizeY="{}"/></Image></OME>'
)

PROPERTIES = {
    "mpp": {"openslide.mpp-x": "0.249", "openslide.mpp-y": "0.251"},
    "objective": {"openslide.objective-power": "40"},
    "tiff": {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "40000", "tiff.YResolution": "40000"},
}


@pytest.mark.parametrize("left_out", range(6))
def test_first_source_of_the_resolution_wins(left_out: int):
    order = ["table", "mpp", "objective", "tiff", "default"]
    properties = {k: v for name in order[left_out:] if name in PROPERTIES for k, v in PROPERTIES[name].items()}
    table = {"a": 0.25} if left_out == 0 else {}
    default = 0.25 if left_out <= 4 else None
    if left_out == 5:
        with pytest.raises(DataError, match=r"slide a: .* resolution .*--default-mpp, or --mpp-table"):
            resolve("a", properties, table, default)
        return
    found = resolve("a", properties, table, default)
    assert found.source == order[left_out]
    assert found.mpp == pytest.approx(0.25)


@pytest.mark.parametrize("default", [250.0, 1e-9])
def test_an_implausible_default_is_refused_and_not_ignored(default: float):
    for properties in ({}, {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"}):
        with pytest.raises(
            DataError, match=r"--default-mpp is .*, expected µm/px between 0\.05 and 10\. Give it in µm"
        ):
            resolve("a", properties, {}, default)
    assert resolve("a", {}, {"a": 0.25}, default).source == "table"


def test_objective_power_and_inches_are_converted():
    assert resolve("a", {"openslide.objective-power": "20"}, {}, None).mpp == 0.5
    inches = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800"}
    assert resolve("a", inches, {}, None).mpp == pytest.approx(0.5)


@pytest.mark.parametrize(
    "properties",
    [
        {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "72", "tiff.YResolution": "72"},
        {"openslide.mpp-x": "0"},
        {"openslide.mpp-x": "nan"},
        {"openslide.mpp-x": "unknown"},
        {"openslide.objective-power": "-1"},
    ],
)
def test_a_resolution_that_cannot_be_is_none(properties: dict[str, str]):
    assert resolve("a", properties, {}, 0.5).source == "default"


@pytest.mark.parametrize(
    ("mpp", "nominal", "exact"), [(0.25, 2, 2), (0.265, 2, 1.8868), (0.499, 1, 1.002), (0.2325, 2, 2.1505), (0.5, 1, 1)]
)
def test_nominal_takes_buckets_and_exact_the_true_resolution(mpp: float, nominal: float, exact: float):
    assert scale_of("a", mpp, 20, "nominal").factor == nominal
    assert scale_of("a", mpp, 20, "exact").factor == pytest.approx(exact, abs=1e-4)


def test_nominal_warns_beyond_a_tenth(caplog: pytest.LogCaptureFixture):
    scale_of("a", 0.265, 20, "nominal")
    assert not caplog.records
    scale_of("a", 0.29, 20, "nominal")
    assert "slide a: 0.29 µm/px is taken as 40x" in caplog.text
    assert scale_of("a", 0.29, 20, "nominal").warning == "0.29 µm/px is taken as 40x (0.25 µm/px)"
    assert scale_of("a", 0.29, 20, "exact").taken_as == "exact"


@pytest.mark.parametrize(
    ("mpp", "power"),
    [
        (0.1, 80), (0.159, 80), (0.16, 60), (0.185, 60), (0.1999, 60), (0.2, 40), (0.2325, 40), (0.2999, 40), (0.3, 20),
        (0.325, 20), (0.35, 20), (0.5999, 20), (0.6, 10), (0.65, 10), (1.1999, 10), (1.2, 5), (2.3999, 5),
    ],
)  # fmt: skip
def test_nominal_keeps_to_the_buckets_of_trident(mpp: float, power: float):
    """The limits as TRIDENT's `_fetch_magnification` has them."""
    found = scale_of("a", mpp, 5, "nominal")
    assert (found.factor, found.taken_as) == (power / 5, f"{power}x")


@given(st.floats(0.05, 2.39), st.floats(0.05, 2.39))
def test_a_coarser_slide_is_never_taken_as_a_finer_one(first: float, second: float):
    fine, coarse = sorted((first, second))
    assert scale_of("a", fine, 5, "nominal").factor >= scale_of("a", coarse, 5, "nominal").factor


@pytest.mark.parametrize(
    ("properties", "sides"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, r"0.25 µm/px in x and 0.5 µm/px in y"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.256"}, r"0.25 µm/px in x and 0.256 µm/px in y"),
        (
            {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "40000", "tiff.YResolution": "20000"},
            r"0.25 µm/px in x and 0.5 µm/px in y .TIFF",
        ),
        (
            {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25", "openslide.objective-power": "20"},
            r"0.25 µm/px .mpp. and an objective of 20x",
        ),
        (
            {"openslide.objective-power": "40", "tiff.ImageDescription": OME.format("0.5", "0.5")},
            r"0.5 µm/px .ome. and an objective of 40x",
        ),
        (
            {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25", "tiff.ImageDescription": OME.format("0.5", "0.5")},
            r"0.25 µm/px and 0.5 µm/px in OME-XML",
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_unless_the_table_decides(properties: dict[str, str], sides: str):
    with pytest.raises(DataError, match=f"slide a: its file contradicts itself: {sides}.*--mpp-table"):
        resolve("a", properties, {}, 0.5)
    assert resolve("a", properties, {"a": 0.4}, None) == Resolution(0.4, "table")


@pytest.mark.parametrize(
    ("unit", "size"),
    [("", "0.5"), (' PhysicalSizeXUnit="&#181;m" PhysicalSizeYUnit="&#181;m"', "0.5"), ("nm", "500"), ("mm", "0.0005")],
)
def test_the_resolution_of_ome_xml(tmp_path: Path, unit: str, size: str):
    """With tifffile's own reading of the file as the right value."""
    units = f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"' if unit.isalpha() else unit
    xml = OME.format(size, size).replace("<Pixels", f"<Pixels{units}")
    assert resolve("a", {"tiff.ImageDescription": xml}, {}, None) == Resolution(pytest.approx(0.5), "ome")
    assert tifffile.xml2dict(xml)["OME"]["Image"]["Pixels"]["PhysicalSizeX"] == float(size)


def test_ome_xml_with_a_unit_that_is_no_length_or_with_entities_states_nothing():
    pixel = OME.format("1", "1").replace("<Pixels", '<Pixels PhysicalSizeXUnit="pixel" PhysicalSizeYUnit="pixel"')
    bomb = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "1">]>' + OME.format("&a;", "&a;")
    for xml in (pixel, bomb, OME.format("0.5", "0.5")[:-10]):
        assert resolve("a", {"tiff.ImageDescription": xml}, {}, 0.25).source == "default"


def test_slides_that_are_too_coarse_or_odd_say_so():
    with pytest.raises(DataError, match="slide a: 1 µm/px is too coarse for 20x"):
        scale_of("a", 1.0, 20, "nominal")
    with pytest.raises(DataError, match=r"2.4 µm/px is coarser than 5x.*--resolution exact"):
        scale_of("a", 2.4, 2.5, "nominal")
    assert scale_of("a", 0.1, 20, "exact").factor == pytest.approx(5)


def test_table_of_resolutions(tmp_path: Path):
    table = tmp_path / "mpp.csv"
    table.write_text("slide_id,mpp\na,0.25\nb,0.5\n")
    assert read_mpp_table(table) == {"a": 0.25, "b": 0.5}
    table.write_text("slide_id,mpp\n a.svs ,0.25\nJose\u0301.NDPI,0.5\na,0.25\n")
    assert read_mpp_table(table) == {"a": 0.25, "Jos\u00e9": 0.5}
    table.write_text("slide_id,mpp\na,0.25\nb,0.5\na.svs,0.5\n")
    with pytest.raises(DataError, match=r"mpp.csv, lines 2 and 4: slide a has 0.25 and 0.5 µm/px"):
        read_mpp_table(table)
    table.write_text("slide_id,mpp\na,0.25\nb,fast\n")
    with pytest.raises(DataError, match=r"mpp.csv, line 3: mpp is 'fast', expected µm/px"):
        read_mpp_table(table)
    table.write_text("slide,resolution\na,1\n")
    with pytest.raises(DataError, match="expected slide_id and mpp"):
        read_mpp_table(table)
    with pytest.raises(DataError, match="cannot be read"):
        read_mpp_table(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('slide_id,mpp\na,"0,25"\n', {"a": 0.25}),
        ("Slide_ID; MPP\nslides/a.svs ;0,25\n;\n", {"a": 0.25}),
        ("mpp\tslide_id\n0.25\tC:\\x\\a.svs\n", {"a": 0.25}),
        ("slide_id,mpp\na,0,25\n", "line 2: has 3 fields, but the header 2"),
        ("slide_id,mpp,mpp\na,0.25,0.5\n", "has the columns slide_id, mpp, mpp"),
        ("slide_id,mpp\n,0.25\n", "line 2: has no slide_id"),
        ("slide_id,mpp\n a.svs , 0.25\n a ,0.5\n", "lines 2 and 3: slide a has 0.25 and 0.5 µm/px"),
        ("", r"has the columns \(none\)"),
    ],
)
def test_tables_of_resolutions_as_spreadsheets_write_them(tmp_path: Path, text: str, expected: dict[str, float] | str):
    table = tmp_path / "mpp.csv"
    table.write_text(text)
    if isinstance(expected, dict):
        assert read_mpp_table(table) == expected
    else:
        with pytest.raises(DataError, match=expected):
            read_mpp_table(table)


def test_the_real_slides(shared: Path):
    small = open_slide(shared / "slides/cmu_small_region.svs")
    assert (small.resolution.mpp, small.resolution.source) == (0.499, "mpp")
    with pytest.raises(DataError, match=r"tcga-cr-7395-01a-01-ts1.*--default-mpp"):
        open_slide(shared / "slides/tcga-cr-7395-01a-01-ts1.svs")
    large = open_slide(shared / "slides/tcga-cr-7395-01a-01-ts1.svs", {"tcga-cr-7395-01a-01-ts1": 0.25}, 0.5)
    assert (large.resolution.mpp, large.resolution.source) == (0.25, "table")
    assert large.downsamples[1] == pytest.approx(2.0005, abs=1e-4)


@pytest.mark.parametrize(
    ("size", "levels"),
    [((4443, 512), ((2221, 256),)), ((20479, 256), ((5120, 64),)), ((4000, 1000), ()), ((900, 700), ())],
    ids=["2.0005", "3.9998", "one level", "smaller than a cell"],
)
def test_overview_lies_where_the_slide_lies(tmp_path: Path, size: tuple[int, int], levels):
    picture = np.full((size[1], size[0], 3), 240, np.uint8)
    x, y = size[0] * 9 // 10, size[1] // 2
    picture[y - 64 : y + 64, x - 64 : x + 64] = (120, 20, 120)
    slide = open_slide(write_slide(tmp_path / "a.svs", picture, mpp=0.5, level_sizes=levels))
    overview = read_overview(slide, 8.0)
    assert overview.px_level0 == pytest.approx((16, 16), rel=0.02)
    rows, columns = np.nonzero(overview.rgb[..., 1] < 100)
    assert (columns.mean() + 0.5) * overview.px_level0[0] == pytest.approx(x, abs=12)
    assert (rows.mean() + 0.5) * overview.px_level0[1] == pytest.approx(y, abs=12)
    assert overview.scanned.all()


def test_what_lies_outside_is_background_and_not_black(tmp_path: Path):
    slide = open_slide(write_slide(tmp_path / "a.svs", tissue_picture(600, 500)))
    rgba = slide.read_rgba(500, 400, 256, 256)
    assert (rgba[120:, :, 3] == 0).all()
    rgb = slide.composite(rgba)
    assert (rgb[120:] == 255).all()
    assert np.abs(rgb[:90, :90].astype(int) - GLASS).max() < 12


def test_a_bad_read_leaves_the_slide_usable(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1024, 512))
    good = open_slide(path).read_rgba(512, 0, 256, 256)
    break_tile(path, 0)
    slide = open_slide(path)
    for _ in range(2):
        with pytest.raises(DataError, match=r"a.svs: the region at 0, 0 cannot be read"):
            slide.read_rgba(0, 0, 256, 256)
        np.testing.assert_array_equal(slide.read_rgba(512, 0, 256, 256), good)


def test_a_good_region_survives_the_error_of_another_thread(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1024, 512))
    good = open_slide(path).read_rgba(512, 0, 256, 256)
    break_tile(path, 0)
    slide = open_slide(path)
    # What another thread does between this one's look at the handle and its reading.
    with pytest.raises(openslide.OpenSlideError):
        slide._handle.read_region((0, 0), 0, (256, 256))
    np.testing.assert_array_equal(slide.read_rgba(512, 0, 256, 256), good)


def test_an_unreadable_part_of_the_overview_is_marked(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(2048, 2048), level_sizes=((512, 512),))
    break_tile(path, 0, level=1)
    overview = read_overview(open_slide(path))
    assert overview.unread.any()


@pytest.mark.parametrize("fault", [drop_tile, break_tile], ids=["hole", "broken"])
def test_level_0_decides_what_the_overview_lacks(tmp_path: Path, fault):
    """The right overview is that of the same slide without a fault."""
    picture = tissue_picture(4096, 4096, share=0.6)
    path = write_slide(tmp_path / "a.svs", picture, level_sizes=((1024, 1024),))
    intact = read_overview(open_slide(path))
    for number in (0, 5, 10):
        fault(path, number, level=1)
    mended = read_overview(open_slide(path))
    assert mended.scanned.all()
    assert not mended.lost.any()
    right, found = (tissue_mask(o, 8.0) for o in (intact, mended))
    assert right.any()
    assert (right != found).mean() < 0.002


def test_what_no_level_can_decode_is_lost_and_what_none_has_is_not_scanned(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(2048, 2048), level_sizes=((512, 512),))
    for number, fault in ((0, break_tile), (3, drop_tile)):
        fault(path, number, level=1)
    for number in (*range(4), *range(8, 12), *range(16, 20), *range(24, 28)):
        break_tile(path, number)
    for number in (36, 37, 38, 39, 44, 45, 46, 47, 52, 53, 54, 55, 60, 61, 62, 63):
        drop_tile(path, number)
    overview = read_overview(open_slide(path))
    height, width = overview.scanned.shape
    assert overview.lost[: height // 2 - 1, : width // 2 - 1].all()
    assert not overview.scanned[height // 2 + 1 :, width // 2 + 1 :].any()
    assert overview.scanned[: height // 2 - 1, width // 2 + 1 :].all()


@pytest.mark.parametrize("content", [b"", b"not a slide at all", b"II*\0" + bytes(100)])
def test_a_file_that_is_no_slide(tmp_path: Path, content: bytes):
    (tmp_path / "a.svs").write_bytes(content)
    with pytest.raises(DataError, match=r"a.svs: (OpenSlide does not know this format|the slide is damaged)"):
        open_slide(tmp_path / "a.svs")


def test_finding_slides(tmp_path: Path):
    for name in ("b.svs", "sub/a.TIFF", "sub/b.ndpi", "notes.txt", ".hidden/c.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_slides(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in found] == ["b.svs", "sub/a.TIFF", "sub/b.ndpi"]
    assert [slide_id_of(p) for p in found] == ["b", "a", "b"]
    assert same_name(found) == {"b": [tmp_path / "b.svs", tmp_path / "sub/b.ndpi"]}
    with pytest.raises(DataError, match="no such file or folder"):
        find_slides(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"contains no slides. Looked for .*\.svs"):
        find_slides(tmp_path / "empty")


def test_links_to_folders_are_followed_and_no_folder_is_searched_twice(tmp_path: Path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "own", elsewhere):
        folder.mkdir(parents=True)
    (root / "own" / "a.svs").touch()
    (elsewhere / "b.svs").touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "linked-again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    assert [str(p.relative_to(root)) for p in find_slides(root)] == ["linked/b.svs", "own/a.svs"]


def test_whatever_looks_like_a_slide_is_listed(tmp_path: Path):
    for name in ("a.qptiff", "b.isyntax", "deep/er/c.czi"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.svs").symlink_to("nowhere.svs")
    found = find_slides(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in found] == ["a.qptiff", "b.isyntax", "deep/er/c.czi", "gone.svs"]
    with pytest.raises(DataError, match=r"gone.svs: links to nowhere.svs, which does not exist"):
        open_slide(tmp_path / "gone.svs")


def dicom(path: Path, series: str, kind: str = "1.2.840.10008.5.1.4.1.1.77.1.6") -> Path:
    """Write a DICOM header whose sequences hold a decoy of the series."""

    def element(group, number, vr, value):
        value = value + b"\0" * (len(value) % 2)
        long = vr in (b"SQ", b"OB")
        return (
            struct.pack("<HH2s", group, number, vr)
            + struct.pack("<HI" if long else "<H", *([0] * long), len(value))
            + value
        )

    decoy = element(0x0020, 0x000E, b"UI", b"9.9.9")
    item = struct.pack("<HHI", 0xFFFE, 0xE000, len(decoy)) + decoy
    untold = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + decoy + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        bytes(128) + b"DICM" + element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1")
        + element(0x0008, 0x0016, b"UI", kind.encode()) + element(0x0008, 0x1115, b"SQ", item)
        + struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + untold + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        + element(0x0020, 0x000E, b"UI", series.encode())
    )  # fmt: skip
    return path


def test_dicom_files_are_slides_by_series(tmp_path: Path):
    for name, series in (
        ("m/1.dcm", "1.1"),
        ("m/2.dcm", "1.2"),
        ("m/3.dcm", "1.1"),
        ("one/x.dcm", "1.3"),
        ("one/IM0001", "1.3"),
    ):
        dicom(tmp_path / name, series)
    report = dicom(tmp_path / "one/report.dcm", "1.4", "1.2.840.10008.5.1.4.1.1.88.33")
    found = find_slides(tmp_path)
    names = [(str(p.relative_to(tmp_path)), slide_id_of(p)) for p in found]
    assert names == [("m/1.dcm", "1"), ("m/2.dcm", "2"), ("one/IM0001", "one"), ("one/report.dcm", "report")]
    assert slide_id_of(tmp_path / "m/3.dcm") == "1"
    assert other_dicom_class(report) == "1.2.840.10008.5.1.4.1.1.88.33"
    assert {other_dicom_class(p) for p in found if p != report} == {""}


def test_two_real_dicom_slides_in_one_folder(shared: Path, monkeypatch: pytest.MonkeyPatch):
    """With OpenSlide's property as the right series."""
    folder = shared / "cases/slides/r03_two_dicom"
    found = find_slides(folder)
    assert [slide_id_of(p) for p in found] == ["A_2336245", "B_3581709"]
    for path in found:
        with openslide.OpenSlide(path) as slide:
            assert dicom_tags(path)[SERIES] == slide.properties["dicom.SeriesInstanceUID"]
    monkeypatch.chdir(folder)
    assert [slide_id_of(p) for p in find_slides(Path())] == ["A_2336245", "B_3581709"]


def test_the_name_of_a_lone_dicom_file_is_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(dicom(tmp_path / "case" / "a.dcm", "1.1").parent)
    assert slide_id_of(Path("a.dcm")) == "case"


@pytest.mark.parametrize("big", [False, True])
def test_a_slide_that_is_cut_short_or_in_an_unknown_compression_says_so(tmp_path: Path, big: bool):
    path = tmp_path / "a.tif"
    picture = tissue_picture(1100, 1100)
    options = {"tile": (256, 256), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=big) as tiff:
        tiff.write(picture, compression="jpeg2000", **options)
    with pytest.raises(DataError, match=r"does not read this kind .*Unsupported.*not damaged. Convert it"):
        open_slide(path)
    with tifffile.TiffWriter(path, bigtiff=big) as tiff:
        tiff.write(picture, compression="deflate", **options)
    data = bytearray(path.read_bytes())
    at, kind = (8, "<Q") if big else (4, "<I")
    struct.pack_into(kind, data, at, len(data) + 1000)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cut short: a directory.* past the end.*Download the file again"):
        open_slide(path)


@pytest.mark.parametrize("share", [0.2, 0.55])
def test_a_slide_of_which_only_the_beginning_arrived_is_cut_short(tmp_path: Path, share: float):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1100, 1100), level_sizes=((275, 275),))
    assert not tiff_is_cut_short(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert tiff_is_cut_short(path)
    with pytest.raises(DataError, match=r"cut short.*Download the file again"):
        open_slide(path)


def test_tiles_of_an_impossible_size_do_not_end_the_process(tmp_path: Path):
    """OpenSlide aborts if a tile needs more memory than the machine has."""
    path = write_slide(tmp_path / "a.svs", tissue_picture(1100, 1100))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["TileWidth"].overwrite(1 << 30, dtype="I")
    with pytest.raises(DataError, match=r"a.svs: the slide is damaged"):
        read_overview(open_slide(path))


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
@pytest.mark.parametrize("change", ["type", "value"])
def test_a_tile_of_more_bytes_than_the_file_does_not_end_the_process(tmp_path: Path, compression: str, change: str):
    """A wrong type makes one number of two byte counts."""
    path = write_slide(tmp_path / "a.svs", tissue_picture(700, 700), compression=compression)
    assert impossible_tile(path) == ""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        if change == "value":
            tag.overwrite([2**31 if i == 1 else count for i, count in enumerate(tag.value)], dtype="I")
        at = tag.offset
    if change == "type":
        data = bytearray(path.read_bytes())
        struct.pack_into("<H", data, at + 2, 16)
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.svs: the slide is damaged: a tile of image 0 has \d+ bytes, but the file"):
        open_slide(path)


def test_the_dicom_files_of_a_folder_are_one_slide(tmp_path: Path):
    for name in ("case-1/0.dcm", "case-1/1.dcm", "case-2/b.dcm", "case-2/a.DCM", "c.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_slides(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in found] == ["c.svs", "case-1/0.dcm", "case-2/a.DCM"]
    assert [slide_id_of(p) for p in found] == ["c", "case-1", "case-2"]


@pytest.fixture
def rle_slide(tmp_path: Path, shared: Path) -> tuple[Path, Path]:
    """A DICOM slide that OpenSlide reads, and the same with tiles in RLE and a level more, which it does not read."""
    wsidicom = pytest.importorskip("wsidicom", reason="wsidicom is not installed")
    from wsidicom.codec.settings import RleSettings

    original = tmp_path / "original" / "1.dcm"
    original.parent.mkdir()
    shutil.copy(shared / "cases/slides/r03_two_dicom/A_2336245.dcm", original)
    (tmp_path / "rle").mkdir()
    with wsidicom.WsiDicom.open(original) as slide:
        slide.save(tmp_path / "rle", transcoding=RleSettings(), add_missing_levels=True, include_labels=False)
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(min((tmp_path / "rle").iterdir()))
    return original, tmp_path / "rle"


def test_a_dicom_slide_that_openslide_refuses_is_read_by_wsidicom(rle_slide):
    original, folder = rle_slide
    (path,) = find_slides(folder)
    assert slide_id_of(path) == "rle"
    slide, right = open_slide(path, default_mpp=0.5), open_slide(original, default_mpp=0.5)
    assert slide.size_px == right.size_px
    assert len(slide.level_sizes_px) > 1
    assert slide.resolution.mpp == pytest.approx(right.resolution.mpp)
    width, height = slide.size_px
    for place in ((0, 0, 100, 80), (width - 50, height - 40, 100, 80), (-20, -10, 64, 64), (width + 5, 0, 10, 10)):
        np.testing.assert_array_equal(slide.read_rgba(*place), right.read_rgba(*place))
    found, expected = (read_overview(s).rgb.astype(int) for s in (slide, right))
    assert np.abs(found - expected).mean() < 3


def test_without_wsidicom_the_extra_is_named(rle_slide, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wsidicom", None)
    with pytest.raises(DataError, match=r"OpenSlide does not read this DICOM.*Install it with: .*cfusion\[dicom\]"):
        open_slide(min(rle_slide[1].iterdir()))


def test_a_damaged_dicom_slide_is_not_called_unknown(rle_slide):
    path = min(rle_slide[1].iterdir())
    for file in rle_slide[1].iterdir():
        file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(DataError, match=r"damaged or truncated|does not know"):
        open_slide(path)


def test_an_ome_tiff_with_its_pyramid_in_subifds_is_read(tmp_path: Path):
    path, picture = tmp_path / "a.ome.tif", tissue_picture(900, 700)
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 90}}
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture, subifds=2, metadata={"axes": "YXS", **sizes}, **options)
        for down in (2, 4):
            tiff.write(np.ascontiguousarray(picture[::down, ::down]), subfiletype=1, **options)
    slide = open_slide(path)
    assert slide.size_px == (900, 700)
    assert slide.resolution == Resolution(0.25, "ome")
    found = slide.read_rgba(300, 200, 256, 256)[..., :3].astype(int)
    assert np.abs(found - picture[200:456, 300:556]).mean() < 3
    assert read_overview(slide).scanned.all()
