"""The index of a shard set: location and expected content of every member of every sample.

A shard set is a folder of plain WebDataset tars and one `index.json`. A sample is a slide; its members are
`x20.npy` (embeddings), `coords_x20.npy`, `parent_x20.npy`, `scale_x20.npy` (int8 only), the same for the other
magnifications, and `meta.json`. The index gives each member's byte offset, so reading a bag needs no tar parsing.
"""

from __future__ import annotations

import errno
import functools
import io
import math
import os
import re
import threading
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cfusion.errors import DISK, ShardsError
from cfusion.files import digest_json, write_text
from cfusion.types import SLIDE

INDEX_NAME = "index.json"
META = "meta.json"
StoredDtype = Literal["f16", "f32", "int8"]
STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "f16": np.dtype("<f2"), "f32": np.dtype("<f4"), "int8": np.dtype("i1"),
}  # fmt: skip
_HEADER = threading.Lock()
"""Python 3.11 counts the depth of what `ast` builds over all threads, so reading headers in parallel can fail."""

_REPACK = "Pack the store again with `cfusion preprocess shard`."


def tar_key(slide_id: str) -> str:
    """Return the WebDataset key of a slide: its stem, with special characters of tars and WebDataset percent-encoded.

    WebDataset ends a key at the first dot, so `TCGA-….DX1.7B2F` becomes `TCGA-…%2EDX1%2E7B2F`.
    """
    return quote(slide_id, safe=" ()+,=@").replace(".", "%2E").replace("~", "%7E")


def _tar_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar", name):
        raise ValueError("a shard's name is a plain file name that ends in .tar")
    return name


