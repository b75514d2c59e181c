"""A drawn cohort by command."""

import pandas as pd
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.errors import ConfigError


def test_a_cohort_is_drawn(tmp_path):
    done = CliRunner().invoke(app, ["phantom", str(tmp_path / "study"), "--cases", "2"])
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "study" / "cohort.csv")
    assert table.columns.tolist() == ["patient", "slide", "time", "event"]
    assert {f"{slide}.svs" for slide in table["slide"]} == {p.name for p in (tmp_path / "study" / "slides").iterdir()}
    assert len(table) == 3


def test_an_unknown_cohort_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["phantom", str(tmp_path / "study"), "--like", "phantom-z"])
    assert isinstance(done.exception, ConfigError)
    assert "phantom-a or phantom-b" in str(done.exception)
    assert not (tmp_path / "study").exists()
