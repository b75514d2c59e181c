"""Slides as hospitals have them: resolution, pyramids, what is not scanned, what cannot be read."""

from pathlib import Path

import numpy as np
import openslide
import pytest
from slide_factory import GLASS, break_tile, tissue_picture, write_slide

from cfusion.errors import DataError
from preprocess.resolution import finest_scale, read_mpp_table, resolve
from preprocess.slides import find_slides, open_slide, same_name, slide_id_of

PROPERTIES = {
    "mpp": {"openslide.mpp-x": "0.24", "openslide.mpp-y": "0.26"},
    "objective": {"openslide.objective-power": "40"},
    "tiff": {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "40000", "tiff.YResolution": "40000"},
}


@pytest.mark.parametrize("left_out", range(6))
def test_first_source_of_the_resolution_wins(left_out: int):
    order = ["mpp", "objective", "tiff", "table", "default"]
    properties = {k: v for name in order[left_out:] if name in PROPERTIES for k, v in PROPERTIES[name].items()}
    table = {"a": 0.25} if left_out <= 3 else {}
    default = 0.25 if left_out <= 4 else None
    if left_out == 5:
        with pytest.raises(DataError, match=r"slide a: .* resolution .*--default-mpp, or --mpp-table"):
            resolve("a", properties, table, default)
        return
    found = resolve("a", properties, table, default)
    assert found.source == order[left_out]
    assert found.mpp == pytest.approx(0.25)


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
    assert finest_scale("a", mpp, 20, "nominal") == nominal
    assert finest_scale("a", mpp, 20, "exact") == pytest.approx(exact, abs=1e-4)


def test_nominal_warns_beyond_a_tenth(caplog: pytest.LogCaptureFixture):
    finest_scale("a", 0.265, 20, "nominal")
    assert not caplog.records
    finest_scale("a", 0.29, 20, "nominal")
    assert "slide a: 0.29 µm/px is taken as 40x" in caplog.text


def test_slides_that_are_too_coarse_or_odd_say_so():
    with pytest.raises(DataError, match="slide a: 1 µm/px is too coarse for 20x"):
        finest_scale("a", 1.0, 20, "nominal")
    with pytest.raises(DataError, match=r"0.1 µm/px is not near 40x, 20x, 10x.*--resolution exact"):
        finest_scale("a", 0.1, 20, "nominal")
    assert finest_scale("a", 0.1, 20, "exact") == pytest.approx(5)


def test_table_of_resolutions(tmp_path: Path):
    table = tmp_path / "mpp.csv"
    table.write_text("slide_id,mpp\na,0.25\nb,0.5\n")
    assert read_mpp_table(table) == {"a": 0.25, "b": 0.5}
    table.write_text("slide_id,mpp\na,0.25\nb,fast\n")
    with pytest.raises(DataError, match=r"mpp.csv, line 3: mpp is 'fast', expected µm/px"):
        read_mpp_table(table)
    table.write_text("slide,resolution\na,1\n")
    with pytest.raises(DataError, match="expected slide_id and mpp"):
        read_mpp_table(table)
    with pytest.raises(DataError, match="cannot be read"):
        read_mpp_table(tmp_path / "none.csv")


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
    overview = slide.overview(8.0)
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
    overview = open_slide(path).overview()
    assert overview.unread.any()


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


def test_the_dicom_files_of_a_folder_are_one_slide(tmp_path: Path):
    for name in ("case-1/0.dcm", "case-1/1.dcm", "case-2/b.dcm", "case-2/a.DCM", "c.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_slides(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in found] == ["c.svs", "case-1/0.dcm", "case-2/a.DCM"]
    assert [slide_id_of(p) for p in found] == ["c", "case-1", "case-2"]
