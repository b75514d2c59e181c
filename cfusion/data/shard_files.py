"""Open shards: self-closing descriptors, positioned reads, memory maps."""

from __future__ import annotations

import errno
import functools
import io
import logging
import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from isal.isal_zlib import crc32
from jaxtyping import UInt8

from cfusion.data.shard_index import Shard, TarMember
from cfusion.errors import DISK, TRANSIENT, ShardsError

logger = logging.getLogger(__name__)

REPAIR = "Copy or pack the shards again; `cfusion preprocess verify` lists the intact slides."
_PAUSES = (0.1, 1.0, 5.0)
"""Seconds before the attempts at a file that a network file system does not read for the moment."""
_GAP = 8192
_STEP = 4 << 20
_MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module has no name for it.


class OpenFile:
    """A descriptor that closes when its last reader releases it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def readv(self, buffers: list[memoryview], offset: int) -> int:
        """Read into buffers; after an error that a network file system may recover from, open the file again.

        Raises:
            ShardsError: It still fails after all attempts.
        """
        for pause in (*_PAUSES, None):
            try:
                return os.preadv(self.descriptor, buffers, offset)
            except OSError as error:
                if error.errno not in TRANSIENT or pause is None:
                    raise unreadable(self.path, error) from error
                logger.warning("%s: %s; opening it again in %.1f s", self.path, error.strerror, pause)
                time.sleep(pause)
            self._reopen()
        raise AssertionError

    def _reopen(self) -> None:
        """Open the file again under the same descriptor, which other threads may be using."""
        try:
            other = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # the next read fails as this one did
        os.dup2(other, self.descriptor, inheritable=False)
        os.close(other)

    @functools.cached_property
    def map(self) -> mmap.mmap:
        """Map the complete file into memory."""
        # Private, because some network file systems have no shared maps.
        return mmap.mmap(self.descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)

    def mapped(self, offset: int, size: int, checksum: int | None) -> UInt8[np.ndarray, " size"] | None:
        """Map bytes of the file into memory: all are read from disk, none is copied.

        Writes to the memory are private and never reach the file. The pages are released with the array.

        Args:
            offset: Start of the bytes.
            size: Number of bytes.
            checksum: Their CRC-32; None: it is not compared.

        Returns:
            The bytes; None if the system cannot map them, or if they have another checksum.
        """
        before = offset % mmap.ALLOCATIONGRANULARITY
        access = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            private = mmap.mmap(self.descriptor, before + size, mmap.MAP_PRIVATE, access, offset=offset - before)
            found = 0
            # In steps, so that the bytes just read are still in the processor's cache for the checksum. Disk errors
            # are raised here, whereas touching the pages would kill the process.
            for start in range(0, before + size, _STEP):
                end = min(start + _STEP, before + size)
                private.madvise(_MADV_POPULATE_READ, start, end - start)
                if checksum is not None:
                    found = crc32(memoryview(private)[max(start, before) : end], found)
        except (OSError, ValueError):
            return None
        return None if checksum is not None and found != checksum else np.frombuffer(private, np.uint8)[before:]

    def read_ahead(self, start: int, width: int, rows: np.ndarray) -> None:
        """Prefetch all rows through the kernel if the disk is cold, as a probe of a few rows shows.

        Args:
            start: Offset of row 0.
            width: Bytes of a row.
            rows: Ascending rows.
        """
        if all(self._is_cached(start + int(row) * width) for row in rows[:: max(1, len(rows) // 4)]):
            return
        edges = np.flatnonzero(np.diff(rows) != 1) + 1
        firsts, ends = rows[np.concatenate([[0], edges])], rows[np.concatenate([edges - 1, [-1]])] + 1
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
            os.posix_fadvise(self.descriptor, start + first * width, (end - first) * width, os.POSIX_FADV_WILLNEED)

    def _is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self.descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@runtime_checkable
class ShardFiles(Protocol):
    """Location of the bytes of the tars."""

    where: str
    """Folder or URL, for messages."""
    remote: bool
    """Whether reading goes over a network."""

    def open(self, number: int, shard: Shard, member: TarMember) -> tuple[OpenFile, int]:
        """Open a file that contains a member; also return what to add to an offset in the shard to find it there."""

    def fetch(self, number: int, shard: Shard, members: Sequence[TarMember]) -> None:
        """Prefetch members that will be opened, if that is cheaper than one by one."""

    def discard(self, number: int, member: TarMember) -> bool:
        """Delete a damaged local copy of a member; return whether there was one, so that another attempt can help."""

    def stream(self, shard: Shard) -> io.IOBase:
        """Open a tar, to be read front to back."""


class LocalFiles:
    """Shards in a folder."""

    remote = False

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.where = str(directory)
        self._open: dict[int, OpenFile] = {}
        self._lock = threading.Lock()

    def open(self, number: int, shard: Shard, member: TarMember) -> tuple[OpenFile, int]:
        """Return the shard, which stays open: at most 256 at a time."""
        file = self._open.get(number)
        if file is not None:
            return file, 0
        path = self.directory / shard.name
        file = _opened(path)
        with self._lock:
            while len(self._open) >= 256:
                del self._open[next(iter(self._open))]
            self._open[number] = file
        return file, 0

    def fetch(self, number: int, shard: Shard, members: Sequence[TarMember]) -> None:
        """Do nothing: the files are local."""

    def discard(self, number: int, member: TarMember) -> bool:
        """Return False: there is no copy."""
        return False

    def stream(self, shard: Shard) -> io.IOBase:
        """Return the shard."""
        return (self.directory / shard.name).open("rb")


def _opened(path: Path) -> OpenFile:
    for pause in (*_PAUSES, None):
        try:
            return OpenFile(path)
        except OSError as error:
            if error.errno not in TRANSIENT or pause is None:
                raise unreadable(path, error) from error
            logger.warning("%s: %s; trying again in %.1f s", path, error.strerror, pause)
            time.sleep(pause)
    raise AssertionError


def unreadable(path: Path, error: OSError) -> ShardsError:
    """Return the error for a shard that the system does not read; what is missing can be packed again."""
    remedy = REPAIR if error.errno == errno.ENOENT else DISK.get(error.errno or 0, REPAIR)
    return ShardsError(f"{path}: cannot be read ({error.strerror}).", remedy)


def array_bytes(array: np.ndarray) -> memoryview:
    """Return the memory of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def read_pieces(file: OpenFile, pieces: list[tuple[int, Any]]) -> bool:
    """Read pieces of a file, adjacent ones in one call; return False if the file ends first."""
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
        count = file.readv(buffers, offset)
        if not count:
            return False
        offset += count
        # The kernel gives at most 2 GiB per call: continue in the buffer where it stopped.
        while buffers and count >= buffers[0].nbytes:
            count -= buffers.pop(0).nbytes
        if count:
            buffers[0] = buffers[0][count:]
    return True
