"""Complete cross-validations from the command line to the last file, each side as a process.

    python -m benchmarks.crossval_commands [--quick] [--json FILE] [--cases NAME …] [--repeats N]

Two cohorts of made-up embeddings: A has small bags (128 tiles at 20x, 160 patients, embeddings of 192 channels, models
of width 128), B middle-sized ones (512 tiles, 40 patients, 1024 channels, width 512). Five folds, three magnifications.

- theirs: the published recipe, f32 `.pt` files, one fold after the other. With the environment variable `PUBLISHED`,
  the folder of the authors' `train.py` (changed to run on a CPU), it is the authors' program, and a row shows how far
  the time of this project's transcription lies from it. Without it, theirs is the transcription
  (`benchmarks.published_training`). Each row names its rival;
- ours: `cfusion train` with its defaults, and with the settings of the published program.

The sides take turns; each figure is the median over the repeats. Wall time, CPU time of all processes, and the largest
sum of their proportional memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
import yaml
from torch import Tensor

from benchmarks.crossval_files import Files, Size
from benchmarks.published_model import PublishedAMIL, PublishedCrossFusion
from benchmarks.published_training import BINS, theirs
from benchmarks.table import Row, options, present
from cfusion.cohort.read import read_cohort
from cfusion.config import CohortConfig
from cfusion.types import SlideFeatures
from preprocess.packing import pack_store

ROOT = Path(__file__).parents[1]
FOLDS = 5
NAMES = ("x20", "x10", "x5")
PROGRAM = {"crossfusion": "CrossFusion", "amil": "AMIL"}
"""What the authors' program calls the models."""


@dataclass(frozen=True)
class Study:
    """A cohort, a model and the number of epochs.

    Attributes:
        patients: Number of patients, one slide each.
        cells: Median number of tiles at 5x; 16 times as many at 20x.
        spread: Standard deviation of the logarithm of that number.
        channels: Width of the embeddings.
        width: Width of the model.
        model: Name of the model in this program.
        epochs: Number of epochs of each fold.
    """

    patients: int
    cells: int
    spread: float
    channels: int
    width: int
    model: str
    epochs: int


STUDIES = {
    "A crossfusion": Study(160, 8, 0.6, 192, 128, "crossfusion", 3),
    "B crossfusion": Study(40, 32, 0.5, 1024, 512, "crossfusion", 2),
    "B amil": Study(40, 32, 0.5, 1024, 512, "amil", 6),
}
QUICK = Study(60, 2, 0.3, 16, 16, "amil", 2)


class ProgramFiles(Files):
    """A cohort whose `.pt` files lie where the authors' program looks for them."""

    def pt(self, slide_id: str) -> list[Path]:
        """The files of a slide."""
        return [self.folder / "pt" / "made" / name / "pt_files" / f"{slide_id}.pt" for name in self.names]


class Drawn:
    """Made-up slides behind the interface of a feature store."""

    def __init__(self, study: Study) -> None:
        self._channels = study.channels
        draws = np.random.default_rng(0).lognormal(math.log(study.cells), study.spread, study.patients)
        self._cells = {f"P{i:03d}_s1": max(2, int(n)) for i, n in enumerate(draws)}

    def slide_ids(self) -> list[str]:
        """All slides."""
        return list(self._cells)

    def attrs(self, slide_id: str) -> dict[str, Any]:
        """Provenance."""
        return {"encoder": "made-up", "tile_px_level0": {"x20": 256, "x10": 512, "x5": 1024}}

    def read(self, slide_id: str) -> SlideFeatures:
        """One slide, without coordinates."""
        cells, rng = self._cells[slide_id], np.random.default_rng(int(slide_id[1:4]))
        features = {
            name: rng.standard_normal((cells * share, self._channels), dtype=np.float32).astype(np.float16)
            for name, share in (("x20", 16), ("x10", 4), ("x5", 1))
        }
        return SlideFeatures(slide_id, features, {}, {}, self.attrs(slide_id))


