"""Rivals train from shards; shards that lack what a model needs are refused."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from factories import CohortFiles, MadeUpStore, make_cohort, slide_features

from preprocess.packing import pack_store

RIVALS = ["patchgcn", "deepgraphconv", "hipt", "zoommil"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=24, two_slides=3)


def train(files: CohortFiles, folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """One epoch of two folds by the command."""
    config = files.config(
        folder / "run", model={"name": name, "embed_dim": 16}, train={"epochs": 1}, splits={"folds": 2}
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return subprocess.run(
        [sys.executable, "-m", "cfusion", "train", str(path), *overrides],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_trains_end_to_end(files: CohortFiles, tmp_path: Path, name: str):
    done = train(files, tmp_path, name)
    assert done.returncode == 0, done.stderr
    predictions = pd.concat(pd.read_csv(path) for path in (tmp_path / "run").glob("fold_*/predictions.csv"))
    assert predictions["case_id"].nunique() == 24
    assert np.isfinite(predictions["risk"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("patchgcn", "train.micro_batch=4", "needs the position of every x20 tile, and these bags have none"),
        ("hipt", "train.micro_batch=4", "needs the position of every x20 tile, and these bags have none"),
        ("zoommil", "train.micro_batch=4", "needs the position of every x5 tile, and these bags have none"),
        ("zoommil", "data.magnifications=[20]", "zoommil needs two or more magnifications, and the data offer x20"),
    ],
)
def test_shards_that_lack_what_a_rival_needs_are_refused(
    files: CohortFiles, tmp_path: Path, name: str, override: str, message: str
):
    rng, table = np.random.default_rng(0), pd.read_csv(files.table)
    slides = [dataclasses.replace(slide_features(s, 2, 8, rng), coords={}, parents={}) for s in table["slide"]]
    pack_store(MadeUpStore(slides), tmp_path / "shards")
    done = train(CohortFiles(files.table, tmp_path / "shards"), tmp_path, name, override)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
