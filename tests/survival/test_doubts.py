"""Test that predictions in another unit, on another scale or of the other sign are noted, and correct ones are not."""

import numpy as np
import pandas as pd
import pytest

from cfusion.cohort.splits import make_splits
from cfusion.config import SplitsConfig
from cfusion.survival.score import Scores, score
from tests.made_up_outcomes import cohort, predicted


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    data = cohort(300)
    return predicted(data, make_splits(data, SplitsConfig()), "mine", "strict", noise=0.3)


def notes(table: pd.DataFrame, bootstrap: int = 0) -> tuple[str, ...]:
    return score(table, bootstrap=bootstrap).notes


def scaled(table: pd.DataFrame, prefix: str, factor: float) -> pd.DataFrame:
    return table.assign(**{name: table[name] * factor for name in table.columns if name.startswith(prefix)})


def test_correct_predictions_have_no_notes(table: pd.DataFrame) -> None:
    assert notes(table, bootstrap=50) == ()


@pytest.mark.parametrize(("factor", "unit"), [(30.4, "days"), (1 / 12, "years"), (4.35, "days"), (1 / 120, "years")])
def test_edges_in_another_unit(table: pd.DataFrame, factor: float, unit: str) -> None:
    (note,) = notes(scaled(table, "edge_", factor))
    assert note.startswith("made_up, mine: the last edge_K is ")
    assert f"are the edges in {unit}?" in note


@pytest.mark.parametrize("factor", [-1.0, -1e-12])
def test_the_sign_of_the_risk(table: pd.DataFrame, factor: float) -> None:
    turned = scaled(table.drop(columns="risk_cutoff"), "risk", factor)
    found = notes(turned, bootstrap=50)
    assert any("and its interval lie below .5; is the sign of the risk turned?" in note for note in found)
    assert any("a higher risk have a higher predicted survival" in note for note in found)
    bare = turned[[name for name in turned.columns if not name.startswith(("survival_1", "survival_2", "survival_3",
                                                                          "survival_4", "edge"))]]  # fmt: skip
    assert [note[:22] for note in notes(bare, bootstrap=50)] == [
        f"made_up, mine: C {score(bare).summary['cindex_within'][0]:.3f}"
    ]
    assert notes(bare) == ()  # without intervals nothing is significant


def test_survival_that_rises_with_risk(table: pd.DataFrame) -> None:
    names = [name for name in table.columns if name.startswith("survival_") and name != "survival_months"]
    swapped = table.copy()
    for _, rows in table.groupby("fold"):
        order = rows.sort_values("risk").index
        swapped.loc[order, names] = table.loc[order[::-1], names].to_numpy()
    assert any("a higher risk have a higher predicted survival" in note for note in notes(swapped))


@pytest.mark.parametrize("cutoff", [1e6, -1e6])
def test_a_cutoff_on_another_scale(table: pd.DataFrame, cutoff: float) -> None:
    assert notes(table.assign(risk_cutoff=cutoff)) == (
        "made_up, mine: every risk_cutoff lies outside the risks; is it on another scale?.",
    )


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_risks_that_differ_only_by_rounding(table: pd.DataFrame, scale: float) -> None:
    bare = table.drop(columns="risk_cutoff")
    rounding = bare.assign(risk=scale * (0.3 + 1e-16 * np.arange(len(table))))
    assert any("no model; within each fold all patients have the same risk" in note for note in notes(rounding))
    assert not any("no model" in note for note in notes(bare.assign(risk=scale * bare["risk"])))


def test_too_many_expected_deaths(table: pd.DataFrame) -> None:
    def with_hazard(factor: float) -> Scores:
        names = [name for name in table.columns if name.startswith("survival_") and name != "survival_months"]
        return score(table.assign(**{name: table[name] ** factor for name in names}), bootstrap=0)

    right, many, few = (with_hazard(factor) for factor in (1, 3, 1 / 3))
    assert right.notes == ()
    assert "expects too many events: during the follow-up observed/expected is 0.4" in many.notes[0]
    assert "expects too few events: during the follow-up observed/expected is" in few.notes[0]
    for name in ("observed_expected", "calibration_intercept", "ici"):
        values = [scores.summary[name][0] for scores in (many, right, few)]
        if name == "ici":
            assert values[1] < min(values[0], values[2])
        else:
            assert values[0] < values[1] < values[2]
    # Between edges survival is interpolated, not the hazard, so the intercepts differ by less than log 3.
    difference = right.summary["calibration_intercept"][0] - many.summary["calibration_intercept"][0]
    assert 0.7 < difference < np.log(3)
    # The slope sees none of it.
    assert many.summary["calibration_slope"][0] == pytest.approx(right.summary["calibration_slope"][0], abs=0.1)


def test_every_survival_column_counts_in_the_brier_score(table: pd.DataFrame) -> None:
    """Models that differ only in the survival past the last quantile of events have different scores."""
    found = [
        score(table.assign(survival_4=values), bootstrap=20).summary.iloc[0]
        for values in (table["survival_4"], 0.0, table["survival_3"])
    ]
    assert len({round(row["ibs"], 6) for row in found}) == 3
    months = [row["ibs_months"] for row in found]
    assert months[0] == months[1] == months[2]
    edges = table[["edge_1", "edge_3", "edge_4"]].mean()
    assert edges["edge_3"] < months[0] < edges["edge_4"]
    for row in found:
        assert row["ibs_low"] < row["ibs"] < row["ibs_high"]
