"""Write files atomically, read JSON, and compute digests of files and values."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cfusion.errors import DataError


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `target` for a file or folder, which is renamed to `target` when the block ends.

    The data is on disk before the rename, so after a crash `target` has the old or the new content, never a part of it.
    If the block raises, the temporary is removed and `target` is unchanged; an error of the system without a file, such
    as of a full disk, is given that of `target`.
    """
    target = Path(target)
    if not target.name:
        raise _is_a_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{_mark()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        put_in_place(temporary, target)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _mark() -> str:
    """Return a unique name for a temporary, which identifies the machine and process that write it."""
    return f"{_machine()}_{os.getpid()}_{uuid.uuid4().hex[:8]}"


def is_orphan(temporary: Path) -> bool:
    """Return whether a temporary of `atomic_path` belongs to an ended process of this machine."""
    match = re.search(r"\.([0-9a-f]{8})_(\d+)_[0-9a-f]{8}\.(tmp|old)$", temporary.name)
    if match is None or match[1] != _machine():
        return False
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def remove_orphans(folder: Path) -> None:
    """Delete the temporaries of `atomic_path` that ended processes of this machine have left in a folder and below."""
    for path in [path for path in folder.rglob(".*") if is_orphan(path)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a finished file or folder to `target`; an existing folder is moved aside first and deleted afterwards.

    Raises:
        IsADirectoryError: A file would replace a folder.
    """
    if target.is_dir() and not temporary.is_dir():
        raise _is_a_folder(target)
    if target.is_dir():
        aside = target.with_name(f".{target.name}.{_mark()}.old")
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside)
    else:
        temporary.replace(target)


def _is_a_folder(target: Path) -> IsADirectoryError:
    return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))


def _sync(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def user_cache() -> Path:
    """Return the program's folder in the user's cache, `XDG_CACHE_HOME` or `~/.cache`; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cfusion"


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `target` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `target` atomically; NaN and infinity raise ValueError."""
    write_text(target, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file is missing, or is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON ({error}).") from error


def check_format(path: str | os.PathLike[str], values: Mapping[str, Any], reads: int) -> None:
    """Reject a file whose `format` is newer than this program; files of version 0.1.0 have no format and pass.

    Args:
        path: Path of the file, for the error.
        values: Content of the file.
        reads: The highest format that this program reads.

    Raises:
        DataError: The format is higher than `reads`, or is not a positive integer.
    """
    found = values.get("format", 1)
    if type(found) is not int or not 1 <= found <= reads:
        raise DataError(
            f"{path}: has format {found!r}; this program reads formats up to {reads}.",
            "It was written by a newer cfusion: upgrade.",
        )


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON; it does not depend on the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