def make_study(folder: Path, study: Study) -> None:
    """Write the cohort for both sides: tables and folds as the authors' program reads them, `.pt` files, shards."""
    slides, rng = Drawn(study), np.random.default_rng(2)
    death, censoring = rng.exponential(30, study.patients), rng.exponential(50, study.patients)
    table = pd.DataFrame({
        "case_id": [f"P{i:03d}" for i in range(study.patients)],
        "slide_id": [f"{slide}.svs" for slide in slides.slide_ids()],
        "censorship": (censoring < death).astype(int),
        "survival_months": np.round(np.minimum(death, censoring) + 0.03, 2),
    })  # fmt: skip
    table["survival_days"] = (table["survival_months"] * 30.4).round() + 1
    folder.mkdir(parents=True)
    table.to_csv(folder / "clinical.csv")
    manifest = {"id": range(study.patients), "filename": table["slide_id"], "md5": "x", "size": 1, "state": "ok"}
    pd.DataFrame(manifest).to_csv(folder / "manifest.tsv", sep="\t", index=False)
    (folder / "splits").mkdir()
    # The authors' program ends where a training side lacks a time bin with or without the event.
    order = table.sort_values(["censorship", "survival_months"], kind="stable")["case_id"].tolist()
    for fold in range(FOLDS):
        held_out = order[fold::FOLDS]
        train = [case for case in order if case not in held_out]
        pd.DataFrame({"train": pd.Series(train), "val": pd.Series(held_out)}).to_csv(
            folder / "splits" / f"splits_{fold}.csv"
        )
    files = opened(folder)
    for path in {path.parent for path in files.pt("any")}:
        path.mkdir(parents=True)
    for slide_id in slides.slide_ids():
        features = slides.read(slide_id).features
        for name, path in zip(NAMES, files.pt(slide_id), strict=True):
            torch.save(torch.from_numpy(features[name].astype(np.float32)), path)
    pack_store(slides, folder / "shards")


def opened(folder: Path) -> ProgramFiles:
    """The cohort in a folder."""
    cohort = read_cohort(CohortConfig(name="made", table=folder / "clinical.csv"))
    splits = [pd.read_csv(folder / "splits" / f"splits_{fold}.csv") for fold in range(FOLDS)]
    folds = [(split["train"].dropna().tolist(), split["val"].dropna().tolist()) for split in splits]
    return ProgramFiles(folder, cohort, folds, NAMES)


def our_command(folder: Path, study: Study, output: Path, *, as_published: bool) -> list[str]:
    """The command of this program with its defaults, or with the settings of the published program."""
    config: dict[str, Any] = {
        "cohort": {"name": "made", "table": str(folder / "clinical.csv")},
        "splits": {"directory": str(folder / "splits")},
        "data": {"shards": str(folder / "shards")},
        "model": {"name": study.model, "embed_dim": study.width},
        "train": {"epochs": study.epochs},
        "evaluation": {"protocol": "published"},
        "output": str(output),
    }
    if as_published:
        config["data"] |= {"unit": "slide", "order_seed": 7}
        config["model"] |= {"num_heads": 4, "num_layers": 1}
        config["model"] |= {"options": {"published": True}} if study.model == "crossfusion" else {}
        config["train"] |= {
            "patience": 20, "min_epoch": 0, "optimizer": "adam", "lr": 1e-4, "weight_decay": 4e-6,
            "schedule": "published", "warmup_fraction": 0.0, "clip_norm": None, "ema": None,
            "loss": "nll", "alpha": 0.2, "sampling": "weighted",
            "micro_batch": 1,
        }  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "cfusion", "train", str(path)]


def program_command(folder: Path, study: Study, output: Path) -> list[str]:
    """The command of the authors' program with the settings of its script."""
    settings = {
        "csv-path": folder / "manifest.tsv", "clinical-path": folder / "clinical.csv", "img-dir": "x",
        "save-dir": output, "model-name": PROGRAM[study.model], "data-workers": 2, "prefetch-factor": 3,
        "grad-accum-steps": 32, "preload": 0, "num-folds": FOLDS, "splits-path": folder / "splits", "batch-size": 1,
        "random-seed": 7, "num-epochs": study.epochs, "continue-training": 0, "es-patience": 20,
        "learning-rate": 1e-4, "weight-decay": 4e-6, "loss-fn": "nll_surv", "embed-dim": study.width, "num-heads": 4,
        "num-attn-layers": 1, "pt-dir": folder / "pt", "backbone": "made", "lr-decay": 0.5, "alpha-surv": 0.2,
        "backbone-dim": study.channels, "dataset-name": "MADE", "warmup-epochs": 0, "bfloat16": 1,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "train.py", *words, "--magnifications", "5", "10", "20"]


def transcription_command(folder: Path, study: Study) -> list[str]:
    """The command that runs this project's transcription of the published training."""
    return [sys.executable, "-m", "benchmarks.crossval_commands", "--transcribed", str(folder), json.dumps(vars(study))]


