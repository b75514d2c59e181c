"""Packed slides, read by offset without tar parsing; the only copy is into the caller's array."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from cfusion.config import DataConfig
from cfusion.console import progress
from cfusion.data.joined_shards import join_sets
from cfusion.data.shard_files import REPAIR, LocalFiles, OpenFile, ShardFiles, array_bytes, read_pieces
from cfusion.data.shard_index import Sample, Shard, ShardIndex, TarMember, check_header, read_index, tar_key
from cfusion.data.staging import StagedFiles, stage_folder
from cfusion.errors import CfusionError, DataError, ShardsError


class ShardDataset:
    """Slides of a set of shards. Threads may read in parallel.

    Attributes:
        index: Content of the shards.
        slide_ids: All slides, in the order of the shards.
        directory: Folder or URL of the shards, for messages.
    """

    def __init__(self, files: ShardFiles, index: ShardIndex) -> None:
        self.index = index
        self.slide_ids = tuple(sample.slide_id for sample in index.samples)
        self.directory = files.where
        self._files = files
        self._samples: Mapping[str, Sample] = {sample.slide_id: sample for sample in index.samples}
        self._checked: set[tuple[str, str]] = set()
        self._held: set[str] = set()
        self._memory: dict[tuple[str, str], np.ndarray] = {}

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        cache_directory: str | os.PathLike[str] | None = None,
        cache_bytes: int = 64 << 30,
        stage: Path | None = None,
    ) -> ShardDataset:
        """Open a folder or URL (`https://`, `s3://`, `gs://`, …) of shards.

        Args:
            directory: Folder or URL of the tars and `index.json`.
            cache_directory: Cache folder for members of remote shards; None: `cfusion` in the user's cache folder.
            cache_bytes: Maximum size of the cache.
            stage: Folder of a local disk to which shards are copied before they are read; None: they are not.

        Raises:
            ShardsError: The index is missing or invalid, or a shard is missing or has another length than indexed.
        """
        if "://" in str(directory):
            from cfusion.data.remote import open_remote

            remote, index = open_remote(str(directory), cache_directory, cache_bytes)
            return cls(remote if stage is None else StagedFiles(remote, index, stage), index)
        index = read_index(directory)
        for shard in index.shards:
            path = Path(directory) / shard.name
            if not path.is_file():
                raise ShardsError(f"{path}: the shard is missing.", REPAIR)
            if path.stat().st_size != shard.size:
                raise ShardsError(
                    f"{path}: {path.stat().st_size} bytes, the index says {shard.size}: truncated, or from "
                    f"another index{_first_beyond(index, shard, path.stat().st_size)}.",
                    REPAIR,
                )
        files = LocalFiles(directory)
        return cls(files if stage is None else StagedFiles(files, index, stage), index)

    def __contains__(self, slide_id: str) -> bool:
        return slide_id in self._samples

    def sample(self, slide_id: str) -> Sample:
        """Return the index entry of a slide.

        Raises:
            ShardsError: The shards do not contain the slide.
        """
        sample = self._samples.get(slide_id)
        if sample is None:
            reason = self.index.refused.get(slide_id, "it was not in the store when the shards were packed")
            raise ShardsError(f"{self.directory}: no slide {slide_id}: {reason}.", "Pack the store again.")
        return sample

    def tiles(self, slide_id: str) -> dict[str, int]:
        """Count the tiles of a slide per magnification name."""
        return self.sample(slide_id).tiles

    def has(self, slide_id: str, name: str) -> bool:
        """Whether a slide has a member, such as `coords_x20`."""
        return f"{name}.npy" in self.sample(slide_id).members

    def has_positions(self, slide_id: str, names: Iterable[str]) -> bool:
        """Whether a slide has coordinates and a tile size at all the given magnifications."""
        sides = self.sample(slide_id).tile_px_level0
        return all(name in sides and self.has(slide_id, f"coords_{name}") for name in names)

    def read(self, slide_id: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Read complete members, such as `x20` or `coords_x20`, into new arrays of the stored dtype.

        Raises:
            ShardsError: The slide or a member is missing, or its bytes differ from the packed ones.
        """
        members = {name: self._member(slide_id, name) for name in names}
        arrays = {name: np.empty(member.shape, member.dtype) for name, member in members.items()}
        self.read_into(slide_id, arrays)
        return arrays

    def read_into(
        self, slide_id: str, out: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Read members of a slide into C-contiguous arrays of their dtypes.

        The checksum is compared, and the `.npy` header checked, the first time a member is read completely.

        Args:
            slide_id: The slide.
            out: Per member name, such as `x20`, the array for its rows.
            rows: Ascending rows to read of each member; None: all.

        Raises:
            ShardsError: The slide or a member is missing, or its bytes differ from the packed ones.
        """
        if slide_id in self._held:
            self._copy(slide_id, out, rows)
            return
        self._fetch(slide_id, out)
        if rows is None:
            self._read_complete(slide_id, out)
        else:
            # All are requested from the disk before waiting for the first.
            tables = {name: self._table(slide_id, name, rows[name]) for name in out}
            for name, array in out.items():
                np.take(tables[name], rows[name], axis=0, out=array, mode="clip")

    def mapped(self, slide_id: str, names: Iterable[str]) -> dict[str, np.ndarray] | None:
        """Map complete members of a slide without a copy: the page cache itself, privately writable.

        Returns None if they are held in memory, if the system cannot map them, or if the bytes differ from the
        packed ones:
        `read_into` then reads them, or raises the reason.

        Raises:
            ShardsError: The slide or a member is missing.
        """
        if slide_id in self._held:
            return None
        sample, arrays, names = self.sample(slide_id), {}, tuple(names)
        self._fetch(slide_id, names)
        for name in names:
            member = self._member(slide_id, name)
            file, shift = self._files.open(sample.shard, self.index.shards[sample.shard], member)
            new = (slide_id, name) not in self._checked
            data = file.mapped(member.offset + shift, member.size, member.crc32 if new else None)
            if data is None:
                return None
            if new:
                self._check_header(slide_id, name, bytes(data[: member.header]))
                self._checked.add((slide_id, name))
            arrays[name] = data[member.header :].view(member.dtype).reshape(member.shape)
        return arrays

    def bytes_of(self, slide_ids: Iterable[str]) -> int:
        """Size of all members of the given slides, in bytes."""
        return sum(member.size for slide in slide_ids for member in self.sample(slide).members.values())

    def held_bytes(self, slide_ids: Iterable[str]) -> int:
        """Size of those given slides that `hold` was asked to keep, in bytes."""
        return self.bytes_of(slide for slide in slide_ids if slide in self._held)

    def hold(self, slide_ids: Iterable[str]) -> None:
        """Keep slides in memory after their first read; a remote shard of which half or more is needed is streamed."""
        new = [slide for slide in slide_ids if slide not in self._held]
        self._held.update(new)
        if not self._files.remote:
            return
        wanted, total = Counter[int](), Counter[int]()
        for sample in self.index.samples:
            total[sample.shard] += self.bytes_of([sample.slide_id])
        for slide in new:
            wanted[self.sample(slide).shard] += self.bytes_of([slide])
        now = [slide for slide in new if 2 * wanted[number := self.sample(slide).shard] >= total[number]]
        if not now:
            return
        with progress("fetching slides", len(now)) as bar:
            for slide_id, arrays in self.samples(now):
                self._memory.update({(slide_id, name): array for name, array in arrays.items()})
                bar.advance()

    def samples(self, slide_ids: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Iterate over slides with all their arrays, once each in the order of the shards.

        Shards are read front to back through webdataset, and nothing is cached: use it to read a complete remote
        epoch.

        Raises:
            ShardsError: A shard does not match its index.
        """
        wanted = frozenset(self.slide_ids if slide_ids is None else slide_ids)
        for number, shard in enumerate(self.index.shards):
            keys = {tar_key(s.slide_id): s.slide_id for s in self.index.samples if s.shard == number}
            left = wanted.intersection(keys.values())
            for members in self._tar_samples(shard) if left else ():
                slide_id = keys.get(members["__key__"])
                if slide_id is None:
                    key = members["__key__"]
                    raise ShardsError(f"{self.directory}/{shard.name}: {key} is not in the index.", REPAIR)
                if slide_id in left:
                    left -= {slide_id}
                    yield slide_id, self._arrays(slide_id, members)
            if left:
                raise ShardsError(f"{self.directory}/{shard.name}: slide {min(left)} is not in the tar.", REPAIR)

    def _tar_samples(self, shard: Shard) -> Iterator[dict[str, Any]]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        with self._files.stream(shard) as stream:
            try:
                yield from group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}]))
            except CfusionError as error:
                # webdataset appends its streams to the message of errors that pass through it.
                raise type(error)(error.message, error.remedy, topic=error.topic) from None
            except Exception as error:  # tarfile raises many kinds of errors on a damaged header
                raise ShardsError(
                    f"{self.directory}/{shard.name}: truncated, or not a tar ({error.args[0]}).", REPAIR
                ) from error

    def _array_names(self, slide_id: str) -> list[str]:
        return [name.removesuffix(".npy") for name in self.sample(slide_id).members if name.endswith(".npy")]

    def _arrays(self, slide_id: str, members: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = {}
        for name in self._array_names(slide_id):
            member, data = self._member(slide_id, name), members.get(f"{name}.npy", b"")
            if len(data) != member.size or crc32(data) != member.crc32:
                raise self._bad(slide_id, name, "its checksum differs from the packed one")
            self._check_header(slide_id, name, data[: member.header])
            arrays[name] = np.frombuffer(data, member.dtype, offset=member.header).reshape(member.shape)
        return arrays

    def _member(self, slide_id: str, name: str) -> TarMember:
        members = self.sample(slide_id).members
        member = members.get(f"{name}.npy")
        if member is None:
            raise ShardsError(
                f"{self.directory}: slide {slide_id} has no member {name}.npy; it has {', '.join(members)}.",
                "Change data.magnifications, or extract and pack this magnification.",
            )
        return member

    def _fetch(self, slide_id: str, names: Iterable[str]) -> None:
        number = self.sample(slide_id).shard
        self._files.fetch(number, self.index.shards[number], [self._member(slide_id, name) for name in names])

    def _copy(self, slide_id: str, out: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray] | None) -> None:
        absent = [name for name in out if (slide_id, name) not in self._memory]
        if absent:
            members = {name: self._member(slide_id, name) for name in absent}
            arrays = {name: np.empty(member.shape, member.dtype) for name, member in members.items()}
            self._read_complete(slide_id, arrays)
            self._memory.update({(slide_id, name): array for name, array in arrays.items()})
        for name, array in out.items():
            if rows is None:
                np.copyto(array, self._memory[slide_id, name])
            else:
                np.take(self._memory[slide_id, name], rows[name], axis=0, out=array, mode="clip")

    def _read_complete(self, slide_id: str, out: Mapping[str, np.ndarray]) -> None:
        sample = self.sample(slide_id)
        shard = self.index.shards[sample.shard]
        headers = {name: bytearray(self._member(slide_id, name).header) for name in out}
        spans: dict[int, tuple[OpenFile, list[tuple[int, Any]]]] = {}
        for name, array in out.items():
            member = self._member(slide_id, name)
            file, shift = self._files.open(sample.shard, shard, member)
            pieces = spans.setdefault(id(file), (file, []))[1]
            pieces += [
                (member.offset + shift, headers[name]),
                (member.offset + shift + member.header, array_bytes(array)),
            ]
        for file, pieces in spans.values():
            if not read_pieces(file, pieces):
                raise self._bad(slide_id, next(iter(out)), "the shard ends before the member does")
        for name, array in out.items():
            if (slide_id, name) not in self._checked:
                self._check(slide_id, name, headers[name], array)

    def _check(self, slide_id: str, name: str, header: bytearray, array: np.ndarray) -> None:
        sample, member = self.sample(slide_id), self._member(slide_id, name)
        if crc32(array_bytes(array), crc32(header)) != member.crc32:
            if not self._files.discard(sample.shard, member):
                raise self._bad(slide_id, name, "its checksum differs from the packed one")
            return self._read_complete(slide_id, {name: array})
        self._check_header(slide_id, name, bytes(header))
        self._checked.add((slide_id, name))
        return None

    def _check_header(self, slide_id: str, name: str, header: bytes) -> None:
        problem = check_header(header, self._member(slide_id, name))
        if problem:
            raise self._bad(slide_id, name, problem)

    def _table(self, slide_id: str, name: str, rows: np.ndarray) -> np.ndarray:
        """Map a member into memory, to gather rows in one call; positioned reads would need one per run of rows."""
        sample, member = self.sample(slide_id), self._member(slide_id, name)
        file, shift = self._files.open(sample.shard, self.index.shards[sample.shard], member)
        start = member.offset + member.header + shift
        # Touching a map beyond the end of its file would kill the process.
        if os.fstat(file.descriptor).st_size < start + member.payload:
            raise self._bad(slide_id, name, "the shard ends before the member does")
        size = member.payload // np.dtype(member.dtype).itemsize
        table = np.frombuffer(file.map, member.dtype, size, start).reshape(member.shape)
        file.read_ahead(start, table.strides[0], rows)
        return table

    def _bad(self, slide_id: str, name: str, what: str) -> DataError:
        shard = self.index.shards[self.sample(slide_id).shard].name
        return DataError(f"{self.directory}/{shard}: slide {slide_id}, member {name}.npy: {what}.", REPAIR)


def _first_beyond(index: ShardIndex, shard: Shard, size: int) -> str:
    """Name the first member of a shard that does not lie within `size` bytes; empty if all do."""
    number = index.shards.index(shard)
    members = ((s.slide_id, name, m) for s in index.samples if s.shard == number for name, m in s.members.items())
    beyond = [(m.offset, slide_id, name) for slide_id, name, m in members if m.offset + m.size > size]
    return "; slide {1}, member {2} is the first beyond its end".format(*min(beyond)) if beyond else ""


def open_shards(data: DataConfig) -> ShardDataset:
    """Open the shards of a `data` section, local or remote; several sets are joined, see `join_sets`."""
    sets = [
        ShardDataset.open(
            address.reveal(), cache_directory=data.cache_directory, cache_bytes=data.cache_bytes,
            stage=None if data.stage is None else stage_folder(data.stage),
        )
        for address in data.shard_sets
    ]  # fmt: skip
    return sets[0] if len(sets) == 1 else ShardDataset(*join_sets([(one._files, one.index) for one in sets]))
