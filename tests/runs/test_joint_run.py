"""A run over several cohorts: its identity, its tables, its report, and its sequel on one of them."""

import json

import numpy as np
import pandas as pd
import pytest
from factories import joint_config, make_cohorts

import cfusion
from cfusion.config import Config
from cfusion.errors import ConfigError, DataError
from cfusion.files import digest_file
from cfusion.report.comparison.cells import ComparedRun, compare_runs
from cfusion.report.runs import report_runs
from cfusion.runs.crossval import cross_validate
from cfusion.runs.run import Run
from cfusion.survival.metrics import concordance


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_cohorts(tmp_path_factory.mktemp("cohorts"))


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Config:
    config = joint_config(files, tmp_path_factory.mktemp("joint") / "run", train={"epochs": 2})
    cross_validate(config)
    return config


@pytest.mark.slow
def test_the_tables_have_each_cohort_and_the_stratified_score(finished):
    predictions = pd.read_csv(finished.output / "predictions.csv")
    assert set(predictions["cohort"]) == {"short", "long"}
    summary = pd.read_csv(finished.output / "summary.csv").set_index("cohort")
    assert list(summary.index) == ["both", "short", "long"]
    cells = predictions["cohort"] + predictions["fold"].astype(str)
    outcomes = predictions["survival_months"], predictions["event"].astype(bool)
    expected = concordance(*outcomes, predictions["risk"], cells).cindex
    assert summary.loc["both", "cindex_within"] == pytest.approx(expected, abs=1e-12)
    assert summary[["within_low", "within_high"]].notna().all(axis=None)
    folds = pd.read_csv(finished.output / "scores.csv")
    assert folds["cohort"].value_counts().to_dict() == {"both": 3, "short": 3, "long": 3}
    assert set(pd.read_csv(finished.output / "outcomes.csv")["cohort"]) == {"short", "long"}


@pytest.mark.slow
def test_the_report_shows_both_and_each(finished, tmp_path):
    page = report_runs([finished.output], tmp_path / "report", title="Both").read_text()
    rows = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert [row["cohort"] for row in rows] == ["both", "short", "long"]
    written = pd.read_csv(finished.output / "summary.csv")
    assert [row["cindex_within"] for row in rows] == pytest.approx(written["cindex_within"].tolist())
    assert "overall survival (OS)" in page
    assert "within each cohort" in page
    report_runs([finished.output], tmp_path / "hidden", title="Both", pseudonyms=True)
    assert "S-0001" not in (tmp_path / "hidden" / "index.html").read_text()


def test_every_cohort_is_part_of_the_identity(files, finished, tmp_path):
    run = Run.prepare(finished)
    assert set(run.provenance["table_sha256"]) == {"short", "long"}
    table = pd.read_csv(files["long"].table)
    table.loc[table["patient"] == table["patient"][0], "time"] += 1
    table.to_csv(tmp_path / "long.csv", index=False)
    cohorts = {"short": {"table": str(files["short"].table)}, "long": {"table": str(tmp_path / "long.csv")}}
    changed = joint_config(files, finished.output, train={"epochs": 2}, cohorts=cohorts)
    with pytest.raises(ConfigError, match=r"holds a run that differs in .*table_sha256\.long"):
        cross_validate(changed)
    turned = joint_config({name: files[name] for name in reversed(files)}, tmp_path / "turned", train={"epochs": 2})
    assert Run.prepare(turned).identity != run.identity


@pytest.mark.slow
def test_an_unfinished_run_goes_on_to_the_same_bytes(files, finished, tmp_path):
    config = joint_config(files, tmp_path / "again", train={"epochs": 2})
    cross_validate(config)
    before = (config.output / "predictions.csv").read_bytes()
    assert before == (finished.output / "predictions.csv").read_bytes()
    for name in ("done.json", "predictions.csv", "fold_1/fold.json"):
        (config.output / name).unlink()
    cross_validate(config)
    assert (config.output / "predictions.csv").read_bytes() == before


