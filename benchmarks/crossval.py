"""A 5-fold cross-validation: five published runs one after the other against all folds together.

    python -m benchmarks.crossval [--quick] [--json FILE]

Patients, slides, outcomes and folds are those of TCGA-BLCA; the embeddings (d = 1024) and the numbers of tiles
(log-normal) are drawn, smaller than real ones so that a CPU gets through, at the sizes given in the title.

- theirs: five trainings in turn, three f32 `.pt` files a slide read by a DataLoader, the published model and recipe:
  one slide a step of 32, Adam, weighted sampling, attention dropout that stays on in the validation of every epoch;
- ours: `cfusion train` with `train.folds=together`, the default recipe and tracking on: f16 shards, scores, figures and
  MLflow included. Both choose on the outer fold (the published protocol), so that they see the same patients.

Whether the folds are worth stacking into one product is measured as well: the program takes what is faster.

Warm: all files in the page cache. Cold: dropped from it before every epoch of either side.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.bags import drop_from_page_cache
from benchmarks.crossval_files import COHORT, DIM, NAMES, Files, Size, make_files
from benchmarks.published_model import PublishedAMIL, PublishedCrossFusion
from benchmarks.published_training import BINS, Spent, measured, theirs
from benchmarks.table import Row, options, present
from cfusion.config import Config, validate
from cfusion.data import batches, loader
from cfusion.data.batches import RawBatch
from cfusion.models import build_model, linear
from cfusion.runs.crossval import cross_validate
from cfusion.tracking import TrackedRun
from cfusion.training.group.group import Group

USUAL = {"amil": Size(None, 2048, 4), "crossfusion": Size(None, 512, 3)}


def ours(
    files: Files, model: str, size: Size, output: Path, *, cold: bool, device: str, published: bool = False,
    tracked: bool = True,
) -> Spent:  # fmt: skip
    """All folds together; see the module."""
    config = validate(
        Config,
        {
            "cohort": {"name": COHORT, "table": str(files.folder / "table.csv")},
            "splits": {"directory": str(files.folder / "splits")},
            "data": {
                "shards": str(files.folder / "shards"),
                "magnifications": [float(name[1:]) for name in files.names],
            },
            "model": {"name": model, "options": {"published": True} if published else {}},
            "train": {"folds": "together", "epochs": size.epochs, "patience": None},
            "parallel": {"precision": "bf16" if device == "cuda" else "f32"},
            "evaluation": {"protocol": "published"},
            "tracking": {"enabled": tracked},
            "output": str(output / "run"),
        },
        "benchmark",
    )
    spent = Spent()
    with _counted(spent, files if cold else None), measured(spent):
        cross_validate(config)
    return spent


@contextlib.contextmanager
def _counted(spent: Spent, forgets: Files | None) -> Iterator[None]:
    """Count what our side reads, how long each pass takes, and the time that training spends in calls of tracking."""
    read_batch, one_pass = batches.read_batch, Group._pass
    calls = {name: getattr(TrackedRun, name) for name in ("child", "log", "inputs", "artifacts", "close")}
    begin = TrackedRun.begin

    def reading(*arguments: Any) -> RawBatch:
        batch = read_batch(*arguments)
        spent.read += sum(tensor.nbytes for tensor in batch.features.values())
        return batch

    def passing(self: Group, *arguments: Any) -> None:
        if forgets is not None:
            drop_from_page_cache(forgets.tars)
        started = time.perf_counter()
        one_pass(self, *arguments)
        spent.epochs.append(time.perf_counter() - started)

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                spent.tracking += time.perf_counter() - started

        return wrapped

    replaced: list[tuple[Any, str, Any, Any]] = [
        (loader, "read_batch", reading, read_batch),
        (Group, "_pass", passing, one_pass),
        (TrackedRun, "begin", timed(begin), begin),
        *((TrackedRun, name, timed(call), call) for name, call in calls.items()),
    ]
    for owner, name, new, _ in replaced:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, _, old in replaced:
            setattr(owner, name, old)


def rows_of(case: str, left: Spent, right: Spent, epochs: int) -> list[Row]:
    """The rows of one comparison; `left` is ours."""
    return [
        Row(f"{case}: wall", left.wall, right.wall, "s", "lower"),
        Row(f"{case}: CPU time", left.cpu, right.cpu, "s", "lower"),
        Row(f"{case}: an epoch", float(np.mean(left.epochs[1:epochs] or left.epochs[:1])), float(np.mean(right.epochs)),
            "s", "lower"),
        Row(f"{case}: read", left.read / 1e9, right.read / 1e9, "GB", "lower"),
        Row(f"{case}: share of tracking", 100 * left.tracking / left.wall, None, "%", "lower"),
    ]  # fmt: skip


def compare(model: str, size: Size, arguments: argparse.Namespace) -> list[Row]:
    """All rows of one model."""
    device = arguments.device
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        files = make_files(folder / "files", size, NAMES[model])
        build = {
            "crossfusion": lambda: PublishedCrossFusion(DIM, BINS, 512, 4, 1),
            "amil": lambda: PublishedAMIL(DIM, BINS),
        }[model]
        drop_from_page_cache([])
        for state in ("warm", "cold") if model == "amil" else ("warm",):
            cold = state == "cold"
            left = ours(files, model, size, folder / state, cold=cold, device=device)
            right = theirs(files, build, size, cold=cold, device=device)
            rows += rows_of(f"{model}, {state}", left, right, size.epochs)
        if model == "crossfusion":
            left = ours(files, model, size, folder / "dropouts", cold=False, device=device, published=True)
            rows += rows_of(f"{model}, published dropouts, warm", left, right, size.epochs)
    return rows


def stacked(tiles: int, repeats: int) -> list[Row]:
    """Five gated-attention models on one bag, in turn as the program does it, against one product for all five."""
    models = [build_model("amil", backbone_dim=DIM, n_bins=BINS) for _ in range(5)]
    bag = torch.randn(1, tiles, DIM)
    parameters, _ = torch.func.stack_module_state(models)

    def loss(one: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (one,), (bag,)).logits.sum()

    gradient = torch.func.vmap(torch.func.grad(loss))

    def together() -> None:
        with mock.patch.object(linear, "onednn_is_faster", return_value=False):  # vmap has no rule for it
            gradient(parameters)

    wide = torch.randn(5 * 512, DIM, requires_grad=True)

    def in_turn() -> None:
        for model in models:
            model(bag).logits.sum().backward()

    def projections() -> None:
        for part in wide.chunk(5):
            nn.functional.linear(bag, part).sum().backward()

    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "complete model, five in turn, against torch.func.vmap": (in_turn, together),
        "first projection, five in turn, against one wide product": (
            projections,
            lambda: nn.functional.linear(bag, wide).sum().backward(),
        ),
    }
    return [
        Row(f"{name}, {tiles} tiles", _fastest(left, repeats), _fastest(right, repeats), "s", "lower")
        for name, (left, right) in sides.items()
    ]


def _fastest(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def main() -> None:
    """Measure, print, and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(NAMES), default=sorted(NAMES))
    parser.add_argument("--patients", type=int, help="number of patients, from all folds; default: all")
    parser.add_argument("--tiles", type=int, help="median number at 20x")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; default: the system's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    rows = []
    for model in arguments.models:
        usual = Size(30, 64, 2) if arguments.quick else USUAL[model]
        size = Size(
            arguments.patients or usual.patients, arguments.tiles or usual.tiles, arguments.epochs or usual.epochs
        )
        found = compare(model, size, arguments)
        rows += found
        people = "all patients" if size.patients is None else f"{size.patients} patients"
        title = (
            f"{COHORT}, {people}, {size.tiles} tiles at 20x (median), {size.epochs} epochs, {arguments.threads} threads"
        )
        present(f"{model}: {title}, load {os.getloadavg()[0]:.0f}", found, None)
    rows += stacked(256 if arguments.quick else 2048, 2 if arguments.quick else 8)
    present("All rows", rows, arguments.json)


if __name__ == "__main__":
    main()
