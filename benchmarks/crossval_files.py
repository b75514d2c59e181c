"""A cohort on disk for both sides of `benchmarks.crossval`: real patients and folds, made-up bags, two layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cfusion.cohort.read import read_cohort
from cfusion.config import CohortConfig
from cfusion.study.packaged import FOLDER
from cfusion.types import Cohort, SlideFeatures
from preprocess.packing import pack_store

COHORT = "tcga_blca"
DIM = 1024
NAMES = {"crossfusion": ("x20", "x10", "x5"), "amil": ("x20",)}


@dataclass(frozen=True)
class Size:
    """How much of it: patients (none: all), median number of tiles at 20x, epochs."""

    patients: int | None
    tiles: int
    epochs: int


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


def make_files(folder: Path, size: Size, names: tuple[str, ...]) -> Files:
    """Table, folds, shards and `.pt` files of the cohort, or of some of its patients out of every fold."""
    table = pd.read_csv(FOLDER / "tcga" / "clinical" / f"{COHORT}.csv")
    splits = [pd.read_csv(FOLDER / "tcga" / "splits" / COHORT / f"splits_{k}.csv") for k in range(5)]
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