def _member_dtype(text: str) -> str:
    if text not in ("<f2", "<f4", "|i1", "<i4", "|u1"):
        raise ValueError("a member's dtype is one of <f2, <f4, |i1, <i4, |u1")
    return text


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TarMember(_Entry):
    """One file in a tar: `size` bytes from `offset`, an `.npy` of `dtype` and `shape` (or JSON, as |u1)."""

    offset: int = Field(ge=512)
    size: int = Field(ge=0)
    dtype: Annotated[str, AfterValidator(_member_dtype)]
    shape: tuple[int, ...]
    crc32: int = Field(ge=0, lt=1 << 32)

    @property
    def payload(self) -> int:
        """Size of the array without its `.npy` header, in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def header(self) -> int:
        """Size of the `.npy` header before the array, in bytes."""
        return self.size - self.payload

    @model_validator(mode="after")
    def _holds_its_array(self) -> TarMember:
        if min(self.shape, default=0) < 0 or not 0 <= self.header <= 65536:
            raise ValueError(f"{self.size} bytes cannot contain an array of shape {self.shape} and dtype {self.dtype}")
        return self


def check_header(header: bytes, member: TarMember) -> str:
    """Describe what is wrong with an `.npy` header; empty if it agrees with the index.

    Args:
        header: The bytes before the array.
        member: The index entry. Its size was compared with its shape, so a header that claims more is false.
    """
    stream = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _HEADER:
            shape, fortran, dtype = read(stream)
    except Exception as error:  # noqa: BLE001 - numpy reads the text as Python, and raises whatever that leads to
        return f"not an .npy file ({error})"
    if dtype.hasobject:
        return "contains Python objects, which need unpickling; cfusion never does that"
    if fortran or shape != member.shape or dtype != np.dtype(member.dtype):
        order = " in Fortran order" if fortran else ""
        return f"its header claims {dtype.str} {shape}{order}, the index {member.dtype} {member.shape}"
    return ""


class Sample(_Entry):
    """One slide in a shard.

    Attributes:
        slide_id: File stem of the slide.
        shard: Number of its tar in `ShardIndex.shards`.
        tile_px_level0: Per magnification name, side of a tile in level-0 px; empty where unknown.
        members: By name.
        error: int8 only: per magnification name, root mean square of the rounding error over that of the values.
    """

    slide_id: str
    shard: int = Field(ge=0)
    tile_px_level0: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    members: dict[str, TarMember]
    error: dict[str, float] = {}

    @functools.cached_property
    def tiles(self) -> dict[str, int]:
        """Number of tiles per magnification name."""
        return {
            name.removesuffix(".npy"): member.shape[0]
            for name, member in self.members.items()
            if re.fullmatch(rf"(x[0-9.]+|{SLIDE})\.npy", name)
        }


class Shard(_Entry):
    """One tar: its file name, length in bytes and SHA-256."""

    name: Annotated[str, AfterValidator(_tar_name)]
    size: int = Field(ge=0)
    sha256: str


class ShardIndex(_Entry):
    """Content of a set of shards.

    Attributes:
        format: Version of this schema.
        encoder: Name of the encoder of the embeddings.
        plan: Digest of everything that determined the shards: slides, their attributes in the store, order, dtype,
            target.
        provenance: Attributes that all slides share: weight digest, transform, resample filter, …
        dtype: Storage type of embeddings.
        dim: Width of an embedding.
        magnifications: Names, finest first.
        seed: Seed of the order of samples.
        target_bytes: A tar is closed before it would exceed this size.
        shards: The tars.
        samples: The slides, in the order of the tars.
        refused: Slides of the store that could not be packed, and why.
    """

    format: Literal["cfusion-shards-1"] = "cfusion-shards-1"
    encoder: str
    plan: str
    provenance: dict[str, Any] = {}
    dtype: StoredDtype
    dim: int = Field(ge=1)
    magnifications: tuple[str, ...] = Field(min_length=1)
    seed: int
    target_bytes: int
    shards: tuple[Shard, ...]
    samples: tuple[Sample, ...]
    refused: dict[str, str] = {}

    @property
    def itemsize(self) -> int:
        """Size of one stored channel, in bytes."""
        return STORED_DTYPES[self.dtype].itemsize

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the complete index, and through its checksums over the shards."""
        return digest_json(self.model_dump(mode="json"))

    @model_validator(mode="after")
    def _slides_have_one_place(self) -> ShardIndex:
        seen: set[str] = set()
        for sample in self.samples:
            if sample.slide_id in seen:
                raise ValueError(f"slide {sample.slide_id} appears twice")
            seen.add(sample.slide_id)
            if sample.shard >= len(self.shards):
                raise ValueError(f"slide {sample.slide_id} lies in shard {sample.shard}, which does not exist")
        return self

    def contradiction(self, sample: Sample) -> tuple[str, str]:
        """Find the first member of a slide that does not match the set, and why; both empty if all match."""
        for magnification in self.magnifications:
            name, stored = f"{magnification}.npy", STORED_DTYPES[self.dtype].str
            member = sample.members.get(name)
            if member is None:
                return name, "is missing"
            if member.dtype != stored or len(member.shape) != 2 or member.shape[1] != self.dim:
                return name, f"is {member.dtype} {member.shape}, expected {stored} (tiles, {self.dim})"
            for companion, (dtype, shape) in self._companions(magnification, member.shape[0]).items():
                other = sample.members.get(companion)
                if other is None and companion.startswith("scale_"):
                    return companion, "is missing"
                if other is not None and (other.dtype, other.shape) != (dtype, shape):
                    return companion, f"is {other.dtype} {other.shape}, expected {dtype} {shape}"
        length = self.shards[sample.shard].size
        for name, member in sample.members.items():
            if member.offset + member.size > length:
                return name, f"ends beyond its shard of {length} bytes"
        return "", ""

    def _companions(self, magnification: str, tiles: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        layouts: dict[str, tuple[str, tuple[int, ...]]] = {
            f"coords_{magnification}.npy": ("<i4", (tiles, 2)),
            f"parent_{magnification}.npy": ("<i4", (tiles,)),
        }
        if self.dtype == "int8":
            layouts[f"scale_{magnification}.npy"] = ("<f4", (self.dim,))
        return layouts

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write the index into `directory`, atomically."""
        write_text(Path(directory) / INDEX_NAME, self.model_dump_json() + "\n")


EntryT = TypeVar("EntryT", bound=BaseModel)


def parse(schema: type[EntryT], text: str | bytes, source: str) -> EntryT:
    """Parse an index, or a part of one, from JSON.

    Raises:
        ShardsError: It is not JSON, or does not describe a shard set; `source` and the entry are named.
    """
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ShardsError(f"{source}: {where + ': ' if where else ''}{first['msg']}.", _REPACK) from None


def parse_index(text: str | bytes, source: str) -> ShardIndex:
    """Parse an index and check that all slides match the set.

    Raises:
        ShardsError: It does not describe a shard set, or a slide contradicts it; slide and member are named.
    """
    index = parse(ShardIndex, text, source)
    for sample in index.samples:
        name, what = index.contradiction(sample)
        if name:
            raise ShardsError(
                f"{source}: slide {sample.slide_id}, member {name}: {what}.",
                f"{_REPACK[:-1]}; `cfusion preprocess verify` lists the intact slides.",
            )
    return index


def read_index_file(directory: str | os.PathLike[str]) -> bytes:
    """Read the bytes of `index.json` of a folder of shards.

    Raises:
        ShardsError: The file is unreadable.
    """
    path = Path(directory) / INDEX_NAME
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = _REPACK if error.errno == errno.ENOENT else DISK.get(error.errno or 0, _REPACK)
        raise ShardsError(f"{path}: cannot be read ({error.strerror}).", remedy) from error


def read_index(directory: str | os.PathLike[str]) -> ShardIndex:
    """Read `index.json` of a folder of shards.

    Raises:
        ShardsError: As `read_index_file` and `parse_index`.
    """
    return parse_index(read_index_file(directory), str(Path(directory) / INDEX_NAME))
