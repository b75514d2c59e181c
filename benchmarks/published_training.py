"""Cross-validation as published: one fold after the other, `.pt` files, dropout that stays on in validation."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from benchmarks.bags import drop_from_page_cache
from benchmarks.crossval_files import Files, Size
from benchmarks.published_model import Attention
from cfusion.survival.bins import TimeBins
from cfusion.survival.losses import nll
from cfusion.survival.metrics import concordance
from cfusion.types import SurvivalOutput, Targets

BINS, ACCUMULATE, WORKERS = 4, 32, 4


@dataclass
class Spent:
    """What a side took: wall and CPU seconds, seconds of each epoch over all folds, bytes read, seconds of tracking."""

    wall: float = 0.0
    cpu: float = 0.0
    epochs: list[float] = dataclasses.field(default_factory=list)
    read: int = 0
    tracking: float = 0.0


@contextlib.contextmanager
def measured(spent: Spent) -> Iterator[None]:
    """Fill in the wall and CPU seconds of the block."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    wall, before = time.perf_counter(), cpu()
    yield
    spent.wall, spent.cpu = time.perf_counter() - wall, cpu() - before


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
    with measured(spent):
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
    sampler = WeightedRandomSampler(weights.tolist(), len(slides))
    # Its own best settings on a GPU: bags are copied from pinned memory.
    reading: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": device == "cuda"}
    loader = DataLoader(PtFiles(files, slides), 1, sampler=sampler, **reading)
    val_loader = DataLoader(PtFiles(files, val_slides), 1, **reading)
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
        return model(*(bag.to(device, non_blocking=True) for bag in bags))


def _pick(targets: Targets, index: Tensor) -> Targets:
    return Targets(targets.label[index], targets.event[index], targets.time_months[index])
