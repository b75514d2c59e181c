"""Packed slides, read by offset: no tar parsing, no copy beyond the one into the caller's array."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfusion.data.shard_index import Member, Sample, ShardIndex, read_index
from cfusion.errors import DataError

_REPACK = "Pack the store again, or copy the shard again; `cfusion preprocess verify` lists what is whole."
_IOV_MAX = 1024


class _OpenFile:
    """A descriptor that closes when its last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardDataset:
    """Slides of a folder of shards. Threads may read at the same time.

    Attributes:
        index: What the shards hold.
        slide_ids: All slides, in the order of the shards.
    """

    def __init__(self, directory: str | os.PathLike[str], index: ShardIndex) -> None:
        self.directory = Path(directory)
        self.index = index
        self.slide_ids = tuple(sample.slide_id for sample in index.samples)
        self._samples: Mapping[str, Sample] = {sample.slide_id: sample for sample in index.samples}
        self._checked: set[tuple[str, str]] = set()
        self._open = functools.lru_cache(maxsize=256)(_OpenFile)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> ShardDataset:
        """Open a folder of shards.

        Raises:
            DataError: There is no index, it is not valid, or a shard is missing or has another length than indexed.
        """
        index = read_index(directory)
        for shard in index.shards:
            path = Path(directory) / shard.name
            if not path.is_file():
                raise DataError(f"{path}: the shard is missing.", _REPACK)
            if path.stat().st_size != shard.size:
                raise DataError(
                    f"{path}: {path.stat().st_size} bytes, the index says {shard.size}: cut short, or another's index.",
                    _REPACK,
                )
        return cls(directory, index)

    def sample(self, slide_id: str) -> Sample:
        """The index entry of a slide.

        Raises:
            DataError: The shards hold no such slide.
        """
        try:
            return self._samples[slide_id]
        except KeyError:
            reason = self.index.refused.get(slide_id, "it was not in the store when the shards were packed")
            raise DataError(f"{self.directory}: no slide {slide_id}: {reason}.", "Pack the store again.") from None

    def __contains__(self, slide_id: str) -> bool:
        return slide_id in self._samples

    def tiles(self, slide_id: str) -> dict[str, int]:
        """Number of tiles of a slide per magnification name."""
        return self.sample(slide_id).tiles

    def read(self, slide_id: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Read whole members, such as `x20` or `coords_x20`, into new arrays of the stored dtype.

        Raises:
            DataError: The slide or a member is missing, or its bytes are not those that were packed.
        """
        arrays = {}
        for name in names:
            member = self.member(slide_id, name)
            arrays[name] = np.empty(member.shape, member.dtype)
            self.read_into(slide_id, name, arrays[name])
        return arrays

    def has(self, slide_id: str, name: str) -> bool:
        """Whether a slide has a member, such as `coords_x20`."""
        return f"{name}.npy" in self.sample(slide_id).members

    def member(self, slide_id: str, name: str) -> Member:
        """The index entry of a member.

        Raises:
            DataError: The slide or the member is missing.
        """
        members = self.sample(slide_id).members
        try:
            return members[f"{name}.npy"]
        except KeyError:
            raise DataError(
                f"{self.directory}: slide {slide_id} has no member {name}.npy; it has {', '.join(members)}.",
                "Change data.magnifications, or extract and pack this magnification.",
            ) from None

    def read_into(self, slide_id: str, name: str, out: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Read a member, or ascending `rows` of it, into `out`, a C-contiguous array of its dtype.

        The checksum is compared when a member is first read whole.

        Raises:
            DataError: The slide or member is missing, or its bytes are not those that were packed.
        """
        sample, member = self.sample(slide_id), self.member(slide_id, name)
        file = self._file(sample)
        if rows is None:
            header = bytearray(member.header)
            self._preadv(file, [header, _bytes(out)], member.offset, sample, name)
            self._check(sample, name, member, header, out)
        else:
            self._read_rows(file, sample, name, rows, out)

    def _file(self, sample: Sample) -> _OpenFile:
        path = self.directory / self.index.shards[sample.shard].name
        with self._lock:
            try:
                return self._open(path)
            except OSError as error:
                raise DataError(f"{path}: cannot be opened ({error.strerror}).", _REPACK) from error

    def _preadv(self, file: _OpenFile, buffers: list[Any], offset: int, sample: Sample, name: str) -> None:
        wanted = sum(memoryview(buffer).nbytes for buffer in buffers)
        done = os.preadv(file.descriptor, buffers, offset)
        while done < wanted:
            # The kernel gives at most 2 GiB a call, and less where the file ends.
            rest = _skip(buffers, done)
            more = os.preadv(file.descriptor, rest, offset + done)
            if not more:
                raise self._bad(sample, name, "the shard ends inside it")
            done += more

    def _read_rows(self, file: _OpenFile, sample: Sample, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        member = self.member(sample.slide_id, name)
        width = member.payload // max(member.shape[0], 1)
        start = member.offset + member.header
        view = _bytes(out)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        edges = [0, *breaks.tolist(), len(rows)]
        for first, last in itertools.pairwise(edges):
            if first < last:
                piece = view[first * width : last * width]
                self._preadv(file, [piece], start + int(rows[first]) * width, sample, name)

    def _check(self, sample: Sample, name: str, member: Member, header: bytearray, out: np.ndarray) -> None:
        if (sample.slide_id, name) in self._checked:
            return
        if zlib.crc32(_bytes(out), zlib.crc32(header)) != member.crc32:
            raise self._bad(sample, name, "its checksum is not the one it was packed with")
        self._checked.add((sample.slide_id, name))

    def _bad(self, sample: Sample, name: str, what: str) -> DataError:
        shard = self.index.shards[sample.shard].name
        return DataError(f"{self.directory / shard}: slide {sample.slide_id}, member {name}.npy: {what}.", _REPACK)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _skip(buffers: list[Any], count: int) -> list[memoryview]:
    rest = []
    for buffer in buffers:
        view = memoryview(buffer)
        rest.append(view[min(count, view.nbytes) :])
        count -= min(count, view.nbytes)
    return rest
