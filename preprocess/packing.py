"""Pack a feature store into WebDataset tars with an index. The same input gives the same bytes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from cfusion.console import progress
from cfusion.data.shard_index import (
    INDEX_NAME,
    Sample,
    Shard,
    ShardIndex,
    StoredDtype,
    TarMember,
    parse,
    read_index,
    tar_key,
)  # fmt: skip
from cfusion.errors import DataError
from cfusion.files import atomic_path, digest_json, write_text
from cfusion.locks import HeldError, hold
from cfusion.types import SlideFeatures
from preprocess.samples import BLOCK, EncodedSlide, TarStream, encode

logger = logging.getLogger(__name__)


LOCK_NAME = ".packing.lock"
OWN_FILE = re.compile(r"shard-\d{6}\.(tar|part\.json)|\.(shard-\d{6}\.(tar|part\.json)|index\.json)\.\w+\.tmp")
"""Names of the files that packing writes, and of its temporaries."""


class FeatureSource(Protocol):
    """Source of slides: a feature store, or anything that reads slides like one."""

    def slide_ids(self) -> Sequence[str]:
        """All slides."""

    def attrs(self, slide_id: str) -> Mapping[str, Any]:
        """Return the provenance of one slide; `encoder` names the encoder."""

    def read(self, slide_id: str) -> SlideFeatures:
        """Read one slide's embeddings."""


class _Part(BaseModel):
    """A finished tar and its samples, kept next to it until the set is complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    plan: str
    shard: Shard
    samples: tuple[Sample, ...]
    refused: dict[str, str]


@dataclass(frozen=True)
class _Plan:
    """Everything that determines the bytes of the shards."""

    order: tuple[str, ...]
    sources: dict[str, str]
    encoder: str
    provenance: dict[str, Any]
    dtype: StoredDtype
    seed: int
    target_bytes: int

    @functools.cached_property
    def digest(self) -> str:
        return digest_json(dataclasses.asdict(self))


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

    Slides are in an order drawn once from `seed`. If the run is stopped, finished tars are kept and the next call
    resumes after them. A finished set of the same content is left unchanged. A slide that cannot be packed (it is
    unreadable, has no tiles or a value that is not finite) is left out and named in `ShardIndex.refused`.

    Args:
        store: The slides.
        out_dir: Folder for the tars and `index.json`.
        target_bytes: A tar is closed before it would exceed this size; a larger slide gets a separate tar.
        dtype: `f16`, `f32`, or `int8` with one scale per channel, slide and magnification.
        seed: Seed of the order.
        workers: Threads that read and encode slides.

    Raises:
        DataError: No slide could be packed, slides differ in encoder, width or magnifications, or another process packs
            into the folder.
    """
    out = Path(out_dir)
    plan = _plan(store, dtype, seed, target_bytes)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        finished = _finished(out, plan, store)
        if finished is not None:
            _sweep(out, {shard.name for shard in finished.shards})
            logger.info("%s already contains these %d slides", out, len(plan.order))
            return finished
        (out / INDEX_NAME).unlink(missing_ok=True)
        return _pack(store, out, plan, workers)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from packing into a folder."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(out / LOCK_NAME, keep=False))
        except HeldError as error:
            raise DataError(
                f"{out}: another process is packing into this folder ({error.message}).",
                "Wait until it finishes, or give another folder.",
            ) from None
        yield


def _pack(store: FeatureSource, out: Path, plan: _Plan, workers: int) -> ShardIndex:
    parts = _resume(out, plan, store)
    done = sum(len(part.samples) + len(part.refused) for part in parts)
    with progress("packing shards", len(plan.order)) as bar:
        bar.advance(done)
        feed = _Feed(_encode_ahead(store, plan.order[done:], plan.dtype, workers))
        while feed.next is not None:
            reference = next((sample for part in parts for sample in part.samples), None)
            part = _write_part(out, len(parts), feed, plan, reference)
            parts.append(part)
            bar.advance(len(part.samples) + len(part.refused))
    return _assemble(out, plan, parts)


