"""The state of a training as one explicit object, and as a folder that others can load without pickle.

`checkpoint/` holds `state.json` (numbers), `tensors.safetensors` (parameters, best parameters, moving average and the
optimizer's moments) and the random state of each rank. It is replaced whole, so what is there is never a part.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cfusion.errors import CheckpointError
from cfusion.files import atomic_path, read_json, write_json
from cfusion.training.runtime import Runtime

FORMAT = 1

INTERVAL_SECONDS = 30.0
"""A checkpoint is written at the first step this long after the one before."""


@dataclass
class TrainState:
    """Where a training stands; with the parameters and random states, all that a resumed one needs.

    Attributes:
        epoch: Epoch in progress, from 0.
        samples_seen: Bags of this epoch that were trained on, over all processes.
        step: Optimizer steps since the start.
        loss_sum: Sum over this epoch's steps of mean loss × cases.
        best_score: Best validation score so far (higher is better); none before the first.
        best_epoch: Its epoch, −1 before the first.
        history: One row of metrics per finished epoch.
    """

    epoch: int = 0
    samples_seen: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_score: float | None = None
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Snapshot:
    """Tensors that belong to a state.

    Attributes:
        model: The model itself, unwrapped.
        optimizer: Its optimizer.
        best: Parameters of the best epoch; empty before the first.
        average: Moving average of the parameters; empty where it is off.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


class Checkpoints:
    """The checkpoint folder of one training, shared by all its processes.

    Args:
        folder: Replaced whole at each save.
        identity: Digest of what is trained on what; `load` refuses another.
        runtime: The processes; all of them call each method, rank 0 writes.
    """

    def __init__(self, folder: Path, identity: str, runtime: Runtime) -> None:
        self.folder = folder
        self.identity = identity
        self.runtime = runtime
        self._saved = time.monotonic()

    def save(self, state: TrainState, snapshot: Snapshot, *, now: bool) -> None:
        """Write a checkpoint if `now`, or if the one before is `INTERVAL_SECONDS` old."""
        runtime = self.runtime
        if not runtime.from_main(now or time.monotonic() - self._saved > INTERVAL_SECONDS):
            return
        random = runtime.gather([_random_state()])
        if runtime.is_main:
            with atomic_path(self.folder) as temporary:
                temporary.mkdir()
                tensors = _pack(snapshot) | {f"random/{rank}": state for rank, state in enumerate(random)}
                save_file(tensors, temporary / "tensors.safetensors")
                numbers = {
                    "format": FORMAT,
                    "identity": self.identity,
                    "engine": runtime.parallel.engine,
                    "state": dataclasses.asdict(state),
                    "optimizer": _plain(snapshot.optimizer.state_dict()),
                }
                write_json(temporary / "state.json", numbers)
        runtime.barrier()
        self._saved = time.monotonic()

    def load(self, snapshot: Snapshot) -> TrainState | None:
        """Read the checkpoint into `snapshot` and the random generators; None where there is none.

        At another number of processes the random states start from those of the ranks that were there, in turn.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to another model, data or engine.
        """
        folder, engine = self.folder, self.runtime.parallel.engine
        if not folder.is_dir():
            return None
        remedy = f"Delete {folder} to train from the start."
        numbers = read_json(folder / "state.json")
        if numbers.get("format") != FORMAT or numbers.get("engine") != engine:
            raise CheckpointError(
                f"{folder}: was written by engine {numbers.get('engine')}, format {numbers.get('format')}; this run "
                f"has engine {engine}, format {FORMAT}.",
                remedy,
            )
        if numbers["identity"] != self.identity:
            raise CheckpointError(f"{folder}: belongs to another configuration, fold or data.", remedy)
        try:
            tensors = load_file(folder / "tensors.safetensors", device=str(self.runtime.device))
            random = _unpack(tensors, numbers["optimizer"], snapshot)["random"]
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: cannot be read ({' '.join(str(error).split())[:200]}).", remedy
            ) from error
        _set_random_state(random[str(self.runtime.rank % len(random))])
        return TrainState(**numbers["state"])


def copy_parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _pack(snapshot: Snapshot) -> dict[str, Tensor]:
    groups = {"model": snapshot.model.state_dict(), "best": snapshot.best, "average": snapshot.average}
    packed = {f"{group}/{name}": t.contiguous() for group, tensors in groups.items() for name, t in tensors.items()}
    for index, moments in snapshot.optimizer.state_dict()["state"].items():
        packed |= {f"optimizer/{index}/{name}": t.contiguous() for name, t in moments.items()}
    return packed


def _plain(optimizer_state: dict[str, Any]) -> list[dict[str, Any]]:
    """The optimizer's settings as JSON holds them."""
    groups = optimizer_state["param_groups"]
    return [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in groups]


def _unpack(
    tensors: dict[str, Tensor], groups: list[dict[str, Any]], snapshot: Snapshot
) -> dict[str, dict[str, Tensor]]:
    by_group: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "average": {}, "optimizer": {}, "random": {}}
    for key, tensor in tensors.items():
        group, name = key.split("/", 1)
        by_group[group][name] = tensor
    snapshot.model.load_state_dict(by_group["model"])
    snapshot.best = by_group["best"]
    snapshot.average = by_group["average"]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in by_group["optimizer"].items():
        index, name = key.split("/")
        moments.setdefault(int(index), {})[name] = tensor.cpu() if name == "step" else tensor
    snapshot.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return by_group


def _random_state() -> Tensor:
    """The CPU's generator and, where there is one, the GPU's, one after the other."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


def _set_random_state(states: Tensor) -> None:
    states = states.cpu()
    length = torch.get_rng_state().numel()
    torch.set_rng_state(states[:length])
    if torch.cuda.is_available() and states.numel() > length:
        torch.cuda.set_rng_state(states[length:])
