"""Load the tensors of `.pt` files: nothing else is unpickled, and damaged archives are recognised."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from cfusion.errors import LayoutError
from cfusion.machine_limits import memory_bytes

DOS_FOLDER = 0x10
"""Attribute of a part of a zip archive that is a folder."""

MOST_EXPANSION, SMALL_BYTES = 100, 2**26
"""Features hardly compress: what declares more than 64 MiB and more than 100 times its stored bytes is no features."""


def check_size(path: Path, declared: int, stored: int) -> None:
    """Check the bytes that a file declares, before they are allocated.

    Args:
        path: The file, for messages.
        declared: Bytes of the numbers.
        stored: Bytes of the file, or of the part that has them.

    Raises:
        LayoutError: They cannot be features, or do not fit the memory of this machine.
    """
    if declared <= SMALL_BYTES:
        return
    if declared > MOST_EXPANSION * stored:
        raise LayoutError(
            f"{path}: declares {declared / 1e9:.3g} GB of numbers, but stores {stored / 1e9:.3g} GB.",
            "Copy the file again, or extract the slide again.",
        )
    if declared > memory_bytes():
        raise LayoutError(
            f"{path}: has {declared / 1e9:.3g} GB of numbers, more than the memory of this machine.",
            "Import it on a larger machine.",
        )


def load_tensors(path: Path) -> Any:
    """Load what a `.pt` file contains, on the CPU: tensors and plain containers only.

    Since version 1.6, torch writes zip archives with a checksum for each part, and does not compare them when it
    reads. They are compared here, which takes less time than the reading. Files without checksums, which are the older
    format and archives saved with `set_crc32_options(False)`, are read as they are.

    Raises:
        LayoutError: It declares more bytes than tensors can have in such a file.
        pickle.UnpicklingError: The file contains other objects.
        Exception: It is damaged; torch and zipfile raise errors of many kinds.
    """
    if zipfile.is_zipfile(path) and (part := _damaged_part(path)) is not None:
        raise ValueError(f"its part {part} is damaged: the checksum or an attribute does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def _damaged_part(path: Path) -> str | None:
    """Return the first part of a zip archive whose checksum does not match, or that torch would not read."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        check_size(path, sum(part.file_size for part in parts), path.stat().st_size)
        # torch takes these for folders: it reads nothing, and returns memory that was never written.
        folder = next((part.filename for part in parts if part.external_attr & DOS_FOLDER and part.file_size), None)
        has_checksums = any(part.CRC for part in parts)
        return folder or (archive.testzip() if has_checksums else None)
