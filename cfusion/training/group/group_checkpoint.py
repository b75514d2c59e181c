"""Checkpoints of a group: the state of all its members at one point of a pass, written atomically.

Each member's job names a folder for checkpoints. One of these folders holds the group's state; the others hold a file
that points to it. The state is therefore found in whatever order the runs are given, even without the run that owns the
folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from cfusion.errors import DataError
from cfusion.files import digest_json, read_json, write_json
from cfusion.training.checkpoint_files import NUMBERS, CheckpointWriting, Piece, Stored
from cfusion.training.checkpoint_policy import CHECKPOINT_FORMAT, INTERVAL_SECONDS, CheckpointPolicy, kept_checkpoints
from cfusion.training.group.member import GroupMember
from cfusion.training.runtime import Runtime

KEEP = 2
"""Number of newest checkpoints to keep."""

POINTER = "elsewhere.json"
"""File in a member's folder with the relative path of the folder that holds the group's state."""


class GroupCheckpoints(CheckpointPolicy):
    """The checkpoints of one group. All of its processes must call each method.

    Args:
        members: All members; their jobs' folders hold only checkpoints.
        runtime: The processes.
        background: See `CheckpointPolicy`.
    """

    def __init__(self, members: Sequence[GroupMember], runtime: Runtime, *, background: bool = False) -> None:
        self._used = _folders(members)
        super().__init__(self._used[0] if self._used else Path(), runtime, KEEP, background=background)

    def save(self, members: Sequence[GroupMember], number: int, seen: int, *, now: bool) -> None:
        """Write a checkpoint if `now`, or if the last one is old enough.

        Args:
            members: Members that are not finished.
            number: Number of the pass.
            seen: Bags of the pass already processed.
            now: Whether it must be written.

        Raises:
            CheckpointError: It must be written `now` and cannot be; older ones are unchanged.
        """
        if not self.settle(wait=now) or not self._due(INTERVAL_SECONDS, now=now) or not members:
            return
        folders = _folders(members)
        self.folder = folders[0]
        path = self.folder / f"step_{number:06d}_{seen:06d}"
        self._write(path, lambda: [self._all(path, members, number, folders)], now=now)

    def _all(
        self, path: Path, members: Sequence[GroupMember], number: int, folders: Sequence[Path]
    ) -> CheckpointWriting:
        numbers = {
            "format": CHECKPOINT_FORMAT,
            "pass": number,
            "members": {name_of(member): member.numbers() for member in members},
        }
        pieces = {
            f"{name_of(member)}/{key}": Piece(tensor.shape, 0, tensor)
            for member in members
            for key, tensor in member.tensors().items()
            if self.runtime.is_main
        }
        return CheckpointWriting(self.runtime, path, pieces, numbers, lambda: self._point_to_it(folders))

    def _point_to_it(self, folders: Sequence[Path]) -> None:
        """Point to the new state from the other folders, then remove what it replaces there."""
        if not self.runtime.is_main:
            return
        for folder in folders[1:]:
            write_json(folder / POINTER, {"folder": os.path.relpath(self.folder, folder)})
        for folder in self._used:
            if folder not in folders:
                shutil.rmtree(folder, ignore_errors=True)
            elif folder != self.folder:
                for old in kept_checkpoints(folder):
                    shutil.rmtree(old, ignore_errors=True)
        (self.folder / POINTER).unlink(missing_ok=True)

    def load(self, members: Sequence[GroupMember]) -> tuple[list[GroupMember], int]:
        """Restore the members in the best complete checkpoint, and return them with the number of their pass.

        The best checkpoint has the most of these members; among equals it is the newest. Members that are not in it are
        left unchanged. Damaged checkpoints are skipped with a warning.

        Raises:
            CheckpointError: All are damaged, or the best was written by another version of the program.
        """
        ranked = self.runtime.from_main(_ranked(members))
        taken = self._take_up(ranked, lambda stored: self._restore(members, stored))
        found, number = taken[1] if taken else ([], 0)
        self._used = _folders(found or members)
        return found, number

    def clear(self) -> None:
        """Remove the checkpoints of the members that were last loaded."""
        self.settle()
        self.runtime.barrier()
        if self.runtime.is_main:
            for folder in self._used:
                shutil.rmtree(folder, ignore_errors=True)
        self.runtime.barrier()

    def _restore(self, members: Sequence[GroupMember], stored: Stored) -> tuple[list[GroupMember], int]:
        self._check_format(stored)
        found = [member for member in members if name_of(member) in stored.numbers["members"]]
        for member in found:
            prefix = f"{name_of(member)}/"
            tensors = {
                key.removeprefix(prefix): stored.complete(key).to(self.runtime.device)
                for key in stored.shapes
                if key.startswith(prefix)
            }
            member.restore(stored.numbers["members"][name_of(member)], tensors)
        return found, int(stored.numbers["pass"])


def name_of(member: GroupMember) -> str:
    """Return a member's name in checkpoints, a digest of its model and data."""
    return digest_json(member.fold.job.identity)[:16]


def _folders(members: Sequence[GroupMember]) -> list[Path]:
    return list(dict.fromkeys(member.fold.job.folder for member in members))


def _ranked(members: Sequence[GroupMember]) -> list[Path]:
    """List the checkpoints that hold one of the members or that cannot be read, best first."""
    names = {name_of(member) for member in members}
    places = [place for folder in _folders(members) for place in (folder, _pointed_to(folder)) if place is not None]
    found = dict.fromkeys(path for place in dict.fromkeys(places) for path in kept_checkpoints(place))
    ranked = [(_known(path, names), path.name, path) for path in found]
    return [path for known, _, path in sorted(ranked, reverse=True) if known]


def _known(checkpoint: Path, names: Collection[str]) -> int:
    """Count the named members with a state in a checkpoint; an unreadable checkpoint counts as holding all."""
    try:
        return sum(name in read_json(checkpoint / NUMBERS)["members"] for name in names)
    except (DataError, OSError, KeyError, TypeError):
        return len(names)


def _pointed_to(folder: Path) -> Path | None:
    try:
        return Path(os.path.normpath(folder / read_json(folder / POINTER)["folder"]))
    except (DataError, OSError, KeyError, TypeError):
        return None
