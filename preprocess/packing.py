"""A feature store packed into WebDataset tars with an index, the same bytes whenever the input is the same."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from cfusion.console import progress
from cfusion.data.shard_index import (
    INDEX_NAME,
    META,
    STORED_DTYPES,
    Member,
    Sample,
    Shard,
    ShardIndex,
    StoredDtype,
    parse,
    read_index,
    tar_key,
)  # fmt: skip
from cfusion.errors import DataError
from cfusion.files import atomic_path, digest_json, write_text
from cfusion.types import SlideFeatures, magnification_value

logger = logging.getLogger(__name__)

_BLOCK = 512
_REEXTRACT = "Extract or import this slide again, or remove it from the store."


class FeatureSource(Protocol):
    """What is packed: a feature store, or anything that reads slides like one."""

    def slide_ids(self) -> Sequence[str]:
        """All slides."""

    def attrs(self, slide_id: str) -> Mapping[str, Any]:
        """Provenance of one slide; `encoder` names the encoder."""

    def read(self, slide_id: str) -> SlideFeatures:
        """One slide's embeddings."""


class _Part(BaseModel):
    """A finished tar and its samples, kept beside it until the whole set is there."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    settings: str
    shard: Shard
    samples: tuple[Sample, ...]
    refused: dict[str, str]


@dataclass(frozen=True)
class _Plan:
    """Everything that decides the bytes of the shards."""

    order: tuple[str, ...]
    sources: dict[str, str]
    encoder: str
    provenance: dict[str, Any]
    dtype: StoredDtype
    seed: int
    target_bytes: int

    @property
    def digest(self) -> str:
        return digest_json(dataclasses.asdict(self))


@dataclass(frozen=True)
class _Encoded:
    """One slide as tar members, before it has a place; `refusal` instead of members where it cannot be packed."""

    slide_id: str
    members: dict[str, tuple[bytes, np.ndarray]] = dataclasses.field(default_factory=dict)
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)
    error: dict[str, float] = dataclasses.field(default_factory=dict)
    tile_px_level0: dict[str, float] = dataclasses.field(default_factory=dict)
    refusal: str = ""

    def tar_bytes(self) -> int:
        sizes = (len(header) + array.nbytes for header, array in self.members.values())
        return sum(_BLOCK - (-size // _BLOCK) * _BLOCK for size in sizes)


def pack_store(
    store: FeatureSource,
    out_dir: str | os.PathLike[str],
    *,
    target_bytes: int = 1 << 30,
    dtype: StoredDtype = "f16",
    seed: int = 7,
    workers: int = 2,
) -> ShardIndex:
    """Pack all slides of a store into tars of about `target_bytes` and write their index.

    Slides stand in an order drawn once from `seed`. A finished tar is kept when the run is stopped, and the next call
    goes on behind it; a finished set of the same content is left as it is. A slide that cannot be packed (it cannot
    be read, has no tiles or a value that is not finite) is left out and named in `ShardIndex.refused`.

    Args:
        store: The slides.
        out_dir: Folder for the tars and `index.json`.
        target_bytes: A tar is closed before it would grow beyond this; a larger slide gets a tar of its own.
        dtype: `f16`, `f32`, or `int8` with one scale a channel, slide and magnification.
        seed: Seed of the order.
        workers: Threads that read and encode slides.

    Raises:
        DataError: No slide could be packed, or slides differ in encoder, width or magnifications.
    """
    out = Path(out_dir)
    plan = _plan(store, dtype, seed, target_bytes)
    finished = _finished(out, plan)
    if finished is not None:
        logger.info("%s holds these %d slides already", out, len(plan.order))
        return finished
    out.mkdir(parents=True, exist_ok=True)
    (out / INDEX_NAME).unlink(missing_ok=True)
    parts = _resume(out, plan)
    done = sum(len(part.samples) + len(part.refused) for part in parts)
    with progress("packing shards", len(plan.order)) as bar:
        bar.advance(done)
        feed = _Feed(_encode_ahead(store, plan.order[done:], dtype, workers))
        while feed.next is not None:
            part = _write_part(out, len(parts), feed, plan)
            parts.append(part)
            bar.advance(len(part.samples) + len(part.refused))
    return _assemble(out, plan, parts)


def _plan(store: FeatureSource, dtype: StoredDtype, seed: int, target_bytes: int) -> _Plan:
    slide_ids = sorted(store.slide_ids())
    if not slide_ids:
        raise DataError("The feature store holds no slides.", "Extract features first.")
    # Raw generator output is stable over numpy versions; Generator.permutation is not promised to be.
    ranks = np.random.PCG64(seed).random_raw(len(slide_ids))
    order = tuple(slide_ids[i] for i in np.argsort(ranks, kind="stable"))
    attrs = {slide_id: json.loads(json.dumps(dict(store.attrs(slide_id)), default=str)) for slide_id in order}
    first = attrs[order[0]]
    for slide_id, values in attrs.items():
        for key in ("encoder", "weight_digest"):
            if values.get(key) != first.get(key):
                raise DataError(
                    f"Slides {order[0]} and {slide_id} differ in {key}: {first.get(key)} and {values.get(key)}.",
                    "A set of shards holds one encoder: name it, or extract the slide again.",
                )
    shared = {k: v for k, v in first.items() if all(k in a and a[k] == v for a in attrs.values())}
    sources = {slide_id: digest_json(values) for slide_id, values in attrs.items()}
    return _Plan(order, sources, str(first.get("encoder", "unknown")), shared, dtype, seed, target_bytes)


def _finished(out: Path, plan: _Plan) -> ShardIndex | None:
    if not (out / INDEX_NAME).exists():
        return None
    index = read_index(out)
    same = (
        (index.dtype, index.seed, index.target_bytes) == (plan.dtype, plan.seed, plan.target_bytes)
        and {s.slide_id for s in index.samples} | set(index.refused) == set(plan.order)
        and all(plan.sources[s.slide_id] == s.source for s in index.samples)
        and all(_is_whole(out, shard) for shard in index.shards)
    )
    return index if same else None


def _is_whole(out: Path, shard: Shard) -> bool:
    path = out / shard.name
    return path.is_file() and path.stat().st_size == shard.size


def _part_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.part.json"


def _resume(out: Path, plan: _Plan) -> list[_Part]:
    """The finished tars of an interrupted run with the same plan; tars of any other run are removed."""
    parts: list[_Part] = []
    while (path := _part_path(out, len(parts))).exists():
        part = parse(_Part, path.read_bytes(), str(path))
        if part.settings != plan.digest or not _is_whole(out, part.shard):
            break
        parts.append(part)
    kept = {part.shard.name for part in parts} | {_part_path(out, i).name for i in range(len(parts))}
    for path in sorted(out.glob("shard-*")):
        if path.name not in kept and re.fullmatch(r"shard-\d{6}\.(tar|part\.json)", path.name):
            path.unlink()
    if parts:
        logger.info("%s: going on behind %d finished shards", out, len(parts))
    return parts


class _Feed:
    """An iterator that shows its next item."""

    def __init__(self, items: Iterator[_Encoded]) -> None:
        self._items = items
        self.next = next(items, None)

    def take(self) -> _Encoded:
        assert self.next is not None
        item, self.next = self.next, next(self._items, None)
        return item


def _encode_ahead(store: FeatureSource, order: Sequence[str], dtype: StoredDtype, workers: int) -> Iterator[_Encoded]:
    """Encode slides in threads, at most two a worker ahead, and yield them in order."""
    with ThreadPoolExecutor(workers, "pack") as pool:
        pending: collections.deque[Future[_Encoded]] = collections.deque()
        remaining = iter(order)
        while True:
            while len(pending) < 2 * workers and (slide_id := next(remaining, None)) is not None:
                pending.append(pool.submit(_encode, store, slide_id, dtype))
            if not pending:
                return
            yield pending.popleft().result()


def _encode(store: FeatureSource, slide_id: str, dtype: StoredDtype) -> _Encoded:
    try:
        slide = store.read(slide_id)
        arrays, error = _arrays(slide, dtype)
    except DataError as problem:
        return _Encoded(slide_id, refusal=str(problem))
    meta = json.dumps({"slide_id": slide_id, "attrs": slide.attrs}, sort_keys=True, default=str).encode()
    members = {name: (_npy_header(array), array) for name, array in arrays.items()}
    members[META] = (b"", np.frombuffer(meta, np.uint8))
    checksums = {name: zlib.crc32(array.data, zlib.crc32(header)) for name, (header, array) in members.items()}
    tile_px = {name: float(side) for name, side in dict(slide.attrs.get("tile_px_level0", {})).items()}
    return _Encoded(slide_id, members, checksums, error, tile_px)


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
    # What training reads lies together, so that a slide is one read.
    for prefix, table in (("coords", slide.coords), ("parent", slide.parents)):
        for name in names:
            if name in table and len(table[name]):
                arrays[f"{prefix}_{name}.npy"] = np.ascontiguousarray(table[name], "<i4")
    return arrays, error


def _check_features(slide_id: str, name: str, features: np.ndarray) -> None:
    if features.ndim != 2 or not len(features):
        raise DataError(f"slide {slide_id}, {name}: no tiles (shape {features.shape}).", _REEXTRACT)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise DataError(f"slide {slide_id}, {name}: row {row} holds a value that is not finite.", _REEXTRACT)


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


def _write_part(out: Path, number: int, feed: _Feed, plan: _Plan) -> _Part:
    """Write the next tar: slides until it would grow beyond the target."""
    name = f"shard-{number:06d}.tar"
    samples: list[Sample] = []
    refused: dict[str, str] = {}
    with atomic_path(out / name) as temporary, temporary.open("wb") as stream:
        tar = _TarStream(stream)
        while feed.next is not None:
            if samples and tar.offset + feed.next.tar_bytes() + 2 * _BLOCK > plan.target_bytes:
                break
            slide = feed.take()
            if slide.refusal:
                logger.warning("left out: %s", slide.refusal)
                refused[slide.slide_id] = slide.refusal
                continue
            samples.append(_write_sample(tar, slide, number, plan))
        shard = Shard(name=name, size=tar.close(), sha256=tar.digest.hexdigest())
    part = _Part(settings=plan.digest, shard=shard, samples=tuple(samples), refused=refused)
    write_text(_part_path(out, number), part.model_dump_json())
    return part


def _write_sample(tar: _TarStream, slide: _Encoded, shard: int, plan: _Plan) -> Sample:
    key = tar_key(slide.slide_id)
    members = {}
    for name, (header, array) in slide.members.items():
        size = len(header) + array.nbytes
        offset = tar.add(f"{key}.{name}", size, header, array)
        members[name] = Member(
            offset=offset, size=size, dtype=array.dtype.str, shape=array.shape, crc32=slide.checksums[name]
        )
    return Sample(
        slide_id=slide.slide_id, shard=shard, source=plan.sources[slide.slide_id], members=members,
        tile_px_level0=slide.tile_px_level0, error=slide.error,
    )  # fmt: skip


class _TarStream:
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
        """Append a file and give the offset of its first byte."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        self._write(info.tobuf(tarfile.GNU_FORMAT))
        offset = self.offset
        self._write(header)
        self._write(array.data)
        self._write(bytes(-size % _BLOCK))
        return offset

    def close(self) -> int:
        """End the tar and give its length."""
        self._write(bytes(2 * _BLOCK))
        return self.offset


def _assemble(out: Path, plan: _Plan, parts: Sequence[_Part]) -> ShardIndex:
    samples = [sample for part in parts for sample in part.samples]
    refused = {slide_id: reason for part in parts for slide_id, reason in part.refused.items()}
    if not samples:
        reason = next(iter(refused.values()))
        raise DataError(f"None of the {len(refused)} slides could be packed; the first: {reason}")
    first = samples[0]
    names = tuple(first.tiles)
    index = ShardIndex(
        encoder=plan.encoder, provenance=plan.provenance, dtype=plan.dtype,
        dim=first.members[f"{names[0]}.npy"].shape[1], magnifications=names, seed=plan.seed, target_bytes=plan.target_bytes, shards=tuple(part.shard for part in parts),
        samples=tuple(samples), refused=refused,
    )  # fmt: skip
    index.write(out)
    for number in range(len(parts)):
        _part_path(out, number).unlink()
    return index
