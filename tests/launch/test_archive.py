"""An archive is the same bytes whenever its files are, and one from outside is refused unless all is as listed."""

import hashlib
import os
import stat
import zipfile
from pathlib import Path

import pytest

from cfusion.errors import DataError
from launch.sweep import archive as archives
from launch.sweep.archive import SUMS, is_archive, unpack, write_archive

MEMBERS = {"b/two.csv": b"1,2\n", "README.md": b"# one\n", "a.json": b"{}\n"}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    write_archive(tmp_path / "made.zip", MEMBERS)
    return tmp_path / "made.zip"


def rewritten(archive: Path, *, sums: bool = True, **changes: bytes | None) -> Path:
    """The archive with members changed (None: left out), and with the digests of the new content if `sums`."""
    with zipfile.ZipFile(archive) as source:
        content: dict[str, bytes | None] = {name: source.read(name) for name in source.namelist() if name != SUMS}
        listed = source.read(SUMS)
    content |= changes
    kept = {name: value for name, value in content.items() if value is not None}
    if sums:
        listed = "".join(f"{hashlib.sha256(v).hexdigest()}  {k}\n" for k, v in kept.items()).encode()
    with zipfile.ZipFile(archive, "w") as target:
        for name, value in {**kept, SUMS: listed}.items():
            target.writestr(name, value)
    return archive


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(archive: Path, message: str) -> None:
    """The archive is refused, and nothing of it is left on the disk."""
    before = sorted(archive.parent.rglob("*"))
    with pytest.raises(DataError, match=message):
        unpack(archive, archive.parent / "out")
    assert sorted(archive.parent.rglob("*")) == before


def test_the_same_files_give_the_same_bytes_whatever_their_order_and_age(tmp_path):
    digests = []
    for number, order in enumerate((list(MEMBERS), sorted(MEMBERS))):
        content = dict[str, bytes | Path]()
        for name in order:
            content[name] = tmp_path / f"{number}-{name.replace('/', '-')}"
            content[name].write_bytes(MEMBERS[name])
            os.utime(content[name], (number * 10**8, number * 10**8))
            content[name].chmod(0o600 + number)
        digests.append(write_archive(tmp_path / f"{number}.zip", content))
    assert (tmp_path / "0.zip").read_bytes() == (tmp_path / "1.zip").read_bytes()
    assert digests == [hashlib.sha256((tmp_path / "0.zip").read_bytes()).hexdigest()] * 2


def test_what_is_archived_comes_out_as_it_was(archive, tmp_path):
    assert is_archive(archive)
    unpack(archive, tmp_path / "out")
    found = files_in(tmp_path / "out")
    assert found == MEMBERS
    with zipfile.ZipFile(archive) as source:
        sums = dict(reversed(line.split("  ")) for line in source.read(SUMS).decode().splitlines())
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in MEMBERS.items()}


def test_an_archive_that_was_packed_again_is_the_same(archive, tmp_path):
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as target:
        for name in reversed(source.namelist()):
            target.writestr(name, source.read(name))
    unpack(tmp_path / "z.zip", tmp_path / "out")
    assert files_in(tmp_path / "out") == MEMBERS


def test_changed_bytes_are_refused_with_the_file_and_both_digests(archive):
    changed = b"1,3\n"
    digests = [hashlib.sha256(value).hexdigest() for value in (changed, MEMBERS["b/two.csv"])]
    raw = archive.read_bytes().replace(MEMBERS["b/two.csv"], changed)
    assert raw != archive.read_bytes()
    archive.write_bytes(raw)  # the checksum of the zip is now wrong too
    refused(archive, f"b/two.csv has changed: SHA-256 {digests[0]}, and {SUMS} has {digests[1]}")
    write_archive(archive, MEMBERS)
    refused(rewritten(archive, sums=False, **{"b/two.csv": changed}), f"{digests[0]}, and {SUMS} has {digests[1]}")


def test_members_that_are_missing_or_not_listed_are_named(archive):
    refused(rewritten(archive, sums=False, **{"a.json": None}), r"a\.json is missing")
    write_archive(archive, MEMBERS)
    refused(rewritten(archive, sums=False, **{"c.json": b""}), r"c\.json is not listed in SHA256SUMS")


@pytest.mark.parametrize(
    "name",
    ["../out-of-it", "/etc/passwd", "a/../../b", "C:/b", "..\\b", "a//b", "./a", "a\nb", "a/", "a\u202eb"],
)
def test_no_path_leads_out_of_the_folder(archive, name):
    refused(rewritten(archive, **{name: b"x"}), "is refused: (its path|it is a folder)")


def added(archive: Path, info: zipfile.ZipInfo, content: bytes = b"x", *, twice: bool = False) -> Path:
    listed = f"{hashlib.sha256(content).hexdigest()}  {info.filename}\n".encode()
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr(info, content)
        if twice:
            target.writestr(zipfile.ZipInfo(info.filename.upper()), content)
        target.writestr(SUMS, listed)
    return archive


def test_odd_members_are_refused(archive):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(added(archive, link, b"/etc"), "'link' is refused: it is a link or a device")
    refused(added(archive, zipfile.ZipInfo("table.csv"), twice=True), "another member has this name")
    packed = zipfile.ZipInfo("x")
    packed.compress_type = zipfile.ZIP_BZIP2
    refused(added(archive, packed), "its compression")
    secret = zipfile.ZipInfo("x")
    raw = bytearray(added(archive, secret).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1
    archive.write_bytes(raw)
    refused(archive, "it is encrypted")


def test_a_bomb_is_refused_before_it_is_unpacked(archive, monkeypatch):
    monkeypatch.setattr(archives, "_FREE_BYTES", 1 << 20)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        with target.open("zeros", "w") as member:
            for _ in range(20):
                member.write(bytes(1 << 20))
        target.writestr(SUMS, f"{'0' * 64}  zeros\n")
    refused(archive, r"bytes would unpack to 20,97\d,\d+")


def test_a_member_that_is_longer_than_it_states_is_refused(archive):
    info = zipfile.ZipInfo("x")
    info.compress_type = zipfile.ZIP_DEFLATED
    raw = bytearray(added(archive, info, bytes(10_000)).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = raw.index(signature) + offset
        raw[at : at + 4] = (10).to_bytes(4, "little")
    archive.write_bytes(raw)
    refused(archive, "x has changed")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 and no more"])
def test_what_is_no_archive_is_refused(archive, content):
    archive.write_bytes(content)
    assert not is_archive(archive)
    refused(archive, "is not a zip archive, or is damaged")


def test_an_archive_without_digests_or_with_wrong_ones_is_refused(archive):
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("a", b"")
    refused(archive, "lacks SHA256SUMS")
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("a", b"")
        target.writestr(SUMS, "abc  a\n")
    refused(archive, "SHA256SUMS, line 1: 'abc  a': expected a digest")
    raw = write_archive(archive, MEMBERS) and archive.read_bytes()
    archive.write_bytes(raw[: len(raw) // 2])
    refused(archive, "is not a zip archive, or is damaged")


def test_a_name_that_would_be_refused_is_not_written(tmp_path):
    with pytest.raises(DataError, match="cannot be archived: its path leads out"):
        write_archive(tmp_path / "made.zip", {"../x": b""})
    assert not (tmp_path / "made.zip").exists()


def test_a_missing_archive_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"none\.zip: cannot be read or unpacked \(No such file"):
        unpack(tmp_path / "none.zip", tmp_path / "out")
