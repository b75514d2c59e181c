"""The commands score, null and audit, as a user types them."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from cfusion.cli import cmd_evidence as evidence
from cfusion.cohort.audited import audited
from cfusion.cohort.read import read_cohort
from cfusion.config import Config, load_config
from cfusion.errors import CfusionError, ConfigError, DataError
from cfusion.report.evidence import cohort_null, first_run_outcomes
from cfusion.survival.null import EpochChoice

app = typer.Typer()
evidence.register(app)


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if isinstance(result.exception, CfusionError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "coad.yaml"
    path.write_text(
        "cohort: {name: tcga_coad, table: package:tcga/clinical/tcga_coad.csv}\n"
        "splits: {directory: package:tcga/splits/tcga_coad}\n"
    )
    return path


def test_score_writes_the_published_numbers(material: Path, tmp_path: Path) -> None:
    source = material / "published/mcat_iccv2021/predictions.csv"
    table = pd.read_csv(source)
    small = tmp_path / "predictions.csv"
    table[table["cohort"] == "ucec"].to_csv(small, index=False)
    output = run("score", "--predictions", small, "--out", tmp_path / "out", "--bootstrap", "20")
    assert "ucec\tAMIL\tC within folds 0.624 [" in output
    assert "\tmean 0.625 ± 0.057\tpooled 0.601" in output
    assert "note: ucec, DeepSets (unknown): no model; within each fold all patients have the same risk." in output
    folds = pd.read_csv(tmp_path / "out/scores.csv")
    assert folds.columns[:6].tolist() == ["model", "cohort", "fold", "n", "events", "harrell_c"]
    summary = pd.read_csv(tmp_path / "out/summary.csv")
    assert {"cindex_mean", "cindex_std", "cindex_pooled", "logrank_p", "cindex_low", "cindex_high"} <= set(summary)
    assert (tmp_path / "out/index.html").stat().st_size > 20_000
    with pytest.raises(ConfigError, match="expected increasing months"):
        run("score", "--predictions", small, "--out", tmp_path / "out", "--horizons", "60,12")
    with pytest.raises(ConfigError, match="expected increasing months"):
        run("score", "--predictions", small, "--out", tmp_path / "out", "--horizons", "nan")


def test_score_says_what_a_risk_adds_to_the_clinic(material: Path, tmp_path: Path) -> None:
    table = pd.read_csv(material / "published/mcat_iccv2021/predictions.csv")
    small = tmp_path / "predictions.csv"
    table[(table["cohort"] == "ucec") & (table["model"] == "AMIL")].to_csv(small, index=False)
    covariates = "package:tcga/covariates/tcga_ucec.csv"
    output = run("score", "--predictions", small, "--out", tmp_path, "--bootstrap", "20", "--covariates", covariates)
    assert "clinical 0.786, added +0.003 [" in output
    assert "adjusted HR per SD 1.29, p 0.031" in output
    page = (tmp_path / "index.html").read_text()
    assert "it adds to age, stage and grade, which reach .79 by themselves (adjusted hazard ratio 1.29 per SD" in page
    assert "Decision curve at " in page
    assert "Cox: age, stage and grade" in page


def test_a_failed_score_leaves_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("model,cohort,fold,case_id,risk,survival_months,event\nm,c,0,a,nan,3,1\n")
    with pytest.raises(DataError, match="values of risk are missing"):
        run("score", "--predictions", bad, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_null(config: Path) -> None:
    published = run("null", config, "train.recipe=published", "--unit", "slide")
    rows = [line.split("\t") for line in published.splitlines()[1:]]
    assert [row[1] for row in rows] == ["strict, fixed-epoch", "published", "published"]
    assert float(rows[0][3]) == pytest.approx(0.5, abs=0.02)
    assert float(rows[1][3]) == pytest.approx(0.662, abs=0.01)
    assert float(rows[2][3]) == pytest.approx(0.610, abs=0.01)
    assert rows[1][2] == "independent; at most 100 epochs, patience 20, from epoch 5 on"
    with pytest.raises(ConfigError, match="expected case or slide"):
        run("null", config, "--unit", "tile")


def test_null_chooses_among_the_epochs_of_the_configuration(config: Path) -> None:
    def means(*overrides: str) -> list[float]:
        return [float(line.split("\t")[3]) for line in run("null", config, *overrides).splitlines()[1:]]

    assert means("train.epochs=1") == pytest.approx([0.5] * 3, abs=0.02)
    assert 0.5 < means("train.epochs=5")[1] < means("train.epochs=40", "train.patience=null")[1] - 0.02
    with pytest.raises(ConfigError, match=r"No epoch may be chosen: train\.min_epoch=5, and train\.epochs=5"):
        run("null", config, "train.epochs=5", "train.min_epoch=5")


def test_null_prints_the_limits_of_the_report(config: Path) -> None:
    settings = load_config(config, [])
    found = audited(settings, read_cohort(settings.cohort))
    outcomes = found.cohort.cases[["time_months", "event"]].set_axis(["survival_months", "event"], axis=1)
    rows = pd.concat(
        [outcomes.loc[list(split.test)].assign(seed=0, repeat=0, fold=split.fold) for split in found.splits]
    )
    folds, _ = first_run_outcomes(rows.sample(frac=1, random_state=1))
    report = [cohort_null(folds, None).unchanged, cohort_null(folds, EpochChoice.of(settings.train)).independent]
    printed = [line.split("\t")[3:] for line in run("null", config).splitlines()[1:3]]
    assert printed == [[f"{v:.3f}" for v in (null.mean, null.sd, null.high, null.high_error)] for null in report]


def test_audit_names_what_it_drops_and_stops_when_strict(config: Path) -> None:
    output = run("audit", config)
    assert output.count("[zero_time]") == 23
    assert "in the tables: 416 patients, 424 slides" in output
    with pytest.raises(DataError, match=r"23 findings \(23 zero_time\)"):
        run("audit", config, "--strict")
    assert "[zero_time]" not in run("audit", config, "cohort.keep_zero_times=true")


def test_null_trains_on_permuted_outcomes(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def cross_validate(settings: Config) -> SimpleNamespace:
        seen.append((settings.evaluation.permute_outcomes, settings.output))
        return SimpleNamespace(summary=pd.DataFrame([{"cindex_mean": 0.49, "cindex_within": 0.5}]))

    monkeypatch.setattr("cfusion.runs.crossval.cross_validate", cross_validate)
    output = run("null", config, f"output={tmp_path}/run", "--permutations", "2", "--repetitions", "2")
    assert seen == [(0, tmp_path / "run-permuted-0"), (1, tmp_path / "run-permuted-1")]
    assert "permuted outcomes, seed 1 (strict): C within folds 0.500, mean 0.490" in output
