"""Made-up cohorts as real files: a clinical table and packed shards, small enough for any test.

The embeddings carry the risk plainly, so that a few epochs learn it and a broken trainer does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cfusion.config import Config, validate
from cfusion.types import SlideFeatures
from preprocess.packing import pack_store

ENCODER = "made-up"
MAGNIFICATIONS = ("x20", "x10", "x5")


class MadeUpStore:
    """Slides in memory behind the interface of a feature store."""

    def __init__(self, slides: list[SlideFeatures]) -> None:
        self._slides = {slide.slide_id: slide for slide in slides}

    def slide_ids(self) -> list[str]:
        return list(self._slides)

    def read(self, slide_id: str) -> SlideFeatures:
        return self._slides[slide_id]

    def attrs(self, slide_id: str) -> dict[str, Any]:
        return self._slides[slide_id].attrs


@dataclass(frozen=True)
class CohortFiles:
    """Where a made-up cohort lies."""

    table: Path
    shards: Path

    def config(self, output: Path, **sections: dict[str, Any]) -> Config:
        """A small, quick configuration on these files; sections are merged over it."""
        values: dict[str, Any] = {
            "cohort": {"name": "made_up", "table": str(self.table)},
            "splits": {"folds": 3},
            "data": {"shards": str(self.shards), "encoder": ENCODER},
            "model": {"name": "amil", "embed_dim": 16},
            "train": {"epochs": 4, "patience": None, "lr": 3e-3, "micro_batch": 4},
            "parallel": {"global_batch": 8},
            "evaluation": {"bootstrap": 50},
            "tracking": {"enabled": False},
            "output": str(output),
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        return validate(Config, values, "test")


def slide_features(
    slide_id: str, cells: int, dim: int, rng: np.random.Generator, signal: float = 0.0, encoder: str = ENCODER
) -> SlideFeatures:
    """One slide with `cells` 5x tiles, each with its 4 tiles at 10x and 16 at 20x."""
    columns = np.arange(cells)
    cell_xy = np.stack([columns % 4, columns // 4], axis=1) * 1024
    features, coords, parents = {}, {"x5": cell_xy}, {}
    for finer, coarser, side in (("x10", "x5", 512), ("x20", "x10", 256)):
        steps = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * side
        coords[finer] = (coords[coarser][:, None] + steps[None]).reshape(-1, 2)
        parents[finer] = np.repeat(np.arange(len(coords[coarser])), 4).astype(np.int32)
    for name, xy in coords.items():
        values = rng.normal(size=(len(xy), dim))
        values[:, 0] += signal
        features[name] = values.astype(np.float16)
    attrs = {
        "encoder": encoder,
        "tile_px_level0": {"x5": 1024, "x10": 512, "x20": 256},
        "mpp": 0.5,
    }
    coords32 = {name: xy.astype(np.int32) for name, xy in coords.items()}
    return SlideFeatures(slide_id, features, coords32, parents, attrs)


def make_cohort(
    folder: Path,
    *,
    patients: int = 48,
    dim: int = 8,
    two_slides: int = 1,
    seed: int = 0,
    max_cells: int = 4,
    encoder: str = ENCODER,
    prefix: str = "PT",
    pace: float = 1.0,
    shift: float = 0.0,
) -> CohortFiles:
    """A cohort whose first embedding channel carries the log-hazard; about half of it censored.

    `pace` stretches all times, and `shift` moves that channel, so that cohorts differ in their baseline hazard.
    """
    rng = np.random.default_rng(seed)
    log_hazard = rng.normal(size=patients) * 2.5
    death = rng.exponential(size=patients) * 20 * pace * np.exp(-log_hazard)
    censoring = rng.exponential(size=patients) * 30 * pace
    rows, slides = [], []
    for i in range(patients):
        case = f"{prefix}-{i:04d}"
        for k in range(2 if i < two_slides else 1):
            slide_id = f"{case}-{k + 1}"
            cells = int(rng.integers(1, max_cells + 1))
            slides.append(slide_features(slide_id, cells, dim, rng, log_hazard[i] + shift, encoder))
            rows.append(
                {
                    "patient": case,
                    "slide": slide_id,
                    "time": round(min(death[i], censoring[i]) + 0.1, 3),
                    "event": int(death[i] <= censoring[i]),
                }
            )
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "clinical.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    pack_store(MadeUpStore(slides), folder / "shards")
    return CohortFiles(table, folder / "shards")


def make_cohorts(folder: Path, *, patients: int = 48) -> dict[str, CohortFiles]:
    """Two cohorts with opposite baseline hazards: that with the higher first channel lives ten times as long."""
    return {
        "short": make_cohort(folder / "short", patients=patients, seed=1, prefix="S", pace=0.3, shift=-3.0),
        "long": make_cohort(folder / "long", patients=patients, seed=2, prefix="L", pace=3.0, shift=3.0),
    }


def joint_config(files: dict[str, CohortFiles], output: Path, **sections: Any) -> Config:
    """A configuration that trains on several cohorts as one, `both`."""
    one = next(iter(files.values()))
    together: dict[str, Any] = {
        "cohort": {"name": "both", "table": "cohort.csv"},
        "cohorts": {name: {"table": str(of.table)} for name, of in files.items()},
        "data": {"shards": [str(of.shards) for of in files.values()]},
        "splits": {},
    }
    joint = {name: {**values, **sections.pop(name, {})} for name, values in together.items()}
    if joint["splits"].get("scheme") == "cohort":
        joint["splits"] = {"folds": len(files), **joint["splits"]}
    return one.config(output, **joint, **sections)
