"""Test that extraction reports damaged slides, full disks, killed processes and bad encoders, and hides nothing."""

import csv
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from slide_factory import break_tile, drop_tile, tissue_picture, write_slide

from cfusion.console import Progress
from cfusion.data.store import FeatureStore
from cfusion.errors import ConfigError, DataError
from cfusion.files import atomic_path
from preprocess import extraction, slide_plan
from preprocess.encoders import load_slots
from preprocess.extraction import preprocess_slides
from preprocess.settings import PreprocessConfig
from preprocess.tissue import METHOD

SIDE = 1700


class MeanColour:
    """An encoder with predictable embeddings: the mean of each channel."""

    name = "mean-colour"

    def __init__(self, dim: int = 3, returns=None) -> None:
        self.dim, self.identity, self._returns = dim, {"version": "1"}, returns

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        means = tiles.mean(axis=(1, 2), dtype=np.float32)
        return means if self._returns is None else self._returns(means)


def extract(slides: Path, store: Path, encoder=None, strict=False, overwrite=False, **settings):
    config = PreprocessConfig(slides=slides, store=store, **settings)
    return preprocess_slides(config, slots=[[encoder or MeanColour()]], strict=strict, overwrite=overwrite)


def read(store: Path, slide_id: str):
    return FeatureStore.open(store, "mean-colour").read(slide_id)


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for number in range(3):
        write_slide(folder / f"s{number}.svs", tissue_picture(SIDE, SIDE, seed=number))
    return folder


@pytest.fixture
def slides(written: Path, tmp_path: Path) -> Path:
    """Three slides of two by two cells, of seven by seven JPEG tiles."""
    return Path(shutil.copytree(written, tmp_path / "slides"))


def test_no_resolution_is_one_line_that_names_the_options(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1100, 1100), mpp=None)
    with pytest.raises(DataError, match=r"slide a: .*resolution.*--default-mpp, or --mpp-table"):
        extract(path, tmp_path / "store", strict=True)
    table = tmp_path / "mpp.csv"
    table.write_text("slide_id,mpp\na,0.5\n")
    outcome = extract(path, tmp_path / "store", mpp_table=table).outcomes[0]
    assert (outcome.status, outcome.mpp, outcome.mpp_source) == ("done", 0.5, "table")


def test_a_slide_at_265_nm_is_not_a_slide_at_250(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(2300, 2300), mpp=0.265)
    extract(path, tmp_path / "nominal")
    extract(path, tmp_path / "exact", resolution="exact")
    nominal, exact = read(tmp_path / "nominal", "a"), read(tmp_path / "exact", "a")
    assert nominal.attrs["tile_px_level0"]["x20"] == 512
    assert exact.attrs["tile_px_level0"]["x20"] == pytest.approx(256 * 0.5 / 0.265)
    assert {nominal.attrs["mpp"], exact.attrs["mpp"]} == {0.265}


@pytest.mark.parametrize("size", [(4443, 1783), (1200, 1000), (600, 500)], ids=["odd", "one level", "below a cell"])
def test_pyramids_and_sizes(tmp_path: Path, size):
    levels = ((2221, 891),) if size[0] == 4443 else ()
    picture = tissue_picture(*size, share=0.95)
    path = write_slide(tmp_path / "a.svs", picture, level_sizes=levels)
    outcome = extract(path, tmp_path / "store").outcomes[0]
    assert outcome.status == "done"
    slide = read(tmp_path / "store", "a")
    for (x, y), mean in zip(slide.coords["x20"], slide.features["x20"], strict=True):
        patch = np.full((256, 256, 3), 255.0)
        own = picture[y : y + 256, x : x + 256]
        patch[: own.shape[0], : own.shape[1]] = own
        np.testing.assert_allclose(mean, patch.mean(axis=(0, 1)), atol=1.5)