@pytest.mark.slow
def test_folds_together_give_the_same_predictions(files, finished, tmp_path):
    config = joint_config(files, tmp_path / "together", train={"epochs": 2, "folds": "together"})
    cross_validate(config)
    one, other = (pd.read_csv(c.output / "predictions.csv").sort_values("case_id") for c in (finished, config))
    np.testing.assert_allclose(one["risk"], other["risk"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_each_fold_leaves_out_a_cohort(files, tmp_path):
    config = joint_config(files, tmp_path / "run", train={"epochs": 1}, splits={"scheme": "cohort"})
    scores = cross_validate(config)
    assert list(scores.summary["cohort"]) == ["both", "short", "long"]
    assert scores.summary["within_low"].notna().all()
    assert scores.folds.groupby("cohort")["fold"].nunique().to_dict() == {"both": 2, "short": 1, "long": 1}
    assert "survival_1" not in scores.predictions
    report_runs([config.output], tmp_path / "report", title="Left out")


@pytest.mark.slow
def test_a_run_of_one_cohort_starts_from_the_joint_one_on_the_same_folds(files, finished, tmp_path):
    """The model of fold K of the joint run has not seen the patients that fold K of the cohort scores."""
    config = finished.of_cohort("long")
    train = config.train.model_copy(update={"start_from": str(finished.output)})
    run = config.model_copy(update={"output": tmp_path / "long", "train": train})
    scores = cross_validate(run)
    assert list(scores.summary["cohort"]) == ["long"]
    card = json.loads((run.output / "fold_2" / "model" / "model.json").read_text())
    assert card["start"]["cohort"] == "both"
    assert card["start"]["fold"] == 2


@pytest.mark.slow
def test_a_run_starts_from_a_registered_model(files, tmp_path):
    tracking = {"enabled": True, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "register_as": "both"}
    first = joint_config(files, tmp_path / "first", train={"epochs": 1}, tracking=tracking)
    cross_validate(first)
    of_long = first.of_cohort("long")
    train = of_long.train.model_copy(update={"start_from": "models:/both@candidate"})
    run = Run.prepare(of_long.model_copy(update={"output": tmp_path / "long", "train": train}))
    weights = [first.output / f"fold_{fold}" / "model" / "model.safetensors" for fold in range(3)]
    assert [start.sha256 for start in run.starts] == [digest_file(path) for path in weights]
    absent = of_long.train.model_copy(update={"start_from": "models:/nobody@candidate"})
    with pytest.raises(DataError, match="no version candidate of a model nobody"):
        Run.prepare(of_long.model_copy(update={"train": absent}))
    wrong = of_long.train.model_copy(update={"start_from": "models:both"})
    with pytest.raises(ConfigError, match=r"train\.start_from=models:both: expected models:/NAME@ALIAS"):
        Run.prepare(of_long.model_copy(update={"train": wrong}))


@pytest.mark.slow
def test_a_sweep_compares_joint_runs_by_pairs_within_cohorts(files, finished, tmp_path):
    other = joint_config(files, tmp_path / "mean", train={"epochs": 2}, model={"name": "mean_mil"})
    cross_validate(other)
    members = [
        ComparedRun(c.model.name, c.output, "both", "made-up", c.model.name, "strict", c.seed, None, "done")
        for c in (finished, other)
    ]
    comparison = compare_runs(members, bootstrap=40)
    summary = pd.read_csv(finished.output / "summary.csv")
    first = comparison.cells[0].summary
    assert first is not None
    assert first["cindex_within"] == pytest.approx(summary["cindex_within"].iloc[0])
    values = [float(cell.summary["cindex_within"]) for cell in comparison.cells if cell.summary is not None]
    assert abs(comparison.tests["difference"].iloc[0]) == pytest.approx(abs(values[0] - values[1]))


@pytest.mark.slow
def test_the_python_of_the_readme_works_on_several_cohorts(finished):
    cohort = cfusion.read_cohorts(finished)
    split = cfusion.make_splits(cohort, finished.splits, finished.evaluation.protocol)[0]
    run = cfusion.fit(finished, cohort, split)
    scores = cfusion.score(run.predictions, cohort, split, bootstrap=20)
    assert list(scores.summary["cohort"]) == ["both", "short", "long"]
    assert "both amil (strict): C" in repr(scores)
