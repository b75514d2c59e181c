"""Runs of a sweep with made-up predictions, as their folders hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cfusion.cohort.splits import write_splits
from cfusion.files import digest_json
from cfusion.report.comparison.cells import ComparedRun, Cost
from cfusion.types import Split

PATIENTS, FOLDS = 60, 3
STRENGTH = {("uni", "good_model"): 3.0, ("uni", "weak"): 0.0, ("conch", "good_model"): 2.0, ("conch", "weak"): 0.0}


def member(
    folder: Path,
    cohort: str,
    encoder: str,
    model: str,
    seed: int,
    state: str = "done",
    permuted: int | None = None,
    protocol: str = "strict",
) -> ComparedRun:
    """A run with made-up predictions, if it is done."""
    name = f"{cohort}-{encoder}-{model}-{seed}{'' if permuted is None else f'-permuted-{permuted}'}"
    if state == "done":
        write_run(folder / name, cohort, model, seed, STRENGTH[encoder, model] if permuted is None else 0.0, protocol)
    word = "DataError: no <b>loss</b> & no gain" if state == "failed" else ""
    cost = Cost(0.5, 0.25, 0.1)
    return ComparedRun(name, folder / name, cohort, encoder, model, protocol, seed, permuted, state, word, cost)


def write_run(folder: Path, cohort: str, model: str, seed: int, strength: float, protocol: str) -> None:
    rng = np.random.default_rng(int(digest_json(cohort)[:8], 16))
    hazard = rng.normal(size=PATIENTS)
    death, censoring = rng.exponential(size=PATIENTS) * 20 * np.exp(-hazard), rng.exponential(size=PATIENTS) * 60
    fold = np.arange(PATIENTS) % FOLDS
    ids = np.array([f"{cohort}-{i:03d}" for i in range(PATIENTS)])
    noise = np.random.default_rng(int(digest_json([folder.name])[:8], 16)).normal(size=PATIENTS)
    folder.mkdir(parents=True)
    table = {
        "model": model, "cohort": cohort, "protocol": protocol, "seed": seed, "repeat": 0, "fold": fold, "case_id": ids,
        "risk": strength * hazard + noise, "survival_months": np.minimum(death, censoring) + 0.1,
        "event": death <= censoring,
    }  # fmt: skip
    pd.DataFrame(table).to_csv(folder / "predictions.csv", index=False)
    splits = [Split(k, tuple(ids[fold != k]), (), tuple(ids[fold == k])) for k in range(FOLDS)]
    write_splits(splits, folder / "splits")
    outcomes = pd.DataFrame(table)[["case_id", "survival_months", "event"]]
    outcomes.rename(columns={"survival_months": "time_months"}).to_csv(folder / "outcomes.csv", index=False)
