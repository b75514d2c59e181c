"""Test complete runs: every fold trains once, a stopped run resumes, results are tracked and registered."""

import dataclasses
import html
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from factories import ENCODER, CohortFiles, MadeUpStore, make_cohort
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.cohort.permutation import permuted
from cfusion.config import Config, load_config
from cfusion.data.shards import ShardDataset
from cfusion.errors import ConfigError, DataError
from cfusion.report.runs import report_runs
from cfusion.run_folder import is_done
from cfusion.runs import crossval
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run
from cfusion.training.folds import fit
from cfusion.types import SlideFeatures
from preprocess.packing import pack_store


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=60)


def tracked(files: CohortFiles, folder, **sections) -> Config:
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracking = {"enabled": True, "uri": uri, "experiment": "test", "register_as": "made-up"}
    return files.config(folder / "run", tracking=tracking, **sections)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Config:
    config = tracked(files, tmp_path_factory.mktemp("finished"))
    cross_validate(config)
    return config


def test_every_patient_is_predicted_once_by_a_model_that_never_saw_it(files, finished):
    predictions = pd.read_csv(finished.output / "predictions.csv")
    assert len(predictions) == predictions["case_id"].nunique() == 60
    for split in Run.prepare(finished).splits:
        fold = predictions[predictions["fold"] == split.fold]
        assert set(fold["case_id"]) == set(split.test)
        assert not set(split.test) & {*split.train, *split.validation}


def test_mlflow_has_a_parent_a_child_a_fold_and_the_registered_model(finished):
    client = MlflowClient(str(finished.tracking.uri))
    experiment = client.get_experiment_by_name("test")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    assert len(runs) == 4
    assert all(run.info.status == "FINISHED" for run in runs)
    assert parents[0].data.params["model.name"] == "amil"
    pooled = pd.read_csv(finished.output / "summary.csv")["cindex_pooled"].iloc[0]
    assert parents[0].data.metrics["cindex_pooled"] == pytest.approx(pooled)
    child = next(run for run in runs if run.data.tags.get("mlflow.runName") == "fold_0")
    history = client.get_metric_history(child.info.run_id, "train_loss")
    assert [metric.step for metric in history] == [0, 1, 2, 3]
    version = client.get_model_version_by_alias("made-up", "candidate")
    assert version.run_id == parents[0].info.run_id


def test_the_registered_model_answers_a_bag_as_the_fold_models_do(finished, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(finished.tracking.uri))
    served = mlflow.pyfunc.load_model("models:/made-up@candidate")
    rng = np.random.default_rng(0)
    bag = {name: rng.normal(size=(n, 8)).astype(np.float32) for name, n in (("x20", 16), ("x10", 4), ("x5", 1))}
    answer = served.predict(bag)
    pd.testing.assert_frame_equal(answer, FoldEnsemble.load(finished.output).predict_bag(bag))
    assert answer["survival"].between(0, 1).all()
    assert answer["survival"].is_monotonic_decreasing
    with pytest.raises(MlflowException, match="x20"):
        served.predict({**bag, "x20": bag["x20"].astype(np.float64)})


