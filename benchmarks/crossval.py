"""A 5-fold cross-validation: five published runs one after the other against all folds together.

    python -m benchmarks.crossval [--quick] [--json FILE] [--shared ../shared]

Patients, slides, outcomes and folds are those of TCGA-BLCA; the embeddings (d = 1024) and the numbers of tiles
(log-normal) are drawn, smaller than real ones so that a CPU gets through, at the sizes the title tells.

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
import dataclasses
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from benchmarks.bags import drop_from_page_cache
from benchmarks.published_model import Attention, PublishedAMIL, PublishedCrossFusion
from benchmarks.table import Row, options, present
from cfusion.cohort import read_cohort
from cfusion.config import CohortConfig, Config, validate
from cfusion.crossval import cross_validate
from cfusion.data.shards import ShardDataset
from cfusion.models import build_model
from cfusion.survival.bins import TimeBins
from cfusion.survival.losses import nll
from cfusion.survival.metrics import concordance
from cfusion.tracking import TrackedRun
from cfusion.training.group import Group
from cfusion.types import Cohort, SlideFeatures, SurvivalOutput, Targets
from preprocess.packing import pack_store

COHORT = "tcga_blca"
DIM, BINS, ACCUMULATE, WORKERS = 1024, 4, 32, 4
NAMES = {"crossfusion": ("x20", "x10", "x5"), "amil": ("x20",)}


@dataclass(frozen=True)
class Size:
    """How much of it: patients (none: all), median number of tiles at 20x, epochs."""

    patients: int | None
    tiles: int
    epochs: int


USUAL = {"amil": Size(None, 2048, 4), "crossfusion": Size(None, 512, 3)}


@dataclass
class Spent:
    """What a side took: wall and CPU seconds, seconds of each epoch over all folds, bytes read, seconds of tracking."""

    wall: float = 0.0
    cpu: float = 0.0
    epochs: list[float] = dataclasses.field(default_factory=list)
    read: int = 0
    tracking: float = 0.0


class Slides:
    """Made-up slides of log-normal size behind the interface of a feature store."""

    def __init__(self, slide_ids: Sequence[str], median: int) -> None:
        draws = np.random.default_rng(0).lognormal(math.log(max(1, median // 16)), 0.6, len(slide_ids))
        self._cells = dict(zip(slide_ids, np.maximum(1, draws).astype(int).tolist(), strict=True))
        self._block = np.random.default_rng(1).standard_normal((1009, DIM), dtype=np.float32).astype(np.float16)

    def slide_ids(self) -> list[str]:
        """All slides."""
        return list(self._cells)

    def attrs(self, slide_id: str) -> dict[str, Any]:
        """Provenance."""
        return {"encoder": "made-up", "tile_px_level0": {"x20": 256, "x10": 512, "x5": 1024}}

    def read(self, slide_id: str) -> SlideFeatures:
        """One slide, without coordinates."""
        cells = self._cells[slide_id]
        rows = {name: np.arange(cells * share) * 31 + cells for name, share in (("x20", 16), ("x10", 4), ("x5", 1))}
        features = {name: self._block[index % 1009] for name, index in rows.items()}
        return SlideFeatures(slide_id, features, {}, {}, self.attrs(slide_id))


@dataclass(frozen=True)
class Files:
    """A cohort on disk, for both sides."""

    folder: Path
    cohort: Cohort
    folds: list[tuple[list[str], list[str]]]
    names: tuple[str, ...]

    def pt(self, slide_id: str) -> list[Path]:
        """The published files of a slide."""
        return [self.folder / "pt" / f"{slide_id}.{name}.pt" for name in self.names]

    @property
    def tars(self) -> list[Path]:
        """Our shards."""
        return sorted((self.folder / "shards").glob("*.tar"))


def make_files(shared: Path, folder: Path, size: Size, names: tuple[str, ...]) -> Files:
    """Table, folds, shards and `.pt` files of the cohort, or of some of its patients out of every fold."""
    table = pd.read_csv(shared / "tcga" / "clinical" / f"{COHORT}.csv")
    splits = [pd.read_csv(shared / "tcga" / "splits" / COHORT / f"splits_{k}.csv") for k in range(5)]
    quota = None if size.patients is None else math.ceil(size.patients / len(splits))
    kept = {case for split in splits for case in split["val"].dropna()[:quota]} & set(table["case_id"])
    (folder / "splits").mkdir(parents=True)
    folds = []
    for k, split in enumerate(splits):
        train, val = ([case for case in split[part].dropna() if case in kept] for part in ("train", "val"))
        folds.append((train, val))
        pd.DataFrame({"train": pd.Series(train), "val": pd.Series(val)}).to_csv(folder / "splits" / f"splits_{k}.csv")
    table[table["case_id"].isin(kept)].to_csv(folder / "table.csv", index=False)
    cohort = read_cohort(CohortConfig(name=COHORT, table=folder / "table.csv"))
    slides = Slides(list(cohort.slides.index), size.tiles)
    pack_store(slides, folder / "shards")
    files = Files(folder, cohort, folds, names)
    (folder / "pt").mkdir()
    for slide_id in slides.slide_ids():
        features = slides.read(slide_id).features
        for name, path in zip(names, files.pt(slide_id), strict=True):
            torch.save(torch.from_numpy(features[name].astype(np.float32)), path)
    return files


class PtFiles(Dataset[tuple[list[Tensor], int]]):
    """The published layout: the bags of a slide, coarse to fine, and its number."""

    def __init__(self, files: Files, slide_ids: Sequence[str]) -> None:
        self._files, self._slide_ids = files, slide_ids

    def __len__(self) -> int:
        return len(self._slide_ids)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        paths = reversed(self._files.pt(self._slide_ids[index]))
        return [torch.load(path, weights_only=True) for path in paths], index


def theirs(files: Files, build: Callable[[], nn.Module], size: Size, *, cold: bool, device: str) -> Spent:
    """The published way; see the module."""
    spent = Spent()
    with _measured(spent):
        for train, val in files.folds:
            for epoch, seconds in enumerate(
                _published_fold(files, build, train, val, size.epochs, spent, cold, device)
            ):
                if len(spent.epochs) <= epoch:
                    spent.epochs.append(0.0)
                spent.epochs[epoch] += seconds
    return spent


def _published_fold(
    files: Files, build: Callable[[], nn.Module], train: list[str], val: list[str], epochs: int, spent: Spent,
    cold: bool, device: str,
) -> Iterator[float]:  # fmt: skip
    torch.manual_seed(7)
    cases = files.cohort.cases
    bins = TimeBins.fit(cases["time_months"], cases["event"], BINS)
    parts = []
    for patients in (train, val):
        slides = [slide for found in files.cohort.slides_of(patients).values() for slide in found]
        rows = cases.loc[files.cohort.slides.loc[slides, "case_id"]]
        targets = Targets(
            torch.as_tensor(bins.label(rows["time_months"].to_numpy())),
            torch.tensor(rows["event"].to_numpy(dtype=bool)),
            torch.tensor(rows["time_months"].to_numpy(dtype=float)),
        )
        parts.append((slides, targets))
    (slides, targets), (val_slides, val_targets) = parts
    classes = pd.Series(list(zip(targets.label.tolist(), targets.event.tolist(), strict=True)))
    weights = 1 / classes.map(classes.value_counts()).to_numpy(dtype=float)
    sampler = WeightedRandomSampler(torch.from_numpy(weights), len(slides))
    loader = DataLoader(PtFiles(files, slides), 1, sampler=sampler, num_workers=WORKERS, persistent_workers=True)
    val_loader = DataLoader(PtFiles(files, val_slides), 1, num_workers=WORKERS, persistent_workers=True)
    bytes_of = {s: sum(path.stat().st_size for path in files.pt(s)) for s in (*slides, *val_slides)}
    model = build().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=4e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    best = -1.0
    for _ in range(epochs):
        if cold:
            drop_from_page_cache(path for slide in slides + val_slides for path in files.pt(slide))
        started = time.perf_counter()
        model.train()
        for step, (bags, index) in enumerate(loader, 1):
            spent.read += bytes_of[slides[int(index)]]
            own = _pick(targets, index).to(device)
            loss = nll(_logits(model, bags, device), own, alpha=0.2).sum()
            (loss / ACCUMULATE).backward()
            loss.item()
            if step % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        score = _published_validation(model, val_loader, val_targets, device)
        spent.read += sum(bytes_of[slide] for slide in val_slides)
        if score > best:
            best, _ = score, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        yield time.perf_counter() - started


def _published_validation(
    model: nn.Module, loader: DataLoader[tuple[list[Tensor], int]], targets: Targets, device: str
) -> float:
    """C-index over slides, attention dropout on as published."""
    model.eval()
    for module in model.modules():
        if isinstance(module, Attention):
            module.train()
    with torch.no_grad():
        logits = torch.cat([_logits(model, bags, device).float().cpu() for bags, _ in loader])
    risk = SurvivalOutput.from_logits(logits).risk.numpy()
    return concordance(targets.time_months.numpy(), targets.event.numpy(), risk).cindex


def _logits(model: nn.Module, bags: list[Tensor], device: str) -> Tensor:
    mixed = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    with mixed:
        return model(*(bag.to(device) for bag in bags))


def _pick(targets: Targets, index: Tensor) -> Targets:
    return Targets(targets.label[index], targets.event[index], targets.time_months[index])


def ours(
    files: Files, model: str, size: Size, output: Path, *, cold: bool, device: str, published: bool = False
) -> Spent:
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
            "output": str(output / "run"),
        },
        "benchmark",
    )
    spent = Spent()
    with _counted(spent, files if cold else None), _measured(spent):
        cross_validate(config)
    return spent


@contextlib.contextmanager
def _measured(spent: Spent) -> Iterator[None]:
    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    wall, before = time.perf_counter(), cpu()
    yield
    spent.wall, spent.cpu = time.perf_counter() - wall, cpu() - before


@contextlib.contextmanager
def _counted(spent: Spent, forgets: Files | None) -> Iterator[None]:
    """Count what our side reads, how long each pass takes, and the time that training spends in calls of tracking."""
    read_into, one_pass = ShardDataset.read_into, Group._pass
    calls = {name: getattr(TrackedRun, name) for name in ("child", "log", "inputs", "artifacts", "close")}
    begin = TrackedRun.begin

    def reading(self: ShardDataset, slide_id: str, out: Any, *arguments: Any) -> None:
        spent.read += sum(array.nbytes for array in out.values())
        read_into(self, slide_id, out, *arguments)

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
        (ShardDataset, "read_into", reading, read_into),
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
        files = make_files(arguments.shared, folder / "files", size, NAMES[model])
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
    parameters, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]

    def loss(one: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (one,), (bag,)).logits.sum()

    gradient = torch.func.vmap(torch.func.grad(loss))
    wide = torch.randn(5 * 512, DIM, requires_grad=True)

    def in_turn() -> None:
        for model in models:
            model(bag).logits.sum().backward()

    def projections() -> None:
        for part in wide.chunk(5):
            nn.functional.linear(bag, part).sum().backward()

    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "whole model, five in turn, against torch.func.vmap": (in_turn, lambda: gradient(parameters)),
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
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with tcga/clinical, tcga/splits")
    parser.add_argument("--models", nargs="+", choices=sorted(NAMES), default=sorted(NAMES))
    parser.add_argument("--patients", type=int, help="so many, out of all folds; default: all")
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
