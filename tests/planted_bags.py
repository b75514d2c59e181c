"""Planted slides as features, and an ensemble that learnt what was planted: a few seconds, for the fast tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from factories import make_cohort, slide_features

import cfusion
from cfusion.apply.ensemble import FoldEnsemble
from cfusion.apply.ranking import RunRanking, rank_test
from cfusion.cohort.permutation import permuted
from cfusion.survival.predictions import checked_predictions
from cfusion.types import SlideFeatures

DIM = 8


def ensemble(folder: Path, model: str = "crossfusion", folds: int = 2, epochs: int = 1, **options) -> FoldEnsemble:
    """Models of some folds of a cohort whose first embedding channel carries the log-hazard."""
    return ranked(folder, model, folds, epochs, **options)[0]


def ranked(
    folder: Path, model: str = "crossfusion", folds: int = 2, epochs: int = 1, permute: int | None = None, **options
) -> tuple[FoldEnsemble, RunRanking | None]:
    """Models as those of `ensemble`, and how they rank held-out patients; `permute` is the seed of a permutation."""
    files = make_cohort(folder / "cohort", patients=100, dim=DIM, max_cells=6)
    config = files.config(
        folder / "run",
        model={"name": model, "embed_dim": 16, "num_heads": 2, "options": options},
        train={"epochs": epochs, "lr": 1e-2, "micro_batch": 8},
    )
    cohort = cfusion.read_cohort(config.cohort)
    cohort = cohort if permute is None else permuted(cohort, permute)
    runs = [cfusion.fit(config, cohort, split) for split in cfusion.make_splits(cohort, config.splits)[:folds]]
    predictions = checked_predictions(pd.concat([run.predictions for run in runs]))
    return FoldEnsemble(tuple(run.model for run in runs)), rank_test(predictions)


def planted_slide(cells: int = 12, seed: int = 0) -> tuple[SlideFeatures, dict[str, np.ndarray]]:
    """A slide with a third of its cells of grave tissue, the others of low risk, and the truth of each tile."""
    rng = np.random.default_rng(seed)
    slide = slide_features(f"planted-{seed}", cells, DIM, rng)
    truth = {"x5": np.isin(np.arange(cells), rng.permutation(cells)[: cells // 3])}
    for finer, coarser in (("x10", "x5"), ("x20", "x10")):
        truth[finer] = truth[coarser][slide.parents[finer]]
    for name, planted in truth.items():
        slide.features[name][:, 0] += np.where(planted, 2.5, -2.5).astype(np.float16)
    return slide, truth
