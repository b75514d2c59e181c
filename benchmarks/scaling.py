"""What more processes cost: CPU per slide at 1, 2 and 4 processes, and memory per process under DDP and ZeRO-3.

Run `python -m benchmarks.scaling [--quick] [--memory] [--json FILE]`.

Cost is user and system time of all processes, reading and exchange included, over an epoch of bags of a thousand tiles
at 20x, in global batches of 32, after a first one that is not counted; each process computes on one thread. Worlds take
turns, so that a busy machine is busy for all, and the cheapest of the repeats is shown; 1 process is the other side,
and the aim is .91 (at most 1.1 times its cost).

`--memory` trains CrossFusion with D = 2048 (348M parameters, f32, AdamW) on 2 processes: the most that a process held
while it trained, and since its start, when the complete model is created before it is split. It needs 14 GB.

With a GPU: one process with NCCL in bf16, the time of a step, its share of what a large matrix product reaches, and the
share of an epoch that the model waited for bags.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.arithmetic import operations
from benchmarks.bags import Slides
from benchmarks.model_step import matrix_peak, peak_memory
from benchmarks.table import Row, options, present
from cfusion.cohort.read import read_cohort
from cfusion.cohort.splits import make_splits
from cfusion.config import Config, load_config
from cfusion.data.shards import open_shards
from cfusion.survival.losses import LOSSES
from cfusion.training.fold_job import FoldJob
from cfusion.training.folds import ReadyFold, ready_fold
from cfusion.training.loop import train_fold
from cfusion.training.optimizers import make_optimizer
from cfusion.training.runtime import Runtime
from cfusion.training.step import Share, Stepper
from cfusion.training.world import join_world
from cfusion.types import Targets
from preprocess.packing import pack_store

WORLDS = (1, 2, 4)
GB = 1e9


class SmallSlides(Slides):
    """Slides of the first `cells` 5x tiles of those of `benchmarks.bags`, so that a CPU gets through them."""

    def __init__(self, count: int, cells: int) -> None:
        super().__init__(count)
        self._cells = {slide: cells + number % 5 for number, slide in enumerate(self._cells)}


def write_run(folder: Path, slides: int, cells: int, **sections: dict[str, Any]) -> Path:
    """Shards, a clinical table and a configuration of one epoch; returns the configuration's path."""
    store = SmallSlides(slides, cells)
    pack_store(store, folder / "shards")
    rng = np.random.default_rng(0)
    table = {"patient": store.slide_ids(), "slide": store.slide_ids()}
    outcomes = {"time": rng.exponential(30, slides).round(1) + 0.1, "event": rng.integers(0, 2, slides)}
    pd.DataFrame(table | outcomes).to_csv(folder / "clinical.csv", index=False)
    values: dict[str, dict[str, Any]] = {
        "cohort": {"table": str(folder / "clinical.csv")},
        "splits": {"folds": 2},
        "data": {"shards": str(folder / "shards")},
        "model": {"embed_dim": 256},
        "train": {"epochs": 1, "patience": None},
        "evaluation": {"protocol": "fixed-epoch"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    path = folder / "run.json"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def world(processes: int, work: str, path: Path, engine: str = "ddp") -> dict[str, float]:
    """Do `work` in a world of processes and return what they measured."""
    out = path.with_name("measured.json")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "benchmarks.scaling", "--child", work, "--engine", engine, "--file", str(path), "--json", str(out),
    ]  # fmt: skip
    # Large tensors then go back to the system when they are freed, so that the kernel's peaks are the program's.
    # One thread for a single process too: Accelerate would give it all that the machine has.
    # Only the rows of a GPU see one: several processes that count CPU time would be refused where there is one GPU.
    environment = {
        **os.environ,
        **({} if work == "gpu" else {"CUDA_VISIBLE_DEVICES": ""}),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
    }
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, env=environment)
    return json.loads(out.read_text())


def child(work: str, config: Config) -> dict[str, float] | None:
    """One process's part; what rank 0 returns is for all of them."""
    torch.set_num_threads(1)
    runtime = join_world(config.parallel)
    cohort = read_cohort(config.cohort)
    split = make_splits(cohort, config.splits, config.evaluation.protocol)[0]
    split = dataclasses.replace(split, train=(*split.train, *split.test))
    dataset = open_shards(config.data)
    with tempfile.TemporaryDirectory() as scratch:
        fold = ready_fold(config, cohort, split, dataset, runtime, folder=Path(scratch), on_epoch=None)
        model, optimizer = runtime.prepare(fold.network, make_optimizer(fold.network, config.train))
        stepper = Stepper(runtime, model, optimizer, LOSSES["nll"], config.train.alpha, config.train.clip_norm)
        measured = {"cost": _cost, "memory": _memory, "gpu": _gpu}[work](runtime, fold, stepper)
    return measured if runtime.is_main else None


def _cost(runtime: Runtime, fold: ReadyFold, stepper: Stepper) -> dict[str, float]:
    """CPU-seconds per slide of the second epoch, over all processes."""
    train_fold(runtime, fold.job, fold.network, stepper)
    before = time.process_time()
    train_fold(runtime, _restarted(fold.job), fold.network, stepper)
    (taken,) = runtime.sum([time.process_time() - before])
    return {"seconds": taken / len(fold.job.train.bags)}


