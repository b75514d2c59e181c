"""Joins several sets of shards, such as those of several cohorts, into one; each keeps its own files and index."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from cfusion.data.encoder_names import encoder_name
from cfusion.data.shard_files import OpenFile, ShardFiles
from cfusion.data.shard_index import Sample, Shard, ShardIndex, TarMember
from cfusion.errors import ShardsError
from cfusion.files import digest_json

SAME_FOR_ALL = ("version", "weights", "transform", "pool", "resolution", "resample")
"""What two sets of embeddings of one encoder must have in common for one model to read both."""

EXTRACTED = "extracted"
"""Coarser magnifications that are not derived from the finest."""

ShardSet = tuple[ShardFiles, ShardIndex]


class JoinedFiles:
    """The tars of several sets; a shard's number counts through all of them.

    Args:
        sets: Files and number of shards of each set.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.where = ", ".join(files.where for files, _ in sets)
        self.remote = any(files.remote for files, _ in sets)
        self._places = [(files, number) for files, index in sets for number in range(len(index.shards))]
        # Equal entries have the same name, length and SHA-256, so either set may give the bytes.
        self._source = {shard: files for files, index in sets for shard in index.shards}

    def open(self, number: int, shard: Shard, member: TarMember) -> tuple[OpenFile, int]:
        """Open a file of the shard's set that contains the member; see `ShardFiles.open`."""
        files, own = self._places[number]
        return files.open(own, shard, member)

    def fetch(self, number: int, shard: Shard, members: Sequence[TarMember]) -> None:
        """Prefetch members of a shard, as its set does it."""
        files, own = self._places[number]
        files.fetch(own, shard, members)

    def discard(self, number: int, member: TarMember) -> bool:
        """Delete a damaged local copy of a member, if its set keeps copies."""
        files, own = self._places[number]
        return files.discard(own, member)

    def stream(self, shard: Shard) -> io.IOBase:
        """Open a tar, to be read front to back."""
        return self._source[shard].stream(shard)


def join_sets(sets: Sequence[ShardSet]) -> ShardSet:
    """Join sets of shards; the magnifications are those that all of them have.

    Args:
        sets: Files and index of each, two or more.

    Raises:
        ShardsError: Two sets have other embeddings, or a slide is in two of them.
    """
    (first_files, first), *others = sets
    for files, index in others:
        problem = _contradiction(first, index)
        if problem:
            raise ShardsError(
                f"{files.where} and {first_files.where} cannot be read as one set: {problem}.",
                "Embed and pack the slides of all cohorts in the same way.",
                topic="encoder",
            )
    _refuse_same_slides(sets)
    samples: list[Sample] = []
    shards: list[Shard] = []
    for _, index in sets:
        samples += [sample.model_copy(update={"shard": sample.shard + len(shards)}) for sample in index.samples]
        shards += index.shards
    joined = ShardIndex(
        encoder=first.encoder,
        plan=digest_json([index.plan for _, index in sets]),
        provenance={k: v for k, v in first.provenance.items() if all(i.provenance.get(k) == v for _, i in others)},
        dtype=first.dtype,
        dim=first.dim,
        magnifications=tuple(m for m in first.magnifications if all(m in index.magnifications for _, index in sets)),
        seed=first.seed,
        target_bytes=first.target_bytes,
        shards=tuple(shards),
        samples=tuple(samples),
        refused={slide: why for _, index in sets for slide, why in index.refused.items()},
    )
    return JoinedFiles(sets), joined


def _contradiction(one: ShardIndex, other: ShardIndex) -> str:
    """Say why one model cannot read both sets; empty if it can."""
    if (encoder_name(one.encoder), one.dim) != (encoder_name(other.encoder), other.dim):
        return f"embeddings of {other.encoder} ({other.dim} wide) and of {one.encoder} ({one.dim} wide)"
    if one.dtype != other.dtype:
        return f"stored as {other.dtype} and as {one.dtype}"
    if not set(one.magnifications) & set(other.magnifications):
        return f"magnifications {', '.join(other.magnifications)} and {', '.join(one.magnifications)}"
    return made_otherwise(one.provenance, other.provenance)


def made_otherwise(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say in what the making of two sets of embeddings of one encoder differs; empty if in nothing that is recorded."""
    for key in SAME_FOR_ALL:
        ours, theirs = one.get(key), other.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            return f"embeddings with {key} {theirs} and with {key} {ours}"
    ours, theirs = (made.get("coarser") or EXTRACTED for made in (one, other))
    return "" if ours == theirs else f"coarser magnifications that are {theirs} and that are {ours}"


def _refuse_same_slides(sets: Sequence[ShardSet]) -> None:
    places: dict[str, str] = {}
    for files, index in sets:
        for sample in index.samples:
            other = places.setdefault(sample.slide_id, files.where)
            if other != files.where:
                raise ShardsError(
                    f"slide {sample.slide_id} is in {other} and in {files.where}.", "Leave it out of one of them."
                )
