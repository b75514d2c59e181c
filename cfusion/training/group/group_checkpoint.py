"""Checkpoints of a group: the state of all its members at one point of a pass, whole or not at all."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from cfusion.errors import CheckpointError, DataError
from cfusion.files import digest_json
from cfusion.training.checkpoint import FORMAT, INTERVAL_SECONDS, kept_checkpoints
from cfusion.training.checkpoint_files import Piece, Stored, open_checkpoint, write_checkpoint
from cfusion.training.group.member import GroupMember
from cfusion.training.runtime import Runtime

logger = logging.getLogger(__name__)

KEEP = 2
"""So many of the newest stay."""

SHARE = 0.05
"""Most of the time that writing them may take."""


class GroupCheckpoints:
    """The checkpoints of one group, shared by all its processes; all of them call each method.

    Args:
        folder: Holds them and nothing else.
        runtime: The processes.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder = folder
        self._runtime = runtime
        self._saved = time.monotonic()
        self._took = 0.0

    def save(self, members: Sequence[GroupMember], number: int, seen: int, *, now: bool) -> None:
        """Write a checkpoint if `now`, or if the one before is old enough.

        One that cannot be written, as on a full disk, is told of and tried again after the next interval.

        Args:
            members: Those that are not done.
            number: Of the pass.
            seen: Bags of the pass that are behind.
            now: Whether it must be written.

        Raises:
            CheckpointError: It was to be written `now` and cannot be; older ones are as they were.
        """
        started = time.monotonic()
        pause = max(INTERVAL_SECONDS, self._took / SHARE)
        if not self._runtime.from_main(now or started - self._saved > pause):
            return
        numbers = {
            "format": FORMAT,
            "pass": number,
            "members": {name_of(member): member.numbers() for member in members},
        }
        pieces = {
            f"{name_of(member)}/{key}": Piece(tensor.shape, 0, tensor)
            for member in members
            for key, tensor in member.tensors().items()
            if self._runtime.is_main
        }
        path = self.folder / f"step_{number:06d}_{seen:06d}"
        problem = write_checkpoint(self._runtime, path, pieces, numbers)
        self._saved = time.monotonic()
        self._took = self._saved - started
        if problem is not None:
            message = f"{path}: the checkpoint cannot be written ({problem})."
            if now:
                raise CheckpointError(message, "Make room there; the same command goes on from the checkpoint before.")
            logger.warning("%s Training goes on; the checkpoint before is kept.", message)
        elif self._runtime.is_main:
            for old in kept_checkpoints(self.folder)[KEEP:]:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, members: Sequence[GroupMember]) -> tuple[list[GroupMember], int]:
        """Restore the members that stand in the newest whole checkpoint, and say in which pass they are.

        Members that are not in it are left as they are. Damaged checkpoints are passed over with a warning.

        Raises:
            CheckpointError: All are damaged, or the newest is of another version of the program.
        """
        problem = ""
        for folder in self._runtime.from_main(kept_checkpoints(self.folder)):
            try:
                with open_checkpoint(folder) as stored:
                    return self._restore(members, stored)
            except (DataError, OSError, KeyError, RuntimeError) as error:
                problem = problem or " ".join(str(error).split())
                logger.warning("%s The checkpoint before it is taken.", problem)
        if problem:
            raise CheckpointError(problem, f"No checkpoint is whole. Delete {self.folder} to train from the start.")
        return [], 0

    def clear(self) -> None:
        """Remove all of them."""
        self._runtime.barrier()
        if self._runtime.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._runtime.barrier()

    def _restore(self, members: Sequence[GroupMember], stored: Stored) -> tuple[list[GroupMember], int]:
        if stored.numbers.get("format") != FORMAT:
            raise CheckpointError(
                f"{stored.folder}: has format {stored.numbers.get('format')}; this program reads {FORMAT}.",
                f"Delete {self.folder} to train from the start.",
            )
        found = [member for member in members if name_of(member) in stored.numbers["members"]]
        for member in found:
            prefix = f"{name_of(member)}/"
            tensors = {
                key.removeprefix(prefix): stored.whole(key).to(self._runtime.device)
                for key in stored.shapes
                if key.startswith(prefix)
            }
            member.restore(stored.numbers["members"][name_of(member)], tensors)
        return found, int(stored.numbers["pass"])


def name_of(member: GroupMember) -> str:
    """A member's name in checkpoints: what is trained on what."""
    return digest_json(member.fold.job.identity)[:16]
