from __future__ import annotations

import numpy as np
import pytest
import webdataset
from made_up_slides import MemoryStore, make_slide

from cfusion.data.shards import ShardDataset
from cfusion.data.store import FeatureStore, write_slide
from cfusion.errors import DataError
from preprocess.packing import pack_store


@pytest.fixture
def store():
    return MemoryStore([make_slide(f"TCGA-{i:02d}.DX1.7B2F", cells=2 + i % 4, seed=i) for i in range(9)])


def tar_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_store_gives_the_same_bytes_whatever_the_threads(store, tmp_path):
    pack_store(store, tmp_path / "a", target_bytes=30_000, workers=1)
    pack_store(MemoryStore(reversed(store.slides.values())), tmp_path / "b", target_bytes=30_000, workers=3)
    assert tar_bytes(tmp_path / "a") == tar_bytes(tmp_path / "b")
    assert len(tar_bytes(tmp_path / "a")) > 3
    pack_store(store, tmp_path / "c", target_bytes=30_000, seed=8)
    assert tar_bytes(tmp_path / "a") != tar_bytes(tmp_path / "c")


def test_tars_are_about_as_large_as_asked(store, tmp_path):
    index = pack_store(store, tmp_path / "some", target_bytes=40_000)
    sizes = [(tmp_path / "some" / shard.name).stat().st_size for shard in index.shards]
    assert sizes == [shard.size for shard in index.shards]
    assert max(sizes) <= 40_000
    assert min(sizes[:-1]) > 20_000
    each = pack_store(store, tmp_path / "each", target_bytes=1)
    assert len(each.shards) == len(store.slides)


