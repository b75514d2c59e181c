"""The tensors of a training run that a process keeps, and their pieces in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cfusion.errors import CheckpointError
from cfusion.training.checkpoint_files import Piece, Stored
from cfusion.training.runtime import Part


class OtherTrainingError(CheckpointError):
    """A complete checkpoint of another training run; older ones would not match either."""


@dataclass
class Snapshot:
    """The part of a training state's tensors that this process keeps.

    Attributes:
        parts: The parameters and their moments, see `Runtime.parts`.
        best: Parameters of the best epoch; empty before the first.
        average: Moving average of the parameters; empty if it is off.
        carried: Gradient that waits for the next step, by parameter (`train.published_errors`); empty if none does.
    """

    parts: dict[str, Part]
    best: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> dict[str, Tensor]:
        """Return a copy of the parameters."""
        return {name: part.values.clone() for name, part in self.parts.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters' values; call `Runtime.publish` to make the model use them."""
        for name, part in self.parts.items():
            part.values.copy_(values[name])

    @torch.no_grad()
    def move_average(self, decay: float | None) -> None:
        """Move the average towards the parameters; do nothing if there is none (`decay` None)."""
        if decay is None:
            return
        for name, part in self.parts.items():
            self.average[name].lerp_(part.values, 1 - decay)

    def pieces(self) -> dict[str, Piece]:
        """Return what this process writes to a checkpoint: parameters, average, moments and a carried gradient."""
        groups = {"model": {name: part.values for name, part in self.parts.items()}, "average": self.average}
        pieces = {
            f"{group}/{name}": Piece(part.shape, part.start, values[name])
            for group, values in groups.items()
            for name, part in self._written().items()
            if values
        }
        for name, part in self._written().items():
            if name in self.carried:
                pieces[f"gradient/{name}"] = Piece(part.shape, part.start, self.carried[name])
            for moment, values in part.moments.items():
                if values.ndim:
                    pieces[f"{moment}/{name}"] = Piece(part.shape, part.start, values)
                elif part.start == 0:
                    # All slices of a parameter share it, so the first one writes it.
                    pieces[f"{moment}/{name}"] = Piece(values.shape, 0, values.clone())
        return pieces

    def best_pieces(self) -> dict[str, Piece]:
        """Return what this process writes of the best parameters."""
        return {
            f"model/{name}": Piece(part.shape, part.start, self.best[name]) for name, part in self._written().items()
        }

    def _written(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if part.writes and part.values.numel()}

    @torch.no_grad()
    def fill(self, stored: Stored, best: Stored | None) -> None:
        """Read all tensors from a checkpoint, and the best parameters from theirs if there is one.

        Raises:
            OtherTrainingError: The checkpoint holds another model.
            CheckpointError: Something is missing in it.
        """
        self._check_model(stored)
        for name, part in self.parts.items():
            part.values.copy_(_read(stored, "model", name, part))
            for moment, values in part.moments.items():
                if values.ndim:
                    values.copy_(_read(stored, moment, name, part))
                elif part.values.numel():
                    values.copy_(stored.complete(f"{moment}/{name}"))
        if self.average:
            self.average = {name: _read(stored, "average", name, part) for name, part in self.parts.items()}
        self.carried = {
            name: _read(stored, "gradient", name, part)
            for name, part in self.parts.items()
            if f"gradient/{name}" in stored.shapes
        }
        if best is not None:
            self.best = {name: _read(best, "model", name, part) for name, part in self.parts.items()}

    def _check_model(self, stored: Stored) -> None:
        there = {key.removeprefix("model/"): shape for key, shape in stored.shapes.items() if key.startswith("model/")}
        for name in sorted(there.keys() | self.parts.keys()):
            here = self.parts[name].shape if name in self.parts else None
            if there.get(name) != here:
                raise OtherTrainingError(
                    f"{stored.folder}: holds another model: {name} is {_shape_text(there.get(name))} there and "
                    f"{_shape_text(here)} here."
                )


def _read(stored: Stored, group: str, name: str, part: Part) -> Tensor:
    values = stored.read(f"{group}/{name}", part.start, part.values.numel())
    return values.to(part.values.device, part.values.dtype).view(part.values.shape)


def _shape_text(shape: torch.Size | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