def test_no_tissue_and_all_pen_are_listed_with_the_reason(tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    glass = np.full((1500, 1500, 3), 243, np.uint8)
    pen = glass.copy()
    pen[200:1300, 300:500] = (30, 120, 60)
    write_slide(slides / "glass.svs", glass)
    write_slide(slides / "pen.svs", pen)
    write_slide(slides / "tissue.svs", tissue_picture(1500, 1500))
    summary = extract(slides, tmp_path / "store")
    assert [(o.slide_id, o.status) for o in summary.outcomes] == [
        ("glass", "failed"), ("pen", "failed"), ("tissue", "done"),
    ]  # fmt: skip
    assert all("no tissue was found" in o.why for o in summary.of("failed"))
    assert summary.table.read_text().count("no tissue was found") == 2


def test_alpha_0_is_background_and_not_black(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1300, 1300, share=1.5))
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "a.png")
    extract(path, tmp_path / "store", masks=tmp_path, min_tissue=0.001)
    slide = read(tmp_path / "store", "a")
    assert slide.attrs["tissue"] == "a.png"
    edge = slide.features["x20"][(slide.coords["x20"] == [1280, 1280]).all(axis=1)]
    assert len(edge) == 1
    # 20 × 20 of its 256 × 256 px are on the slide, the rest is background.
    assert edge.min() > 250


