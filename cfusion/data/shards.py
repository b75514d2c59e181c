"""Packed slides, read by offset: no tar parsing, no copy beyond the one into the caller's array."""

from __future__ import annotations

import functools
import mmap
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cfusion.data.npy import check_header
from cfusion.data.shard_index import Member, Sample, Shard, ShardIndex, read_index
from cfusion.errors import DataError

_REPAIR = "Copy or pack the shards again; `cfusion preprocess verify-shards` lists the slides that are whole."
_GAP = 8192


class OpenFile:
    """A descriptor that closes when its last reader lets go of it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @functools.cached_property
    def map(self) -> mmap.mmap:
        """The whole file as memory."""
        return mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)

    def read_ahead(self, start: int, width: int, rows: np.ndarray) -> None:
        """Have the kernel fetch runs of rows all at once, which cold disks need; cheap where they are cached."""
        edges = np.flatnonzero(np.diff(rows) != 1) + 1
        firsts = rows[np.concatenate([[0], edges])] if len(rows) else rows
        counts = np.diff(np.concatenate([[0], edges, [len(rows)]]))
        for first, count in zip(firsts.tolist(), counts.tolist(), strict=False):
            os.posix_fadvise(self.descriptor, start + first * width, count * width, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardFiles(Protocol):
    """Where the bytes of the tars are."""

    where: str
    """Folder or URL, for messages."""
    remote: bool
    """Whether reading goes over a network."""

    def open(self, number: int, shard: Shard, member: Member) -> tuple[OpenFile, int]:
        """A file that holds a member, and what to add to an offset in the shard to find it there."""

    def discard(self, number: int, member: Member) -> bool:
        """Forget a damaged local copy of a member; true where there was one, so that another try can help."""

    def samples(self, index: ShardIndex, number: int, wanted: frozenset[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The members of the wanted slides of one shard, read front to back."""


