"""Headers of slides, read without OpenSlide: which DICOM files are one slide, and whether a TIFF is cut short."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

WHOLE_SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""DICOM's class of whole-slide images; reports and annotations have others."""

SOP_CLASS, SERIES = (0x0008, 0x0016), (0x0020, 0x000E)
"""DICOM tags: the class of a file, and the series that the files of one slide share."""

UNTOLD = 0xFFFFFFFF
"""The length of a sequence or an item that ends with a marker."""

LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""Value representations with a length of four bytes."""

MAX_HEADER_BYTES = 256 << 10
"""Where the search for these tags ends."""


class TiffForm(NamedTuple):
    """How a kind of TIFF writes pointers and the number of a directory's tags, and where its first pointer is."""

    pointer: str
    tags: str
    first: int


CLASSIC, BIG = TiffForm("I", "H", 4), TiffForm("Q", "Q", 8)

TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value of each TIFF type."""

INTEGER_TYPES = frozenset({1, 3, 4, 13, 16, 18})
"""TIFF types of unsigned integers; sizes in other types are refused by libtiff."""

BYTE_COUNTS = frozenset({279, 325})
"""TIFF tags with the bytes of each strip or tile."""

MAX_DIRECTORIES, MAX_TAGS = 1000, 1000
"""Where a search of damaged directories ends."""


def other_dicom_class(path: Path) -> str:
    """Return the class of a DICOM file that is no slide, such as a report; empty for all other files."""
    if not is_dicom(path):
        return ""
    kind = dicom_tags(path).get(SOP_CLASS, WHOLE_SLIDE_CLASS)
    return "" if kind == WHOLE_SLIDE_CLASS else kind


def first_of_series(path: Path) -> Path:
    """Return the first file of the series that a DICOM file belongs to."""
    series = slide_series(path.absolute().parent)
    if path.name not in series:
        return path
    return path.with_name(min(name for name, other in series.items() if other == series[path.name]))


def slide_series(folder: Path) -> dict[str, str]:
    """Return the series of each DICOM file of a folder that is part of a slide.

    If no file tells its series, all are taken as one slide; otherwise those that do not tell it stand for themselves.
    """
    return _series_at(folder, folder.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _series_at(folder: Path, _modified_ns: int) -> dict[str, str]:
    series = {}
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.is_file() and is_dicom(path) and not other_dicom_class(path):
            series[path.name] = dicom_tags(path).get(SERIES, "")
    known = any(series.values())
    return {name: uid for name, uid in series.items() if uid or not known}


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its suffix, or, if it has none, by its content."""
    if path.suffix.lower() == ".dcm":
        return True
    has_suffix = path.suffix and not path.suffix[1:].isdigit()
    return not has_suffix and path.is_file() and _bytes_at(path, 128, 4) == b"DICM"


def _bytes_at(path: Path, offset: int, count: int) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(count)
    except OSError:
        return b""


def dicom_tags(path: Path) -> dict[tuple[int, int], str]:
    """Read the class and the series of a DICOM file; what cannot be found is left out.

    The header of a whole-slide image is in explicit little endian (DICOM PS3.5, 7.1.2).
    """
    data = _bytes_at(path, 0, MAX_HEADER_BYTES)
    found: dict[tuple[int, int], str] = {}
    at, depth = 132, 0
    while data[128:132] == b"DICM" and at + 8 <= len(data):
        group, element = struct.unpack_from("<HH", data, at)
        if group == 0xFFFE:  # an item of a sequence, or the end of an item or a sequence without a length
            (length,) = struct.unpack_from("<I", data, at + 4)
            depth += {0xE000: int(length == UNTOLD), 0xE00D: -1, 0xE0DD: -1}.get(element, 0)
            at += 8 + (length if element == 0xE000 and length != UNTOLD else 0)
            continue
        length, at = _length(data, at)
        if depth == 0 and (group, element) > SERIES:
            break
        if length == UNTOLD:  # a sequence: its items follow
            depth += 1
            continue
        if depth == 0 and (group, element) in (SOP_CLASS, SERIES):
            found[group, element] = data[at : at + length].decode("ascii", "replace").strip("\0 ")
        at += length
    return found


def _length(data: bytes, at: int) -> tuple[int, int]:
    """Return the length of an element's value, and where it begins."""
    if data[at + 4 : at + 6] in LONG:
        return struct.unpack_from("<I", data, at + 8)[0] if at + 12 <= len(data) else 0, at + 12
    return struct.unpack_from("<H", data, at + 6)[0], at + 8


def tiff_is_cut_short(path: Path) -> bool:
    """Return whether a TIFF file's directories, or what they point to, lie past the end of the file."""
    size = path.stat().st_size
    return any(tags is None or any(tag.end > size for tag in tags) for tags in _directories(path))


def impossible_tile(path: Path) -> str:
    """Return what is wrong with the size of a tile of a TIFF file: more bytes than the file has; empty if nothing."""
    size = path.stat().st_size
    for number, tags in enumerate(_directories(path)):
        for tag in tags or ():
            if tag.name not in BYTE_COUNTS or tag.kind not in INTEGER_TYPES:
                continue
            data = _bytes_at(path, tag.at, max(0, min(tag.end, size) - tag.at))
            width = TYPE_BYTES[tag.kind]
            counts = np.frombuffer(data[: len(data) // width * width], f"{tag.order}u{width}")
            if len(counts) and counts.max() > size:
                return f"a tile of image {number} has {counts.max()} bytes, but the file has {size}"
    return ""


class _Tag(NamedTuple):
    """A tag of a TIFF directory, and where its values begin and end in the file."""

    name: int
    kind: int
    at: int
    end: int
    order: str


def _directories(path: Path) -> Iterator[list[_Tag] | None]:
    """Read the tags of each directory of a TIFF file; None, and no more, for one that is not in the file."""
    head = _bytes_at(path, 0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(f"{order}H", head[2:4])[0] if order and len(head) == 16 else 0
    if order is None or version not in (42, 43):
        return
    form = BIG if version == 43 else CLASSIC
    (at,) = struct.unpack_from(f"{order}{form.pointer}", head, form.first)
    for _ in range(MAX_DIRECTORIES):
        if at == 0:
            return
        tags, at = _directory(path, at, order, form)
        yield tags
        if tags is None:
            return


def _directory(path: Path, at: int, order: str, form: TiffForm) -> tuple[list[_Tag] | None, int]:
    """Return the tags of the directory at `at`, None if it is not in the file, and where the next one is."""
    entry, pointer, counted = (struct.Struct(order + f) for f in (f"HH{form.pointer * 2}", form.pointer, form.tags))
    head = _bytes_at(path, at, counted.size)
    if len(head) < counted.size:
        return None, 0
    count, first = counted.unpack(head)[0], at + counted.size
    data = _bytes_at(path, first, min(count, MAX_TAGS) * entry.size)
    after = _bytes_at(path, first + count * entry.size, pointer.size)
    if len(after) < pointer.size:
        return None, 0
    tags = []
    for i, (name, kind, number, value) in enumerate(entry.iter_unpack(data[: len(data) // entry.size * entry.size])):
        length = number * TYPE_BYTES.get(kind, 0)
        # Short values stand in the entry itself, where the pointer would be.
        where = value if length > pointer.size else first + (i + 1) * entry.size - pointer.size
        tags.append(_Tag(name, kind, where, where + length, order))
    return tags, int(pointer.unpack(after)[0])
