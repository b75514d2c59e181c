"""Runs, stores and shards that version 0.1.0 wrote still open; what a newer version writes is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cfusion
from cfusion.apply.ensemble import FoldEnsemble
from cfusion.config import DataConfig
from cfusion.data.shards import ShardDataset
from cfusion.data.store import FeatureStore
from cfusion.errors import DataError, ShardsError
from cfusion.report import write_report
from cfusion.run_folder import fold_folders, is_done, read_run
from cfusion.survival.predictions import read_predictions
from cfusion.training.fitted import FittedModel

MATERIAL = Path(__file__).parent / "material" / "v0_1_0"
NAMES = ("x20", "x10", "x5")


def test_a_finished_run_is_read():
    run = read_run(MATERIAL / "run")
    assert is_done(run.folder)
    assert run.provenance["program"] == "0.1.0"
    assert run.key == ("made_up", "mean_mil", "strict")
    assert [fold.name for fold in fold_folders(run.folder)] == ["fold_0", "fold_1"]
    assert len(run.curves()) == 4


def test_its_models_predict_its_shards_as_they_did():
    data = DataConfig(shards=str(MATERIAL / "cohort" / "shards"))
    for fold in fold_folders(MATERIAL / "run"):
        stored = read_predictions(fold / "predictions.csv").set_index("case_id")
        model = FittedModel.load(fold / "model")
        again = cfusion.predict(model, data, list(stored.index)).set_index("case_id").loc[stored.index]
        np.testing.assert_allclose(again["risk"], stored["risk"], rtol=1e-5)


def test_its_ensemble_loads_and_its_report_is_written(tmp_path: Path):
    assert len(FoldEnsemble.load(MATERIAL / "run").models) == 2
    predictions = pd.read_csv(MATERIAL / "run" / "predictions.csv")
    cohort = cfusion.read_cohort(read_run(MATERIAL / "run").config.cohort.model_copy(
        update={"table": MATERIAL / "cohort" / "clinical.csv"}
    ))  # fmt: skip
    write_report([cfusion.score(predictions, cohort)], tmp_path)
    assert "made_up" in (tmp_path / "index.html").read_text()


def test_its_shards_and_its_store_are_read():
    dataset = ShardDataset.open(MATERIAL / "cohort" / "shards")
    assert len(dataset.slide_ids) == 24
    assert dataset.read(dataset.slide_ids[0], NAMES)["x20"].shape == (16, 8)
    features = FeatureStore.open(MATERIAL / "store", "made-up").read("S-1")
    assert {name: features.features[name].shape for name in NAMES} == {"x20": (16, 8), "x10": (4, 8), "x5": (1, 8)}


@pytest.mark.parametrize("name", ["run.json", "fold_0/model/model.json"])
def test_a_newer_format_is_refused_with_both_numbers(name: str, tmp_path: Path):
    folder = shutil.copytree(MATERIAL / "run", tmp_path / "run")
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, "format": 7}))
    with pytest.raises(DataError, match=r"format 7.* 1\b") as refused:
        read_run(folder) if name == "run.json" else FittedModel.load((folder / name).parent)
    assert str(folder / name) in str(refused.value)


def test_a_newer_index_of_shards_is_refused(tmp_path: Path):
    folder = shutil.copytree(MATERIAL / "cohort" / "shards", tmp_path / "shards")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": "cfusion-shards-2"}))
    with pytest.raises(ShardsError, match="cfusion-shards-1"):
        ShardDataset.open(folder)