def _plan(store: FeatureSource, dtype: StoredDtype, seed: int, target_bytes: int) -> _Plan:
    slide_ids = sorted(store.slide_ids())
    if not slide_ids:
        raise DataError("The feature store contains no slides.", "Extract features first.")
    # Raw generator output is stable across numpy versions; Generator.permutation does not promise this.
    ranks = np.random.PCG64(seed).random_raw(len(slide_ids))
    order = tuple(slide_ids[i] for i in np.argsort(ranks, kind="stable"))
    attrs = {slide_id: _attrs(store, slide_id) for slide_id in order}
    readable = {slide_id: values for slide_id, values in attrs.items() if values is not None}
    shown, first = next(iter(readable.items()), (order[0], {}))
    for slide_id, values in readable.items():
        for key in ("encoder", "weight_digest", "coarser"):
            if values.get(key) != first.get(key):
                raise DataError(
                    f"Slides {shown} and {slide_id} differ in {key}: {first.get(key)} and {values.get(key)}.",
                    "A set of shards has one encoder: name it, or extract the slide again.",
                )
    shared = {k: v for k, v in first.items() if all(k in a and a[k] == v for a in readable.values())}
    sources = {slide_id: digest_json(values) for slide_id, values in attrs.items()}
    return _Plan(order, sources, str(first.get("encoder", "unknown")), shared, dtype, seed, target_bytes)


def _attrs(store: FeatureSource, slide_id: str) -> dict[str, Any] | None:
    """Return a slide's provenance as JSON stores it; None if unreadable, so that packing refuses the slide."""
    try:
        return dict(json.loads(json.dumps(dict(store.attrs(slide_id)), default=str)))
    except DataError:
        return None


def _finished(out: Path, plan: _Plan, store: FeatureSource) -> ShardIndex | None:
    if not (out / INDEX_NAME).exists():
        return None
    try:
        index = read_index(out)
    except DataError as error:
        logger.warning("packing again: %s", error.message)
        return None
    if index.encoder != plan.encoder:
        raise DataError(
            f"{out}: contains shards of {index.encoder}, which those of {plan.encoder} would replace.",
            "Give another folder, or delete it.",
        )
    same = index.plan == plan.digest and all(_is_complete(out, shard) for shard in index.shards)
    return index if same and _still_refused(store, index.refused, plan) else None


def _still_refused(store: FeatureSource, refused: Iterable[str], plan: _Plan) -> bool:
    # A slide that is extracted again may have the same attributes, and therefore the same plan.
    return all(encode(store.read, slide_id, plan.dtype).refusal for slide_id in refused)


def _is_complete(out: Path, shard: Shard) -> bool:
    path = out / shard.name
    return path.is_file() and path.stat().st_size == shard.size


def _part_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.part.json"


def _resume(out: Path, plan: _Plan, store: FeatureSource) -> list[_Part]:
    """Return the finished tars of an interrupted run with the same plan; tars of any other run are removed."""
    parts: list[_Part] = []
    while (path := _part_path(out, len(parts))).exists():
        try:
            part = parse(_Part, path.read_bytes(), str(path))
        except DataError:
            break
        same = part.plan == plan.digest and _is_complete(out, part.shard)
        if not same or not _still_refused(store, part.refused, plan):
            break
        parts.append(part)
    _sweep(out, {part.shard.name for part in parts} | {_part_path(out, i).name for i in range(len(parts))})
    if parts:
        logger.info("%s: resuming after %d finished shards", out, len(parts))
    return parts


def _sweep(out: Path, kept: set[str]) -> None:
    """Remove the leftovers of another or an interrupted packing."""
    stale = [p for p in out.iterdir() if p.name not in kept and OWN_FILE.fullmatch(p.name)]
    for path in stale:
        path.unlink()
    if stale:
        logger.info("%s: removed %d files of another or an unfinished packing", out, len(stale))


class _Feed:
    """An iterator with a look at the next item."""

    def __init__(self, items: Iterator[EncodedSlide]) -> None:
        self._items = items
        self.next = next(items, None)

    def take(self) -> EncodedSlide:
        assert self.next is not None
        item, self.next = self.next, next(self._items, None)
        return item


