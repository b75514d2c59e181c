"""Errors of a disk or its server: tried again where that may help, then reported with the file and what to do."""

import errno
import fcntl
import os

import numpy as np
import pytest
from factories import make_cohort

from cfusion.cli import main
from cfusion.data import shard_files
from cfusion.data.shards import ShardDataset
from cfusion.doctor import checks
from cfusion.errors import ShardsError

TRIES = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=4).shards


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(shard_files, "_PAUSES", (0.0,) * TRIES)


def failing(monkeypatch, name, code, times):
    """`os.NAME` fails on shards, `times` times."""
    real, left = getattr(os, name), [times]

    def call(what, *more, **options):
        if left[0] and (name != "open" or str(what).endswith(".tar")):
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(what, *more, **options)

    monkeypatch.setattr(os, name, call)
    return left


@pytest.mark.parametrize("name", ["preadv", "open"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_what_a_server_gives_at_a_second_attempt_is_read(shards, monkeypatch, name, code):
    slide = ShardDataset.open(shards).slide_ids[0]
    expected = ShardDataset.open(shards).read(slide, ["x20", "coords_x5"])
    left = failing(monkeypatch, name, code, TRIES)
    found = ShardDataset.open(shards).read(slide, ["x20", "coords_x5"])
    assert left == [0]
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values)


@pytest.mark.parametrize("name", ["preadv", "open"])
@pytest.mark.parametrize(
    ("code", "tries", "message"),
    [
        (errno.EIO, TRIES + 1, r"\.tar: cannot be read \(Input/output error\)\. The disk or its file server failed"),
        (errno.ESTALE, TRIES + 1, r"\.tar: cannot be read \(Stale file handle\)\. The disk or its file server failed"),
        (errno.EMFILE, 1, r"\.tar: cannot be read \(Too many open files\)\. Raise .*ulimit -n"),
        (errno.EACCES, 1, r"\.tar: cannot be read \(Permission denied\)\. Give another path"),
        (errno.ENOENT, 1, r"\.tar: cannot be read \(No such file.*\)\. Copy or pack the shards again"),
    ],
)
def test_what_stays_unreadable_is_named_with_what_to_do(shards, monkeypatch, name, code, tries, message):
    dataset = ShardDataset.open(shards)
    left = failing(monkeypatch, name, code, 99)
    with pytest.raises(ShardsError, match=message):
        dataset.read(dataset.slide_ids[0], ["x20"])
    assert 99 - left[0] == tries


def test_a_file_that_was_replaced_is_read_again_under_the_same_descriptor(shards, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    file = shard_files.OpenFile(path)
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").replace(path)
    failing(monkeypatch, "preadv", errno.ESTALE, 1)
    buffer = bytearray(3)
    assert file.readv([memoryview(buffer)], 0) == 3
    assert buffer == b"new"
    assert fcntl.fcntl(file.descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOTCONN, errno.ENOENT, errno.EXDEV])
def test_a_command_ends_with_one_line(monkeypatch, capsys, code):
    def fails():
        raise OSError(code, os.strerror(code), "/scratch/table.csv")

    monkeypatch.setattr(main, "app", fails)
    with pytest.raises(SystemExit) as left:
        main.run()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: /scratch/table.csv: {os.strerror(code)}. ")
    assert said.count("\n") == 1


def test_the_doctor_says_whether_there_is_flock(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "CHECKS", [check for check in checks.CHECKS if check[0] == "locks"])
    (found,) = checks.check_node()
    assert found.passed

    def flock(_descriptor, _operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    (found,) = checks.check_node()
    assert (found.passed, found.required) == (False, False)
    assert "no flock on the file system here (Function not implemented)" in found.detail