def test_a_truncated_file_is_listed_and_the_rest_goes_on(slides: Path, tmp_path: Path):
    intact = (slides / "s1.svs").read_bytes()
    (slides / "s1.svs").write_bytes(intact[: len(intact) // 3])
    (slides / "s2.svs").write_bytes(b"")
    summary = extract(slides, tmp_path / "store")
    assert [o.status for o in summary.outcomes] == ["done", "failed", "failed"]
    assert "s1.svs" in summary.outcomes[1].why
    with pytest.raises(DataError, match=r"s1\.svs"):
        extract(slides, tmp_path / "other", strict=True)


def test_one_broken_tile_is_recorded_and_masked_and_the_rest_is_exact(slides: Path, tmp_path: Path):
    extract(slides, tmp_path / "intact")
    break_tile(slides / "s1.svs", 7 * 2 + 2)
    summary = extract(slides, tmp_path / "broken")
    assert [o.status for o in summary.outcomes] == ["done"] * 3
    assert summary.outcomes[1].why == "1 of 4 cells cannot be read"
    intact, broken = read(tmp_path / "intact", "s1"), read(tmp_path / "broken", "s1")
    assert broken.attrs["unreadable_cells"] == [[0, 0]]
    for name in ("x20", "x10", "x5"):
        good = (intact.coords[name] >= 1024).any(axis=1)
        assert 0 < good.sum() < len(good)
        np.testing.assert_array_equal(broken.features[name], intact.features[name][good])
        np.testing.assert_array_equal(broken.coords[name], intact.coords[name][good])


def test_a_tile_that_was_never_written_is_no_white_tile(tmp_path: Path):
    picture = tissue_picture(2048, 2048, share=1.5)
    for name in ("intact", "holed"):
        write_slide(tmp_path / name / "a.tif", picture, level_sizes=((512, 512),), aperio=False)
    drop_tile(tmp_path / "holed" / "a.tif", 8 * 5 + 2)
    extract(tmp_path / "intact", tmp_path / "one", default_mpp=0.5)
    summary = extract(tmp_path / "holed", tmp_path / "other", default_mpp=0.5)
    assert [o.why for o in summary.outcomes] == ["1 of 4 cells cannot be read"]
    one, other = read(tmp_path / "one", "a"), read(tmp_path / "other", "a")
    assert other.attrs["unreadable_cells"] == [[0, 1]]
    kept = ~((one.coords["x20"][:, 0] < 1024) & (one.coords["x20"][:, 1] >= 1024))
    np.testing.assert_array_equal(other.features["x20"], one.features["x20"][kept])


def test_a_slide_that_goes_away_when_it_is_read_is_not_lost(slides: Path, tmp_path: Path):
    def unlink(means):
        (slides / "s1.svs").unlink(missing_ok=True)
        return means

    config = PreprocessConfig(slides=slides, store=tmp_path / "store", batch_size=10_000)
    summary = preprocess_slides(config, slots=[[MeanColour(returns=unlink)]])
    assert [o.status for o in summary.outcomes] == ["done"] * 3


def test_progress_is_also_reported_within_a_slide(slides: Path, tmp_path: Path, monkeypatch):
    notes = []

    class Recording(Progress):
        def advance(self, count: int = 1, note: str = "") -> None:
            notes.append((count, note))

    monkeypatch.setattr(extraction, "progress", lambda *_: nullcontext(Recording("", 0)))
    extract(slides / "s0.svs", tmp_path / "store", batch_size=4)
    assert [count for count, _ in notes].count(1) == 1
    assert len(notes) > 5
    assert all(re.fullmatch(r"\d+ tiles/s, \d+\.\d\d GB/s", note) for _, note in notes)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not tell a process's open files")
def test_slides_whose_tiles_wait_for_a_batch_are_closed(slides: Path, tmp_path: Path):
    opened = []

    def look(means):
        links = [p.readlink() for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
        opened.extend(link for link in links if slides in link.parents)
        return means

    extract(slides, tmp_path / "store", MeanColour(returns=look), batch_size=10_000)
    assert not opened


def test_a_missing_folder_of_masks_is_refused(slides: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"masks=.*none: no such folder"):
        extract(slides, tmp_path / "store", masks=tmp_path / "none")


def test_a_slide_of_broken_tiles_fails(slides: Path, tmp_path: Path):
    for number in range(49):
        break_tile(slides / "s1.svs", number)
    outcome = extract(slides, tmp_path / "store").outcomes[1]
    assert outcome.status == "failed"
    assert "none of its 4 cells can be read" in outcome.why


def test_the_same_name_in_two_folders_is_reported_for_both(slides: Path, tmp_path: Path):
    (slides / "sub").mkdir()
    write_slide(slides / "sub" / "s1.svs", tissue_picture(1100, 1100))
    summary = extract(slides, tmp_path / "store")
    assert [o.status for o in summary.outcomes] == ["done", "failed", "done", "failed"]
    for outcome in summary.of("failed"):
        assert "2 slides share this name" in outcome.why
        assert str(slides / "s1.svs") in outcome.why
        assert str(slides / "sub" / "s1.svs") in outcome.why


def test_a_full_disk_stops_the_run_in_one_line_and_leaves_no_part(slides: Path, tmp_path: Path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zarr, "open_group", full)
    with pytest.raises(DataError, match=r"cannot be written .No space left on device"):
        extract(slides, tmp_path / "store")
    assert not list((tmp_path / "store" / "mean-colour").iterdir())


def test_a_disk_that_is_full_while_a_sheet_is_written_is_not_a_fault_of_the_slide(slides, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "store" / "sheets" / "s1.png"))

    monkeypatch.setattr(slide_plan, "write_sheets", full)
    with pytest.raises(DataError, match=r"s1\.png: cannot be written \(Disk quota exceeded\)\. Free some space"):
        extract(slides, tmp_path / "store", sheets=True)


def test_nan_and_infinity_of_an_encoder_fail_the_slide(slides: Path, tmp_path: Path):
    for bad in (np.nan, np.inf, 1e6):
        encoder = MeanColour(returns=lambda means, bad=bad: np.where(means > 0, bad, means))
        summary = extract(slides, tmp_path / "store", encoder)
        assert [o.status for o in summary.outcomes] == ["failed"] * 3
        assert "the features of tile 0 are not finite" in summary.outcomes[0].why
    assert not list((tmp_path / "store").rglob("*.zarr"))


def test_a_wrong_width_stops_the_run(slides: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"encoder mean-colour: returned \[\d+, 2\], expected \[\d+, 3\]"):
        extract(slides, tmp_path / "store", MeanColour(returns=lambda means: means[:, :2]))


def test_a_changed_configuration_says_which_slides_are_stale(slides: Path, tmp_path: Path):
    extract(slides, tmp_path / "store")
    assert {o.status for o in extract(slides, tmp_path / "store").outcomes} == {"skipped"}
    changed = extract(slides, tmp_path / "store", min_tissue=0.9)
    assert {o.status for o in changed.outcomes} == {"stale"}
    why = "mean-colour made with min_tissue 0.25, now 0.9; --overwrite extracts it again"
    assert {o.why for o in changed.outcomes} == {why}
    again = extract(slides, tmp_path / "store", min_tissue=0.9, overwrite=True)
    assert {o.status for o in again.outcomes} == {"done"}
    write_slide(slides / "s0.svs", tissue_picture(1500, 1500))
    replaced = extract(slides, tmp_path / "store", min_tissue=0.9)
    assert [o.status for o in replaced.outcomes] == ["stale", "skipped", "skipped"]
    assert re.search(r"made with slide_bytes \d+, now \d+; --overwrite", replaced.outcomes[0].why)


def test_a_resolution_that_is_now_another_makes_a_slide_stale(tmp_path: Path):
    path = write_slide(tmp_path / "a.svs", tissue_picture(1100, 1100), mpp=None)
    extract(path, tmp_path / "store", default_mpp=0.5)
    table = tmp_path / "mpp.csv"
    table.write_text("slide_id,mpp\na,0.25\n")
    outcome = extract(path, tmp_path / "store", default_mpp=0.5, mpp_table=table).outcomes[0]
    assert (outcome.status, outcome.why[:40]) == ("stale", "mean-colour made with mpp 0.5, now 0.25;")
    assert extract(path, tmp_path / "store", default_mpp=0.5).outcomes[0].status == "skipped"


@pytest.mark.slow
def test_an_added_encoder_computes_only_its_missing_features(slides: Path, tmp_path: Path):
    class Counting(MeanColour):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.tiles = name, 0

        def encode(self, tiles: np.ndarray) -> np.ndarray:
            self.tiles += len(tiles)
            return super().encode(tiles)

    config = PreprocessConfig(slides=slides, store=tmp_path / "store")
    first = Counting("first")
    preprocess_slides(config.model_copy(update={"slides": slides / "s0.svs"}), slots=[[first]])
    of_one = first.tiles
    second = Counting("second")
    summary = preprocess_slides(config, slots=[[first, second]])
    assert [o.status for o in summary.outcomes] == ["done"] * 3
    assert 0 < of_one < first.tiles == second.tiles
    stores = [FeatureStore.open(tmp_path / "store", name) for name in ("first", "second")]
    for slide_id in ("s0", "s1", "s2"):
        one, other = (store.read(slide_id) for store in stores)
        np.testing.assert_array_equal(one.features["x20"], other.features["x20"])


@pytest.mark.slow
def test_batches_threads_and_devices_do_not_change_the_features(slides: Path, tmp_path: Path):
    extract(slides, tmp_path / "a", batch_size=7, threads=1)
    config = PreprocessConfig(slides=slides, store=tmp_path / "b", batch_size=100, threads=4)
    preprocess_slides(config, slots=[[MeanColour()], [MeanColour()], [MeanColour()]])
    for slide_id in ("s0", "s1", "s2"):
        one, other = read(tmp_path / "a", slide_id), read(tmp_path / "b", slide_id)
        for name in one.features:
            np.testing.assert_array_equal(one.features[name], other.features[name])


SLOW = """
import signal, sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from preprocess.test_bad_input import MeanColour, extract
go = Path({go!r})
class Slow(MeanColour):
    batches = 0
    def encode(self, tiles):
        self.batches += 1
        while self.batches > {first} and not go.exists():
            time.sleep(0.01)
        return super().encode(tiles)
def interrupted(*_):
    go.touch()
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupted)
extract(Path({slides!r}), Path({store!r}), Slow(), batch_size=1)
"""
FIRST = 4 * 3
"""Batches of the first slide: one a cell and magnification."""


def start_slow(slides: Path, store: Path, go: Path) -> subprocess.Popen:
    """A process that extracts slides; behind the first one it waits for a file `go`, or an interruption."""
    tests = str(Path(__file__).parents[1])
    code = SLOW.format(tests=tests, slides=str(slides), store=str(store), go=str(go), first=FIRST)
    code = code.replace("from preprocess.test_bad_input", "from test_bad_input")
    code = code.replace("sys.path[:0] = [", f"sys.path[:0] = [{str(Path(__file__).parent)!r}, ")
    root = str(Path(__file__).parents[2])
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [pytest.param(signal.SIGINT, id="Ctrl-C"), pytest.param(signal.SIGKILL, id="kill -9")],
)
def test_an_interrupted_run_leaves_complete_slides_and_the_same_call_does_the_rest(slides: Path, tmp_path: Path, kill):
    store = tmp_path / "store"
    process = start_slow(slides, store, tmp_path / "go")
    try:
        wait_for(lambda: list(store.glob("mean-colour/[!.]*.zarr")) or process.poll() is not None)
        process.send_signal(kill)
        process.wait(60)
    finally:
        process.kill()
        process.communicate()
    there = FeatureStore.open(store).slide_ids()
    assert there == ["s0"]
    # A kill during a write leaves a temporary folder named after the pid of a process that has ended.
    lacking = next(name for name in ("s0", "s1", "s2") if name not in there)
    with atomic_path(store / "mean-colour" / f"{lacking}.zarr") as temporary:
        temporary.mkdir()
        half = temporary.with_name(temporary.name.replace(f"_{os.getpid()}_", f"_{process.pid}_"))
        shutil.copytree(temporary, half)
    shutil.rmtree(store / "mean-colour" / f"{lacking}.zarr")
    summary = extract(slides, store)
    assert [o.status for o in summary.outcomes].count("skipped") == len(there)
    assert sorted(p.name for p in (store / "mean-colour").iterdir()) == ["s0.zarr", "s1.zarr", "s2.zarr"]
    extract(slides, tmp_path / "undisturbed")
    for slide_id in ("s0", "s1", "s2"):
        one, other = read(store, slide_id), read(tmp_path / "undisturbed", slide_id)
        for name in one.features:
            np.testing.assert_array_equal(one.features[name], other.features[name])


@pytest.mark.slow
def test_two_processes_on_the_same_slides_both_end_well(slides: Path, tmp_path: Path):
    store = tmp_path / "store"
    go = tmp_path / "go"
    go.touch()
    processes = [start_slow(slides, store, go) for _ in range(2)]
    codes = []
    for process in processes:
        try:
            _, errors = process.communicate(timeout=120)
            codes.append((process.returncode, errors.decode()[-500:]))
        finally:
            process.kill()
    assert [code for code, _ in codes] == [0, 0], codes
    assert sorted(p.name for p in (store / "mean-colour").iterdir()) == ["s0.zarr", "s1.zarr", "s2.zarr"]
    assert {o.status for o in extract(slides, store).outcomes} == {"skipped"}


def plain_tiff(path: Path, picture: np.ndarray) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture, tile=(256, 256), photometric="rgb", compression="deflate", metadata=None,
                   resolution=(20000, 20000), resolutionunit="CENTIMETER")  # fmt: skip
    return path


