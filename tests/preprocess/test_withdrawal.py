"""Slides withdrawn from stores and shards, and stores merged: nothing else changes, contradictions are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up_slides import make_slide

from cfusion.data.shard_index import read_index
from cfusion.data.shards import ShardDataset
from cfusion.data.store import FeatureStore, write_slide
from cfusion.data.verify import verify_shards
from cfusion.errors import ConfigError, DataError, LayoutError
from preprocess.inspection import verify_store
from preprocess.merging import merge_stores, plan_merge
from preprocess.packing import pack_store
from preprocess.withdrawal import plan_removal, remove_slides

NAMES = ["TCGA-AA-0001-01Z", "TCGA-AA-0001-02Z", "TCGA-AA-0002-01Z", "TCGA-AA-0003-01Z", "TCGA-AA-0004-01Z"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    for seed, name in enumerate(NAMES):
        write_slide(root, make_slide(name, seed=seed))
    (root / "sheets").mkdir()
    for name in NAMES[:3]:
        (root / "sheets" / f"{name}.png").touch()
    rows = "".join(f"{name},done\r\n" for name in NAMES)
    (root / "summary.csv").write_text(f"slide_id,status\r\n{rows}")
    return root


@pytest.fixture
def shards(store: Path, tmp_path: Path) -> Path:
    pack_store(FeatureStore.open(store), tmp_path / "shards", target_bytes=20_000)
    return tmp_path / "shards"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_all(shards: Path) -> dict[str, dict[str, np.ndarray]]:
    dataset = ShardDataset.open(shards)
    return {name: dataset.read(name, ["x20", "x10", "parent_x20"]) for name in dataset.slide_ids}


def test_a_plan_changes_nothing_and_lists_everything(store: Path, shards: Path):
    before = contents(store) | contents(shards)
    plan = plan_removal([store, shards], [*NAMES[:2], "nobody"])
    assert contents(store) | contents(shards) == before
    assert plan.slide_ids == tuple(NAMES[:2])
    assert plan.unknown == ("nobody",)
    assert [p.name for p in plan.groups] == [f"{name}.zarr" for name in NAMES[:2]]
    assert [p.name for p in plan.files] == [f"{name}.png" for name in NAMES[:2]]
    assert [p.name for p in plan.tables] == ["summary.csv"]
    index = read_index(shards)
    tars = {index.shards[s.shard].name for s in index.samples if s.slide_id in NAMES[:2]}
    assert set(plan.shards[shards]) == tars


def test_a_removed_slide_is_nowhere_and_the_rest_is_unchanged(store: Path, shards: Path):
    before, digest = read_all(shards), read_index(shards).digest
    remove_slides(plan_removal([store, shards], NAMES[:2]))
    found = b"".join(contents(store).values()) + b"".join(contents(shards).values())
    assert not any(name.encode() in found for name in NAMES[:2])
    assert not any(name in path for name in NAMES[:2] for path in contents(store))
    assert verify_store(store) == {}
    assert sorted(verify_shards(shards).good) == NAMES[2:]
    assert verify_shards(shards).problems == ()
    after = read_all(shards)
    assert sorted(after) == NAMES[2:]
    for name, features in after.items():
        for magnification, array in features.items():
            np.testing.assert_array_equal(array, before[name][magnification])
    assert read_index(shards).digest != digest
    assert [line.split(",")[0] for line in (store / "summary.csv").read_text().splitlines()[1:]] == NAMES[2:]
    index = pack_store(FeatureStore.open(store), shards, target_bytes=20_000)
    assert sorted(s.slide_id for s in index.samples) == NAMES[2:]


def test_an_interrupted_removal_leaves_a_usable_set_and_is_repeated(shards: Path, monkeypatch: pytest.MonkeyPatch):
    complete = contents(shards)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "broken", "x")))
        with pytest.raises(DataError, match=r"cannot be changed.*same command removes the rest"):
            remove_slides(plan_removal([shards], NAMES[:1]))
    assert sorted(read_all(shards)) == NAMES[1:]
    plan = plan_removal([shards], NAMES[:1])
    assert plan.leftovers
    remove_slides(plan)
    assert NAMES[0].encode() not in b"".join(contents(shards).values())
    assert len(contents(shards)) <= len(complete)


def test_a_damaged_member_is_not_given_a_new_checksum(store: Path, tmp_path: Path):
    shards = tmp_path / "one"
    pack_store(FeatureStore.open(store), shards)
    index = read_index(shards)
    sample = next(s for s in index.samples if s.shard == 0)
    other = next(s for s in index.samples if s.shard == 0 and s is not sample)
    path = shards / index.shards[0].name
    data = bytearray(path.read_bytes())
    data[other.members["x20.npy"].offset + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{other.slide_id}, x20.npy: differs from its checksum"):
        remove_slides(plan_removal([shards], [sample.slide_id]))
    assert sorted(ShardDataset.open(shards).slide_ids) == NAMES


def test_what_is_not_there_is_refused(store: Path, shards: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="does not contain the slides nobody"):
        plan_removal([store, shards], ["nobody"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither a feature store nor a folder of shards"):
        plan_removal([tmp_path / "empty"], NAMES)
    with pytest.raises(DataError, match="contains no other slides"):
        remove_slides(plan_removal([shards], NAMES))


def test_two_stores_are_merged(store: Path, tmp_path: Path):
    other = tmp_path / "other"
    write_slide(other, make_slide("new", seed=9))
    shutil.copytree(store / "made-up" / f"{NAMES[0]}.zarr", other / "made-up" / f"{NAMES[0]}.zarr")
    write_slide(other, make_slide(NAMES[1], seed=99))
    (other / "sheets").mkdir()
    (other / "sheets" / "new.jpg").write_bytes(b"sheet")
    before = contents(store)
    plan = plan_merge(other, store)
    assert contents(store) == before
    assert plan.copied == (("made-up", "new"),)
    assert plan.same == (("made-up", NAMES[0]),)
    assert "has other features of it" in plan.refused[f"made-up/{NAMES[1]}"]
    assert merge_stores(plan) == plan.refused
    assert FeatureStore.open(store).slide_ids() == sorted([*NAMES, "new"])
    assert verify_store(store) == {}
    assert (store / "sheets" / "new.jpg").read_bytes() == b"sheet"
    assert {k: v for k, v in contents(store).items() if "new." not in k} == before


def test_a_damaged_slide_is_not_copied_and_the_next_is(store: Path, tmp_path: Path):
    chunk = next(p for p in (store / "made-up" / f"{NAMES[0]}.zarr/x20/features/c").rglob("*") if p.is_file())
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    refused = merge_stores(plan_merge(store, tmp_path / "new"))
    assert list(refused) == [f"made-up/{NAMES[0]}"]
    assert "differs from its digest" in refused[f"made-up/{NAMES[0]}"]
    assert FeatureStore.open(tmp_path / "new").slide_ids() == NAMES[1:]


@pytest.mark.parametrize(
    ("key", "first", "second"), [("weights", "1f", "2e"), ("version", "1", "2"), ("coarser", None, "mean of x20")]
)
def test_two_encoders_of_one_name_are_not_merged(tmp_path: Path, key: str, first: str | None, second: str):
    for store, value in (("a", first), ("b", second)):
        slide = make_slide(f"of-{store}")
        slide.attrs.update({} if value is None else {key: value})
        write_slide(tmp_path / store, slide)
    with pytest.raises(LayoutError, match=f"differ in {key}: {first} and {second}"):
        plan_merge(tmp_path / "b", tmp_path / "a")


def test_other_settings_are_reported(tmp_path: Path):
    for store, resample in (("a", "area"), ("b", "bicubic")):
        slide = make_slide(f"of-{store}")
        slide.attrs.update(resample=resample, weights="1f")
        write_slide(tmp_path / store, slide)
    assert plan_merge(tmp_path / "b", tmp_path / "a").remarks == ("made-up: resample area and bicubic",)
    with pytest.raises(ConfigError, match="merged with itself"):
        plan_merge(tmp_path / "a", tmp_path / "a")


def test_a_summary_with_odd_rows_keeps_them(store: Path):
    (store / "summary.csv").write_text(f'slide_id,why\r\n{NAMES[0]},x\r\n"a,""b",\r\n\r\nz\r\n')
    remove_slides(plan_removal([store], [NAMES[0]]))
    assert (store / "summary.csv").read_text() == 'slide_id,why\r\n"a,""b",\r\n\r\nz\r\n'.replace("\r\n", "\n")
