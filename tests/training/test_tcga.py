"""The published bladder cancer cohort: real outcomes and folds, synthetic features in realistic bag sizes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from factories import ENCODER, slide_features

import cfusion
from cfusion.config import Config, validate
from cfusion.runs.crossval import cross_validate
from cfusion.types import SlideFeatures
from preprocess.packing import pack_store

DIM = 16


class GeneratedStore:
    """Generates slides when they are read: log-normal numbers of 5x cells, and 16 times as many tiles at 20x."""

    def __init__(self, slide_ids: list[str]) -> None:
        self._slide_ids = slide_ids
        sizes = np.random.default_rng(0).lognormal(np.log(500), 0.6, len(slide_ids))
        self._cells = dict(zip(slide_ids, np.clip(sizes, 20, 2000).astype(int), strict=True))

    def slide_ids(self) -> Iterator[str]:
        return iter(self._slide_ids)

    def read(self, slide_id: str) -> SlideFeatures:
        seed = int.from_bytes(slide_id.encode()[-8:], "little")
        return slide_features(slide_id, int(self._cells[slide_id]), DIM, np.random.default_rng(seed))

    def attrs(self, slide_id: str) -> dict[str, Any]:
        return self.read(slide_id).attrs


def configuration(folder: Path) -> Config:
    values = {
        "cohort": {"name": "tcga_blca", "table": "package:tcga/clinical/tcga_blca.csv"},
        "splits": {"directory": "package:tcga/splits/tcga_blca"},
        "data": {"shards": str(folder / "shards"), "encoder": ENCODER},
        "model": {"name": "amil"},
        "train": {"epochs": 1},
        "evaluation": {"bootstrap": 100},
        "tracking": {"enabled": False},
        "output": str(folder / "run"),
    }
    return validate(Config, values, "test")


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_five_folds_of_blca_with_bags_of_realistic_size(tmp_path):
    config = configuration(tmp_path)
    cohort = cfusion.read_cohort(config.cohort)
    index = pack_store(GeneratedStore(list(cohort.slides.index)), tmp_path / "shards")
    tiles = [sample.tiles["x20"] for sample in index.samples]
    assert len(tiles) == 437
    assert np.median(tiles) > 6000

    scores = cross_validate(config)
    summary = scores.summary.iloc[0]
    assert summary["n"] == 373
    assert summary["events"] == 169
    assert list(scores.folds["fold"]) == [0, 1, 2, 3, 4]

    predictions = pd.read_csv(config.output / "predictions.csv")
    assert predictions["case_id"].nunique() == len(predictions) == 373
    assert np.isfinite(predictions["risk"]).all()