def test_an_ordinary_tiff_under_another_name_is_read_through_openslide(slides: Path, tmp_path: Path):
    plain_tiff(slides / "x.ndpi", tissue_picture(SIDE, SIDE))
    summary = extract(slides, tmp_path / "store")
    assert [(o.slide_id, o.status) for o in summary.outcomes] == [(name, "done") for name in ("s0", "s1", "s2", "x")]
    assert summary.outcomes[-1].reader == "openslide"


@pytest.mark.parametrize("where", ["preprocess.slide_plan.find_tissue", "preprocess.slide_plan.choose_reader"])
def test_an_error_of_a_library_fails_one_slide(slides: Path, tmp_path: Path, monkeypatch, where: str):
    module, name = where.rsplit(".", 1)
    original = getattr(sys.modules[module], name)
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyError("tag 322")
        return original(*args)

    monkeypatch.setattr(where, failing)
    summary = extract(slides, tmp_path / "store", threads=1)
    assert sorted(o.status for o in summary.outcomes) == ["done", "done", "failed"]
    assert "cannot be read (KeyError('tag 322'))" in summary.of("failed")[0].why


@pytest.mark.parametrize("name", ["back\\slash.svs", "line\nbreak.svs", b"not-utf8-\xff.svs"])
def test_a_name_that_the_store_cannot_hold_fails_one_slide(slides: Path, tmp_path: Path, name):
    shutil.copy(slides / "s0.svs", slides / os.fsdecode(name))
    summary = extract(slides, tmp_path / "store")
    assert sorted(o.status for o in summary.outcomes) == ["done", "done", "done", "failed"]
    assert "not a valid name" in summary.of("failed")[0].why
    assert summary.table.read_text(encoding="utf-8").count("done") == 3


