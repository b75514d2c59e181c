"""Remove slides from feature stores and shards, as the withdrawal of a consent requires.

A plan lists what would change before anything does. Shards are rewritten without the slides: new tars first, then the
index, then the old tars are deleted, so an interrupted removal leaves a usable set and can be repeated.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from cfusion.data.shard_index import INDEX_NAME, Sample, Shard, ShardIndex, TarMember, read_index, tar_key
from cfusion.data.store import SUFFIX, FeatureStore, encoders_in
from cfusion.errors import ConfigError, DataError, ShardsError
from cfusion.files import atomic_path, digest_json, write_text
from preprocess.annotation import SHEET_SUFFIXES
from preprocess.packing import OWN_FILE, locked
from preprocess.samples import TarStream


@dataclass(frozen=True)
class Removal:
    """What a removal changes.

    Attributes:
        slide_ids: Slides to remove that at least one place has.
        unknown: Slides to remove that no place has.
        groups: Features to delete.
        files: Masks and sheets to delete.
        tables: Tables of outcomes that lose rows.
        shards: Folders of shards to rewrite, each with the tars that contain the slides.
        leftovers: Tars that no index lists, from an interrupted removal, to delete.
    """

    slide_ids: tuple[str, ...]
    unknown: tuple[str, ...]
    groups: tuple[Path, ...]
    files: tuple[Path, ...]
    tables: tuple[Path, ...]
    shards: dict[Path, tuple[str, ...]]
    leftovers: tuple[Path, ...]


def slides_in(places: Sequence[Path]) -> list[str]:
    """List the slides of feature stores and folders of shards.

    Raises:
        DataError: As `plan_removal`.
    """
    found: set[str] = set()
    for place in places:
        if (place / INDEX_NAME).is_file():
            index = read_index(place)
            found |= {sample.slide_id for sample in index.samples} | set(index.refused)
        else:
            for encoder in encoders_in(place) or _no_store(place):
                found.update(FeatureStore(place / encoder).slide_ids())
    return sorted(found)


def plan_removal(places: Sequence[Path], slide_ids: Iterable[str]) -> Removal:
    """Find everything of the slides in feature stores and folders of shards; nothing is changed.

    Raises:
        ConfigError: None of the places has any of the slides.
        DataError: A place is neither a feature store nor a folder of shards, or its index is unreadable.
    """
    wanted = sorted(set(slide_ids))
    found: set[str] = set()
    groups: list[Path] = []
    files: list[Path] = []
    tables: list[Path] = []
    leftovers: list[Path] = []
    shards: dict[Path, tuple[str, ...]] = {}
    for place in places:
        if (place / INDEX_NAME).is_file():
            index = read_index(place)
            here = {sample.slide_id for sample in index.samples} | set(index.refused)
            if names := here.intersection(wanted):
                found |= names
                tars = {index.shards[s.shard].name for s in index.samples if s.slide_id in names}
                shards[place] = tuple(sorted(tars))
            leftovers += _unlisted(place, index)
            continue
        for encoder in encoders_in(place) or _no_store(place):
            store = FeatureStore(place / encoder)
            here = set(store.slide_ids()).intersection(wanted)
            found |= here
            groups += [store.group_path(name) for name in sorted(here)]
        files += [p for s in wanted for end in SHEET_SUFFIXES if (p := place / "sheets" / f"{s}{end}").is_file()]
        tables += [p for p in sorted(place.glob("*.csv")) if _without_rows(p, wanted) is not None]
    if not found and not leftovers:
        raise ConfigError(
            f"{', '.join(map(str, places))}: does not contain the slides {', '.join(wanted[:3])}.",
            "`cfusion preprocess inspect` lists the slides of a store.",
        )
    unknown = tuple(name for name in wanted if name not in found)
    return Removal(
        tuple(sorted(found)), unknown, tuple(groups), tuple(files), tuple(tables), shards, tuple(leftovers)
    )  # fmt: skip


def remove_slides(removal: Removal) -> None:
    """Carry out a removal.

    Raises:
        DataError: A file cannot be changed, a tar is damaged, or another process packs into the folder. What was
            removed until then stays removed, and the same command removes the rest.
    """
    try:
        for folder in removal.shards:
            with locked(folder):
                _rewrite(folder, set(removal.slide_ids))
        for path in removal.tables:
            write_text(path, _without_rows(path, removal.slide_ids) or "")
        for group in removal.groups:
            # First out of sight, so that no half of a group is ever read; the next writer deletes such leftovers.
            hidden = group.with_name(f".{group.name}.removed.old")
            group.replace(hidden)
            shutil.rmtree(hidden)
        for path in (*removal.files, *removal.leftovers):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be changed ({error.strerror or error}).", "The same command removes the rest."
        ) from error


def _no_store(place: Path) -> list[str]:
    raise DataError(f"{place}: neither a feature store nor a folder of shards ({INDEX_NAME}, ENCODER/SLIDE{SUFFIX}).")


def _without_rows(path: Path, slide_ids: Iterable[str]) -> str | None:
    """Return a table of outcomes without the rows of the slides; None if it has none of them."""
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        header, *rows = list(csv.reader(stream)) or [[]]
    if "slide_id" not in header:
        return None
    column, names = header.index("slide_id"), set(slide_ids)
    kept = [row for row in rows if len(row) <= column or row[column] not in names]
    if len(kept) == len(rows):
        return None
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *kept])
    return text.getvalue()


def _unlisted(folder: Path, index: ShardIndex) -> list[Path]:
    listed = {shard.name for shard in index.shards}
    return sorted(p for p in folder.iterdir() if OWN_FILE.fullmatch(p.name) and p.name not in listed)


def _rewrite(folder: Path, slide_ids: set[str]) -> None:
    """Write the tars of a set again without some slides, and the index of the result.

    Raises:
        ShardsError: Only these slides are in the set, or a member differs from its checksum.
    """
    index = read_index(folder)
    kept = [sample for sample in index.samples if sample.slide_id not in slide_ids]
    if not kept:
        raise ShardsError(f"{folder}: contains no other slides.", "Delete the folder.")
    changed = {sample.shard for sample in index.samples if sample.slide_id in slide_ids}
    free = 1 + max(int(p.stem.split("-")[1]) for p in folder.glob("shard-??????.tar"))
    shards: list[Shard] = []
    samples: list[Sample] = []
    for number, shard in enumerate(index.shards):
        here = [sample for sample in kept if sample.shard == number]
        if number in changed and here:
            name = f"shard-{free + len(shards):06d}.tar"
            shard, here = _copied(folder, shard, name, here)
        if here:
            samples += [sample.model_copy(update={"shard": len(shards)}) for sample in here]
            shards.append(shard)
    refused = {name: why for name, why in index.refused.items() if name not in slide_ids}
    # Another plan, so that packing does not take this set for that of the complete store.
    plan = digest_json([index.plan, [sample.slide_id for sample in samples]])
    update = {"plan": plan, "shards": tuple(shards), "samples": tuple(samples), "refused": refused}
    index.model_copy(update=update).write(folder)
    for path in _unlisted(folder, read_index(folder)):
        path.unlink()


def _copied(folder: Path, shard: Shard, name: str, samples: Sequence[Sample]) -> tuple[Shard, list[Sample]]:
    """Copy some samples of a tar into another one; return it, and the samples with their new places."""
    moved = []
    with ExitStack() as stack:
        source = stack.enter_context((folder / shard.name).open("rb"))
        tar = TarStream(stack.enter_context(stack.enter_context(atomic_path(folder / name)).open("wb")))
        for sample in samples:
            members: dict[str, TarMember] = {}
            for key, member in sample.members.items():
                source.seek(member.offset)
                data = source.read(member.size)
                if crc32(data) != member.crc32:
                    raise ShardsError(
                        f"{folder / shard.name}: slide {sample.slide_id}, {key}: differs from its checksum.",
                        "Pack the store again with `cfusion preprocess shard`.",
                    )
                at = tar.add(f"{tar_key(sample.slide_id)}.{key}", member.size, b"", np.frombuffer(data, np.uint8))
                members[key] = member.model_copy(update={"offset": at})
            moved.append(sample.model_copy(update={"members": members}))
        size = tar.close()
    return Shard(name=name, size=size, sha256=tar.digest.hexdigest()), moved
