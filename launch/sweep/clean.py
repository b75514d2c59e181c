"""Disk that the runs of a sweep use, and what of it can go: stale runs, and checkpoints that nothing will read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cfusion.files import is_orphan
from cfusion.run_folder import CHECKPOINTS, is_done, trainer
from launch.sweep.plan import PlannedRun, SweepConfig
from launch.sweep.status import stale

Kind = Literal["stale run", "checkpoints of a finished run", "temporary of a killed process"]


@dataclass(frozen=True)
class Removable:
    """A folder or file that no run of the sweep needs.

    Attributes:
        path: Where it is.
        kind: What it is.
        size: Its size in bytes.
    """

    path: Path
    kind: Kind
    size: int


@dataclass(frozen=True)
class DiskUse:
    """Disk that a sweep uses, in bytes.

    Attributes:
        runs: All folders of runs.
        checkpoints: Of these, the checkpoints.
        tracking: MLflow's database and the files that it stores next to the runs.
        removable: What can go.
    """

    runs: int
    checkpoints: int
    tracking: int
    removable: tuple[Removable, ...]


def disk_use(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> DiskUse:
    """Measure what a sweep's folders take, and find what can go; what another process trains stays.

    Args:
        sweep: The sweep.
        runs: All its runs.
    """
    folder = sweep.output / "runs"
    names = {run.name for run in runs}
    folders = [path for path in sorted(folder.glob("*")) if path.name in names or path.name in set(stale(sweep, runs))]
    tracking = [path for path in folder.glob("ml*") if path not in folders]
    return DiskUse(
        sum(map(size_of, folders)),
        sum(size_of(path / CHECKPOINTS) for path in folders),
        sum(map(size_of, tracking)),
        tuple(_removable(folders, names)),
    )


def _removable(folders: Sequence[Path], planned: set[str]) -> Iterator[Removable]:
    for folder in folders:
        if trainer(folder)[1]:
            continue
        if folder.name not in planned:
            yield Removable(folder, "stale run", size_of(folder))
            continue
        if is_done(folder) and (folder / CHECKPOINTS).is_dir():
            yield Removable(folder / CHECKPOINTS, "checkpoints of a finished run", size_of(folder / CHECKPOINTS))
        for path in sorted(folder.glob(".*")):
            if is_orphan(path):
                yield Removable(path, "temporary of a killed process", size_of(path))


def remove(what: Sequence[Removable]) -> None:
    """Delete folders and files; one that a process has taken since is left."""
    for item in what:
        run = item.path if item.kind == "stale run" else item.path.parent
        if trainer(run)[1]:
            continue
        if item.path.is_dir():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes; 0 if there is none."""
    if not path.is_dir():
        return path.lstat().st_size if path.exists() else 0
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