def test_dangling_links_and_other_dicom_files_stand_in_the_summary(slides: Path, tmp_path: Path):
    (slides / "gone.svs").symlink_to("nowhere.svs")
    report = slides / "case" / "report.dcm"
    report.parent.mkdir()
    kind = b"1.2.840.10008.5.1.4.1.1.88.33\0"
    report.write_bytes(bytes(128) + b"DICM" + b"\x08\0\x16\0UI" + len(kind).to_bytes(2, "little") + kind)
    summary = extract(slides, tmp_path / "store")
    assert [(o.slide_id, o.status) for o in summary.outcomes if o.status != "done"] == [
        ("report", "skipped"), ("gone", "failed"),
    ]  # fmt: skip
    assert "not a whole-slide image" in summary.of("skipped")[0].why
    assert "links to nowhere.svs, which does not exist" in summary.of("failed")[0].why


def mend(path: Path, keep_time: bool) -> None:
    """Change the resolution in place: the size in bytes stays."""
    stat = path.stat()
    data = path.read_bytes()
    assert data.count(b"MPP = 0.5") == 1
    path.write_bytes(data.replace(b"MPP = 0.5", b"MPP = .25"))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_slide_mended_in_place_is_stale(slides: Path, tmp_path: Path):
    extract(slides, tmp_path / "store")
    mend(slides / "s0.svs", keep_time=False)
    (slides / "s1.svs").touch()  # only the time changed: the slide is not stale
    again = extract(slides, tmp_path / "store")
    assert [o.status for o in again.outcomes] == ["stale", "skipped", "skipped"]
    assert "made with mpp 0.5, now 0.25" in again.outcomes[0].why
    assert extract(slides, tmp_path / "store", overwrite=True).outcomes[0].status == "done"
    assert read(tmp_path / "store", "s0").attrs["mpp"] == 0.25


