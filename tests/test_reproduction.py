"""A finished run trained again: equal bit for bit, and where it is not, told."""

import pandas as pd
import pytest
from factories import make_cohort

from cfusion.crossval import cross_validate
from cfusion.errors import DataError
from cfusion.reproduction import reproduce_run


def test_a_run_is_reproduced_bit_for_bit_and_a_changed_table_is_told(tmp_path):
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
    changed = reproduce_run(config.output, tmp_path / "changed")
    assert changed.largest > 0
    assert any(line.startswith("table_sha256") for line in changed.differences)