class Finest(PublishedAMIL):
    """Gated attention that is given all magnifications and reads the finest, as in the authors' program."""

    def forward(self, *bags: Tensor) -> Tensor:
        """As `PublishedAMIL`."""
        return super().forward(bags[-1])


def transcribed(folder: Path, study: Study) -> None:
    """Train as published, in this process."""
    build: Callable[[], torch.nn.Module] = {
        "crossfusion": lambda: PublishedCrossFusion(study.channels, BINS, study.width, 4, 1),
        "amil": lambda: Finest(study.channels, BINS, study.width),
    }[study.model]
    size = Size(study.patients, 16 * study.cells, study.epochs)
    theirs(opened(folder), build, size, cold=False, device="cpu")


@dataclass(frozen=True)
class Cost:
    """Wall seconds, CPU seconds and largest memory in GB of a command, with all processes it started."""

    wall: float
    cpu: float
    memory: float


def cost_of(command: Sequence[str], folder: Path) -> Cost:
    """Run a command in a folder and measure it.

    Raises:
        RuntimeError: The command failed; its last lines are in the message.
    """
    with tempfile.TemporaryFile("w+") as log:
        before, started, largest = os.times(), time.perf_counter(), 0
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            largest = max(largest, _memory(process.pid))
            time.sleep(0.5)
        wall, after = time.perf_counter() - started, os.times()
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command[:4])} ended with {process.returncode}: {log.read()[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(wall, cpu, largest / 1e9)


def _memory(pid: int) -> int:
    """Proportional memory of a process and its descendants in bytes.

    From the kernel's own sums, because adding up each mapping here takes a tenth of a core from what is measured.
    """
    try:
        process = psutil.Process(pid)
        parts = [process, *process.children(recursive=True)]
        rollups = [Path(f"/proc/{part.pid}/smaps_rollup").read_text(encoding="ascii") for part in parts]
    except (psutil.Error, OSError):
        return 0
    return sum(1024 * int(line.split()[1]) for text in rollups for line in text.splitlines() if line[:4] == "Pss:")


def medians(costs: Sequence[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(*(statistics.median(getattr(cost, name) for cost in costs) for name in ("wall", "cpu", "memory")))


def compare(name: str, study: Study, repeats: int, scratch: Path) -> list[Row]:
    """The rows of one study."""
    folder, published = scratch / "files", os.environ.get("PUBLISHED")
    make_study(folder, study)
    found: dict[str, list[Cost]] = {}
    for repeat in range(repeats):
        sides = {
            "defaults": (our_command(folder, study, scratch / f"default_{repeat}", as_published=False), ROOT),
            "its settings": (our_command(folder, study, scratch / f"published_{repeat}", as_published=True), ROOT),
            "transcription": (transcription_command(folder, study), ROOT),
        }
        if published:
            sides["program"] = (program_command(folder, study, scratch / f"program_{repeat}"), Path(published))
        for side, (command, place) in sides.items():
            found.setdefault(side, []).append(cost_of(command, place))
            print(f"{name}, {side}, {repeat + 1} of {repeats}: {found[side][-1]}", flush=True)
    costs = {side: medians(measured) for side, measured in found.items()}
    rival = "program" if published else "transcription"
    rows = []
    for side in ("defaults", "its settings"):
        ours, other = costs[side], costs[rival]
        rows += [
            Row(f"{name}, {side}, against the {rival}: wall", ours.wall, other.wall, "s", "lower"),
            Row(f"{name}, {side}, against the {rival}: CPU time", ours.cpu, other.cpu, "s", "lower"),
            Row(f"{name}, {side}, against the {rival}: memory", ours.memory, other.memory, "GB", "lower"),
        ]
    if published:
        ours, other = costs["transcription"], costs["program"]
        rows.append(Row(f"{name}, transcription against the program: wall", ours.wall, other.wall, "s", "lower"))
    return rows


def main() -> None:
    """Measure, print, and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=sorted(STUDIES), default=sorted(STUDIES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; default: the system's")
    parser.add_argument("--transcribed", nargs=2, metavar=("FOLDER", "STUDY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transcribed:
        transcribed(Path(arguments.transcribed[0]), Study(**json.loads(arguments.transcribed[1])))
        return
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    studies = {"quick": QUICK} if arguments.quick else {name: STUDIES[name] for name in arguments.cases}
    rows = []
    for name, study in studies.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            rows += compare(name, study, 1 if arguments.quick else arguments.repeats, Path(scratch))
    present(f"Complete runs, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}", rows, arguments.json)


if __name__ == "__main__":
    main()
