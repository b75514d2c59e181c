"""What deriving 10x and 5x from 20x costs: CrossFusion on derived against extracted coarser magnifications.

    python -m benchmarks.derived --cases 72 --seeds 2 --encoders stain-texture efficientnet-lite0

A phantom cohort is drawn and extracted at 20x, 10x and 5x with each encoder; `cfusion preprocess derive` makes 10x and
5x of the same 20x embeddings. CrossFusion is cross-validated under the strict protocol on both, with the same folds and
seeds. A row has the C within folds, `ours` derived and `theirs` extracted. In phantoms half of the planted risk is
visible only at 5x.

    python -m benchmarks.derived --linear --cases 72 --encoders stain-texture

answers in seconds, after extraction, what the embeddings contain: a ridge regression on each patient's mean embeddings,
cross-validated, without CrossFusion.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.table import Row, options, present
from cfusion.config import Config, validate
from cfusion.data.store import FeatureStore
from cfusion.demo import SETTINGS
from cfusion.runs.crossval import cross_validate
from cfusion.survival.metrics import concordance
from preprocess.derive import derive_store
from preprocess.encoders.weights import file_name
from preprocess.extraction import preprocess_slides
from preprocess.packing import pack_store
from preprocess.phantom.draw import PHANTOMS, PhantomCohort, draw_cohort
from preprocess.settings import PreprocessConfig

REPEATS, FOLDS, RIDGE = 20, 5, 0.1
"""Of the linear models; the penalty is a multiple of the number of inputs."""


def shards_of(cohort: PhantomCohort, folder: Path, encoder: str, threads: int) -> dict[str, Path]:
    """Make the shards of both kinds of coarser magnifications; finished steps are skipped."""
    name = file_name(encoder)
    config = PreprocessConfig(slides=cohort.slides, store=folder / "extracted", encoders=(encoder,), threads=threads)
    preprocess_slides(config, strict=True)
    derived = folder / f"derived-{name}"
    if not derived.exists():
        derive_store(config.store, derived, (10, 5), name)
    shards = {"derived": folder / f"shards-derived-{name}", "extracted": folder / f"shards-extracted-{name}"}
    for kind, store in (("derived", derived), ("extracted", config.store)):
        if not (shards[kind] / "index.json").is_file():
            pack_store(FeatureStore.open(store, name), shards[kind])
    return shards


def cindex(cohort: PhantomCohort, shards: Path, encoder: str, epochs: int, seed: int) -> float:
    """Return the C within folds of one cross-validation."""
    values = {
        **SETTINGS,
        "cohort": {"name": cohort.table.parent.name, "table": str(cohort.table)},
        "data": {**SETTINGS["data"], "shards": str(shards), "encoder": file_name(encoder)},
        "model": {"name": "crossfusion", **SETTINGS["model"], "options": {"dropout": 0.1}},
        "train": {**SETTINGS["train"], "epochs": epochs},
        "evaluation": {"bootstrap": 0},
        "tracking": {"enabled": False},
        "seed": seed,
        "output": str(shards.with_name(f"{shards.name}-run-{seed}")),
    }
    scores = cross_validate(validate(Config, values, "benchmarks.derived"))
    return float(scores.summary["cindex_within"].iloc[0])


def mean_embeddings(cohort: PhantomCohort, store: FeatureStore) -> np.ndarray:
    """Return the mean embedding of each patient's tiles, side by side for 20x, 10x and 5x, f64 [patient, 3 d]."""
    slides = pd.read_csv(cohort.table).groupby("patient")["slide"].apply(list)
    rows = []
    for names in slides:
        read = [store.read(slide_id).features for slide_id in names]
        rows.append(np.hstack([
            np.mean([tiles[name].astype(np.float64).mean(axis=0) for tiles in read], axis=0) for name in read[0]
        ]))  # fmt: skip
    return np.array(rows)


