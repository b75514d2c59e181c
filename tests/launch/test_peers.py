"""Predictions of STAMP, nnMIL and Patho-Bench on a sweep's folds are one more model; others are refused by name."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from made_up_sweep import drawn, finished, sweep_file, truth_of
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.errors import CfusionError, ConfigError, DataError, PredictionsError
from cfusion.survival.predictions import read_predictions
from cfusion.types import Cohort, Split
from launch.sweep.plan import PlannedRun, load_sweep, plan
from launch.sweep.results import report_sweep
from launch.sweep.sharing import export_sweep, report_archive

DAYS = 365.25 / 12


def cfusion(*arguments: object) -> str:
    """Output of a command that must succeed."""
    result = CliRunner().invoke(app, ["-q", "sweep", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def path(files, tmp_path) -> Path:
    path = sweep_file(files, tmp_path)
    finished(path)
    return path


def folds(path: Path) -> list[tuple[Split, pd.DataFrame]]:
    """The folds of the sweep with predictions of another program."""
    run: PlannedRun = plan(load_sweep(path))[-1]  # weaker than amil
    cohort: Cohort
    cohort, splits = truth_of(run)
    return [(split, drawn(cohort, split, run, number=9)) for split in splits]


def stamp(path: Path, folder: Path) -> Path:
    """`split-K/patient-preds.csv` of `stamp crossval`: patient, risk, time, event; the last name has a median."""
    for split, frame in folds(path):
        table = pd.DataFrame({
            "PATIENT": frame["case_id"], "pred_score": frame["risk"], "time": frame["survival_months"],
            "event": frame["event"].astype(int), "cut_off=-1.25": "",
        })  # fmt: skip
        (folder / f"split-{split.fold}").mkdir(parents=True)
        table.to_csv(folder / f"split-{split.fold}" / "patient-preds.csv", index=False)
    return folder


def nnmil(path: Path, folder: Path) -> Path:
    """`fold_K/predictions/results_MODEL.csv` of nnMIL: a row per slide, some patients with two."""
    for split, frame in folds(path):
        twice = pd.concat([frame, frame.head(3).assign(risk=frame["risk"].head(3) + 2)])
        table = pd.DataFrame({
            "slide_id": [f"{case}-{number}" for number, case in enumerate(twice["case_id"])],
            "patient_id": twice["case_id"], "dataset": "made_up", "status": twice["event"].astype(float),
            "time": (twice["survival_months"] * DAYS).round(), "risk_score": twice["risk"], "MI": 0.1,
        })  # fmt: skip
        (folder / f"fold_{split.fold}" / "predictions").mkdir(parents=True)
        table.to_csv(folder / f"fold_{split.fold}" / "predictions" / "results_simple_mil.csv", index=False)
    return folder


def patho_bench(path: Path, folder: Path) -> Path:
    """`test_metrics/fold_K/predictions.csv`, as `docs/reference/peers.md` has it written from Patho-Bench."""
    for split, frame in folds(path):
        table = pd.DataFrame({
            "case_id": frame["case_id"], "survival_event": frame["event"].astype(int),
            "survival_time": frame["survival_months"] * DAYS, "preds": frame["risk"],
        })  # fmt: skip
        (folder / "test_metrics" / f"fold_{split.fold}").mkdir(parents=True)
        table.to_csv(folder / "test_metrics" / f"fold_{split.fold}" / "predictions.csv", index=False)
    return folder


WRITERS: dict[str, tuple[Callable[[Path, Path], Path], str, str, str]] = {
    "stamp": (stamp, "STAMP", "published", "months"),
    "nnmil": (nnmil, "nnMIL", "strict", "days"),
    "patho-bench": (patho_bench, "Patho-Bench", "fixed-epoch", "days"),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_a_program_is_one_more_model_of_the_report(path, tmp_path, layout):
    write, title, protocol, unit = WRITERS[layout]
    said = cfusion("import", path, write(path, tmp_path / "peer"), "--from", layout)
    patients = sum(len(frame) for _, frame in folds(path))
    assert said.splitlines()[0] == (
        f"imported {title} (made-up) on made_up: {patients} patients in 3 folds, protocol {protocol}, paired with "
        f"seed 1; times in {unit}"
    )
    sweep = load_sweep(path)
    table = pd.read_csv(report_sweep(sweep, plan(sweep), tmp_path / "report").parent / "cells.csv").set_index("model")
    assert list(table.index) == ["amil", "mean", title]
    assert table.loc[title, "protocol"] == protocol
    assert table.loc[title, "optimistic"] == (protocol == "published")
    assert pd.isna(table.loc[title, "cpu_hours"])
    assert table.loc["amil", "cpu_hours"] == pytest.approx(0.05)
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"imported from {title}" in page


@pytest.mark.slow
def test_a_program_under_the_protocol_of_the_sweep_is_tested_against_its_best_and_shared(path, tmp_path):
    source = patho_bench(path, tmp_path / "peer")
    cfusion("import", path, source, "--from", "patho-bench", "--protocol", "strict", "--model", "CoxNet", "--seed", "2")
    sweep = load_sweep(path)
    mine = report_sweep(sweep, plan(sweep), tmp_path / "mine").parent
    tests = pd.read_csv(mine / "tests.csv").set_index("model")
    assert set(tests.index) == {"made-up / mean", "made-up / CoxNet"}
    assert tests.loc["made-up / CoxNet", "seeds"] == 1
    assert tests.loc["made-up / CoxNet", "patients"] == 48
    scored = pd.concat([frame for _, frame in folds(path)])
    stored = read_predictions(next((sweep.output / "imported").glob("*/predictions.csv")))
    together = scored.merge(stored, on="case_id", suffixes=("", "_stored"))
    for column in ("risk", "fold", "survival_months", "event"):
        assert (together[column] == together[f"{column}_stored"]).all(), column
    export_sweep(sweep, plan(sweep), tmp_path / "toy.zip")
    report_archive(tmp_path / "toy.zip", tmp_path / "theirs")
    for name in ("cells.csv", "tests.csv", "table.md"):
        assert (tmp_path / "theirs" / name).read_bytes() == (mine / name).read_bytes()


def test_risks_of_the_slides_of_a_patient_are_averaged_and_a_training_median_is_kept(path, tmp_path):
    cfusion("import", path, nnmil(path, tmp_path / "n"), "--from", "nnmil")
    cfusion("import", path, stamp(path, tmp_path / "s"), "--from", "stamp")
    stored = [pd.read_csv(file) for file in (tmp_path / "sweep" / "imported").glob("*/predictions.csv")]
    found = {frame["model"].iloc[0]: frame.set_index("case_id") for frame in stored}
    _, frame = folds(path)[0]
    first = frame.iloc[0]
    assert found["nnMIL"].loc[first["case_id"], "risk"] == pytest.approx(first["risk"] + 1)
    assert found["STAMP"].loc[first["case_id"], "risk"] == pytest.approx(first["risk"])
    assert set(found["STAMP"]["risk_cutoff"]) == {-1.25}


def test_folds_are_found_by_their_patients_not_by_their_numbers(path, tmp_path):
    source = stamp(path, tmp_path / "peer")
    for old, new in (("split-0", "split-x"), ("split-1", "split-0"), ("split-x", "split-1")):
        (source / old).rename(source / new)
    cfusion("import", path, source, "--from", "stamp")
    stored = pd.read_csv(next((tmp_path / "sweep" / "imported").glob("*/predictions.csv"))).set_index("case_id")
    for split, _ in folds(path):
        assert set(stored.index[stored["fold"] == split.fold]) == set(split.test)


def edited(table: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(table)).to_csv(table, index=False)


Change = Callable[[pd.DataFrame], pd.DataFrame]
FIRST = "split-0/patient-preds.csv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(PATIENT=["XX-1", *t["PATIENT"][1:]]), r"1 patients are not among the 48 .*such as XX-1"),
        (lambda t: t.iloc[1:], r"fold 0 of the sweep is the nearest, and 1 of its patients are missing, such as PT-"),
        (lambda t: t.assign(event=1 - t["event"]), r"16 patients have another event in made_up, such as PT-"),
        (lambda t: t.assign(time=t["time"] * 2), r"have another time in made_up, such as PT-\d+: .* months there"),
        (lambda t: t.rename(columns={"pred_score": "score"}), "lacks the columns pred_score|one column of patients"),
        (lambda t: t.drop(columns="time"), "lacks the columns time; it has PATIENT, pred_score, event"),
        (lambda t: t.assign(pred_score=["high", *t["pred_score"][1:]]), "row 2: pred_score is 'high'"),
        (lambda t: t.assign(pred_score=[None, *t["pred_score"][1:]]), r"patient PT-\d+ has an empty pred_score"),
        (lambda t: t.assign(event=[2, *t["event"][1:]]), "event is '2(.0)?', expected 0 or 1"),
        (lambda t: pd.concat([t, t.head(1).assign(event=1 - t["event"][0])]), r"patient PT-\d+ has two outcomes"),
        (lambda t: t.rename(columns={"cut_off=-1.25": "cut_off=none"}), "expected a number after cut_off="),
        (lambda t: t.assign(more=1), "one column of patients besides pred_score, event, time, found PATIENT, more"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_name(path, tmp_path, change: Change, message: str):
    source = stamp(path, tmp_path / "peer")
    edited(source / FIRST, change)
    with pytest.raises(PredictionsError, match=message):
        cfusion("import", path, source, "--from", "stamp")
    assert not (tmp_path / "sweep" / "imported").exists()


def test_folds_that_do_not_fit_are_refused_by_name(path, tmp_path):
    source = stamp(path, tmp_path / "peer")
    tables = [source / f"split-{k}" / "patient-preds.csv" for k in range(3)]
    one, other = pd.read_csv(tables[0]), pd.read_csv(tables[1])
    pd.concat([one.iloc[1:], other.head(1)]).to_csv(tables[0], index=False)
    moved, left = other["PATIENT"][0], one["PATIENT"][0]
    message = rf"1 patients are not in it, such as {moved}; 1 of its patients are missing, such as {left}"
    with pytest.raises(PredictionsError, match=message):
        cfusion("import", path, source, "--from", "stamp")
    other.to_csv(tables[0], index=False)
    with pytest.raises(PredictionsError, match=r"scores the same patients as .*split-0"):
        cfusion("import", path, source, "--from", "stamp")
    tables[0].unlink()
    with pytest.raises(DataError, match=r"split-0: expected one patient-preds\.csv, found 0: none"):
        cfusion("import", path, source, "--from", "stamp")
    tables[0].parent.rmdir()
    with pytest.raises(PredictionsError, match="no predictions for fold 0 of made_up, which scores 16 patients"):
        cfusion("import", path, source, "--from", "stamp")
    again = nnmil(path, tmp_path / "nnmil")
    (again / "fold_1" / "results_simple_mil.csv").write_text("patient_id\n")
    with pytest.raises(DataError, match=r"found 2: predictions/results_simple_mil\.csv; results_simple"):
        cfusion("import", path, again, "--from", "nnmil")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "stmp"], r"--from stmp: expected one of stamp, nnmil, patho-bench\. Did you mean stamp\?"),
        (["--from", "nnmil"], r"has no folder fold_\*"),
        (["--from", "stamp", "--cohort", "tcga"], "--cohort tcga: the sweep has no such cohort. It has made_up"),
        (["--from", "stamp", "--model", "amil"], "--model amil: the sweep trains a model of this name on made_up"),
        (["--from", "stamp", "--protocol", "best"], "--protocol best: expected one of strict, fixed-epoch"),
    ],
)
def test_a_wrong_option_is_refused(path, tmp_path, options, message):
    with pytest.raises(CfusionError, match=message):
        cfusion("import", path, stamp(path, tmp_path / "peer"), *options)


def test_the_same_predictions_are_imported_once_and_others_under_another_name(path, tmp_path):
    source = stamp(path, tmp_path / "peer")
    for _ in range(2):
        cfusion("import", path, source, "--from", "stamp")
    assert len(list((tmp_path / "sweep" / "imported").iterdir())) == 1
    edited(source / FIRST, lambda table: table.assign(pred_score=0.0))
    with pytest.raises(ConfigError, match=r"has other predictions of STAMP \(seed 1\) on made_up"):
        cfusion("import", path, source, "--from", "stamp")
    cfusion("import", path, source, "--from", "stamp", "--model", "STAMP, second")
    assert len(list((tmp_path / "sweep" / "imported").iterdir())) == 2


def test_a_sweep_without_a_finished_run_has_no_folds_to_compare_with(files, tmp_path):
    path = sweep_file(files, tmp_path)
    with pytest.raises(DataError, match="made_up: no run on real outcomes is done, so its folds are unknown"):
        cfusion("import", path, stamp(path, tmp_path / "peer"), "--from", "stamp")
