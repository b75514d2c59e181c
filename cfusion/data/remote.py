"""Shards on a server: range reads with retries, a bounded cache, and streaming of complete tars."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from isal.isal_zlib import crc32

from cfusion.data.shard_files import OpenFile
from cfusion.data.shard_index import INDEX_NAME, Shard, ShardIndex, TarMember, parse_index
from cfusion.errors import MissingExtraError, ShardsError
from cfusion.files import atomic_path, user_cache
from cfusion.locks import hold, mode_like
from cfusion.secret_text import without_secrets

logger = logging.getLogger(__name__)

_PIECE = 8 << 20
_AT_ONCE = 4
_WORTH_A_REQUEST = 1 << 16
_ATTEMPTS = 6
_FIRST_PAUSE_SECONDS = 0.1
_SILENCE_SECONDS = 60.0
_MAY_PASS = (408, 425, 429)
"""Of the statuses that blame the client, those that another attempt may not meet: too late, too early, too many."""
_OWN = re.compile(r"[0-9a-f]{16}-\d+-\d+|\.[0-9a-f]{16}-\d+-\d+\.\w+\.tmp")


def open_remote(
    url: str, cache_directory: str | os.PathLike[str] | None, cache_bytes: int
) -> tuple[RemoteFiles, ShardIndex]:
    """Read the index at a URL, and open the shards there.

    Raises:
        ShardsError: The URL is unreachable, or has no valid index.
        MissingExtraError: The package for this kind of URL is not installed.
    """
    source = RangeSource(url)
    index = parse_index(source.read_all(INDEX_NAME), f"{source.where}/{INDEX_NAME}")
    cache = DiskCache(Path(cache_directory or user_cache() / "shards"), cache_bytes)
    return RemoteFiles(source, cache, index.digest[:16]), index


class RangeSource:
    """Byte ranges of the files under a URL, through fsspec.

    A range that fails or is short is requested again, with growing pauses; bytes that arrived are kept.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        parts = urlsplit(url)
        self.where = without_secrets(url).rstrip("/")
        self._query = ""
        options: dict[str, Any] = {}
        if parts.scheme in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS)
            # With trust_env it reads http_proxy, no_proxy and ~/.netrc.
            options = {"client_kwargs": {"timeout": limits, "trust_env": True}}
            if parts.query:  # a signature, which every file needs, byte for byte
                options["encoded"] = True
                self._query, url = f"?{parts.query}", urlunsplit(parts._replace(query=""))
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url.rstrip("/"), **options)
        except ImportError as error:
            package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(parts.scheme, f"fsspec[{parts.scheme}]")
            raise MissingExtraError(package, "remote", f"Reading {parts.scheme}:// shards") from error
        except ValueError as error:
            raise ShardsError(
                f"{self.where}: {without_secrets(str(error))}.", "Give a folder, or an https://, s3:// or gs:// URL."
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{self._query}"

    def read_all(self, name: str) -> bytes:
        """Read a complete small file."""
        for pause in _pauses():
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                raise ShardsError(f"{self.where}/{name}: not found.", "Check the URL in data.shards.") from None
            except Exception as error:  # noqa: BLE001 - every file system of fsspec has its own errors
                self._wait(name, error, pause)
        raise AssertionError

    def read(self, name: str, start: int, size: int) -> bytes:
        """Read `size` bytes from `start` of a file.

        Raises:
            ShardsError: The file is missing, or still fails after all attempts.
        """
        edges = list(range(start, start + size, _PIECE))
        pieces: dict[int, bytes] = {}
        for pause in _pauses():
            missing = [edge for edge in edges if edge not in pieces]
            ends = [min(edge + _PIECE, start + size) for edge in missing]
            problem: object = None
            for edge, end, data in zip(missing, ends, self._ranges(name, missing, ends), strict=True):
                if isinstance(data, bytes) and len(data) == end - edge:
                    pieces[edge] = data
                else:
                    problem = self._explain(name, data, end - edge)
            if problem is None:
                return b"".join(pieces[edge] for edge in edges)
            self._wait(name, problem, pause)
        raise AssertionError

    def _ranges(self, name: str, starts: list[int], ends: list[int]) -> Sequence[object]:
        path = self._path(name)
        try:
            return self._fs.cat_ranges([path] * len(starts), starts, ends, on_error="return", batch_size=_AT_ONCE)
        except Exception as error:  # noqa: BLE001 - as above
            return [error] * len(starts)

    def _explain(self, name: str, data: object, size: int) -> object:
        if isinstance(data, FileNotFoundError):
            raise ShardsError(f"{self.where}/{name}: not found.", "Copy the shards and their index together.")
        if isinstance(data, bytes) and len(data) > size:
            raise ShardsError(
                f"{self.where}/{name}: received {len(data)} bytes instead of the requested {size}.",
                "The server must answer range requests; copy the shards to a folder or another server.",
            )
        return f"received {len(data)} of {size} bytes" if isinstance(data, bytes) else data

    def _wait(self, name: str, problem: object, pause: float | None) -> None:
        """Wait before the next attempt.

        Raises:
            ShardsError: It was the last one, or another would be refused too.
        """
        what = problem
        if isinstance(problem, Exception):
            what = without_secrets(f"{type(problem).__name__}: {problem}")
            if _is_refused(problem):
                raise ShardsError(
                    f"{self.where}/{name}: access is refused ({what}).",
                    "Give credentials: for https in ~/.netrc (machine HOST login USER password PASSWORD), for an "
                    "object store in the environment or fsspec's configuration. A signed URL may have expired.",
                    topic="access",
                )
        if pause is None:
            raise ShardsError(
                f"{self.where}/{name}: failed {_ATTEMPTS} times; last error: {what}.",
                "Check the server and the network; the same command resumes from the cache.",
            )
        logger.info("%s/%s: %s; retrying in %.1f s", self.where, name, what, pause)
        time.sleep(pause)


def _is_refused(problem: Exception) -> bool:
    """Whether a server, or a client that has no credentials, will answer every attempt in the same way."""
    # aiohttp's errors have a status, gcsfs's a code; s3fs raises PermissionError, botocore NoCredentialsError.
    status = getattr(problem, "status", getattr(problem, "code", None))
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _MAY_PASS
    return isinstance(problem, PermissionError) or "Credentials" in type(problem).__name__


def _pauses() -> Iterator[float | None]:
    """Yield the seconds to wait after each failed attempt; None after the last."""
    for attempt in range(_ATTEMPTS - 1):
        yield _FIRST_PAUSE_SECONDS * 2**attempt
    yield None


class DiskCache:
    """Files in a folder that takes at most `limit` bytes; the least recently used are deleted.

    Processes may share the folder.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self._limit = limit

    def get(self, name: str) -> OpenFile | None:
        """Open a file; None if it is missing."""
        path = self.folder / name
        try:
            # In a folder that others filled, their files keep their age.
            with contextlib.suppress(PermissionError):
                os.utime(path)
            return OpenFile(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # another user's may be closed to this one
            return None

    def holds(self, name: str) -> bool:
        """Whether a file is cached."""
        return (self.folder / name).exists()

    def fits(self, size: int) -> bool:
        """Whether this many bytes fit in the cache at all."""
        return size <= self._limit

    def put(self, name: str, data: bytes) -> OpenFile:
        """Store `data`, and open it; data larger than the complete cache is returned without being stored.

        Raises:
            ShardsError: The folder cannot be written to.
        """
        try:
            return self._put(name, data)
        except OSError as error:
            raise ShardsError(
                f"{self.folder}: cannot cache shard data here ({error.strerror}).",
                "Set data.cache_directory to a folder with enough space, or reduce data.cache_bytes.",
            ) from error

    def _put(self, name: str, data: bytes) -> OpenFile:
        with contextlib.suppress(PermissionError), hold(self.folder / ".lock", wait=True):
            if self._make_room(len(data)):
                with atomic_path(self.folder / name) as temporary:
                    temporary.write_bytes(data)
                    temporary.chmod(mode_like(self.folder))
                    return OpenFile(temporary)
        # The cache has no room, or another user's files are in the way.
        with tempfile.NamedTemporaryFile(dir=self.folder) as stream:
            stream.write(data)
            stream.flush()
            return OpenFile(stream.name)

    def drop(self, name: str) -> bool:
        """Delete a file; return whether it existed."""
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> bool:
        if not self.fits(size):
            return False
        own = [path for path in self.folder.iterdir() if _OWN.fullmatch(path.name)]
        status = {path: path.stat() for path in own}
        used = sum(s.st_size for s in status.values())
        # Only the holder of the lock writes, so any temporary is from a killed process and is deleted first.
        for path in sorted(own, key=lambda path: (not path.name.startswith("."), status[path].st_mtime_ns)):
            if used + size <= self._limit and not path.name.startswith("."):
                break
            with contextlib.suppress(PermissionError):  # another user's, in a folder where only the owner deletes
                path.unlink(missing_ok=True)
                used -= status[path].st_size
        return True


class RemoteFiles:
    """Shards under a URL; a member is downloaded completely, verified, and cached."""

    remote = True

    def __init__(self, source: RangeSource, cache: DiskCache, prefix: str) -> None:
        self.where = source.where
        self._source = source
        self._cache = cache
        self._prefix = prefix

    def _name(self, number: int, member: TarMember) -> str:
        return f"{self._prefix}-{number}-{member.offset}"

    def open(self, number: int, shard: Shard, member: TarMember) -> tuple[OpenFile, int]:
        """A file with one member at its start."""
        name = self._name(number, member)
        file = self._cache.get(name)
        if file is None:
            file = self._cache.put(name, self._fetch(shard, member))
        return file, -member.offset

    def fetch(self, number: int, shard: Shard, members: Sequence[TarMember]) -> None:
        """Download, in one range, members that are adjacent and not cached, because each request has a fixed cost.

        Members that arrive damaged, or do not fit in the cache, are left to `open`.
        """
        missing = [member for member in members if not self._cache.holds(self._name(number, member))]
        start = min((member.offset for member in missing), default=0)
        size = max((member.offset + member.size for member in missing), default=0) - start
        wanted = sum(member.size for member in missing)
        if len(missing) < 2 or not self._cache.fits(size) or size - wanted > max(wanted, _WORTH_A_REQUEST):
            return
        data = self._source.read(shard.name, start, size)
        for member in missing:
            content = data[member.offset - start : member.offset - start + member.size]
            if crc32(content) == member.crc32:
                self._cache.put(self._name(number, member), content)

    def _fetch(self, shard: Shard, member: TarMember) -> bytes:
        for _ in range(2):
            data = self._source.read(shard.name, member.offset, member.size)
            if crc32(data) == member.crc32:
                return data
        raise ShardsError(
            f"{self.where}/{shard.name}: {member.size} bytes from {member.offset} differ from the packed ones.",
            "Copy the shard to the server again, together with its index.",
        )

    def discard(self, number: int, member: TarMember) -> bool:
        """Delete the cached copy."""
        return self._cache.drop(self._name(number, member))

    def stream(self, shard: Shard) -> io.IOBase:
        """Stream the shard in large ranges, a few in parallel."""
        return io.BufferedReader(_Stream(self._source, shard), _PIECE)


class _Stream(io.RawIOBase):
    """A remote file read front to back, a few pieces in parallel."""

    def __init__(self, source: RangeSource, shard: Shard) -> None:
        super().__init__()
        self._source = source
        self._shard = shard
        self._at = 0
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._ready and self._at < self._shard.size:
            size = min(_AT_ONCE * _PIECE, self._shard.size - self._at)
            self._ready = memoryview(self._source.read(self._shard.name, self._at, size))
            self._at += size
        count = min(len(self._ready), len(buffer))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
