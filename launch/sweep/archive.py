"""An archive of files with their digests: a zip that is the same, byte for byte, whenever its files are.

Members are sorted, carry no time or owner, and are not compressed, since two versions of zlib compress differently.
`SHA256SUMS` lists every other member, in the format of `sha256sum -c`. An archive comes from outside: nothing is
unpacked that is not listed, is no plain file, or would lie outside the target folder.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from cfusion.errors import DataError
from cfusion.files import atomic_path

SUMS = "SHA256SUMS"
"""Member that lists the digests of all others."""

_WHEN = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip can state."""
_MOST_SUMS_BYTES = 64 << 20
_FREE_BYTES = 256 << 20
"""Size up to which an archive may unpack to, whatever its own size."""
_MOST_RATIO = 100
"""Maximum size of the files over the size of the archive; tables of numbers shrink to a tenth at best."""
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_CHUNK = 1 << 20
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises for a damaged member."""


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip that lists its members; whether it is sound, `unpack` says."""
    try:
        with zipfile.ZipFile(path) as archive:
            return SUMS in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def write_archive(path: Path, members: Mapping[str, bytes | Path]) -> str:
    """Write an archive.

    Args:
        path: The archive.
        members: Content by name: bytes, or the file that has them. Names are relative, with `/`.

    Returns:
        The SHA-256 of the archive, in hexadecimal.

    Raises:
        DataError: A name would be refused when the archive is read.
    """
    for name in members:
        if wrong := _wrong_name(name):
            raise DataError(f"{path}: {name!r} cannot be archived: {wrong}.", "Rename it.")
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "x") as archive:
            sums = [f"{_add(archive, name, members[name])}  {name}\n" for name in sorted(members)]
            _add(archive, SUMS, "".join(sums).encode())
        with temporary.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def _add(archive: zipfile.ZipFile, name: str, content: bytes | Path) -> str:
    info = zipfile.ZipInfo(name, _WHEN)
    info.create_system = 3  # Unix, also where it is written elsewhere
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.file_size = content.stat().st_size if isinstance(content, Path) else len(content)
    digest = hashlib.sha256()
    source = content.open("rb") if isinstance(content, Path) else io.BytesIO(content)
    with source, archive.open(info, "w") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


def unpack(path: Path, folder: Path) -> None:
    """Check an archive and unpack it to `folder`, which appears complete or not at all.

    Raises:
        DataError: It is no such archive; a member is missing, not listed, no plain file, encrypted, or outside of the
            folder; the files would be far larger than the archive; or a file's bytes are not those that its digest
            names.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _checked_members(path, archive)
            digests = _digests(path, archive, members)
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                for name, expected in digests.items():
                    _extract(path, archive, members[name], temporary / name, expected)
    except OSError as error:
        raise DataError(f"{path}: cannot be read or unpacked ({error.strerror}).") from error
    except _BROKEN as error:
        raise DataError(f"{path}: is not a zip archive, or is damaged ({error}).", "Get it again.") from error


def _checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    for info in archive.infolist():
        wrong = _wrong_name(info.orig_filename) or _wrong_kind(info)
        alike = unicodedata.normalize("NFC", info.filename).casefold()
        if not wrong and alike in seen:
            wrong = "another member has this name"
        if wrong:
            raise DataError(f"{path}: {info.orig_filename!r} is refused: {wrong}. Nothing was unpacked.")
        seen.add(alike)
        members[info.filename] = info
    size, most = sum(info.file_size for info in members.values()), _MOST_RATIO * path.stat().st_size
    if size > max(_FREE_BYTES, most):
        raise DataError(f"{path}: {path.stat().st_size:,} bytes would unpack to {size:,}. Nothing was unpacked.")
    return members


def _wrong_name(name: str) -> str:
    """Return why a member's name is refused; empty if it is not."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or "\\" in name or ":" in name or ".." in parts:
        return "its path leads out of the folder"
    if name.endswith("/"):
        return "it is a folder, and only files are archived"
    if any(unicodedata.category(letter).startswith("C") for letter in name) or str(PurePosixPath(name)) != name:
        return "its path is not in plain form"
    return ""


def _wrong_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "it is a link or a device"
    if info.flag_bits & 0x1:
        return "it is encrypted"
    known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return "" if info.compress_type in known else f"its compression ({info.compress_type}) is unknown"


def _digests(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> dict[str, str]:
    """Return the digests of all other members by name, from the one that lists them."""
    if SUMS not in members:
        raise DataError(f"{path}: lacks {SUMS}.", "Give an archive that `cfusion sweep export` wrote.")
    if members[SUMS].file_size > _MOST_SUMS_BYTES:
        raise DataError(f"{path}: {SUMS} has {members[SUMS].file_size:,} bytes. Nothing was unpacked.")
    listed: dict[str, str] = {}
    for number, line in enumerate(archive.read(members[SUMS]).decode("utf-8").splitlines(), 1):
        found = _LINE.fullmatch(line)
        if found is None or found[2] in listed:
            raise DataError(f"{path}: {SUMS}, line {number}: {line[:80]!r}: expected a digest and a new name.")
        listed[found[2]] = found[1]
    names = set(members) - {SUMS}
    for wrong, words in ((names - set(listed), f"is not listed in {SUMS}"), (set(listed) - names, "is missing")):
        if wrong:
            raise DataError(f"{path}: {min(wrong)} {words}. Nothing was unpacked.", "Get the archive again.")
    return listed


def _extract(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, expected: str) -> None:
    info.CRC = None  # type: ignore[assignment] # the digest is compared instead, and named where it differs
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as source, target.open("xb") as stream:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            stream.write(chunk)
    if digest.hexdigest() != expected:
        raise DataError(
            f"{path}: {info.filename} has changed: SHA-256 {digest.hexdigest()}, and {SUMS} has {expected}. Nothing "
            "was unpacked.",
            "Get the archive again.",
        )