def test_the_order_depends_only_on_the_seed(store, tmp_path):
    orders = [[s.slide_id for s in pack_store(store, tmp_path / str(n), seed=n).samples] for n in (7, 8)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(store.slides)
    assert orders[0] != sorted(orders[0])


def test_what_is_packed_is_what_is_read(store, tmp_path):
    pack_store(store, tmp_path)
    dataset = ShardDataset.open(tmp_path)
    for slide_id, slide in store.slides.items():
        read = dataset.read(slide_id, ["x20", "x10", "x5", "coords_x20", "parent_x20", "parent_x10"])
        for name in ("x20", "x10", "x5"):
            np.testing.assert_array_equal(read[name], slide.features[name])
        np.testing.assert_array_equal(read["coords_x20"], slide.coords["x20"])
        np.testing.assert_array_equal(read["parent_x20"], slide.parents["x20"])
        assert dataset.tiles(slide_id) == {name: len(slide.features[name]) for name in ("x20", "x10", "x5")}


def test_webdataset_reads_the_tars(store, tmp_path):
    index = pack_store(store, tmp_path, target_bytes=30_000)
    urls = [str(tmp_path / shard.name) for shard in index.shards]
    seen = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        seen[sample["meta.json"]["slide_id"]] = sample
    assert list(seen) == [sample.slide_id for sample in index.samples]
    for slide_id, slide in store.slides.items():
        np.testing.assert_array_equal(seen[slide_id]["x20.npy"], slide.features["x20"])
        np.testing.assert_array_equal(seen[slide_id]["coords_x5.npy"], slide.coords["x5"])
        assert seen[slide_id]["meta.json"]["attrs"] == slide.attrs


def test_a_finished_set_is_left_as_it_is(store, tmp_path):
    first = pack_store(store, tmp_path, target_bytes=30_000)
    store.reads.clear()
    assert pack_store(store, tmp_path, target_bytes=30_000) == first
    assert store.reads == []


def test_a_stopped_run_goes_on_behind_the_last_finished_tar(store, tmp_path):
    expected = pack_store(store, tmp_path / "expected", target_bytes=30_000)
    stopped = MemoryStore(store.slides.values())
    last = expected.samples[-1].slide_id

    def read(slide_id):
        if slide_id == last:
            raise KeyboardInterrupt
        return MemoryStore.read(stopped, slide_id)

    stopped.read = read
    with pytest.raises(KeyboardInterrupt):
        pack_store(stopped, tmp_path / "resumed", target_bytes=30_000, workers=1)
    assert not (tmp_path / "resumed" / "index.json").exists()
    kept = [s for s in expected.samples if (tmp_path / "resumed" / expected.shards[s.shard].name).exists()]
    assert kept
    store.reads.clear()
    assert pack_store(store, tmp_path / "resumed", target_bytes=30_000) == expected
    assert not {s.slide_id for s in kept} & set(store.reads)
    assert tar_bytes(tmp_path / "resumed") == tar_bytes(tmp_path / "expected")


def test_leftovers_of_other_packings_go_and_foreign_files_stay(store, tmp_path):
    pack_store(store, tmp_path, target_bytes=10_000)
    (tmp_path / ".shard-000000.tar.deadbeef.tmp").write_bytes(b"half")
    (tmp_path / "shard-notes.txt").write_text("mine")
    index = pack_store(store, tmp_path, dtype="int8")
    assert {p.name for p in tmp_path.iterdir()} == {s.name for s in index.shards} | {"index.json", "shard-notes.txt"}


def test_what_a_kill_around_the_index_leaves_goes_with_the_next_start(store, tmp_path):
    index = pack_store(store, tmp_path)
    (tmp_path / ".index.json.deadbeef.tmp").write_text("{")
    (tmp_path / "shard-000000.part.json").write_text("{}")
    assert pack_store(store, tmp_path) == index
    assert {p.name for p in tmp_path.iterdir()} == {"index.json", "shard-000000.tar"}


def test_a_damaged_index_is_replaced(store, tmp_path):
    index = pack_store(store, tmp_path)
    (tmp_path / "index.json").write_text("{")
    (tmp_path / "shard-000000.part.json").write_text("[]")
    assert pack_store(store, tmp_path) == index == ShardDataset.open(tmp_path).index


def test_a_changed_slide_is_packed_again(store, tmp_path):
    first = pack_store(store, tmp_path)
    changed = make_slide("TCGA-03.DX1.7B2F", seed=99)
    store.slides[changed.slide_id] = changed
    assert pack_store(store, tmp_path).digest != first.digest
    read = ShardDataset.open(tmp_path).read(changed.slide_id, ["x20"])
    np.testing.assert_array_equal(read["x20"], changed.features["x20"])


def test_a_refused_slide_that_was_mended_is_packed(store, tmp_path):
    good = store.slides["TCGA-03.DX1.7B2F"]
    store.slides[good.slide_id] = make_slide(good.slide_id, seed=4)
    store.slides[good.slide_id].features["x20"][0] = np.nan
    assert list(pack_store(store, tmp_path).refused) == [good.slide_id]
    store.slides[good.slide_id] = good
    assert not pack_store(store, tmp_path).refused


def test_a_refused_slide_that_was_extracted_again_to_the_same_attributes_is_packed(store, tmp_path):
    expected = pack_store(store, tmp_path / "expected", target_bytes=30_000)
    lost = expected.samples[-1].slide_id
    good = store.slides[lost].features["x10"].copy()
    store.slides[lost].features["x10"][0] = np.nan
    assert list(pack_store(store, tmp_path / "mended", target_bytes=30_000).refused) == [lost]
    store.slides[lost].features["x10"][:] = good
    assert pack_store(store, tmp_path / "mended", target_bytes=30_000) == expected
    assert tar_bytes(tmp_path / "mended") == tar_bytes(tmp_path / "expected")


def test_a_slide_whose_store_lost_bytes_is_left_out_and_named(tmp_path):
    for i in range(3):
        write_slide(tmp_path / "store", make_slide(f"s{i}", seed=i))
    groups = FeatureStore.open(tmp_path / "store")
    # zarr reads a chunk that is not there as zeros.
    (groups.group_path("s1") / "x20" / "features" / "c" / "0" / "0").unlink()
    (groups.group_path("s2") / "zarr.json").unlink()
    index = pack_store(groups, tmp_path / "out")
    assert [sample.slide_id for sample in index.samples] == ["s0"]
    assert "s1: x20/features differs from its digest. Delete the group and extract" in index.refused["s1"]
    assert "s2.zarr: not a zarr group" in index.refused["s2"]


@pytest.mark.slow
def test_two_processes_do_not_pack_into_one_folder(store, tmp_path):
    class Second(MemoryStore):
        def read(self, slide_id):
            with pytest.raises(DataError, match=r"another process is packing into this folder.*Wait until it finishes"):
                pack_store(store, tmp_path)
            return super().read(slide_id)

    index = pack_store(Second(store.slides.values()), tmp_path)
    assert len(index.samples) == len(store.slides)
    assert pack_store(store, tmp_path) == index


def test_a_finished_set_with_a_lost_tar_is_packed_again(store, tmp_path):
    index = pack_store(store, tmp_path, target_bytes=30_000)
    (tmp_path / index.shards[1].name).unlink()
    assert pack_store(store, tmp_path, target_bytes=30_000) == index
    assert (tmp_path / index.shards[1].name).exists()


def test_slides_of_two_encoders_are_refused(store, tmp_path):
    store.slides["TCGA-03.DX1.7B2F"].attrs["encoder"] = "other"
    with pytest.raises(DataError, match=r"differ in encoder: .*other"):
        pack_store(store, tmp_path)


def test_a_slide_with_nan_is_left_out_and_named(store, tmp_path):
    store.slides["TCGA-03.DX1.7B2F"].features["x10"][2, 1] = np.nan
    index = pack_store(store, tmp_path)
    assert list(index.refused) == ["TCGA-03.DX1.7B2F"]
    assert "x10: row 2 has a value that is not finite" in index.refused["TCGA-03.DX1.7B2F"]
    assert len(index.samples) == 8


def test_slides_of_two_widths_are_refused_by_name_and_no_index_is_written(store, tmp_path):
    store.slides["TCGA-03.DX1.7B2F"] = make_slide("TCGA-03.DX1.7B2F", dim=9)
    with pytest.raises(DataError, match=r"differ in width: .*Extract"):
        pack_store(store, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_slide_without_a_magnification_is_refused_by_name(store, tmp_path):
    del store.slides["TCGA-03.DX1.7B2F"].features["x10"]
    del store.slides["TCGA-03.DX1.7B2F"].parents["x20"]
    with pytest.raises(DataError, match=r"TCGA-03.*differ in magnifications"):
        pack_store(store, tmp_path / "out")


def test_parents_that_point_nowhere_are_refused(store, tmp_path):
    store.slides["TCGA-03.DX1.7B2F"].parents["x20"][0] = 99
    assert "parents" in pack_store(store, tmp_path).refused["TCGA-03.DX1.7B2F"]


def test_no_slide_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no slides"):
        pack_store(MemoryStore([]), tmp_path)
    bad = make_slide("bad")
    bad.features["x20"][0] = np.inf
    with pytest.raises(DataError, match="None of the 1 slides could be packed; the first: slide bad, x20: row 0"):
        pack_store(MemoryStore([bad]), tmp_path)


def test_slide_names_cannot_leave_the_tar_folder(tmp_path):
    slides = [make_slide(name) for name in ("../evil", "/abs", "a/b", "..", "x\\..\\y", "naïve ~ (1)%")]
    index = pack_store(MemoryStore(slides), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"index.json", "shard-000000.tar"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    dataset = ShardDataset.open(tmp_path / "out")
    for slide in slides:
        np.testing.assert_array_equal(dataset.read(slide.slide_id, ["x5"])["x5"], slide.features["x5"])
    keys = {
        s["__key__"] for s in webdataset.WebDataset(str(tmp_path / "out" / index.shards[0].name), shardshuffle=False)
    }
    assert len(keys) == len(slides)
    assert not any("/" in key or "." in key for key in keys)


def test_int8_error_is_measured_and_bounded_by_half_a_step(store, tmp_path):
    index = pack_store(store, tmp_path, dtype="int8")
    dataset = ShardDataset.open(tmp_path)
    for sample in index.samples:
        read = dataset.read(sample.slide_id, ["x20", "scale_x20"])
        values = store.slides[sample.slide_id].features["x20"].astype(np.float64)
        difference = np.abs(read["x20"] * read["scale_x20"].astype(np.float64) - values)
        assert (difference <= read["scale_x20"] * 0.5001).all()
        measured = np.sqrt((difference**2).mean() / (values**2).mean())
        assert sample.error["x20"] == pytest.approx(measured, rel=1e-4)
        assert 0 < sample.error["x20"] < 0.01


def test_f32_is_kept_exactly_and_f16_refuses_what_it_cannot_hold(tmp_path):
    slide = make_slide("big", dtype="<f4")
    slide.features["x20"][3, 2] = 1e6
    index = pack_store(MemoryStore([slide, make_slide("small")]), tmp_path / "f16")
    assert "beyond the range of f16" in index.refused["big"]
    assert "--dtype f32" in index.refused["big"]
    pack_store(MemoryStore([slide]), tmp_path / "f32", dtype="f32")
    read = ShardDataset.open(tmp_path / "f32").read("big", ["x20"])
    np.testing.assert_array_equal(read["x20"], slide.features["x20"])
