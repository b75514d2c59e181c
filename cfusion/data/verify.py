"""Checks every byte of a set of shards against its index, and says which slides are whole."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from isal.isal_zlib import crc32

from cfusion.console import progress
from cfusion.data.npy import check_header
from cfusion.data.shard_index import META, Member, Sample, ShardIndex, read_index, tar_key
from cfusion.files import digest_file

_COPY = "Copy this shard again, or pack the store again."
_PACK = "Pack the store again; never unpack this tar."
_EXTRACT = "Extract the slide again and pack the store again."


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        shard: File name of the tar.
        slide_id: The slide it concerns; empty where it concerns the tar.
        member: The member it concerns; empty where it concerns more.
        what: What is wrong.
        remedy: What to do about it.
    """

    shard: str
    slide_id: str
    member: str
    what: str
    remedy: str

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.shard, self.slide_id, self.member) if part)
        return f"{where}: {self.what}. {self.remedy}"


@dataclass(frozen=True)
class Verification:
    """What a check of shards found.

    Attributes:
        good: Slides whose every member is as packed.
        problems: All that is wrong.
    """

    good: tuple[str, ...]
    problems: tuple[Problem, ...]


def verify_shards(directory: str | os.PathLike[str]) -> Verification:
    """Compare a folder of shards with its index: lengths, tar entries, `.npy` headers, checksums, finite values.

    Nothing is unpacked or unpickled, and no size is taken from the tars themselves.

    Raises:
        DataError: The index is missing or does not describe a shard set.
    """
    index = read_index(directory)
    problems: list[Problem] = []
    bad: set[str] = set()
    with progress("verifying shards", len(index.shards)) as bar:
        for number in range(len(index.shards)):
            for problem in _check_shard(Path(directory), index, number):
                problems.append(problem)
                bad.add(problem.slide_id)
            bar.advance()
    return Verification(tuple(s.slide_id for s in index.samples if s.slide_id not in bad), tuple(problems))


def _check_shard(directory: Path, index: ShardIndex, number: int) -> Iterator[Problem]:
    shard = index.shards[number]
    path = directory / shard.name
    samples = [sample for sample in index.samples if sample.shard == number]
    if not path.is_file():
        yield from (Problem(shard.name, s.slide_id, "", "the shard is missing", _COPY) for s in samples)
        return
    size = path.stat().st_size
    if size != shard.size:
        yield Problem(shard.name, "", "", f"{size} bytes, the index says {shard.size}", _COPY)
    yield from _check_entries(path, samples)
    with path.open("rb") as stream:
        for sample in samples:
            for name, member in sample.members.items():
                stream.seek(member.offset)
                what, remedy = _check_member(stream.read(member.size), name, member)
                if what:
                    yield Problem(shard.name, sample.slide_id, name, what, remedy)
    if size == shard.size and digest_file(path) != shard.sha256:
        yield Problem(shard.name, "", "", "its SHA-256 is not the one in the index", _COPY)


def _check_entries(path: Path, samples: list[Sample]) -> Iterator[Problem]:
    """Walk the tar's own headers: only the indexed files, where the index says, and nothing that could do harm."""
    expected = {
        f"{tar_key(s.slide_id)}.{name}": (s.slide_id, name, m) for s in samples for name, m in s.members.items()
    }
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                slide_id, name, member = expected.pop(entry.name, ("", "", None))
                what = _check_entry(entry, member)
                if what:
                    yield Problem(path.name, slide_id, name or entry.name, what, _PACK)
    except tarfile.TarError as error:
        yield Problem(path.name, "", "", f"is cut short or no tar ({error})", _COPY)
    for slide_id, name, _ in expected.values():
        yield Problem(path.name, slide_id, name, "is not in the tar", _COPY)


def _check_entry(entry: tarfile.TarInfo, member: Member | None) -> str:
    parts = PurePosixPath(entry.name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        return "its name leads out of the folder a tar is unpacked to"
    if not entry.isreg():
        return "is a link, device or folder, not a plain file"
    if member is None:
        return "is not in the index"
    if (entry.offset_data, entry.size) != (member.offset, member.size):
        return f"lies at {entry.offset_data} with {entry.size} bytes, the index says {member.offset}, {member.size}"
    return ""


def _check_member(data: bytes, name: str, member: Member) -> tuple[str, str]:
    """What is wrong with a member's bytes, and the remedy; empty where nothing is."""
    if len(data) != member.size:
        return f"the shard ends after {len(data)} of its {member.size} bytes", _COPY
    header = "" if name == META else check_header(data[: member.header], member)
    if header:
        return header, _PACK
    if crc32(data) != member.crc32:
        return "its checksum is not the one it was packed with", _COPY
    array = np.frombuffer(data, member.dtype, offset=member.header)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "holds values that are not finite", _EXTRACT
    return "", ""
