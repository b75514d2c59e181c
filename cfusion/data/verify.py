"""Check every byte of a set of shards against its index, and report which slides are intact."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from isal.isal_zlib import crc32

from cfusion.console import progress
from cfusion.data.shard_index import (
    INDEX_NAME,
    META,
    Sample,
    ShardIndex,
    TarMember,
    check_header,
    parse,
    read_index_file,
    tar_key,
)  # fmt: skip
from cfusion.files import digest_file

_COPY = "Copy this shard again, or pack the store again."
_PACK = "Pack the store again; never unpack this tar."
_EXTRACT = "Extract the slide again and pack the store again."
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = 4096


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        shard: File name of the tar.
        slide_id: The affected slide; empty if the tar is affected.
        member: The affected member; empty if more is affected.
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
        # Names come from the tar: terminal control characters are shown as escapes.
        text = f"{where}: {self.what}. {self.remedy}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Verification:
    """Result of a check of shards.

    Attributes:
        good: Slides whose every member is as packed.
        problems: All problems.
    """

    good: tuple[str, ...]
    problems: tuple[Problem, ...]


def verify_shards(directory: str | os.PathLike[str]) -> Verification:
    """Compare a folder of shards with its index: lengths, tar entries, `.npy` headers, checksums, finite values.

    Nothing is unpacked or unpickled, and no size is taken from the tars themselves.

    Raises:
        DataError: The index is missing or does not describe a shard set.
    """
    index = parse(ShardIndex, read_index_file(directory), str(Path(directory) / INDEX_NAME))
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
    with path.open("rb") as stream:
        yield from _check_headers(stream, size, shard.name, samples)
        for sample in samples:
            name, what = index.contradiction(sample)
            if name:
                yield Problem(shard.name, sample.slide_id, name, f"in the index, {what}", _PACK)
                continue
            for name, member in sample.members.items():
                stream.seek(member.offset)
                # Read no more than the file contains: the size that the index claims may not fit in memory.
                data = stream.read(min(member.size, max(0, size - member.offset)))
                what, remedy = _check_member(data, name, member)
                if what:
                    yield Problem(shard.name, sample.slide_id, name, what, remedy)
    if size == shard.size and digest_file(path) != shard.sha256:
        yield Problem(shard.name, "", "", "its SHA-256 differs from the index", _COPY)


def _check_headers(stream: BinaryIO, size: int, shard: str, samples: list[Sample]) -> Iterator[Problem]:
    """Check every header of a tar, member by member, so that a damaged one affects only its own slide."""
    members = sorted(((s.slide_id, name, m) for s in samples for name, m in s.members.items()), key=_place)
    at = 0
    for slide_id, name, member in members:
        what = "is not in the tar"
        try:
            for entry, offset in _headers(stream, at, min(member.offset, size)):
                if offset == member.offset:
                    what = _check_entry(entry, f"{tar_key(slide_id)}.{name}", member.size)
                else:
                    yield Problem(shard, "", entry.name, _check_entry(entry, None, 0), _PACK)
        except tarfile.TarError as error:
            what = f"its tar header is damaged ({error})"
        if what:
            yield Problem(shard, slide_id, name, what, _COPY if member.offset + member.size > size else _PACK)
        at = member.offset + -(-member.size // _BLOCK) * _BLOCK
    try:
        for entry, _ in _headers(stream, at, size):
            yield Problem(shard, "", entry.name, _check_entry(entry, None, 0), _PACK)
    except tarfile.TarError as error:
        yield Problem(shard, "", "", f"contains something else after its last member ({error})", _COPY)


def _place(member: tuple[str, str, TarMember]) -> int:
    return member[2].offset


def _headers(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield the headers of a tar that lie in a range, up to its end mark, each with the offset of its content.

    `TarFile` is not used: it follows sizes backwards, reads as much as an extended header claims, and stops at the
    first damaged header.
    """
    name = None
    while start + _BLOCK <= end:
        stream.seek(start)
        block = stream.read(_BLOCK)
        if not block.strip(b"\0"):
            return
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        start += _BLOCK
        if entry.size < 0:
            raise tarfile.HeaderError(f"a size of {entry.size}")
        if entry.type == tarfile.GNUTYPE_LONGNAME:
            name = stream.read(min(entry.size, _LONGEST_NAME)).rstrip(b"\0").decode("utf-8", "replace")
        else:
            entry.name, name = name or entry.name, None
            yield entry, start
        start += -(-entry.size // _BLOCK) * _BLOCK


def _check_entry(entry: tarfile.TarInfo, expected: str | None, size: int) -> str:
    parts = PurePosixPath(entry.name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        return "its name points outside the folder that a tar is unpacked to"
    if not entry.isreg():
        return "is a link, device or folder, not a plain file"
    if expected is None:
        return "is not in the index"
    if entry.name != expected:
        return f"the tar has {entry.name} in its place"
    if entry.size != size:
        return f"has {entry.size} bytes in the tar, the index says {size}"
    return ""


def _check_member(data: bytes, name: str, member: TarMember) -> tuple[str, str]:
    """Describe what is wrong with a member's bytes, and the remedy; empty if nothing is."""
    if len(data) != member.size:
        return f"the shard ends after {len(data)} of its {member.size} bytes", _COPY
    header = "" if name == META else check_header(data[: member.header], member)
    if header:
        return header, _PACK
    if crc32(data) != member.crc32:
        return "its checksum differs from the packed one", _COPY
    array = np.frombuffer(data, member.dtype, offset=member.header)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "contains values that are not finite", _EXTRACT
    return "", ""
