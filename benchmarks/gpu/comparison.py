"""A 5-fold cross-validation, all folds together, against the published loop on the same device."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from benchmarks.crossval import ours, rows_of
from benchmarks.crossval_files import DIM, NAMES, Size, make_files
from benchmarks.gpu.bench import Bench, Limit
from benchmarks.published_model import PublishedCrossFusion
from benchmarks.published_training import BINS, theirs


def measure(bench: Bench) -> None:
    """Run both sides of `benchmarks.crossval` on a few patients; the published side in bf16 too, from pinned memory."""
    size = Size(45, 16, 1) if bench.quick else Size(60, 8192, 3)
    tracked = importlib.util.find_spec("mlflow") is not None
    if not tracked:
        bench.skip("tracking", "mlflow is not installed; our side runs without it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_files(folder / "files", size, NAMES["crossfusion"])
        device = bench.device.type
        left = ours(files, "crossfusion", size, folder / "ours", cold=False, device=device, tracked=tracked)
        if bench.left < 0:
            bench.skip("published loop", "no time left in this part")
            return
        right = theirs(files, lambda: PublishedCrossFusion(DIM, BINS, 512, 4, 1), size, cold=False, device=device)
    what = f"{size.patients} patients, {size.tiles} tiles (median)"
    for row in rows_of(what, left, right, size.epochs):
        bench.tell(f"{row.case}, ours", row.ours, row.unit)
        if row.theirs is not None:
            bench.tell(f"{row.case}, published loop", row.theirs, row.unit)
        if row.ratio is not None and row.case.endswith(("wall", "an epoch")):
            limit = Limit(10, "least", speed=True) if row.case.endswith("an epoch") else None
            bench.tell(f"{row.case}, how many times faster", row.ratio, "times", limit)
