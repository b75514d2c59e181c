"""Encode one slide as members of a tar, and write the tar."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32

from cfusion.data.shard_index import META, STORED_DTYPES, StoredDtype
from cfusion.data.store import check_digests
from cfusion.errors import DataError
from cfusion.types import SlideFeatures, magnification_value

BLOCK = 512
"""Block size of tars, in bytes."""

_REEXTRACT = "Extract or import this slide again, or remove it from the store."


@dataclass(frozen=True)
class EncodedSlide:
    """One slide as tar members without offsets; `refusal` instead of members if it cannot be packed."""

    slide_id: str
    members: dict[str, tuple[bytes, np.ndarray]] = dataclasses.field(default_factory=dict)
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)
    error: dict[str, float] = dataclasses.field(default_factory=dict)
    tile_px_level0: dict[str, float] = dataclasses.field(default_factory=dict)
    refusal: str = ""

    def tar_bytes(self) -> int:
        """Size of the members in a tar, in bytes."""
        sizes = (len(header) + array.nbytes for header, array in self.members.values())
        return sum(BLOCK - (-size // BLOCK) * BLOCK for size in sizes)


def encode(read: Callable[[str], SlideFeatures], slide_id: str, dtype: StoredDtype) -> EncodedSlide:
    """Read a slide and encode it as tar members.

    Args:
        read: Reads the slide.
        slide_id: The slide.
        dtype: How embeddings are stored.
    """
    try:
        slide = read(slide_id)
        if "digests" in slide.attrs:
            check_digests(slide)
        arrays, error = _arrays(slide, dtype)
    except DataError as problem:
        return EncodedSlide(slide_id, refusal=str(problem))
    meta = json.dumps({"slide_id": slide_id, "attrs": slide.attrs}, sort_keys=True, default=str).encode()
    members = {name: (_npy_header(array), array) for name, array in arrays.items()}
    members[META] = (b"", np.frombuffer(meta, np.uint8))
    checksums = {name: crc32(array.data, crc32(header)) for name, (header, array) in members.items()}
    tile_px = {name: float(side) for name, side in dict(slide.attrs.get("tile_px_level0", {})).items()}
    return EncodedSlide(slide_id, members, checksums, error, tile_px)


def _arrays(slide: SlideFeatures, dtype: StoredDtype) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    names = sorted(slide.features, key=magnification_value, reverse=True)
    arrays: dict[str, np.ndarray] = {}
    error: dict[str, float] = {}
    for name in names:
        features = slide.features[name]
        _check_features(slide.slide_id, name, features)
        if dtype == "int8":
            arrays[f"{name}.npy"], arrays[f"scale_{name}.npy"], error[name] = quantise(features)
        else:
            with np.errstate(over="ignore"):
                arrays[f"{name}.npy"] = np.ascontiguousarray(features, STORED_DTYPES[dtype])
            if not np.isfinite(arrays[f"{name}.npy"]).all():
                raise DataError(
                    f"slide {slide.slide_id}, {name}: values beyond the range of f16.", "Pack with --dtype f32."
                )
    # Members that training reads are adjacent, so that a slide is one read.
    for prefix, table in (("coords", slide.coords), ("parent", slide.parents)):
        for name in names:
            if name in table and len(table[name]):
                arrays[f"{prefix}_{name}.npy"] = np.ascontiguousarray(table[name], "<i4")
    _check_companions(slide, names)
    return arrays, error


def _check_features(slide_id: str, name: str, features: np.ndarray) -> None:
    if features.ndim != 2 or not len(features):
        raise DataError(f"slide {slide_id}, {name}: no tiles (shape {features.shape}).", _REEXTRACT)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise DataError(f"slide {slide_id}, {name}: row {row} has a value that is not finite.", _REEXTRACT)


def _check_companions(slide: SlideFeatures, names: list[str]) -> None:
    for number, name in enumerate(names):
        tiles, coords, parents = len(slide.features[name]), slide.coords.get(name), slide.parents.get(name)
        if coords is not None and len(coords) and coords.shape != (tiles, 2):
            raise DataError(f"slide {slide.slide_id}, {name}: coords {coords.shape} for {tiles} tiles.", _REEXTRACT)
        if parents is None or not len(parents):
            continue
        above = len(slide.features[names[number + 1]]) if number + 1 < len(names) else 0
        if parents.shape != (tiles,) or parents.min() < 0 or parents.max() >= above:
            raise DataError(
                f"slide {slide.slide_id}, {name}: parents {parents.shape} in {parents.min()} … {parents.max()} "
                f"for {tiles} tiles under {above}.",
                _REEXTRACT,
            )


def quantise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Round embeddings to int8 with one scale per channel.

    Args:
        features: [tile, dim], finite.

    Returns:
        int8 [tile, dim], f32 [dim] with `features ≈ int8 * scale`, and the root mean square of the difference over
        the root mean square of the values.
    """
    values = features.astype(np.float32)
    scale = np.abs(values).max(axis=0) / 127
    scale[scale == 0] = 1
    rounded = np.rint(values / scale).astype(np.int8)
    size = float(np.sqrt(np.mean(values**2, dtype=np.float64)))
    difference = float(np.sqrt(np.mean((values - rounded * scale) ** 2, dtype=np.float64)))
    return rounded, scale, difference / size if size else 0.0


def _npy_header(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    return stream.getvalue()


class TarStream:
    """A tar written front to back; tarfile makes the headers, the offsets and the digest are ours."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.offset = 0
        self.digest = hashlib.sha256()

    def _write(self, data: Any) -> None:
        self._stream.write(data)
        self.digest.update(data)
        self.offset += memoryview(data).nbytes

    def add(self, name: str, size: int, header: bytes, array: np.ndarray) -> int:
        """Append a file and return the offset of its first byte."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        self._write(info.tobuf(tarfile.GNU_FORMAT))
        offset = self.offset
        self._write(header)
        self._write(array.data)
        self._write(bytes(-size % BLOCK))
        return offset

    def close(self) -> int:
        """Finish the tar and return its length."""
        self._write(bytes(2 * BLOCK))
        return self.offset
