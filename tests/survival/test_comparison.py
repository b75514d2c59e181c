"""Paired comparisons: real differences are found, equal models show none, and Holm corrects."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfusion.errors import DataError
from cfusion.survival.paired import compare, holm
from cfusion.survival.predictions import checked_predictions


def predictions(noise: dict[str, float], size: int = 300, seeds: int = 1, seed: int = 0) -> pd.DataFrame:
    """Make models that see the true risk with different amounts of noise."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=size)
    happens, leaves = generator.exponential(30 * np.exp(-truth)), generator.exponential(40, size)
    base = pd.DataFrame({
        "cohort": "c", "case_id": [f"p{i}" for i in range(size)], "fold": np.arange(size) % 5,
        "survival_months": np.minimum(happens, leaves), "event": happens < leaves,
    })  # fmt: skip
    frames = [
        base.assign(model=model, seed=s, risk=truth + level * generator.normal(size=size))
        for model, level in noise.items()
        for s in range(seeds)
    ]
    return checked_predictions(pd.concat(frames, ignore_index=True))


def test_worse_model_is_detected() -> None:
    (row,) = compare(predictions({"good": 0.1, "bad": 4.0}), replicates=300).to_dict("records")
    assert (row["model"], row["reference"], row["patients"]) == ("bad", "good", 300)
    assert row["low"] < row["difference"] < row["high"] < 0
    assert row["p"] < 1e-4
    (swapped,) = compare(predictions({"good": 0.1, "bad": 4.0}), reference="bad", replicates=300).to_dict("records")
    assert swapped["difference"] == pytest.approx(-row["difference"], abs=1e-12)


def test_identical_models_do_not_differ() -> None:
    table = predictions({"a": 1.0})
    twin = pd.concat([table, table.assign(model="b")], ignore_index=True)
    (row,) = compare(twin, replicates=100).to_dict("records")
    assert row["difference"] == row["low"] == row["high"] == 0
    assert row["p"] == 1


def test_pairing_beats_two_separate_intervals() -> None:
    table = predictions({"a": 0.5})
    risk = table["risk"] + np.random.default_rng(1).normal(size=len(table)) * 0.05
    both = pd.concat([table, table.assign(model="b", risk=risk)], ignore_index=True)
    (row,) = compare(both, replicates=300).to_dict("records")
    assert row["high"] - row["low"] < 0.02


@pytest.mark.slow
def test_rejection_rate_under_the_null_is_nominal() -> None:
    rejected = sum(
        compare(predictions({"a": 1.5, "b": 1.5}, size=150, seed=s), replicates=200)["p"].iloc[0] < 0.05
        for s in range(60)
    )
    assert rejected <= 8


def test_seeds_are_paired_and_counted() -> None:
    table = predictions({"a": 0.5, "b": 2.0}, seeds=3)
    (row,) = compare(table, replicates=100).to_dict("records")
    assert row["seeds"] == 3
    fewer = table[(table["model"] == "a") | (table["seed"] < 2)]
    assert compare(fewer, replicates=100)["seeds"].tolist() == [2]


@pytest.mark.parametrize("apart", ["seed", "case_id"])
def test_models_without_common_seeds_or_patients_are_not_compared(apart: str) -> None:
    table = predictions({"a": 0.5, "b": 2.0})
    expected = compare(table, replicates=100)
    moved = table[table["model"] == "b"].assign(model="c")
    moved[apart] = 9 if apart == "seed" else "q" + moved["case_id"]
    both = compare(pd.concat([table, moved], ignore_index=True), replicates=100)
    pd.testing.assert_frame_equal(both[both["model"] == "b"], expected)
    row = both[both["model"] == "c"].iloc[0]
    assert row["seeds"] * row["patients"] == 0
    assert row[["difference", "low", "high", "p", "p_holm"]].isna().all()


def test_only_patients_scored_by_both_in_every_seed_count() -> None:
    table = predictions({"a": 0.5, "b": 2.0}, seeds=2)
    fewer = table[(table["model"] == "a") | (table["seed"] == 0) | (table["case_id"] != "p3")]
    (row,) = compare(fewer, replicates=100).to_dict("records")
    assert (row["patients"], row["seeds"]) == (299, 2)
    without = compare(table[table["case_id"] != "p3"], replicates=100).iloc[0]
    assert row["difference"] == pytest.approx(without["difference"], abs=1e-12)


def test_default_reference_is_the_first_model_of_each_protocol() -> None:
    table = predictions({"a": 0.5, "b": 2.0, "c": 1.0})
    table = table.assign(protocol=table["model"].map({"a": "strict", "b": "published", "c": "published"}))
    assert compare(table, replicates=50)[["protocol", "model", "reference"]].to_numpy().tolist() == [
        ["published", "c", "b"]
    ]
    assert compare(table, reference="a", replicates=50).empty


def test_unknown_reference_and_single_model() -> None:
    table = predictions({"a": 0.5})
    assert compare(table).empty
    with pytest.raises(DataError, match="reference z is not among the models a"):
        compare(table, reference="z")


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04, 0.03, 0.005]), [0.03, np.nan, 0.06, 0.06, 0.02])
    with pytest.raises(DataError, match="between 0 and 1"):
        holm([0.1, 1.2])


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_never_lowers_and_keeps_the_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= 1).all()
    assert (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-15).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
