"""Explanations against the truth: planted regions ranked by every method, and deletion curves against random removal.

    python -m benchmarks.faithfulness [--quick] [--folder DIR] [--json FILE]

Trains CrossFusion and AMIL on the phantom cohort whose slides are each of one kind of tissue, then explains slides in
which a third of the cells is grave tissue and the rest is not: grave in the order of its glands (seen at 5x), in the
coarseness of its chromatin (seen at 20x), or in both. `ours` is the mean AUROC over slides with which a method ranks
the tiles of the planted cells above the others, `theirs` is chance; then the area between random removal and removal
by rank, in units of the risk, where `theirs` has none.

Models are trained from several seeds, and the means and the lowest and highest AUROC are over these: which of the five
models of a seed learn the chromatin depends on the seed, and the ensemble's scores are mostly those of the models whose
risks spread most.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

import cfusion
from benchmarks.phantom_regions import Signal, draw_planted, read_planted
from benchmarks.table import Row, options, present
from cfusion.apply.ensemble import FoldEnsemble
from cfusion.config import load_config
from cfusion.data.store import FeatureStore
from cfusion.demo import MODELS, SETTINGS
from cfusion.explanation import explain
from cfusion.explanation.faithfulness import deletion_areas, deletion_curves
from preprocess.encoders import StainTexture
from preprocess.extraction import preprocess_slides
from preprocess.packing import pack_store
from preprocess.phantom.draw import PHANTOMS, draw_cohort
from preprocess.settings import PreprocessConfig

UNIT = ["model", "signal", "magnification", "method"]
SEEDS = (7, 8, 9)


def extract(slides: Path, store: Path) -> FeatureStore:
    """Features of the slides in a folder."""
    config = PreprocessConfig(slides=slides, store=store, encoders=(StainTexture.name,), sheets=False)
    preprocess_slides(config, strict=True)
    return FeatureStore.open(store, StainTexture.name)


def train(folder: Path, models: list[str], patients: int, folds: int, seed: int) -> dict[str, FoldEnsemble]:
    """Ensembles of the first folds, trained as the demo trains them on a phantom cohort of uniform slides."""
    drawn = draw_cohort(dataclasses.replace(PHANTOMS[0], patients=patients), folder / "cohort")
    pack_store(extract(drawn.slides, folder / "features"), folder / "shards")
    places = {"cohort.table": drawn.table, "data.shards": folder / "shards", "tracking.enabled": False}
    shared = {f"{section}.{key}": value for section, values in SETTINGS.items() for key, value in values.items()}
    ensembles = {}
    for name in models:
        settings = {**shared, **places, **MODELS[name], "seed": seed}
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
        config = load_config(None, overrides)
        cohort = cfusion.read_cohort(config.cohort)
        splits = cfusion.make_splits(cohort, config.splits)[:folds]
        ensembles[name] = FoldEnsemble(tuple(cfusion.fit(config, cohort, split).model for split in splits))
    return ensembles


def plant(folder: Path, slides: int, cells: int) -> FeatureStore:
    """Slides of `cells` × `cells` cells of which a third is planted, `slides` of each signal, and their features."""
    for signal in get_args(Signal):
        for number in range(slides):
            rng = np.random.default_rng([cells, number])
            planted = rng.permutation(cells**2).reshape(cells, cells) < round(cells**2 / 3)
            draw_planted(folder / "planted", f"{signal}-{number}", planted, signal=signal, seed=100 + number)
    return extract(folder / "planted", folder / "planted-features")


def evaluate(ensemble: FoldEnsemble, store: FeatureStore, regions: Path, curves_of: str) -> pd.DataFrame:
    """One row per slide, magnification and method: `auroc`, and `area` of the deletion curve.

    Args:
        ensemble: The models.
        store: Features of planted slides.
        regions: Folder of their regions.
        curves_of: Signal of the slides whose deletion curves are made; they cost the most.
    """
    rows = []
    for slide_id in store.slide_ids():
        slide, signal = store.read(slide_id), slide_id.split("-")[0]
        found = explain(ensemble, slide, occlusion="tiles")
        areas = {}
        if signal == curves_of:
            table = deletion_areas(deletion_curves(ensemble, slide, found, steps=10, seeds=10))
            areas = table.set_index(["magnification", "method"])["area"].to_dict()
        for name, level in found.levels.items():
            truth = read_planted(regions / f"{slide_id}.planted.geojson", level.coords + level.side_px / 2)
            if truth.all() or not truth.any():
                continue
            rows += [
                {"signal": signal, "slide": slide_id, "magnification": name, "method": method,
                 "auroc": roc_auc_score(truth, found.scores(name, method)),
                 "area": areas.get((name, method), np.nan)}
                for method in found.methods
            ]  # fmt: skip
    return pd.DataFrame(rows)


def measure(
    folder: Path, models: list[str], *, patients: int, folds: int, slides: int, cells: int, seeds: Sequence[int] = SEEDS
) -> pd.DataFrame:
    """Mean AUROC and area over slides and seeds, and the lowest and highest AUROC of a seed, by `UNIT`."""
    of_seeds = []
    for seed in seeds:
        ensembles = train(folder, models, patients, folds, seed)
        store = plant(folder, slides, cells)
        results = {name: evaluate(ensemble, store, folder / "planted", "both") for name, ensemble in ensembles.items()}
        of_seeds.append(pd.concat(results, names=["model"]).groupby(UNIT, sort=False)[["auroc", "area"]].mean())
    grouped = pd.concat(of_seeds).groupby(UNIT, sort=False)
    return grouped.mean().assign(lowest=grouped["auroc"].min(), highest=grouped["auroc"].max())


def _words(key: Hashable) -> str:
    """Return a key of `UNIT` in words."""
    assert isinstance(key, tuple)
    return " ".join(key)


def main() -> None:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--folder", type=Path, help="keep slides and features here, and use those that are there")
    arguments = parser.parse_args()
    small = {"patients": 60, "folds": 1, "slides": 1, "cells": 3, "seeds": SEEDS[:1]}
    full = {"patients": 240, "folds": 5, "slides": 6, "cells": 4}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        table = measure(folder, list(MODELS), **(small if arguments.quick else full))
    rows = [Row(f"{_words(key)}: AUROC", row["auroc"], 0.5, "AUROC") for key, row in table.iterrows()]
    rows += [
        Row(f"{_words(key)}: {name} AUROC of a seed", row[name], 0.5, "AUROC")
        for key, row in table.iterrows()
        for name in ("lowest", "highest")
    ]  # fmt: skip
    rows += [
        Row(f"{_words(key)}: area above chance", row["area"], None, "risk")
        for key, row in table.dropna().iterrows()
    ]  # fmt: skip
    present("Faithfulness of explanations", rows, arguments.json)


if __name__ == "__main__":
    main()
