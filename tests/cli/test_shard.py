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