class LocalFiles:
    """Shards in a folder."""

    remote = False

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.where = str(directory)
        self._open: dict[int, OpenFile] = {}
        self._lock = threading.Lock()

    def open(self, number: int, shard: Shard, member: Member) -> tuple[OpenFile, int]:
        """The shard itself, which stays open: at most 256 at a time."""
        file = self._open.get(number)
        if file is not None:
            return file, 0
        path = self.directory / shard.name
        try:
            file = OpenFile(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror}).", _REPAIR) from error
        with self._lock:
            while len(self._open) >= 256:
                del self._open[next(iter(self._open))]
            self._open[number] = file
        return file, 0

    def discard(self, number: int, member: Member) -> bool:
        """There is no copy."""
        return False

    def samples(self, index: ShardIndex, number: int, wanted: frozenset[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """A local shard is read by offset, not front to back."""
        raise NotImplementedError


class ShardDataset:
    """Slides of a set of shards. Threads may read at the same time.

    Attributes:
        index: What the shards hold.
        slide_ids: All slides, in the order of the shards.
        directory: Folder or URL of the shards, for messages.
    """

    def __init__(self, files: ShardFiles, index: ShardIndex) -> None:
        self.index = index
        self.slide_ids = tuple(sample.slide_id for sample in index.samples)
        self.directory = files.where
        self._files = files
        self._samples: Mapping[str, Sample] = {sample.slide_id: sample for sample in index.samples}
        self._checked: set[tuple[str, str]] = set()
        self._held: set[str] = set()
        self._memory: dict[tuple[str, str], np.ndarray] = {}

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        cache_directory: str | os.PathLike[str] | None = None,
        cache_bytes: int = 64 << 30,
    ) -> ShardDataset:
        """Open a folder or URL (`https://`, `s3://`, `gs://`, …) of shards.

        Args:
            directory: Where the tars and `index.json` are.
            cache_directory: Where members of remote shards are kept; none: `cfusion` in the user's cache folder.
            cache_bytes: Most bytes to keep there.

        Raises:
            DataError: There is no index, it is not valid, or a shard is missing or has another length than indexed.
        """
        if "://" in str(directory):
            from cfusion.data.remote import open_remote

            files, index = open_remote(str(directory), cache_directory, cache_bytes)
            return cls(files, index)
        index = read_index(directory)
        for shard in index.shards:
            path = Path(directory) / shard.name
            if not path.is_file():
                raise DataError(f"{path}: the shard is missing.", _REPAIR)
            if path.stat().st_size != shard.size:
                raise DataError(
                    f"{path}: {path.stat().st_size} bytes, the index says {shard.size}: cut short, or another's index.",
                    _REPAIR,
                )
        return cls(LocalFiles(directory), index)

    def __contains__(self, slide_id: str) -> bool:
        return slide_id in self._samples

    def sample(self, slide_id: str) -> Sample:
        """The index entry of a slide.

        Raises:
            DataError: The shards hold no such slide.
        """
        sample = self._samples.get(slide_id)
        if sample is None:
            reason = self.index.refused.get(slide_id, "it was not in the store when the shards were packed")
            raise DataError(f"{self.directory}: no slide {slide_id}: {reason}.", "Pack the store again.")
        return sample

    def tiles(self, slide_id: str) -> dict[str, int]:
        """Number of tiles of a slide per magnification name."""
        return self.sample(slide_id).tiles

    def has(self, slide_id: str, name: str) -> bool:
        """Whether a slide has a member, such as `coords_x20`."""
        return f"{name}.npy" in self.sample(slide_id).members

    def has_positions(self, slide_id: str, names: Iterable[str]) -> bool:
        """Whether a slide has coordinates, and the size of a tile, at all the given magnifications."""
        sides = self.sample(slide_id).tile_px_level0
        return all(name in sides and self.has(slide_id, f"coords_{name}") for name in names)

    def read(self, slide_id: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Read whole members, such as `x20` or `coords_x20`, into new arrays of the stored dtype.

        Raises:
            DataError: The slide or a member is missing, or its bytes are not those that were packed.
        """
        members = {name: self._member(slide_id, name) for name in names}
        arrays = {name: np.empty(member.shape, member.dtype) for name, member in members.items()}
        self.read_into(slide_id, arrays)
        return arrays

    def read_into(
        self, slide_id: str, out: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Read members of a slide into C-contiguous arrays of their dtypes.

        The checksum is compared, and the `.npy` header checked, when a member is first read whole.

        Args:
            slide_id: The slide.
            out: Per member name, such as `x20`, where its rows go.
            rows: Ascending rows to read of each member; None: all.

        Raises:
            DataError: The slide or a member is missing, or its bytes are not those that were packed.
        """
        if slide_id in self._held:
            self._copy(slide_id, out, rows)
        elif rows is None:
            self._read_whole(slide_id, out)
        else:
            for name, array in out.items():
                self._read_rows(slide_id, name, rows[name], array)

    def bytes_of(self, slide_ids: Iterable[str]) -> int:
        """Bytes of all members of the given slides."""
        return sum(member.size for slide in slide_ids for member in self.sample(slide).members.values())

    def held_bytes(self, slide_ids: Iterable[str]) -> int:
        """Bytes of those of the given slides that `hold` was asked to keep."""
        return self.bytes_of(slide for slide in slide_ids if slide in self._held)

    def hold(self, slide_ids: Iterable[str]) -> None:
        """Keep slides in memory from their first reading on; remote shards are streamed in whole, at once."""
        new = [slide for slide in slide_ids if slide not in self._held]
        self._held.update(new)
        if self._files.remote:
            for slide_id, arrays in self.samples(new):
                for name, array in arrays.items():
                    self._memory[slide_id, name] = array

    def samples(self, slide_ids: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Slides with all their arrays, once each in the order of the shards.

        Remote shards are streamed front to back through webdataset, which asks the server for little and caches
        nothing: the way to read a whole epoch once.
        """
        wanted = frozenset(self.slide_ids if slide_ids is None else slide_ids)
        for number in range(len(self.index.shards)):
            inside = frozenset(s.slide_id for s in self.index.samples if s.shard == number) & wanted
            if self._files.remote and inside:
                for slide_id, members in self._files.samples(self.index, number, inside):
                    yield slide_id, self._arrays(slide_id, members)
            elif inside:
                for slide_id in (s for s in self.slide_ids if s in inside):
                    yield slide_id, self.read(slide_id, self._array_names(slide_id))

    def _array_names(self, slide_id: str) -> list[str]:
        return [name.removesuffix(".npy") for name in self.sample(slide_id).members if name.endswith(".npy")]

    def _arrays(self, slide_id: str, members: Mapping[str, bytes]) -> dict[str, np.ndarray]:
        arrays = {}
        for name in self._array_names(slide_id):
            member, data = self._member(slide_id, name), members.get(f"{name}.npy", b"")
            if len(data) != member.size or zlib.crc32(data) != member.crc32:
                raise self._bad(slide_id, name, "its checksum is not the one it was packed with")
            self._check_header(slide_id, name, data[: member.header])
            arrays[name] = np.frombuffer(data, member.dtype, offset=member.header).reshape(member.shape)
        return arrays

    def _member(self, slide_id: str, name: str) -> Member:
        members = self.sample(slide_id).members
        member = members.get(f"{name}.npy")
        if member is None:
            raise DataError(
                f"{self.directory}: slide {slide_id} has no member {name}.npy; it has {', '.join(members)}.",
                "Change data.magnifications, or extract and pack this magnification.",
            )
        return member

    def _copy(self, slide_id: str, out: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray] | None) -> None:
        absent = [name for name in out if (slide_id, name) not in self._memory]
        if absent:
            members = {name: self._member(slide_id, name) for name in absent}
            arrays = {name: np.empty(member.shape, member.dtype) for name, member in members.items()}
            self._read_whole(slide_id, arrays)
            self._memory.update({(slide_id, name): array for name, array in arrays.items()})
        for name, array in out.items():
            if rows is None:
                np.copyto(array, self._memory[slide_id, name])
            else:
                np.take(self._memory[slide_id, name], rows[name], axis=0, out=array, mode="clip")

    def _read_whole(self, slide_id: str, out: Mapping[str, np.ndarray]) -> None:
        sample = self.sample(slide_id)
        shard = self.index.shards[sample.shard]
        headers = {name: bytearray(self._member(slide_id, name).header) for name in out}
        spans: dict[int, tuple[OpenFile, list[tuple[int, Any]]]] = {}
        for name, array in out.items():
            member = self._member(slide_id, name)
            file, shift = self._files.open(sample.shard, shard, member)
            pieces = spans.setdefault(id(file), (file, []))[1]
            pieces += [(member.offset + shift, headers[name]), (member.offset + shift + member.header, _bytes(array))]
        for file, pieces in spans.values():
            if not _read_pieces(file, pieces):
                raise self._bad(slide_id, next(iter(out)), "the shard ends before it does")
        for name, array in out.items():
            if (slide_id, name) not in self._checked:
                self._check(slide_id, name, headers[name], array)

    def _check(self, slide_id: str, name: str, header: bytearray, array: np.ndarray) -> None:
        sample, member = self.sample(slide_id), self._member(slide_id, name)
        if zlib.crc32(_bytes(array), zlib.crc32(header)) != member.crc32:
            if not self._files.discard(sample.shard, member):
                raise self._bad(slide_id, name, "its checksum is not the one it was packed with")
            return self._read_whole(slide_id, {name: array})
        self._check_header(slide_id, name, bytes(header))
        self._checked.add((slide_id, name))
        return None

    def _check_header(self, slide_id: str, name: str, header: bytes) -> None:
        problem = check_header(header, self._member(slide_id, name))
        if problem:
            raise self._bad(slide_id, name, problem)

    def _read_rows(self, slide_id: str, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Gather rows from a memory map: one call for all, where positioned reads would take one a run of rows."""
        sample, member = self.sample(slide_id), self._member(slide_id, name)
        file, shift = self._files.open(sample.shard, self.index.shards[sample.shard], member)
        start = member.offset + member.header + shift
        # Touching a map beyond the end of its file would kill the process.
        if os.fstat(file.descriptor).st_size < start + member.payload:
            raise self._bad(slide_id, name, "the shard ends before it does")
        table = np.frombuffer(file.map, member.dtype, member.payload // out.itemsize, start).reshape(member.shape)
        file.read_ahead(start, table.strides[0], rows)
        np.take(table, rows, axis=0, out=out, mode="clip")

    def _bad(self, slide_id: str, name: str, what: str) -> DataError:
        shard = self.index.shards[self.sample(slide_id).shard].name
        return DataError(f"{self.directory}/{shard}: slide {slide_id}, member {name}.npy: {what}.", _REPAIR)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read_pieces(file: OpenFile, pieces: list[tuple[int, Any]]) -> bool:
    """Read pieces of a file, those that lie close together in one call; false where the file ends before they do."""
    pieces.sort(key=lambda piece: piece[0])
    start = end = pieces[0][0]
    buffers: list[memoryview] = []
    for offset, buffer in pieces:
        if offset - end > _GAP:
            if not _preadv(file, buffers, start):
                return False
            buffers, start, end = [], offset, offset
        if offset > end:
            buffers.append(memoryview(bytearray(offset - end)))
        buffers.append(memoryview(buffer))
        end = offset + buffers[-1].nbytes
    return _preadv(file, buffers, start)


def _preadv(file: OpenFile, buffers: list[memoryview], offset: int) -> bool:
    buffers = [buffer for buffer in buffers if buffer.nbytes]
    while buffers:
        count = os.preadv(file.descriptor, buffers, offset)
        if not count:
            return False
        offset += count
        # The kernel gives at most 2 GiB a call: go on in the buffer where it stopped.
        while buffers and count >= buffers[0].nbytes:
            count -= buffers.pop(0).nbytes
        if count:
            buffers[0] = buffers[0][count:]
    return True
