"""The state of a training run as one explicit object, and its checkpoints.

A run's folder holds the newest few `step_00000120/` folders, and `best_epoch_0003/` with the best parameters that they
refer to. A checkpoint is written completely before older ones are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfusion.config import Config
from cfusion.errors import DataError
from cfusion.files import read_json
from cfusion.training.checkpoint_files import NUMBERS, CheckpointWriting, Stored, open_checkpoint
from cfusion.training.checkpoint_policy import CHECKPOINT_FORMAT, INTERVAL_SECONDS, CheckpointPolicy, kept_checkpoints
from cfusion.training.runtime import Runtime
from cfusion.training.snapshot import OtherTrainingError, Snapshot
from cfusion.yaml_files import differences

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """The position of a training run; together with the tensors of `Snapshot`, all that resuming needs.

    A step's learning rate, order of bags and dropout follow from these numbers and the configuration.

    Attributes:
        epoch: Epoch in progress, from 0.
        samples_seen: Bags of this epoch that were trained on, over all processes.
        step: Optimizer steps since the start.
        loss_sum: Sum over this epoch's steps of mean loss × cases.
        best_score: Best validation score so far (higher is better); None before the first.
        best_epoch: Epoch of the best score, −1 before the first.
        history: One row of metrics per finished epoch.
        loss_scale: State of the loss scaler in fp16; empty otherwise.
    """

    epoch: int = 0
    samples_seen: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_score: float | None = None
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    loss_scale: dict[str, float] = field(default_factory=dict)


class Checkpoints(CheckpointPolicy):
    """The checkpoints of one training run. All of its processes must call each method.

    Args:
        folder: Folder that holds only these checkpoints.
        identity: Model and data of the run; `load` refuses a checkpoint with another identity and names what differs.
        runtime: The processes.
        keep: Number of newest checkpoints to keep.
        card: Model card, for readers of a checkpoint that do not have the run.
        background: See `CheckpointPolicy`.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        runtime: Runtime,
        *,
        keep: int = 2,
        card: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        super().__init__(folder, runtime, keep, background=background)
        self.identity = json.loads(json.dumps(identity, default=str))
        self.card = dict(card or {})
        self._best = -1

    def save(self, state: TrainState, snapshot: Snapshot, *, now: bool) -> None:
        """Write a checkpoint if `now`, or if the last one is `INTERVAL_SECONDS` old.

        Raises:
            CheckpointError: It must be written `now` and cannot be; older ones are unchanged.
        """
        if self.settle(wait=now) and self._due(INTERVAL_SECONDS, now=now):
            path = _step_folder(self.folder, state.step)
            self._write(path, lambda: self._both(path, state, snapshot), now=now)

    def _both(self, path: Path, state: TrainState, snapshot: Snapshot) -> list[CheckpointWriting]:
        """Return the writing of the best parameters, if they changed, then of the state."""
        numbers = {
            "format": CHECKPOINT_FORMAT,
            "identity": self.identity,
            "engine": self.runtime.parallel.engine,
            "world_size": self.runtime.world_size,
            "card": self.card,
            "state": dataclasses.asdict(state),
        }
        writings = [CheckpointWriting(self.runtime, path, snapshot.pieces(), numbers)]
        if (epoch := state.best_epoch) not in (-1, self._best):

            def written() -> None:
                self._best = epoch

            best = _best_folder(self.folder, epoch)
            writings.insert(0, CheckpointWriting(self.runtime, best, snapshot.best_pieces(), numbers, written))
        return writings

    def _drop_older(self) -> None:
        super()._drop_older()
        with contextlib.suppress(DataError):  # a damaged checkpoint does not say which best epoch it refers to
            best = {best_of(self.folder, read_json(step / NUMBERS)) for step in kept_checkpoints(self.folder)}
            for folder in self.folder.glob("best_epoch_*"):
                if folder not in best:
                    shutil.rmtree(folder, ignore_errors=True)

    def load(self, snapshot: Snapshot) -> TrainState | None:
        """Load the newest complete checkpoint into `snapshot`; return None if there is none.

        Damaged checkpoints are skipped with a warning and removed. The number of processes may differ from the number
        that wrote it.

        Raises:
            CheckpointError: All are damaged, or the newest belongs to another model, data set or engine.
        """
        kept = self.runtime.from_main(kept_checkpoints(self.folder))
        found = self._take_up(kept, lambda stored: self._restore(stored, snapshot))
        self._tidy(newest=found[0] if found else None)
        return found[1] if found else None

    def _restore(self, stored: Stored, snapshot: Snapshot) -> TrainState:
        self._check_identity(stored)
        state = TrainState(**stored.numbers["state"])
        best = best_of(self.folder, stored.numbers)
        turns = {"turn": self.runtime.rank, "turns": self.runtime.world_size}
        with contextlib.nullcontext() if best is None else open_checkpoint(best, **turns) as stored_best:
            snapshot.fill(stored, stored_best)
        self._best = state.best_epoch
        return state

    def _check_identity(self, stored: Stored) -> None:
        self._check_format(stored)
        numbers, engine = stored.numbers, self.runtime.parallel.engine
        remedy = f"Delete {self.folder} to train from the start."
        if numbers["engine"] != engine:
            raise OtherTrainingError(
                f"{stored.folder}: written with parallel.engine={numbers['engine']}; this run has {engine}.", remedy
            )
        # What an older program did not record is not compared; what it recorded and does not decide neither.
        there = Config.without_asides(numbers["identity"])
        here = {key: value for key, value in self.identity.items() if key in there}
        if there != here:
            differing = differences(there, here)
            raise OtherTrainingError(
                f"{stored.folder}: belongs to another training run; differs in {', '.join(differing[:5])}.", remedy
            )

    def _tidy(self, newest: Path | None) -> None:
        """Remove incomplete files of a killed process, and damaged checkpoints newer than the one loaded."""
        if self.runtime.is_main and self.folder.is_dir():
            newer = [step for step in kept_checkpoints(self.folder) if newest is not None and step.name > newest.name]
            for path in [*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old"), *newer]:
                shutil.rmtree(path, ignore_errors=True)
        self.runtime.barrier()


def best_of(folder: Path, numbers: Mapping[str, Any]) -> Path | None:
    """Return the folder of the best parameters that a checkpoint of `folder` refers to; None before the first."""
    epoch = numbers["state"]["best_epoch"]
    return None if epoch < 0 else _best_folder(folder, epoch)


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _best_folder(folder: Path, epoch: int) -> Path:
    return folder / f"best_epoch_{epoch:04d}"
