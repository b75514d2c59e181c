from __future__ import annotations

import pytest
from made_up_slides import make_slide
from typer.testing import CliRunner

from cfusion.cli import cmd_preprocess as preprocess
from cfusion.data.shards import ShardDataset
from cfusion.data.store import write_slide
from cfusion.errors import ConfigError, DataError, PartialResultError


@pytest.fixture
def store(tmp_path):
    for i in range(4):
        write_slide(tmp_path / "store", make_slide(f"s{i}", seed=i))
    return tmp_path / "store"


def call(*arguments):
    return CliRunner().invoke(preprocess.app, [str(a) for a in arguments], catch_exceptions=True)


def test_a_store_is_packed_checked_and_read(store, tmp_path):
    result = call("shard", store, "--out", tmp_path / "shards", "--size", "20KB")
    assert result.exit_code == 0
    assert result.output.startswith("4 slides in ")
    dataset = ShardDataset.open(tmp_path / "shards")
    assert dataset.index.encoder == "made-up"
    assert sorted(dataset.slide_ids) == ["s0", "s1", "s2", "s3"]
    result = call("verify", tmp_path / "shards")
    assert (result.exit_code, result.output) == (0, "4 slides, all intact\n")


def test_int8_says_its_error(store, tmp_path):
    result = call("shard", store, "--out", tmp_path / "shards", "--dtype", "int8")
    assert result.exit_code == 0
    assert "int8: root mean square error at most 0." in result.output


def test_damage_is_listed_with_the_intact_slides(store, tmp_path):
    call("shard", store, "--out", tmp_path / "shards")
    index = ShardDataset.open(tmp_path / "shards").index
    sample = index.samples[2]
    with (tmp_path / "shards" / index.shards[0].name).open("r+b") as stream:
        stream.seek(sample.members["x5.npy"].offset + 140)
        stream.write(b"\x55\x55")
    result = call("verify", tmp_path / "shards")
    assert isinstance(result.exception, DataError)
    assert f"shard-000000.tar, {sample.slide_id}, x5.npy: its checksum" in result.output
    assert result.output.count("intact: ") == 3
    assert f"intact: {sample.slide_id}" not in result.output


def test_slides_left_out_are_named_and_tell_by_the_exit_code(store, tmp_path):
    chunk = store / "made-up" / "s1.zarr" / "x10" / "features" / "c" / "0" / "0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    result = call("shard", store, "--out", tmp_path / "shards")
    assert isinstance(result.exception, PartialResultError)
    assert result.exception.exit_code == 3
    assert "skipped: slide s1: x10/features differs from its digest. Delete the group" in result.output


@pytest.mark.parametrize("size", ["1", "GB", "-1GB", "1XB", "0MB", "one GB", "1.2.3GB"])
def test_a_size_without_sense_is_refused(store, tmp_path, size):
    result = call("shard", store, "--out", tmp_path / "shards", f"--size={size}")
    assert isinstance(result.exception, ConfigError)
    assert "such as 500MB, 1GB or 4GiB" in str(result.exception)


def test_a_missing_store_is_refused(tmp_path):
    result = call("shard", tmp_path / "nowhere", "--out", tmp_path / "shards")
    assert isinstance(result.exception, DataError)
    assert not (tmp_path / "shards").exists()


def test_patients_are_removed_once_it_is_confirmed(tmp_path):
    store, shards = tmp_path / "store", tmp_path / "shards"
    for name in ("TCGA-AA-0001-01Z", "TCGA-AA-0001-02Z", "TCGA-AA-0002-01Z"):
        write_slide(store, make_slide(name))
    call("shard", store, "--out", shards)
    result = call("remove", store, shards, "--patient", "TCGA-AA-0001")
    assert result.exit_code == 0
    assert "2 slides would be removed; --apply removes them" in result.output
    assert f"rewrite {shards}/shard-000000.tar" in result.output
    assert len(list((store / "made-up").iterdir())) == 3
    result = call("remove", store, shards, "--patient", "TCGA-AA-0001", "--apply")
    assert "2 slides removed" in result.output
    assert [p.name for p in (store / "made-up").iterdir()] == ["TCGA-AA-0002-01Z.zarr"]
    assert ShardDataset.open(shards).slide_ids == ("TCGA-AA-0002-01Z",)


def test_patients_of_a_table_are_removed_and_those_without_slides_refused(store, tmp_path):
    table = tmp_path / "clinical.csv"
    table.write_text("patient,slide,time,event\np1,s0,3,1\np1,s1,3,1\np2,s2,4,0\np3,s9,5,1\n")
    result = call("remove", store, "--patient", "p1", "--table", table, "--apply")
    assert "2 slides removed" in result.output, result.exception
    assert call("remove", store, "--patient", "p3", "--table", table).exception.exit_code == ConfigError.exit_code
    assert "no slide of this patient" in str(call("remove", store, "--patient", "p4").exception)
    assert "no --patient" in str(call("remove", store, "--slide", "s2", "--table", table).exception)
    assert "Give --slide or --patient" in call("remove", store).exception.remedy
    assert isinstance(call("remove", store, "--slide", "s2", "--slide", "s7").exception, PartialResultError)


def test_stores_are_merged_once_it_is_confirmed(store, tmp_path):
    write_slide(tmp_path / "other", make_slide("new"))
    assert "1 groups would be copied; --apply" in call("merge", tmp_path / "other", store).output
    assert "1 groups copied, 0 are there already" in call("merge", tmp_path / "other", store, "--apply").output
    result = call("merge", tmp_path / "other", store, "--apply")
    assert "0 groups copied, 1 are there already, 0 refused" in result.output
    write_slide(tmp_path / "other", make_slide("s0", seed=77))
    assert isinstance(call("merge", tmp_path / "other", store, "--apply").exception, PartialResultError)
