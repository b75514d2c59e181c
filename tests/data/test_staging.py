"""Shards on a node's own disk: the same bytes, copied once, compared with their digest."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from made_up_slides import MemoryStore, make_slide
from range_server import serving

from cfusion.config import DataConfig
from cfusion.data import staging
from cfusion.data.shards import ShardDataset, open_shards
from cfusion.data.staging import stage_folder
from cfusion.errors import ConfigError, ShardsError
from preprocess.packing import pack_store

NAMES = ["x20", "x10", "coords_x20"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    slides = [make_slide(f"s{i}.A", cells=4, seed=i) for i in range(9)]
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack_store(MemoryStore(slides), folder, target_bytes=20_000)
    return folder


def staged(shards: object, stage: str) -> ShardDataset:
    return open_shards(DataConfig(shards=str(shards), stage=stage))


def copies(stage: Path) -> list[str]:
    return sorted(path.name for path in stage.glob("cfusion-shards-*/shard-*.tar"))


def assert_same(one: ShardDataset, other: ShardDataset, slides) -> None:
    for slide in slides:
        for name, values in one.read(slide, NAMES).items():
            np.testing.assert_array_equal(values, other.read(slide, NAMES)[name])


def test_only_what_is_read_is_copied_and_has_the_same_bytes(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_DISK", str(tmp_path / "node"))
    plain, dataset = ShardDataset.open(packed), staged(packed, "$JOB_DISK/me")
    first = dataset.index.samples[0]
    assert_same(plain, dataset, [first.slide_id])
    assert copies(tmp_path / "node" / "me") == [dataset.index.shards[first.shard].name]
    assert_same(plain, dataset, dataset.slide_ids)
    assert len(copies(tmp_path / "node" / "me")) == len(dataset.index.shards) > 1


def test_a_remote_set_is_copied_too_and_found_again(packed, tmp_path):
    with serving(packed) as server:
        dataset = staged(server.url, str(tmp_path))
        assert_same(ShardDataset.open(packed), dataset, dataset.slide_ids)
        asked = len(server.requests)
        assert_same(ShardDataset.open(packed), staged(server.url, str(tmp_path)), dataset.slide_ids)
        assert [path for path, _, _ in server.requests[asked:]] == ["/index.json"] * (len(server.requests) - asked)


def test_processes_of_a_node_copy_a_shard_once(packed, tmp_path, monkeypatch):
    copied = []
    real = staging.StagedFiles._copy

    def copy(self, shard, path):
        copied.append(shard.name)
        real(self, shard, path)

    monkeypatch.setattr(staging.StagedFiles, "_copy", copy)
    datasets = [staged(packed, str(tmp_path)) for _ in range(3)]  # each as in another process
    threads = [threading.Thread(target=d.read, args=(slide, NAMES)) for d in datasets for slide in d.slide_ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(copied) == copies(tmp_path)


def test_a_damaged_shard_is_not_copied(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "shards")
    tar = next((tmp_path / "shards").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    dataset = staged(tmp_path / "shards", str(tmp_path / "node"))
    slide = next(s.slide_id for s in dataset.index.samples if dataset.index.shards[s.shard].name == tar.name)
    with pytest.raises(ShardsError, match=rf"{tar.name}: its digest differs from that of the index.*verify"):
        dataset.read(slide, NAMES)
    assert copies(tmp_path / "node") == []


def test_a_disk_without_room_or_right_is_named(packed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    dataset = staged(packed, str(tmp_path / "file"))
    with pytest.raises(ShardsError, match=r"shard-000000\.tar: cannot be copied there \(Not a directory\)"):
        dataset.read(dataset.slide_ids[0], NAMES)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ShardsError, match=r"0\.0 GB are free, shard-000000\.tar needs .* GB\. Set data\.stage"):
        staged(packed, str(tmp_path / "node")).read(dataset.slide_ids[0], NAMES)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    for text in ("$NO_SUCH_DISK", "/a/${NO_SUCH_DISK}/b"):
        with pytest.raises(ConfigError, match=r"data\.stage=.*: the variable NO_SUCH_DISK is not set here"):
            stage_folder(text)
    monkeypatch.setenv("NO_SUCH_DISK", "/local")
    assert stage_folder("$NO_SUCH_DISK/x") == Path("/local/x")