def test_overwrite_looks_into_every_slide(slides: Path, tmp_path: Path):
    extract(slides, tmp_path / "store")
    mend(slides / "s0.svs", keep_time=True)
    again = extract(slides, tmp_path / "store", overwrite=True)
    assert [o.status for o in again.outcomes] == ["done", "skipped", "skipped"]
    assert read(tmp_path / "store", "s0").attrs["tile_px_level0"]["x20"] == 512


def test_the_table_of_resolutions_wins_and_its_other_rows_are_named(slides: Path, tmp_path: Path, caplog):
    table = tmp_path / "mpp.csv"
    table.write_text("slide_id,mpp\ns0.svs,0.25\ns9,0.25\n")
    summary = extract(slides, tmp_path / "store", mpp_table=table)
    assert [(o.mpp, o.mpp_source, o.taken_as) for o in summary.outcomes] == [
        (0.25, "table", "40x"), (0.5, "mpp", "20x"), (0.5, "mpp", "20x"),
    ]  # fmt: skip
    assert "1 rows have the name of no slide: s9" in caplog.text
    table.write_text("slide_id,mpp\ns9,0.25\n")
    with pytest.raises(
        ConfigError, match="none of its 1 rows has the name of a slide, such as s0; its first row is of s9"
    ):
        extract(slides, tmp_path / "store", mpp_table=table)


def test_what_was_assumed_stands_in_the_summary(tmp_path: Path):
    slides, masks = tmp_path / "slides", tmp_path / "masks"
    masks.mkdir()
    for name in ("a", "b"):
        write_slide(slides / f"{name}.svs", tissue_picture(1100, 1100), mpp=0.35)
    Image.new("L", (110, 110), 255).save(masks / "a.svs.png")
    extract(slides, tmp_path / "store", masks=masks)
    rows = list(csv.DictReader((tmp_path / "store/summary.csv").open(encoding="utf-8")))
    assert [(r["taken_as"], r["mask"]) for r in rows] == [("20x", "a.svs.png"), ("20x", METHOD)]
    assert rows[0]["warnings"] == "0.35 µm/px is taken as 20x (0.5 µm/px)"
    assert rows[1]["warnings"].endswith("; no mask file")


def test_one_checkpoint_for_two_encoders_is_refused(tmp_path: Path):
    (tmp_path / "w.safetensors").touch()
    config = PreprocessConfig(encoders=("uni", "conch"), weights=tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="one checkpoint for the encoders uni, conch"):
        load_slots(config)
