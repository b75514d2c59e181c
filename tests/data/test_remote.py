"""Shards over loopback HTTP, with the faults of a real network."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from made_up_slides import MemoryStore, make_slide
from range_server import serving

from cfusion.config import DataConfig
from cfusion.data import remote
from cfusion.data.bags import make_bags
from cfusion.data.loader import BagLoader
from cfusion.data.shards import ShardDataset
from cfusion.errors import DataError, MissingExtraError
from preprocess.packing import pack_store

NAMES = ["x20", "x10", "x5", "coords_x20"]


@pytest.fixture
def slides():
    return {s.slide_id: s for s in [make_slide(f"s{i}.A", cells=4, seed=i) for i in range(9)]}


@pytest.fixture
def server(slides, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.01)
    pack_store(MemoryStore(slides.values()), tmp_path / "served", target_bytes=20_000)
    with serving(tmp_path / "served") as server:
        yield server


def assert_same(dataset, slides):
    for slide_id, slide in slides.items():
        read = dataset.read(slide_id, NAMES)
        for name in ("x20", "x10", "x5"):
            np.testing.assert_array_equal(read[name], slide.features[name])
        np.testing.assert_array_equal(read["coords_x20"], slide.coords["x20"])


@pytest.mark.parametrize("faults", [[], ["busy"] * 3, ["cut"] * 5, ["busy", "cut", "", "cut", "flip", "busy"]])
def test_the_same_bytes_come_through_faults(server, slides, tmp_path, faults):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    server.faults.extend(faults)
    assert_same(dataset, slides)
    assert [fault for _, _, fault in server.requests if fault] == [fault for fault in faults if fault]
    assert all(span is not None for path, span, _ in server.requests if path.endswith(".tar"))


def test_a_silent_server_is_asked_again(server, slides, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.3)
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    server.faults.extend(["", "silent"])
    assert_same(dataset, slides)
    assert "silent" in {fault for _, _, fault in server.requests}


def test_members_that_lie_together_come_in_one_range(server, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    bags = make_bags(dataset, {"a": ["s0.A"], "b": ["s1.A", "s2.A"]}, "case", (20.0, 10.0, 5.0))
    # Embeddings, coordinates, and, for the drawing of tiles, parents; a slide has eight members besides its provenance.
    for config, bag, most in ((DataConfig(), 0, 2), (DataConfig(max_tiles=70), 1, 6)):
        loader = BagLoader(dataset, bags, config, magnifications=(20.0, 10.0, 5.0), seed=1)
        server.requests.clear()
        next(loader.stream([[bag]], epoch=0, training=True))
        assert len(server.requests) <= most


def test_what_is_cached_is_not_asked_for_again(server, slides, tmp_path):
    assert_same(ShardDataset.open(server.url, cache_directory=tmp_path / "cache"), slides)
    server.requests.clear()
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    assert_same(dataset, slides)
    assert [path for path, _, _ in server.requests if path.endswith(".tar")] == []


def test_the_cache_keeps_to_its_bound_and_to_its_own_files(server, slides, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "thesis.tex").write_bytes(bytes(50_000))
    (cache / f".{'0' * 16}-0-512.ab.tmp").write_bytes(bytes(5_000))
    dataset = ShardDataset.open(server.url, cache_directory=cache, cache_bytes=6_000)
    for slide_id in slides:
        assert_same(dataset, {slide_id: slides[slide_id]})
        own = [p for p in cache.iterdir() if p.name not in ("thesis.tex", ".lock")]
        assert sum(p.stat().st_size for p in own) <= 6_000
        assert own
        assert not any(p.name.startswith(".") for p in own)
    assert (cache / "thesis.tex").stat().st_size == 50_000


def test_a_cache_smaller_than_a_member_still_reads(server, slides, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache", cache_bytes=10)
    assert_same(dataset, slides)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_folder_that_cannot_be_written_to_is_named_with_its_setting(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    with pytest.raises(
        DataError, match=rf"{tmp_path / 'cache'}: .*cannot cache shard data here.*data\.cache_directory"
    ):
        dataset.read("s0.A", ["x20"])


def test_a_damaged_cached_file_is_fetched_again(server, slides, tmp_path):
    assert_same(ShardDataset.open(server.url, cache_directory=tmp_path / "cache"), slides)
    for path in (tmp_path / "cache").glob("[0-9a-f]*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert_same(ShardDataset.open(server.url, cache_directory=tmp_path / "cache"), slides)


def test_a_server_that_stays_down_is_named(server, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    server.faults.extend(["busy"] * 50)
    with pytest.raises(DataError, match=r"127\.0\.0\.1.*shard-0000\d\d\.tar: failed 6 times.*503.*Check the server"):
        dataset.read("s0.A", ["x20"])


def test_a_shard_that_is_wrong_on_the_server_is_named(server, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    server.faults.extend(["flip"] * 2)
    with pytest.raises(DataError, match="differ from the packed ones"):
        dataset.read("s0.A", ["x20"])


def test_a_server_without_range_requests_is_refused(server, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    server.ignores_ranges = True
    with pytest.raises(DataError, match="must answer range requests"):
        dataset.read("s0.A", ["x20"])


def test_missing_shards_and_indexes_are_named(server, tmp_path):
    with pytest.raises(DataError, match=r"nowhere/index\.json: not found"):
        ShardDataset.open(f"{server.url}/nowhere")
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    for path in server.folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"shard-0000\d\d\.tar: not found.*Copy the shards and their index"):
        dataset.read("s0.A", ["x20"])


def test_credentials_in_a_url_reach_no_message(server):
    url = server.url.replace("http://", "http://user:secret@")
    with pytest.raises(DataError) as caught:
        ShardDataset.open(f"{url}/nowhere")
    assert "secret" not in str(caught.value)


def test_a_user_and_password_come_from_the_url_or_from_netrc(server, slides, tmp_path, monkeypatch):
    server.user = ("joe", "s3cr@t")
    assert_same(ShardDataset.open(server.url.replace("//", "//joe:s3cr%40t@"), cache_directory=tmp_path / "a"), slides)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login joe password s3cr@t\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert_same(ShardDataset.open(server.url, cache_directory=tmp_path / "b"), slides)


def test_a_signature_goes_behind_the_name_of_each_file_as_it_is(server, slides, tmp_path):
    server.query = "sv=1&sig=a%2Fb%2Bc%3D"
    dataset = ShardDataset.open(f"{server.url}/?{server.query}", cache_directory=tmp_path / "cache")
    assert_same(dataset, slides)
    assert dataset.directory == server.url


@pytest.mark.parametrize("url", ["http://joe:secret@{}", "http://{}/?sig=secret", "http://{}"])
def test_refused_access_is_reported_at_once_and_without_the_secret(server, tmp_path, url):
    server.user, server.query = ("joe", "another"), "sig=another"
    with pytest.raises(DataError, match=r"index\.json: access is refused \(ClientResponseError: 401.*netrc") as caught:
        ShardDataset.open(url.format(server.url.removeprefix("http://")))
    assert "secret" not in str(caught.value)
    assert caught.value.topic == "access"
    assert len(server.requests) == 1


def test_a_proxy_of_the_environment_is_asked(server, slides, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    assert_same(ShardDataset.open("http://shards.invalid", cache_directory=tmp_path / "cache"), slides)


def test_a_cache_can_be_shared_by_a_group(server, slides, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o2770)
    assert_same(ShardDataset.open(server.url, cache_directory=cache), slides)
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.iterdir()} == {0o660}


def test_what_another_user_has_closed_is_fetched_and_not_kept(server, slides, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert_same(ShardDataset.open(server.url, cache_directory=cache), slides)
    theirs = {path.name for path in cache.iterdir()}
    real = os.open

    def as_another(path, flags, *more, **options):
        if Path(path).parent == cache and Path(path).name in theirs:
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", as_another)
    assert_same(ShardDataset.open(server.url, cache_directory=cache), slides)
    assert {path.name for path in cache.iterdir()} == theirs


def test_an_index_with_a_path_writes_nothing(server, tmp_path):
    index = server.folder / "index.json"
    index.write_text(index.read_text().replace("shard-000000.tar", "../evil.tar"))
    with pytest.raises(DataError, match="plain file name"):
        ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_complete_epoch_is_streamed_once_through_webdataset(server, slides, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    server.faults.extend(["", "cut", "busy"])
    seen = dict(dataset.samples())
    assert list(seen) == list(dataset.slide_ids)
    for slide_id, slide in slides.items():
        np.testing.assert_array_equal(seen[slide_id]["x20"], slide.features["x20"])
        np.testing.assert_array_equal(seen[slide_id]["parent_x10"], slide.parents["x10"])
    tars = [path for path, _, fault in server.requests if path.endswith(".tar") and fault != "busy" and fault != "cut"]
    assert len(tars) == len(dataset.index.shards)
    assert not (tmp_path / "cache").exists()


def test_a_shard_is_streamed_into_memory_only_where_half_of_it_is_wanted(server, slides, tmp_path):
    pack_store(MemoryStore(slides.values()), server.folder, target_bytes=60_000)
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    by_shard = [[s.slide_id for s in dataset.index.samples if s.shard == n] for n in range(len(dataset.index.shards))]
    assert len(by_shard[0]) > 2
    server.requests.clear()
    dataset.hold([by_shard[0][0], *by_shard[1]])
    assert {path for path, _, _ in server.requests} == {"/shard-000001.tar"}
    wanted = {slide_id: slides[slide_id] for slide_id in (by_shard[0][0], *by_shard[1])}
    assert_same(dataset, wanted)
    server.requests.clear()
    assert_same(dataset, wanted)
    assert not server.requests


def test_a_flipped_bit_in_a_stream_is_named(server, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    sample = dataset.index.samples[0]
    path = server.folder / dataset.index.shards[0].name
    data = bytearray(path.read_bytes())
    data[sample.members["x10.npy"].offset + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"slide {sample.slide_id}, member x10\.npy: its checksum"):
        list(dataset.samples())


def test_a_stream_of_another_tar_is_refused(server, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    first, second = (server.folder / shard.name for shard in dataset.index.shards[:2])
    first.write_bytes(second.read_bytes().ljust(first.stat().st_size, b"\0"))
    with pytest.raises(DataError, match="is not in the index"):
        list(dataset.samples())


@pytest.mark.parametrize(
    "damage", [lambda d: d[:900], lambda d: b"\x1f\x8b" + d[2:], lambda d: bytes(len(d)), lambda d: b"?" * 9]
)
def test_a_stream_that_is_not_a_complete_tar_is_named(server, tmp_path, damage):
    dataset = ShardDataset.open(server.folder, cache_directory=tmp_path / "cache")
    path = server.folder / dataset.index.shards[1].name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{path.name}: (truncated, or not a tar|slide .* is not in the tar).*verify"):
        list(dataset.samples())


def test_a_stream_from_a_server_that_goes_away_fails_as_other_reads_do(server, tmp_path):
    dataset = ShardDataset.open(server.url, cache_directory=tmp_path / "cache")
    server.faults.extend(["busy"] * 50)
    with pytest.raises(DataError, match=r"shard-000000\.tar: failed 6 times.*503") as caught:
        list(dataset.samples())
    assert str(caught.value) == f"{caught.value.message} {caught.value.remedy}"


def test_training_reads_remote_bags_like_local_ones(server, slides, tmp_path):
    cases = {"a": ["s0.A", "s1.A"], "b": ["s2.A"]}
    batches = []
    for where, cache in ((server.folder, "page"), (server.url, "page"), (server.url, "ram")):
        dataset = ShardDataset.open(where, cache_directory=tmp_path / cache)
        bags = make_bags(dataset, cases, "case", (20.0, 10.0, 5.0))
        config = DataConfig(cache=cache, max_tiles=70)
        loader = BagLoader(dataset, bags, config, magnifications=(20.0, 10.0, 5.0), seed=1)
        batches.append(list(loader.stream([[1], [0, 1]], epoch=3, training=True)))
    for local, other in zip(batches[0] * 2, batches[1] + batches[2], strict=True):
        for name in ("x20", "x10", "x5"):
            np.testing.assert_array_equal(local.features[name].numpy(), other.features[name].numpy())
            np.testing.assert_array_equal(local.positions[name].numpy(), other.positions[name].numpy())


def test_any_file_system_of_fsspec_serves(slides, tmp_path):
    import fsspec

    pack_store(MemoryStore(slides.values()), tmp_path / "local")
    memory = fsspec.filesystem("memory")
    try:
        for path in (tmp_path / "local").iterdir():
            memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
        dataset = ShardDataset.open("memory://bucket", cache_directory=tmp_path / "cache")
        assert_same(dataset, slides)
        assert len(list(dataset.samples())) == len(slides)
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_kind_of_url_without_its_package_names_the_extra(monkeypatch):
    import fsspec

    def absent(*_, **__):
        raise ImportError("s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(MissingExtraError, match=r"s3fs.*cfusion\[remote\]"):
        ShardDataset.open("s3://bucket/shards")


def test_an_unknown_kind_of_url_is_refused():
    with pytest.raises(DataError, match="nonsense"):
        ShardDataset.open("nonsense://bucket/shards")
