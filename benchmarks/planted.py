"""Every rival on a signal that only its mechanism can see, and gated attention, which cannot see it.

    python -m benchmarks.planted [--quick] [--models NAME ...] [--folder DIR] [--json FILE]

Made-up shards, no slides. Two cohorts of the same patients and outcomes:

- `neighbours`: a tile is of one of two kinds, exactly half of the tiles of each slide of either. In some squares of
  16 tiles all are of one kind, in the others the kinds alternate; the log-hazard is the share of the latter. The set
  of a slide's 20x tiles says nothing about the patient, which of them are neighbours does. For models of graphs, of
  clusters of near tiles, and of regions.
- `coarse`: the log-hazard lies in one channel of the 5x tiles; 20x and 10x are noise. For models of several
  magnifications.

Each model is cross-validated under the strict protocol. `ours` is the lower 95% bound of its C within folds. `theirs`
is what it must exceed: the 97.5% limit of noise on these outcomes and folds, and then C of gated attention on the same
shards.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import cfusion
from benchmarks.table import Row, options, present
from cfusion.config import load_config
from cfusion.survival.null import scored_outcomes, simulate_null
from cfusion.types import SlideFeatures
from preprocess.packing import pack_store

DIM = 16
ROWS, COLUMNS = 4, 5
"""Squares of a slide: each is one 5x tile, 2 × 2 at 10x, 4 × 4 at 20x."""

EPOCHS = 30
QUICK: dict[str, object] = {"train.epochs": 2, "train.patience": 2}

BLIND = "amil"
SEEN_BY = {
    "neighbours": ("patchgcn", "deepgraphconv", "protosurv", "scmil", "hipt"),
    "coarse": ("crossfusion", "mustmil", "csmil", "zoommil"),
}
SETTINGS: dict[str, dict[str, object]] = {
    # DeepGraphSurv joins tiles with like embeddings by default, which says nothing about neighbours.
    "deepgraphconv": {"model.options": {"edges": "spatial"}},
    # Clusters by place, as large as a square. Attention is SCMIL's last layer before the pooling, so only the pooling's
    # scores can tell pure from mixed clusters: it learns that late, in many small steps, or memorises the patients.
    "scmil": {
        "model.options": {
            "cluster_size": 16, "feature_weight": 0.0, "components": 10, "head_width": 16, "dropout": 0.1
        },
        "model.embed_dim": 8, "train.epochs": 80, "train.patience": 80, "train.weight_decay": 0.1,
        "parallel.global_batch": 4,
    },
}  # fmt: skip
"""What a model needs in order to see or learn the signal, where that is not its default."""


class PlantedSlides:
    """Made-up slides, one a patient, with the signal of one cohort.

    Args:
        signal: A key of `SEEN_BY`.
        log_hazard: Of each patient, in [0, 1].
    """

    def __init__(self, signal: str, log_hazard: np.ndarray) -> None:
        self._signal, self._hazard = signal, log_hazard

    def slide_ids(self) -> list[str]:
        """All slides."""
        return [f"slide-{row:03d}" for row in range(len(self._hazard))]

    def attrs(self, slide_id: str) -> dict[str, object]:
        """Provenance."""
        return {"encoder": "made-up", "mpp": 0.5, "tile_px_level0": {"x20": 256, "x10": 512, "x5": 1024}}

    def read(self, slide_id: str) -> SlideFeatures:
        """Draw a slide; the same at each call."""
        row = int(slide_id[-3:])
        generator = np.random.default_rng(row)
        squares = np.stack(np.divmod(np.arange(ROWS * COLUMNS), COLUMNS), axis=1)[:, ::-1]
        places = {"x5": squares}
        parents = {}
        for name, coarser in (("x10", "x5"), ("x20", "x10")):
            places[name] = (2 * places[coarser][:, None] + np.array([[0, 0], [1, 0], [0, 1], [1, 1]])).reshape(-1, 2)
            parents[name] = np.repeat(np.arange(len(places[coarser])), 4).astype(np.int32)
        features = {name: generator.normal(size=(len(at), DIM)) for name, at in places.items()}
        if self._signal == "coarse":
            features["x5"][:, 0] += 6 * (self._hazard[row] - 0.5)
        else:
            features["x20"][:, 0] += 3 * kinds(places["x20"], self._hazard[row], generator)
        side = {"x20": 256, "x10": 512, "x5": 1024}
        coords = {name: (at * side[name]).astype(np.int32) for name, at in places.items()}
        stored = {name: values.astype(np.float16) for name, values in features.items()}
        return SlideFeatures(slide_id, stored, coords, parents, self.attrs(slide_id))


def kinds(places: np.ndarray, mixed_share: float, generator: np.random.Generator) -> np.ndarray:
    """Return -1 or 1 for each 20x tile [tile], as many of either; `places` are columns and rows [tile, 2]."""
    squares = ROWS * COLUMNS
    pure = 2 * round((1 - mixed_share) * squares / 2)
    # 0: the kinds alternate within the square; as many squares of one kind as of the other.
    square_kinds = np.repeat([-1, 1, 0], [pure // 2, pure // 2, squares - pure])
    generator.shuffle(square_kinds)
    of_square = square_kinds[(places[:, 1] // 4) * COLUMNS + places[:, 0] // 4]
    alternating = 1 - 2 * (places.sum(axis=1) % 2)
    return np.where(of_square == 0, alternating, of_square)


def write_cohorts(folder: Path, patients: int) -> Path:
    """Write the table of outcomes and, for each signal, the shards; return the table."""
    generator = np.random.default_rng(11)
    log_hazard = generator.uniform(size=patients)
    death = generator.exponential(size=patients) * 40 * np.exp(-4 * (log_hazard - 0.5))
    leaves = generator.uniform(10, 100, size=patients)
    table = folder / "clinical.csv"
    rows = {
        "patient": [f"PT-{row:03d}" for row in range(patients)],
        "slide": [f"slide-{row:03d}" for row in range(patients)],
        "time": np.minimum(death, leaves).round(2) + 0.1,
        "event": (death <= leaves).astype(int),
    }
    pd.DataFrame(rows).to_csv(table, index=False)
    for signal in SEEN_BY:
        if not (folder / signal).exists():
            pack_store(PlantedSlides(signal, log_hazard), folder / signal)
    return table


def train(folder: Path, table: Path, signal: str, model: str, quick: bool) -> tuple[float, float, float]:
    """Cross-validate one model; return C within folds, its lower 95% bound, and the 97.5% limit of noise."""
    settings = {
        "cohort.name": signal, "cohort.table": str(table), "data.shards": str(folder / signal),
        "data.encoder": "made-up", "output": str(folder / "runs" / f"{signal}-{model}"), "tracking.enabled": False,
        "model.name": model, "model.embed_dim": 32, "train.epochs": EPOCHS, "train.lr": 1e-3,
        "parallel.global_batch": 16, **SETTINGS.get(model, {}), **(QUICK if quick else {}),
    }  # fmt: skip
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    scores = cfusion.cross_validate(config)
    (row,) = scores.summary.to_dict("records")
    cohort = cfusion.read_cohort(config.cohort)
    folds = scored_outcomes(cohort, cfusion.make_splits(cohort, config.splits))
    null = simulate_null(folds, chosen_on_scored_fold=False)
    return row["cindex_within"], row["within_low"], null.high


def main() -> None:
    """Write the shards, train, and print a row per model and limit."""
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--folder", type=Path, help="keep shards and runs here; finished runs are not trained again")
    arguments = parser.parse_args()
    patients = 60 if arguments.quick else 240
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        table = write_cohorts(folder, patients)
        for signal, models in SEEN_BY.items():
            blind, _, _ = train(folder, table, signal, BLIND, arguments.quick)
            for model in models:
                if arguments.models and model not in arguments.models:
                    continue
                found, low, limit = train(folder, table, signal, model, arguments.quick)
                print(f"{signal} {model}: C {found:.3f}, lower bound {low:.3f}; noise {limit:.3f}, {BLIND} {blind:.3f}")
                rows += [
                    Row(f"{signal}, {model}: lower bound, limit of noise", low, limit, "C"),
                    Row(f"{signal}, {model}: lower bound, {BLIND}", low, blind, "C"),
                ]
    present(f"Planted signals, {patients} patients", rows, arguments.json)


if __name__ == "__main__":
    main()