def held_out(inputs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return a ridge regression's predictions for patients it has not seen, f64 [repeat, patient]."""
    found = np.empty((REPEATS, len(target)))
    for repeat in range(REPEATS):
        fold = np.random.default_rng(repeat).permutation(len(target)) % FOLDS
        for held in range(FOLDS):
            train = fold != held
            mean, scale = inputs[train].mean(axis=0), inputs[train].std()
            x, rest = (inputs[train] - mean) / scale, (inputs[~train] - mean) / scale
            penalty = RIDGE * x.shape[1] * np.eye(x.shape[1])
            weights = np.linalg.solve(x.T @ x + penalty, x.T @ (target[train] - target[train].mean()))
            found[repeat, ~train] = rest @ weights
    return found


def excess_events(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Return observed minus expected events of each patient under one hazard for all, a response for a ridge."""
    order = np.argsort(time)
    hazard = np.empty(len(time))
    hazard[order] = np.cumsum(event[order] / np.arange(len(time), 0, -1))
    return event - hazard


def linear_rows(cohort: PhantomCohort, stores: dict[str, FeatureStore]) -> list[Row]:
    """Compare what linear models find in both kinds of coarser magnifications, and in 20x only."""
    outcomes = pd.read_csv(cohort.table).groupby("patient").first()
    truth = pd.read_csv(cohort.truth).set_index("case_id").loc[outcomes.index]
    time, event = outcomes["time"].to_numpy(float), outcomes["event"].to_numpy(float)
    inputs = {kind: mean_embeddings(cohort, store) for kind, store in stores.items()}
    inputs["20x"] = inputs["derived"][:, : inputs["derived"].shape[1] // 3]

    def planted(kind: str, signal: str) -> float:
        target = truth[signal].to_numpy(float)
        return float(np.mean([np.corrcoef(p, target)[0, 1] for p in held_out(inputs[kind], target)]))

    def cindex(kind: str) -> float:
        risks = held_out(inputs[kind], excess_events(time, event))
        return float(np.mean([concordance(time, event.astype(bool), risk).cindex for risk in risks]))

    signals = ("architecture", "nuclei")
    rows = [Row(f"ridge: r with {s}", planted("derived", s), planted("extracted", s), "r") for s in signals]
    rows += [Row("ridge: C", cindex("derived"), cindex("extracted"), "C")]
    return [*rows, Row("ridge: C, 20x only (ours) against extracted", cindex("20x"), cindex("extracted"), "C")]


def main() -> None:
    """Run what the command line asks for."""
    parser = options(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/derived"))
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--linear", action="store_true", help="linear models of mean embeddings instead of CrossFusion")
    parser.add_argument("--encoders", nargs="+", default=["stain-texture", "efficientnet-lite0"])
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    cases, seeds, epochs = (40, 1, 2) if chosen.quick else (chosen.cases, chosen.seeds, SETTINGS["train"]["epochs"])
    cohort = draw_cohort(dataclasses.replace(PHANTOMS[0], patients=cases), chosen.out / PHANTOMS[0].name)
    rows = []
    for encoder in chosen.encoders:
        folder = chosen.out / PHANTOMS[0].name
        shards = shards_of(cohort, folder, encoder, chosen.threads)
        if chosen.linear:
            name = file_name(encoder)
            roots = {"derived": folder / f"derived-{name}", "extracted": folder / "extracted"}
            rows += linear_rows(cohort, {kind: FeatureStore.open(root, name) for kind, root in roots.items()})
            continue
        for seed in range(seeds):
            derived, extracted = (
                cindex(cohort, shards[kind], encoder, epochs, seed) for kind in ("derived", "extracted")
            )
            rows.append(Row(f"{encoder}, seed {seed}", derived, extracted, "C within folds"))
            print(rows[-1], flush=True)
    present(f"Derived (ours) and extracted (theirs) 10x and 5x, {cases} phantom patients", rows, chosen.json)


if __name__ == "__main__":
    main()
