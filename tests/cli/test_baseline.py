"""`cfusion baseline`: the clinical model of six real cohorts, and what it refuses."""

from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from cfusion.cli import cmd_baseline
from cfusion.errors import CfusionError, ConfigError, DataError

app = typer.Typer()
cmd_baseline.register(app)
COHORTS = ("blca", "brca", "coad", "gbmlgg", "luad", "ucec")


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, CfusionError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_six_cohorts_reach_their_known_figures(material: Path) -> None:
    figures = pd.read_csv(material / "clinic/clinical_baseline.csv")
    figures = figures[figures["model"] == "all"].set_index("cohort")
    lines = run(*(f"tcga_{name}" for name in COHORTS), "evaluation.bootstrap=20").splitlines()
    assert len(lines) == 6
    for name, line in zip(COHORTS, lines, strict=True):
        cohort, patients, scores = line.split("\t")
        assert cohort == f"tcga_{name}"
        assert patients.endswith("events")
        assert float(scores.split()[1]) == pytest.approx(figures.loc[name, "mean_c"], abs=0.002)


def test_outcomes_are_permuted_as_in_a_run() -> None:
    scores = run("tcga_ucec", "evaluation.bootstrap=20", "evaluation.permute_outcomes=1").split("\t")[2]
    assert float(scores.split()[1]) < 0.65  # .786 as observed


def test_the_slides_that_a_run_keeps_are_kept(tmp_path: Path) -> None:
    table = pd.DataFrame({"patient": [f"TCGA-A1-{1000 + i}" for i in range(60)]})
    table["slide"] = table["patient"] + "-01A-01-TS1"
    table["time"], table["event"], table["age"] = range(1, 61), [1, 0] * 30, [40 + 7 * i % 50 for i in range(60)]
    table.to_csv(tmp_path / "clinical.csv", index=False)
    study = tmp_path / "study.yaml"
    study.write_text(f"cohort: {{name: study, table: {tmp_path}/clinical.csv, covariates: {{age: number}}}}\n")
    with pytest.raises(DataError, match=r"keep_tissue=\[frozen\]"):
        run(study, "evaluation.bootstrap=20")
    assert "60 patients" in run(study, "evaluation.bootstrap=20", "cohort.keep_tissue=[frozen]")


def test_it_writes_a_report(tmp_path: Path) -> None:
    run("tcga_ucec", "evaluation.bootstrap=20", "evaluation.endpoint=dss", "--out", tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "tcga_ucec: clinical ranks patients better than chance" in page
    assert "24 patients who died of another cause" in page
    assert "age (median)" in page
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert set(predictions["model"]) == {"clinical"}
    assert {"survival_21", "edge_21", "risk_cutoff"} <= set(predictions)


def test_predicted_survival_is_right_on_average(tmp_path: Path) -> None:
    """With few times, interpolation makes the survival of a Cox model 10 points too high."""
    run("tcga_blca", "evaluation.bootstrap=0", "--out", tmp_path)
    row = pd.read_csv(tmp_path / "summary.csv").iloc[0]
    assert row["observed_expected"] == pytest.approx(1, abs=0.08)
    assert row["ici"] < 0.05


def test_covariates_that_order_all_events_are_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pd.DataFrame({"patient": [f"P{i}" for i in range(300)], "slide": [f"S{i}" for i in range(300)]})
    table["time"], table["event"] = range(1, 301), [1, 0, 0] * 100
    table["days_to_death"] = table["time"] * 30
    table.to_csv(tmp_path / "clinical.csv", index=False)
    study = tmp_path / "study.yaml"
    study.write_text(
        f"cohort: {{name: study, table: {tmp_path}/clinical.csv, covariates: {{days_to_death: number}}}}\n"
    )
    assert "C 1.000" in run(study, "evaluation.bootstrap=20")
    found = [record.message for record in caplog.records if "monotone likelihood" in record.message]
    assert len(found) == 5
    assert found[0].startswith(
        "cohort study, fold 0: all 80 events of the training patients are ordered by days_to_death (monotone"
    )


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration was given"):
        run("evaluation.bootstrap=20")
    with pytest.raises(DataError, match="there are no clinical covariates"):
        run("tcga_ucec", "cohort.covariates={}")
    with pytest.raises(ConfigError, match="no endpoint"):
        run("tcga_ucec", "cohort.covariates_table=null", "evaluation.endpoint=dss")
