"""Test whether a run ranks held-out patients better than chance: noise does not, signal does."""

import numpy as np
import pandas as pd
import pytest

from cfusion.apply.ranking import LEVEL, rank_test, run_ranking
from cfusion.survival.null import EpochChoice
from cfusion.survival.predictions import checked_predictions


def outcomes(rng: np.random.Generator, patients: int, signal: float = 0.0) -> pd.DataFrame:
    """Out-of-fold predictions of five folds; `signal` is the slope of the log-hazard over the risk."""
    risk = rng.normal(size=patients)
    death = rng.exponential(size=patients) * np.exp(-signal * risk)
    leaves = rng.exponential(size=patients) * 1.5
    return checked_predictions(pd.DataFrame({
        "model": "m", "cohort": "c", "protocol": "strict", "fold": np.arange(patients) % 5,
        "case_id": [f"PT-{row:04d}" for row in range(patients)], "risk": risk,
        "survival_months": np.minimum(death, leaves) + 0.01, "event": death <= leaves,
    }))  # fmt: skip


def learnt_noise(rng: np.random.Generator, patients: int, width: int = 30) -> pd.DataFrame:
    """Predictions of linear models that were trained on outcomes without any relation to the features."""
    table = outcomes(rng, patients)
    features = rng.normal(size=(patients, width))
    target = table["event"].to_numpy() - table["survival_months"].rank().to_numpy() / patients
    for fold in range(5):
        held = table["fold"].to_numpy() == fold
        slope = features[~held].T @ (target[~held] - target[~held].mean())
        table.loc[held, "risk"] = features[held] @ slope
    return table


def test_models_that_learnt_noise_rarely_rank_patients():
    found = [rank_test(learnt_noise(np.random.default_rng(seed), 100)) for seed in range(100)]
    assert np.mean([one.above_chance for one in found]) <= 2 * LEVEL
    assert np.mean([one.cindex for one in found]) == pytest.approx(0.5, abs=0.015)


def test_a_signal_is_found_and_said():
    found = rank_test(outcomes(np.random.default_rng(0), 150, signal=1.0))
    assert found.above_chance
    assert (found.patients, found.chance) == (150, pytest.approx(0.5, abs=0.01))
    assert str(found).startswith(f"C .{round(1000 * found.cindex)} of 150 held-out patients; chance .")
    assert str(found).endswith("p < .001")


def test_a_score_chosen_on_the_scored_fold_is_compared_with_noise_chosen_likewise():
    weak = outcomes(np.random.default_rng(3), 100, signal=0.35)
    strict, published = (rank_test(weak.assign(protocol=name)) for name in ("strict", "published"))
    assert published.cindex == strict.cindex
    assert strict.chance < 0.52 < 0.55 < published.chance
    assert published.p > strict.p
    one_epoch = rank_test(weak.assign(protocol="published"), EpochChoice(1, 0, None))
    assert one_epoch.chance == pytest.approx(0.5, abs=0.02)


def test_only_patients_of_one_cohort_are_compared():
    rng = np.random.default_rng(5)
    table = pd.concat(
        [
            outcomes(rng, 60).assign(case_id=lambda t, p=name: p + t["case_id"], stratum=name, survival_months=months)
            for name, months in (("a", 1.0), ("b", 50.0))
        ]
    )
    table["risk"] = np.where(table["stratum"] == "a", 1.0, -1.0)
    table["survival_months"] += rng.uniform(size=len(table))
    assert rank_test(table).cindex == 0.5
    assert rank_test(table.drop(columns="stratum")).cindex > 0.6


def test_the_predictions_of_a_run_are_found_from_a_fold(tmp_path):
    table = outcomes(np.random.default_rng(0), 60, signal=1.0)
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "run.json").write_text("{}")
    assert run_ranking(tmp_path) is None, "no predictions yet"
    table.to_csv(tmp_path / "predictions.csv", index=False)
    table.iloc[:12].to_csv(tmp_path / "fold_0" / "predictions.csv", index=False)
    assert run_ranking(tmp_path).patients == run_ranking(tmp_path / "fold_0").patients == 60
    (tmp_path / "predictions.csv").write_text("risk\n1\n")
    assert run_ranking(tmp_path) is None, "unreadable: unknown"


def test_without_an_event_nothing_is_known():
    assert rank_test(outcomes(np.random.default_rng(0), 20).assign(event=False)) is None
