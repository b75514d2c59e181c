"""Runs killed with kill -9 at random moments end with the bytes of an undisturbed one; benchmarks.kills has 200."""

import random

import pytest

from benchmarks.kills import CASES, run_case, write_study


@pytest.mark.slow
def test_twenty_kills_change_no_byte_and_leave_no_traceback(tmp_path):
    write_study(tmp_path)
    series = run_case(tmp_path, "folds side by side", 20, random.Random(1))
    assert series.kills == 20
    assert not series.wrong


def test_what_differs_is_named(tmp_path):
    wanted = {"fold_0/predictions.csv": "a digest", "predictions.csv": "another"}
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "predictions.csv").write_text("other bytes")
    (tmp_path / "summary.json.tmp").touch()
    log = tmp_path / "log"
    log.write_text("Traceback (most recent call last):")
    from benchmarks.kills import problems

    found = problems(tmp_path, log, wanted)
    assert [problem.split()[-1] for problem in found] == ["differs", "differs", "left", "output"]
    assert len(CASES) == 3