@pytest.mark.slow
def test_a_run_that_lost_a_fold_does_that_fold_and_ends_with_the_same_bytes(files, tmp_path, monkeypatch):
    config = files.config(tmp_path / "run")
    cross_validate(config)
    before = (config.output / "predictions.csv").read_bytes()
    for name in ("done.json", "predictions.csv"):
        (config.output / name).unlink()
    for path in sorted((config.output / "fold_1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (config.output / "fold_1").rmdir()
    trained = []
    original = crossval.fit
    monkeypatch.setattr(crossval, "fit", lambda *a, **k: trained.append(a[2].fold) or original(*a, **k))
    cross_validate(config)
    assert trained == [1]
    assert (config.output / "predictions.csv").read_bytes() == before


def test_a_failed_fold_fails_the_run(files, tmp_path, monkeypatch):
    original = crossval.fit

    def fails(config, cohort, split, **options):
        if split.fold == 1:
            raise DataError("fold 1 broke")
        return original(config, cohort, split, **options)

    monkeypatch.setattr(crossval, "fit", fails)
    config = tracked(files, tmp_path)
    with pytest.raises(DataError, match="fold 1 broke"):
        cross_validate(config)
    assert not is_done(config.output)
    assert not (config.output / "summary.csv").exists()
    assert (config.output / "fold_0" / "fold.json").exists()
    client = MlflowClient(str(config.tracking.uri))
    runs = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FAILED", "FINISHED"]


@pytest.mark.slow
def test_edited_predictions_are_not_reported_and_are_written_again_from_the_folds(files, tmp_path):
    config = files.config(tmp_path / "run", splits={"folds": 2}, train={"epochs": 1})
    cross_validate(config)
    of_run, of_fold = config.output / "predictions.csv", config.output / "fold_0" / "predictions.csv"
    before, fold_before = of_run.read_text(), of_fold.read_text()
    edited = pd.read_csv(of_run).assign(risk=lambda rows: -rows["survival_months"])
    edited.to_csv(of_run, index=False)
    with pytest.raises(DataError, match=r"run/predictions\.csv: was changed after the training wrote it"):
        report_runs([config.output], tmp_path / "report", title="Test")
    assert not (tmp_path / "report").exists()
    cross_validate(load_config(config.output / "config.yaml", [f"output={config.output}"]))  # as the error says
    assert of_run.read_text() == before
    report_runs([config.output], tmp_path / "report", title="Test")
    of_fold.write_text(fold_before.replace("amil", "amil "))
    with pytest.raises(DataError, match=r"fold_0/predictions\.csv: was changed"):
        cross_validate(config)
    shutil.rmtree(config.output / "fold_0")
    cross_validate(config)
    assert (of_run.read_text(), of_fold.read_text()) == (before, fold_before)


def test_the_folder_of_another_run_is_refused_and_left_unchanged(files, tmp_path):
    config = files.config(tmp_path / "run")
    cross_validate(config)
    before = (config.output / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run that differs in config\.seed \(7 there, 99 here\)\."):
        cross_validate(files.config(tmp_path / "run", seed=99))
    assert (config.output / "run.json").read_bytes() == before


def test_permuted_outcomes_are_the_same_outcomes_of_other_patients(files, tmp_path):
    real = Run.prepare(files.config(tmp_path)).cohort
    shuffled = permuted(real, 3)
    assert list(shuffled.cases.index) == list(real.cases.index)
    assert not shuffled.cases["time_months"].equals(real.cases["time_months"])
    pairs = [sorted(zip(c.cases["time_months"], c.cases["event"], strict=True)) for c in (real, shuffled)]
    assert pairs[0] == pairs[1]


@pytest.mark.slow
def test_a_report_shows_the_null_of_permuted_outcomes(files, finished, tmp_path):
    null = files.config(tmp_path / "null", evaluation={"permute_outcomes": 1, "bootstrap": 0})
    cross_validate(null)
    report_runs([finished.output, null.output], tmp_path / "report", title="Test", oracle={"made_up": 0.8})
    rows = json.loads((tmp_path / "report" / "summary.json").read_text())
    permuted_c = pd.read_csv(null.output / "summary.csv")["cindex_within"].iloc[0]
    assert [row["model"] for row in rows] == ["amil"]
    assert rows[0]["permuted"] == pytest.approx(permuted_c)
    assert rows[0]["oracle"] == 0.8
    assert rows[0]["cindex_low"] < rows[0]["cindex_pooled"] < rows[0]["cindex_high"]


@pytest.mark.slow
def test_a_run_of_one_fold_is_scored_and_reported_with_its_training_patients_outcomes(files, finished, tmp_path):
    config = files.config(tmp_path / "run", splits={"fold": 1})
    scores = cross_validate(config)
    report_runs([config.output], tmp_path / "report", title="Test")
    (row,) = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert row["cindex_pooled"] == pytest.approx(scores.summary["cindex_pooled"].iloc[0], rel=1e-12)
    full, single = (pd.read_csv(run.output / "scores.csv").set_index("fold").loc[1] for run in (finished, config))
    assert single["ibs"] == pytest.approx(full["ibs"], rel=1e-12), "censoring is estimated on the same patients"


def test_a_slide_missing_from_the_shards_is_reported_and_stops_under_strict(files, tmp_path):
    table = tmp_path / "clinical.csv"
    rows = pd.read_csv(files.table)
    extra = pd.DataFrame([{"patient": "PT-9999", "slide": "PT-9999-1", "time": 5.0, "event": 1}])
    pd.concat([rows, extra]).to_csv(table, index=False)
    config = CohortFiles(table, files.shards).config(tmp_path / "run")
    run = Run.prepare(config)
    assert any("PT-9999" in finding.subject or "PT-9999" in finding.message for finding in run.audit.findings)
    assert "PT-9999" not in run.cohort.cases.index
    with pytest.raises(DataError, match="PT-9999"):
        Run.prepare(CohortFiles(table, files.shards).config(tmp_path / "run", evaluation={"strict": True}))


@pytest.mark.slow
def test_a_starting_run_says_what_the_audit_dropped(files, tmp_path, caplog):
    table = pd.read_csv(files.table)
    late = table.index[table["patient"] == "PT-0007"]
    table.loc[late, "time"] = -1.0
    table.to_csv(tmp_path / "clinical.csv", index=False)
    config = CohortFiles(tmp_path / "clinical.csv", files.shards).config(tmp_path / "run", train={"epochs": 1})
    with caplog.at_level("INFO", logger="cfusion.runs.run"):
        cross_validate(config)
    assert "audit: dropped: PT-0007 has a follow-up of -1 months [negative_time]" in caplog.messages


def test_a_run_with_an_external_test_is_reported_as_it_was_scored(files, tmp_path):
    chosen = pd.read_csv(files.table)["patient"].unique()[:20]
    (tmp_path / "test.csv").write_text("\n".join(["case_id", *chosen]), encoding="utf-8")
    config = files.config(tmp_path / "run", splits={"test_cases": str(tmp_path / "test.csv")}, train={"epochs": 2})
    own = cross_validate(config).folds
    report_runs([config.output], tmp_path / "report", title="One fold")
    reported = pd.read_csv(tmp_path / "report" / "scores.csv", float_precision="round_trip")
    for column in ("harrell_c", "uno_c", "truncation_months", "ibs_null"):
        assert reported[column].tolist() == pytest.approx(own[column].tolist(), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("protocol", ["strict", "fixed-epoch"])
def test_the_outcomes_of_the_test_patients_change_nothing_in_training(files, tmp_path, protocol):
    config = files.config(tmp_path / "run", evaluation={"protocol": protocol}, train={"epochs": 3})
    run = Run.prepare(config)
    split, cases = run.splits[0], run.cohort.cases.copy()
    test = list(split.test)
    cases.loc[test, "time_months"] = cases.loc[test, "time_months"] * 3 + 1
    cases.loc[test, "event"] = ~cases.loc[test, "event"]
    first, second = (fit(config, c, split) for c in (run.cohort, dataclasses.replace(run.cohort, cases=cases)))
    assert first.best_epoch == second.best_epoch
    assert first.model.card == second.model.card  # with time bins and cut-off
    pd.testing.assert_frame_equal(first.history, second.history)
    for name, weights in first.model.module.state_dict().items():
        assert torch.equal(weights, second.model.module.state_dict()[name]), name
    predicted = [c for c in first.predictions if c not in ("survival_months", "event")]
    pd.testing.assert_frame_equal(first.predictions[predicted], second.predictions[predicted])


@pytest.mark.slow
def test_a_changed_recipe_is_named_in_the_log_run_json_report_and_model_cards(files, tmp_path, caplog):
    values = {"recipe": "published", "epochs": 2}
    config = files.config(tmp_path / "run", evaluation={"protocol": "published", "bootstrap": 10})
    config = Config.model_validate({**config.model_dump(), "train": values, "data": {"shards": str(files.shards)}})
    assert "train.epochs=2 (published: 100)" in config.notes[0]
    assert [note.partition(":")[0] for note in config.notes] == [
        "No longer the published recipe",
        "Error of the published program, leak",
        *["Error of the published program, noise"] * 3,
    ]
    with caplog.at_level("WARNING"):
        cross_validate(config)
    page = report_runs([config.output], tmp_path / "report", title="Run")
    assert json.loads((config.output / "run.json").read_text())["provenance"]["notes"] == list(config.notes)
    for fold in range(3):
        card = json.loads((config.output / f"fold_{fold}/model/model.json").read_text())
        assert card["notes"] == list(config.notes)
    for note in config.notes:
        assert sum(note in message for message in caplog.messages) == 1
        for path in (page, page.parent / "model_card.md"):
            assert f"made_up, amil, published: {note}" in html.unescape(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", ["amil", "mean_mil", "crossfusion_single"])
def test_a_model_of_one_magnification_trains_on_shards_of_one(tmp_path, model: str):
    files = make_cohort(tmp_path / "cohort", patients=60)
    dataset = ShardDataset.open(files.shards)
    slides = [
        SlideFeatures(name, {"x20": np.array(dataset.read(name, ("x20",))["x20"])}, {}, {}, {"encoder": ENCODER})
        for name in dataset.slide_ids
    ]
    pack_store(MadeUpStore(slides), tmp_path / "x20")
    files = CohortFiles(files.table, tmp_path / "x20")
    config = files.config(tmp_path / "run", model={"name": model, "embed_dim": 16, "num_heads": 2})
    run = Run.prepare(config)
    assert run.config.data.magnifications == (20.0,)
    assert fit(config, run.cohort, run.splits[0]).model.card.magnifications == (20.0,)
    crossfusion = files.config(tmp_path / "cf", model={"name": "crossfusion", "embed_dim": 16, "num_heads": 2})
    with pytest.raises(DataError, match=r"no magnification x10, x5.*data.magnifications"):
        fit(crossfusion, run.cohort, run.splits[0])
