"""Shards on an S3 of loopback: moto's server, which stands in for an object store."""

import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from made_up_slides import MemoryStore, make_slide
from spawn import free_port

from cfusion.data.shards import ShardDataset
from cfusion.errors import DataError
from preprocess.packing import pack_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint():
    """The address of a server that has one bucket, `bucket`."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while True:
            try:
                request = urllib.request.Request(f"{address}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=5).read()
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < end, "moto's server did not start"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def slides():
    return {s.slide_id: s for s in [make_slide(f"s{i}", cells=4, seed=i) for i in range(5)]}


@pytest.fixture
def bucket(endpoint, slides, tmp_path, monkeypatch):
    """An `s3://` address with packed shards; the environment has endpoint and credentials, as on a cluster."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    pack_store(MemoryStore(slides.values()), tmp_path / "shards", target_bytes=20_000)
    store = s3fs.S3FileSystem()
    for path in (tmp_path / "shards").iterdir():
        store.pipe_file(f"bucket/{tmp_path.name}/{path.name}", path.read_bytes())
    yield f"s3://bucket/{tmp_path.name}"
    s3fs.S3FileSystem.clear_instance_cache()


def test_shards_in_a_bucket_give_the_bytes_that_were_packed(bucket, slides, tmp_path):
    dataset = ShardDataset.open(bucket, cache_directory=tmp_path / "cache")
    assert set(dataset.slide_ids) == set(slides)
    for slide_id, slide in slides.items():
        np.testing.assert_array_equal(dataset.read(slide_id, ["x20"])["x20"], slide.features["x20"])


def test_what_is_not_there_or_not_allowed_is_one_line(bucket, endpoint, tmp_path, monkeypatch):
    import s3fs

    with pytest.raises(DataError, match=r"s3://bucket/nowhere.*index\.json"):
        ShardDataset.open("s3://bucket/nowhere", cache_directory=tmp_path / "cache")
    with pytest.raises(DataError, match=r"s3://no-such-bucket"):
        ShardDataset.open("s3://no-such-bucket/shards", cache_directory=tmp_path / "cache")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"credentials"):
        ShardDataset.open(bucket, cache_directory=tmp_path / "cache")