def _memory(runtime: Runtime, fold: ReadyFold, stepper: Stepper) -> dict[str, float]:
    """GB that the process with the most of it held: since its start, and from its second step on."""
    share = _share(runtime, fold)
    stepper.step([share], cases=runtime.world_size, lr=1e-4)
    complete = peak_memory(runtime.device.type)
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's peak restarts
    for _ in range(2):
        stepper.step([share], cases=runtime.world_size, lr=1e-4)
    trained = peak_memory(runtime.device.type)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in fold.network.parameters())
    return {
        "start": max(runtime.gather([max(complete, trained)])),
        "train": max(runtime.gather([trained])),
        "parameters": float(parameters),
    }


def _gpu(runtime: Runtime, fold: ReadyFold, stepper: Stepper) -> dict[str, float]:
    """Seconds of a bag's step with the bag at hand and over an epoch, and the arithmetic's share of the peak."""
    train_fold(runtime, fold.job, fold.network, stepper)
    torch.cuda.synchronize()
    start = time.perf_counter()
    train_fold(runtime, _restarted(fold.job), fold.network, stepper)
    torch.cuda.synchronize()
    read = (time.perf_counter() - start) / len(fold.job.train.bags)
    share = _share(runtime, fold)
    needed = operations(lambda: stepper.step([share], cases=1, lr=1e-4))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        stepper.step([share], cases=1, lr=1e-4)
    torch.cuda.synchronize()
    held = (time.perf_counter() - start) / 20
    return {"read": read, "held": held, "mfu": needed / held / matrix_peak("cuda")}


def _restarted(job: FoldJob) -> FoldJob:
    """The training from its start, whatever checkpoints the first has left."""
    return dataclasses.replace(job, folder=job.folder / "restarted")


def _share(runtime: Runtime, fold: ReadyFold) -> Share:
    bags = fold.job.train
    batch = next(iter(bags.loader.stream([[0]], epoch=0, training=True)))
    targets = Targets(torch.tensor([1]), torch.tensor([True]), torch.tensor([12.0])).to(runtime.device)
    return Share(batch, targets, torch.ones(1, dtype=runtime.dtype, device=runtime.device), seed=0)


def cost_rows(folder: Path, slides: int, cells: int, repeats: int) -> list[Row]:
    """CPU-seconds per slide, 1 process being the other side."""
    path = write_run(folder, slides, cells)
    found: dict[int, list[float]] = {n: [] for n in WORLDS}
    for n in WORLDS * repeats:
        found[n].append(world(n, "cost", path)["seconds"])
    best = {n: min(taken) for n, taken in found.items()}
    return [
        Row(f"{n} processes: CPU per slide, against 1", best[n], best[1], "s", better="lower") for n in WORLDS if n > 1
    ]


def memory_rows(folder: Path, width: int) -> list[Row]:
    """Most memory of a process under ZeRO-3, DDP being the other side."""
    path = write_run(folder, 8, 4, model={"embed_dim": width}, parallel={"global_batch": 2})
    ours, theirs = (world(2, "memory", path, engine) for engine in ("zero3", "ddp"))
    what = f"{ours['parameters'] / 1e6:.0f}M parameters on 2 processes, ZeRO-3 against DDP"
    return [
        Row(f"{what}: most memory of a process in training", ours["train"], theirs["train"], "GB", better="lower"),
        Row(f"{what}: since its start", ours["start"], theirs["start"], "GB", better="lower"),
    ]


def gpu_rows(folder: Path) -> list[Row]:
    """One process with NCCL in bf16 on bags of 12 thousand tiles."""
    path = write_run(folder, 48, 768, model={"embed_dim": 512}, parallel={"global_batch": 1, "precision": "bf16"})
    found = world(1, "gpu", path)
    return [
        Row("NCCL, 1 GPU, bf16: a bag's step with the bag at hand", found["held"], None, "s", better="lower"),
        Row("NCCL, 1 GPU, bf16: arithmetic, of a large matrix product's", found["mfu"], 1.0, ""),
        Row("NCCL, 1 GPU, bf16: share of an epoch that waits for bags", 1 - found["held"] / found["read"], None, ""),
    ]


def main() -> None:
    """Measure, print, and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--memory", action="store_true", help="also ZeRO-3 against DDP on 348M parameters; 14 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=("cost", "memory", "gpu"), help=argparse.SUPPRESS)
    parser.add_argument("--engine", default="ddp", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        measured = child(chosen.child, load_config(chosen.file, [f"parallel.engine={chosen.engine}"]))
        if measured is not None:
            chosen.json.write_text(json.dumps(measured))
        return
    slides, cells, repeats = (16, 4, 1) if chosen.quick else (64, 64, chosen.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = cost_rows(folder / "cost", slides, cells, repeats)
        if chosen.memory or chosen.quick:
            rows += memory_rows(folder / "memory", 64 if chosen.quick else 2048)
        if torch.cuda.is_available():
            rows += gpu_rows(folder / "gpu")
    present("One training run on more processes", rows, chosen.json)


if __name__ == "__main__":
    main()