def _encode_ahead(
    store: FeatureSource, order: Sequence[str], dtype: StoredDtype, workers: int
) -> Iterator[EncodedSlide]:
    """Encode slides in threads, at most two per worker ahead, and yield them in order."""
    with ThreadPoolExecutor(workers, "pack") as pool:
        pending: collections.deque[Future[EncodedSlide]] = collections.deque()
        remaining = iter(order)
        while True:
            while len(pending) < 2 * workers and (slide_id := next(remaining, None)) is not None:
                pending.append(pool.submit(encode, store.read, slide_id, dtype))
            if not pending:
                return
            yield pending.popleft().result()


def _write_part(out: Path, number: int, feed: _Feed, plan: _Plan, reference: Sample | None) -> _Part:
    """Write the next tar: slides until it would exceed the target."""
    name = f"shard-{number:06d}.tar"
    samples: list[Sample] = []
    refused: dict[str, str] = {}
    with atomic_path(out / name) as temporary, temporary.open("wb") as stream:
        tar = TarStream(stream)
        while feed.next is not None:
            if samples and tar.offset + feed.next.tar_bytes() + 2 * BLOCK > plan.target_bytes:
                break
            slide = feed.take()
            if slide.refusal:
                logger.warning("skipped: %s", slide.refusal)
                refused[slide.slide_id] = slide.refusal
                continue
            sample = _write_sample(tar, slide, number, plan)
            samples.append(sample)
            _check_alike(reference or samples[0], sample)
        shard = Shard(name=name, size=tar.close(), sha256=tar.digest.hexdigest())
    part = _Part(plan=plan.digest, shard=shard, samples=tuple(samples), refused=refused)
    write_text(_part_path(out, number), part.model_dump_json())
    return part


def _check_alike(first: Sample, sample: Sample) -> None:
    for what, of_first, of_this in (
        ("magnifications", list(first.tiles), list(sample.tiles)),
        ("width", *({s.members[f"{name}.npy"].shape[1] for name in s.tiles} for s in (first, sample))),
    ):
        if of_first != of_this:
            raise DataError(
                f"slides {first.slide_id} and {sample.slide_id} differ in {what}: {of_first} and {of_this}.",
                "Extract the incorrect one again, or remove it from the store.",
            )


def _write_sample(tar: TarStream, slide: EncodedSlide, shard: int, plan: _Plan) -> Sample:
    key = tar_key(slide.slide_id)
    members = {}
    for name, (header, array) in slide.members.items():
        size = len(header) + array.nbytes
        offset = tar.add(f"{key}.{name}", size, header, array)
        members[name] = TarMember(
            offset=offset, size=size, dtype=array.dtype.str, shape=array.shape, crc32=slide.checksums[name]
        )
    return Sample(
        slide_id=slide.slide_id, shard=shard, members=members,
        tile_px_level0=slide.tile_px_level0, error=slide.error,
    )  # fmt: skip


def _assemble(out: Path, plan: _Plan, parts: Sequence[_Part]) -> ShardIndex:
    samples = [sample for part in parts for sample in part.samples]
    refused = {slide_id: reason for part in parts for slide_id, reason in part.refused.items()}
    if not samples:
        reason = next(iter(refused.values()))
        raise DataError(f"None of the {len(refused)} slides could be packed; the first: {reason}")
    first = samples[0]
    names = tuple(first.tiles)
    index = ShardIndex(
        encoder=plan.encoder,
        plan=plan.digest,
        provenance=plan.provenance,
        dtype=plan.dtype,
        dim=first.members[f"{names[0]}.npy"].shape[1],
        magnifications=names,
        seed=plan.seed,
        target_bytes=plan.target_bytes,
        shards=tuple(part.shard for part in parts),
        samples=tuple(samples),
        refused=refused,
    )
    index.write(out)
    for number in range(len(parts)):
        _part_path(out, number).unlink()
    return index
