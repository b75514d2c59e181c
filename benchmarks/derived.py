"""What deriving 10x and 5x from 20x costs: CrossFusion on derived against extracted coarser magnifications.

    python -m benchmarks.derived --cases 72 --seeds 2 --encoders stain-texture efficientnet-lite0

A phantom cohort is drawn and extracted at 20x, 10x and 5x with each encoder; `cfusion preprocess derive` makes 10x and
5x of the same 20x embeddings. CrossFusion is cross-validated under the strict protocol on both, with the same folds and
seeds. A row has the C within folds, `ours` derived and `theirs` extracted. In phantoms half of the planted risk is
visible only at 5x.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from benchmarks.table import Row, options, present
from cfusion.config import Config, validate
from cfusion.data.store import FeatureStore
from cfusion.demo import SETTINGS
from cfusion.runs.crossval import cross_validate
from preprocess.derive import derive_store
from preprocess.encoders.weights import file_name
from preprocess.extraction import preprocess_slides
from preprocess.packing import pack_store
from preprocess.phantom.draw import PHANTOMS, PhantomCohort, draw_cohort
from preprocess.settings import PreprocessConfig


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


def main() -> None:
    """Run what the command line asks for."""
    parser = options(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/derived"))
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--encoders", nargs="+", default=["stain-texture", "efficientnet-lite0"])
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    cases, seeds, epochs = (40, 1, 2) if chosen.quick else (chosen.cases, chosen.seeds, SETTINGS["train"]["epochs"])
    cohort = draw_cohort(dataclasses.replace(PHANTOMS[0], patients=cases), chosen.out / PHANTOMS[0].name)
    rows = []
    for encoder in chosen.encoders:
        shards = shards_of(cohort, chosen.out / PHANTOMS[0].name, encoder, chosen.threads)
        for seed in range(seeds):
            pair = [cindex(cohort, shards[kind], encoder, epochs, seed) for kind in ("derived", "extracted")]
            rows.append(Row(f"{encoder}, seed {seed}", *pair, "C within folds"))
            print(rows[-1], flush=True)
    present(f"Derived (ours) and extracted (theirs) 10x and 5x, {cases} phantom patients", rows, chosen.json)


if __name__ == "__main__":
    main()
