"""Test reproduction of a finished run: predictions match bit for bit, or the differences are reported."""

import pandas as pd
import pytest
import typer
from factories import make_cohort
from typer.testing import CliRunner

from cfusion.cli import cmd_evidence as evidence
from cfusion.cli import cmd_reproduce as reproduce
from cfusion.errors import DataError
from cfusion.runs.crossval import cross_validate
from cfusion.runs.reproduction import reproduce_run

app = typer.Typer()
evidence.register(app)
reproduce.register(app)


@pytest.mark.slow
def test_a_run_is_reproduced_bit_for_bit_and_a_changed_table_is_reported(tmp_path):
    files = make_cohort(tmp_path / "cohort", two_slides=0)
    config = files.config(tmp_path / "run", train={"epochs": 2})
    with pytest.raises(DataError, match="holds no finished run"):
        reproduce_run(tmp_path / "run", tmp_path / "again")
    cross_validate(config)
    result = reproduce_run(config.output, tmp_path / "again")
    assert result.cases == 48
    assert result.largest == 0.0
    assert result.differences == ()
    with pytest.raises(DataError, match="holds a finished run"):
        reproduce_run(config.output, tmp_path / "again")

    table = pd.read_csv(files.table)
    table["time"] = table["time"].to_numpy()[::-1]
    table.to_csv(files.table, index=False)
    again = CliRunner().invoke(app, ["reproduce", str(config.output), "--out", str(tmp_path / "changed")])
    assert again.exit_code != 0
    assert "was not reproduced" in str(again.exception)
    assert "table_sha256 was " in str(again.exception)
    assert "packages" not in str(again.exception)


@pytest.mark.slow
def test_different_predictions_are_reported_and_a_tolerance_is_kept(tmp_path, monkeypatch):
    files = make_cohort(tmp_path / "cohort", two_slides=0)
    config = files.config(tmp_path / "run", train={"epochs": 1})
    cross_validate(config)
    table = pd.read_csv(config.output / "predictions.csv", float_precision="round_trip")
    table["survival_1"] += 1e-6  # a change that the risk does not show
    table.to_csv(config.output / "predictions.csv", index=False)
    monkeypatch.chdir(tmp_path)
    strict = CliRunner().invoke(app, ["reproduce", "run", "--out", "first"])
    assert "48 predictions, largest difference 1e-06" in strict.output
    assert "another device or number of threads" in str(strict.exception)
    near = CliRunner().invoke(app, ["reproduce", "run", "--out", "second", "--tolerance", "1e-5"])
    assert near.exit_code == 0, near.output
