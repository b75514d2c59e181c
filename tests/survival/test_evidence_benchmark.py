"""The benchmark of scoring runs, checks that both sides give the same numbers, and reports its measurements."""

from benchmarks.evidence import bootstrap_rows, comparison_rows, predictions
from cfusion.survival.score import score


def test_both_sides_agree_and_are_timed() -> None:
    (row,) = bootstrap_rows(60, 5)
    assert row.case == "5 bootstrap replicates, 60 patients"
    assert row.ours > 0
    assert row.theirs is not None
    assert row.theirs > 0


def test_large_comparison_at_a_small_size() -> None:
    rows = comparison_rows(2, 1)
    assert [row.case.split(": ")[1] for row in rows] == ["scored", "reported", "scored and reported"]
    assert rows[2].ours >= max(rows[0].ours, rows[1].ours)


def test_made_up_models_hold_a_signal() -> None:
    summary = score(predictions(2, 1), bootstrap=0).summary
    assert (summary["cindex_mean"] > 0.6).all()
