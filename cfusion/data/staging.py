"""Copies shards to a local disk of the node before they are read, each once a node and compared with its digest.

A shard is copied when a process first needs it; others of the node wait for the copy. A complete one is found again by
the next run on the node.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from cfusion.console import Progress
from cfusion.data.shard_files import LocalFiles, OpenFile, ShardFiles
from cfusion.data.shard_index import Shard, ShardIndex, TarMember
from cfusion.errors import DISK, ConfigError, ShardsError
from cfusion.files import atomic_path
from cfusion.locks import hold

logger = logging.getLogger(__name__)

_PIECE = 8 << 20
_SHOWN_DIGITS = 16


class StagedFiles:
    """Shards in a folder of the node's own disk, copied from another place.

    Args:
        source: Where the shards are.
        index: Their index.
        stage: Folder for all sets of shards; each gets its own folder in it.
    """

    remote = False

    def __init__(self, source: ShardFiles, index: ShardIndex, stage: Path) -> None:
        self.where = source.where
        self.folder = stage / f"cfusion-shards-{index.digest[:_SHOWN_DIGITS]}"
        self._source = source
        self._local = LocalFiles(self.folder)
        self._copied: set[int] = set()
        self._lock = threading.Lock()
        self._progress = Progress(f"copying shards to {self.folder}, MB", sum(s.size for s in index.shards) >> 20)

    def open(self, number: int, shard: Shard, member: TarMember) -> tuple[OpenFile, int]:
        """Return the copy of the shard, which stays open."""
        self._stage(number, shard)
        return self._local.open(number, shard, member)

    def fetch(self, number: int, shard: Shard, members: Sequence[TarMember]) -> None:
        """Copy the shard."""
        self._stage(number, shard)

    def discard(self, number: int, member: TarMember) -> bool:
        """Return False: a copy was compared with its digest."""
        return False

    def stream(self, shard: Shard) -> io.IOBase:
        """Return the shard at its source: who reads it once, front to back, needs no copy."""
        return self._source.stream(shard)

    def _stage(self, number: int, shard: Shard) -> None:
        if number in self._copied:
            return
        path = self.folder / shard.name
        try:
            with self._lock, hold(self.folder / f".{shard.name}.lock", wait=True):
                if not (path.is_file() and path.stat().st_size == shard.size):
                    self._copy(shard, path)
        except OSError as error:
            raise ShardsError(
                f"{path}: cannot be copied there ({error.strerror}).",
                DISK.get(error.errno or 0, "Set data.stage to a folder of a local disk."),
            ) from error
        self._copied.add(number)

    def _copy(self, shard: Shard, path: Path) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < shard.size:
            raise ShardsError(
                f"{self.folder}: {free / 1e9:.1f} GB are free, {shard.name} needs {shard.size / 1e9:.1f} GB.",
                "Set data.stage to a larger disk, or leave it out and read the shards where they are.",
            )
        digest = hashlib.sha256()
        with self._source.stream(shard) as source, atomic_path(path) as temporary, temporary.open("wb") as target:
            while piece := source.read(_PIECE):
                digest.update(piece)
                target.write(piece)
                self._progress.advance(len(piece) >> 20)
            if digest.hexdigest() != shard.sha256:
                raise ShardsError(
                    f"{self.where}/{shard.name}: its digest differs from that of the index.",
                    "Copy or pack the shards again; `cfusion preprocess verify` lists the intact slides.",
                )


def stage_folder(text: str) -> Path:
    """Return the folder that `data.stage` names, with its variables, such as `$TMPDIR`, filled in.

    Raises:
        ConfigError: A variable is not set on this node.
    """
    folder = os.path.expandvars(text)
    unset = re.search(r"\$(\w+|\{\w+\})", folder)
    if unset is not None:
        raise ConfigError(
            f"data.stage={text}: the variable {unset[1].strip('{}')} is not set here.",
            "Set it, or give a folder of a local disk.",
        )
    return Path(folder).expanduser()
