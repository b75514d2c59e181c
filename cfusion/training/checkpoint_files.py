"""A checkpoint on disk: a folder with one safetensors file per process and a JSON file, written atomically.

A file holds complete tensors, or slices of flattened tensors where several processes share one. Its header says which,
so any number of processes can read a checkpoint written by any other number.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cfusion.errors import CheckpointError
from cfusion.files import digest_file, digest_json, put_in_place, read_json, write_json
from cfusion.training.runtime import Runtime

NUMBERS = "state.json"


@dataclass(frozen=True)
class Piece:
    """Elements `start`, `start` + 1, … of the flattened values of a tensor of `shape`, or the complete tensor."""

    shape: torch.Size
    start: int
    values: Tensor


class CheckpointWriting:
    """Writes a folder together: each process its pieces, and rank 0 the numbers.

    An existing folder of that name is replaced. Every process must create one and call `finish`.

    Args:
        runtime: The processes.
        folder: Folder of the checkpoint.
        pieces: What this process writes.
        numbers: What rank 0 writes.
        then: Called on every process when everything was written.
    """

    def __init__(
        self,
        runtime: Runtime,
        folder: Path,
        pieces: Mapping[str, Piece],
        numbers: Mapping[str, Any],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self._runtime, self._folder, self._pieces, self._numbers, self._then = runtime, folder, pieces, numbers, then
        self._temporary = runtime.from_main(folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"))
        self._name = f"rank_{runtime.rank:05d}.safetensors"
        self._digest, self._problem = "", ""

    def copy_pieces(self) -> None:
        """Copy the values that are to be written, so that training may change them."""
        self._pieces = {
            key: replace(piece, values=piece.values.detach().to("cpu", copy=True))
            for key, piece in self._pieces.items()
        }

    def write_pieces(self) -> None:
        """Write this process's pieces to a temporary folder; needs no other process."""
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            self._digest = _write_tensors(self._temporary / self._name, self._pieces)
        except (OSError, SafetensorError) as error:
            self._problem = _reason(error)

    def finish(self) -> str | None:
        """Put the folder in place once all processes have written their pieces.

        Returns:
            None if everything was written; else the problem, the same on every process, and the folder is removed.
        """
        written = self._runtime.gather([(self._name, self._digest, self._problem)])
        problem = next((failed for _, _, failed in written if failed), "")
        if self._runtime.is_main:
            try:
                if not problem:
                    digests = {file: written_digest for file, written_digest, _ in written}
                    numbers = {**self._numbers, "files": digests}
                    write_json(self._temporary / NUMBERS, {**numbers, "digest": digest_json(numbers)})
                    put_in_place(self._temporary, self._folder)
            except OSError as error:
                problem = _reason(error)
        self.discard()
        problem = self._runtime.from_main(problem)
        if not problem:
            self._then()
        return problem or None

    def discard(self) -> None:
        """Remove what was written and is not in place."""
        if self._runtime.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)


def _write_tensors(path: Path, pieces: Mapping[str, Piece]) -> str:
    layout = {key: [piece.start, list(piece.shape)] for key, piece in pieces.items()}
    save_file(
        {key: piece.values.detach().cpu().contiguous() for key, piece in pieces.items()},
        path,
        {"pieces": json.dumps(layout)},
    )
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return digest_file(path)


@dataclass(frozen=True)
class Stored:
    """An open checkpoint.

    Attributes:
        folder: Folder of the checkpoint.
        numbers: Contents of its JSON file.
        shapes: Shape of each tensor in it, assembled from its pieces.
    """

    folder: Path
    numbers: dict[str, Any]
    shapes: dict[str, torch.Size]
    _places: dict[str, list[tuple[Any, int]]]

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Read elements `start` to `start + count` of the flattened values of a tensor, on the CPU.

        Raises:
            CheckpointError: Some of them are not in any file.
        """
        found: list[Tensor] = []
        at = start
        for file, begin in sorted(self._places.get(key, []), key=lambda place: place[1]):
            part = file.get_slice(key)
            shape = part.get_shape()
            end = begin + (torch.Size(shape).numel())
            if begin <= at < min(end, start + count):
                stop = min(end, start + count)
                values = part[at - begin : stop - begin] if len(shape) == 1 else None
                found.append(file.get_tensor(key).flatten()[at - begin : stop - begin] if values is None else values)
                at = stop
        if at != start + count:
            raise CheckpointError(f"{self.folder}: elements {at} to {start + count} of {key} are missing.")
        return torch.cat(found) if found else torch.empty(0)

    def complete(self, key: str) -> Tensor:
        """Read a complete tensor in its shape."""
        shape = self.shapes[key]
        return self.read(key, 0, shape.numel()).view(shape)


@contextlib.contextmanager
def open_checkpoint(folder: Path, *, turn: int = 0, turns: int = 1) -> Iterator[Stored]:
    """Open a checkpoint and check the JSON file, and the digests of the files assigned to this process.

    Args:
        folder: Folder written by `CheckpointWriting`.
        turn: Number of this process.
        turns: Number of processes that share the checking.

    Raises:
        CheckpointError: Something is missing, or differs from what was written.
    """
    numbers = read_json(folder / NUMBERS)
    if not isinstance(numbers, dict) or numbers.pop("digest", None) != digest_json(numbers):
        raise CheckpointError(f"{folder / NUMBERS}: is damaged.")
    shapes: dict[str, torch.Size] = {}
    places: dict[str, list[tuple[Any, int]]] = {}
    with contextlib.ExitStack() as stack:
        for number, (name, digest) in enumerate(sorted(numbers["files"].items())):
            path = folder / Path(name).name
            try:
                if number % turns == turn and digest_file(path) != digest:
                    raise CheckpointError(f"{path}: is damaged (its SHA-256 differs from the recorded one).")
                file = stack.enter_context(safe_open(path, framework="pt"))
                layout = json.loads(file.metadata()["pieces"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: cannot be read ({_reason(error)}).") from error
            for key, (start, shape) in layout.items():
                shapes[key] = torch.Size(shape)
                places.setdefault(key, []).append((file, start))
        yield Stored(folder, numbers, shapes, places)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
