"""Scores: the published oracle, every rule for invalid input, and no test outcomes in training."""

import dataclasses
from pathlib import Path

import made_up_outcomes
import numpy as np
import pandas as pd
import pytest
from made_up_outcomes import cohort

from cfusion.cohort.splits import make_splits
from cfusion.config import SplitsConfig
from cfusion.errors import DataError, UndefinedMetricError
from cfusion.survival.bins import TimeBins
from cfusion.survival.foldscores import References
from cfusion.survival.predictions import checked_predictions, read_predictions
from cfusion.survival.score import Scores, score
from cfusion.types import Cohort

MCAT = "published/mcat_iccv2021"


@pytest.fixture(scope="module")
def mcat(material: Path) -> Scores:
    return score(read_predictions(material / MCAT / "predictions.csv"), bootstrap=50)


def test_published_folds_return(material: Path, mcat: Scores) -> None:
    published = pd.read_csv(material / MCAT / "cindex_per_fold.csv", float_precision="round_trip")
    both = mcat.folds.merge(published, on=["model", "cohort", "fold"], validate="one_to_one")
    assert len(both) == 50
    np.testing.assert_allclose(both["harrell_c"], both["cindex"], rtol=0, atol=1e-9)


def test_published_summary_returns(material: Path, mcat: Scores) -> None:
    published = pd.read_csv(material / MCAT / "summary.csv", float_precision="round_trip")
    both = mcat.summary.merge(published, on=["model", "cohort"], suffixes=("", "_published"), validate="one_to_one")
    assert len(both) == 10
    for column in ("cindex_mean", "cindex_std", "cindex_pooled"):
        np.testing.assert_allclose(both[column], both[f"{column}_published"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(both["logrank_p"], both["logrank_p_published"], rtol=0.01)


def test_constant_risks_are_noted(mcat: Scores) -> None:
    """MCAT's DeepSets have one risk a fold in three cohorts: no model at all."""
    named = [note.partition(",")[0] for note in mcat.notes if "DeepSets (unknown): no model" in note]
    assert named == ["blca", "brca", "ucec"]
    assert "DeepSets: all risks are equal in folds (1 of luad)." in mcat.notes
    constant = mcat.folds[(mcat.folds["harrell_c"] == 0.5)]
    assert (constant["note"] == "all risks are equal").all()


def repeated(table: pd.DataFrame, column: str, times: int) -> pd.DataFrame:
    """The same risks again and again, each time in other folds (`repeat`) or other rows (`seed`)."""
    parts = []
    for number in range(times):
        shuffled = np.random.default_rng(number).permutation(len(table))
        rows = table.iloc[shuffled].assign(**{column: number})
        parts.append(rows.assign(fold=np.arange(len(rows)) % 5) if column == "repeat" else rows)
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("column", ["repeat", "seed"])
def test_repeating_what_is_known_narrows_no_interval(column: str) -> None:
    full = cohort(120, seed=1)
    table = predicted(full)[["model", "cohort", "protocol", "fold", "case_id", "risk", "survival_months", "event"]]
    rows = [score(repeated(table, column, times), bootstrap=300).summary.iloc[0] for times in (1, 10)]
    widths = [row["within_high"] - row["within_low"] for row in rows]
    assert widths[1] == pytest.approx(widths[0], rel=0.08)
    pooled = [row["cindex_high"] - row["cindex_low"] for row in rows]
    assert pooled[1] == pytest.approx(pooled[0], rel=1e-9)


def test_the_order_of_rows_decides_nothing() -> None:
    full = cohort(80, seed=2)
    table = pd.concat([predicted(full), predicted(full).assign(seed=8)], ignore_index=True)
    shuffled = table.sample(frac=1, random_state=0).sort_values("model", kind="stable")
    one, other = (score(frame, bootstrap=50) for frame in (table, shuffled))
    pd.testing.assert_frame_equal(one.summary, other.summary, check_exact=True)
    pd.testing.assert_frame_equal(one.folds, other.folds, check_exact=True)
    assert one.patients == other.patients


def test_pooled_and_within_that_disagree_are_noted(mcat: Scores) -> None:
    assert "luad, AMIL (unknown): pooled C 0.536 and C within folds 0.559 disagree" in " ".join(mcat.notes)
    full = cohort(120)
    shifted = predicted(full)
    shifted["risk"] += 8 * shifted["fold"]
    plain = predicted(full).assign(model="plain")
    plain["risk"] += np.random.default_rng(0).normal(0, 0.5, len(plain))
    scores = score(pd.concat([shifted, plain], ignore_index=True), bootstrap=0)
    assert any("m is better than plain within folds, and worse when the risks are pooled" in n for n in scores.notes)


def test_few_events_are_noted() -> None:
    assert any("Below about 50" in note for note in score(predicted(cohort(60)), bootstrap=20).notes)
    assert not any("Below about 50" in note for note in score(predicted(cohort(60)), bootstrap=0).notes)


def predicted(cohort: Cohort, config: SplitsConfig | None = None, protocol: str = "strict") -> pd.DataFrame:
    return made_up_outcomes.predicted(cohort, make_splits(cohort, config or SplitsConfig(), protocol), "m", protocol)


def test_correct_model_has_good_scores() -> None:
    data = cohort(200)
    scores = score(predicted(data), data, make_splits(data, SplitsConfig()), bootstrap=200)
    row = scores.summary.iloc[0]
    assert row["cindex_low"] < row["cindex_pooled"] < row["cindex_high"]
    assert row["within_low"] < row["cindex_within"] < row["within_high"]
    assert row["cindex_mean"] > 0.65
    assert row["uno_c"] > 0.65
    assert row["ibs"] < row["ibs_null"]
    assert row["calibration_slope_low"] < 1 < row["calibration_slope_high"]
    assert row["observed_expected_low"] < 1 < row["observed_expected_high"]
    assert row["calibration_intercept_low"] < 0 < row["calibration_intercept_high"]
    assert row["ici"] < 0.1
    assert row["ibs_months"] > 40
    assert np.isnan(row["d_calibration_p"])  # more than a fifth is censored
    assert row["hazard_ratio"] > 1.5
    assert row["logrank_by_fold_p"] < 1e-3
    assert row[["auc_12", "auc_36"]].min() > 0.65
    assert row["ibs_high"] < row["ibs_null"]
    for name in ("auc_12", "auc_36", "ibs"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    assert row["uno_low"] < row["uno_c"] < row["uno_high"]
    assert (scores.folds["harrell_low"] <= scores.folds["harrell_c"]).all()
    assert (scores.folds["uno_low"] <= scores.folds["uno_c"]).all()
    details = scores.patients["made_up", "m", "strict"]
    assert details.cutoff_rule == "median risk of the training patients of each fold"
    assert details.low_at_risk[0] + details.high_at_risk[0] == 200


@pytest.mark.slow
def test_scores_do_not_depend_on_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = predicted(cohort(80))
    models = pd.concat([table.assign(model=f"m{i}", risk=table["risk"] * (i + 1)) for i in range(3)])
    single = score(models, bootstrap=20)
    monkeypatch.setattr("cfusion.survival.score._PARALLEL_FROM", 1)
    monkeypatch.setattr("cfusion.survival.score._MOST_PROCESSES", 2)
    spread = score(models, bootstrap=20)
    pd.testing.assert_frame_equal(single.summary, spread.summary)
    pd.testing.assert_frame_equal(single.folds, spread.folds)


def test_test_outcomes_leave_training_untouched() -> None:
    """Changing the test patients' outcomes changes no split, bin, cut-off, censoring model or truncation time."""
    before = cohort(200)
    for protocol in ("strict", "fixed-epoch"):
        split = make_splits(before, SplitsConfig(), protocol)[0]
        cases = before.cases.copy()
        test = list(split.test)
        cases.loc[test, "time_months"] = cases.loc[test, "time_months"] * 3 + 1
        cases.loc[test, "event"] = ~cases.loc[test, "event"]
        after = dataclasses.replace(before, cases=cases)
        sides = [list(split.train), list(split.validation)]
        for side in sides:
            pd.testing.assert_frame_equal(before.cases.loc[side], after.cases.loc[side])
        fitted = [
            TimeBins.fit(c.cases.loc[sides[0], "time_months"], c.cases.loc[sides[0], "event"], 4)
            for c in (before, after)
        ]
        assert fitted[0] == fitted[1]
        table = checked_predictions(predicted(before, protocol=protocol))
        trainings = [References(c, {(0, 0): split}).training(table, 0)[0] for c in (before, after)]
        np.testing.assert_array_equal(trainings[0].outcomes, trainings[1].outcomes)
        assert trainings[0].truncation_months == trainings[1].truncation_months
        np.testing.assert_array_equal(trainings[0].survival_at([6, 24]), trainings[1].survival_at([6, 24]))


def test_inner_validation_does_not_look_at_the_outer_fold(tmp_path: Path) -> None:
    """With fixed outer folds, changing a test side's outcomes leaves its inner validation unchanged."""
    before = cohort(200)
    outer = make_splits(before, SplitsConfig(), "fixed-epoch")
    for split in outer:
        table = pd.DataFrame({"train": pd.Series(split.train), "val": pd.Series(split.test)})
        table.to_csv(tmp_path / f"splits_{split.fold}.csv")
    config = SplitsConfig(directory=tmp_path)
    first = make_splits(before, config)[0]
    cases = before.cases.copy()
    cases.loc[list(first.test), "time_months"] *= 5
    cases.loc[list(first.test), "event"] = True
    again = make_splits(dataclasses.replace(before, cases=cases), config)[0]
    assert first == again


def test_repeats_and_seeds_are_averaged() -> None:
    data = cohort(120)
    config = SplitsConfig(repeats=2)
    table = predicted(data, config)
    scores = score(table, data, make_splits(data, config), bootstrap=50)
    assert len(scores.folds) == 10
    assert scores.summary["n"].tolist() == [120]
    assert scores.summary["cindex_mean"].iloc[0] == pytest.approx(scores.folds["harrell_c"].mean())


def test_slides_of_a_patient_are_averaged() -> None:
    table = predicted(cohort(80)).drop(columns=["risk_cutoff"])
    shifted = [table.assign(slide_id=f"s{k}", risk=table["risk"] + k) for k in (-1, 1)]
    pooled = score(pd.concat(shifted, ignore_index=True), bootstrap=0)
    assert pooled.summary["n"].tolist() == [80]
    assert pooled.summary["cindex_pooled"].iloc[0] == pytest.approx(
        score(table, bootstrap=0).summary["cindex_pooled"].iloc[0]
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.assign(risk=t["risk"].where(t["case_id"] != "p3")), DataError,
         r"1 values of risk are missing or not finite; first m, made_up, fold \d, case p3"),
        (lambda t: t.assign(risk=np.inf), DataError, "80 values of risk are missing or not finite"),
        (lambda t: t.assign(survival_months=-t["survival_months"]), DataError, "survival_months are negative"),
        (lambda t: t.assign(survival_months=t["survival_months"] * 30.4), DataError,
         "survival_months are over 50 years.*Are the times in days"),
        (lambda t: t.assign(case_id=t["case_id"].where(t["case_id"] != "p3")), DataError,
         "1 values of case_id are missing"),
        (lambda t: t.assign(cohort=t["cohort"].where(t["case_id"] != "p3")), DataError,
         "1 values of cohort are missing"),
        (lambda t: t.assign(fold=t["fold"] + 0.5), DataError,
         r"80 values of fold are not whole numbers; first m, made_up, fold \d\.5"),
        (lambda t: t.assign(protocol="stict"), DataError, "80 values of protocol are not known.*strict, fixed-epoch"),
        (lambda t: t.drop(columns="edge_2"), DataError, "80 values of survival_2 have no edge_2"),
        (lambda t: t.assign(survival_1=t["survival_1"].where(t["case_id"] != "p3")), DataError,
         "1 values of survival_1 are missing or not finite"),
        (lambda t: pd.concat([t.assign(slide_id="s"), t.iloc[:1].assign(slide_id="s", risk=9.0)]), DataError,
         "slide s of case p.* has two different predictions"),
        (lambda t: pd.concat([t, t.iloc[:1]]), DataError, "is scored twice in one fold"),
        (lambda t: pd.concat([t, t.iloc[:1].assign(fold=99)]), DataError, "is scored in two folds"),
        (lambda t: pd.concat([t, t.assign(model="n", survival_months=t["survival_months"] + 1)]), DataError,
         "has two different outcomes"),
        (lambda t: t.assign(event=t["event"] & (t["fold"] != 2)), UndefinedMetricError,
         "m, made_up, fold 2: no comparable pair among 16 patients with 0 events"),
        (lambda t: t.assign(event=False), UndefinedMetricError, "no comparable pair"),
        (lambda t: t.assign(survival_months=5.0, event=True), UndefinedMetricError, "no comparable pair"),
        (lambda t: t.assign(survival_2=t["survival_1"] + 0.1), DataError, "must lie between 0 and 1 and not increase"),
        (lambda t: t.assign(edge_2=t["edge_1"] - 1), DataError, "must increase and be the same"),
    ],
)  # fmt: skip
def test_invalid_predictions(change, error: type, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        score(change(predicted(cohort(80))), bootstrap=0)


def test_models_with_and_without_curves_are_scored_together() -> None:
    table = predicted(cohort(80))
    bare = table.loc[:, ~table.columns.str.match(r"(survival|edge)_\d")].assign(model="bare")
    both = score(pd.concat([table, bare], ignore_index=True), bootstrap=0)
    assert both.summary.set_index("model")["ibs"].notna().to_dict() == {"m": True, "bare": False}
    single = score(table, bootstrap=0)
    pd.testing.assert_frame_equal(both.folds[both.folds["model"] == "m"], single.folds)


def test_missing_interval_is_noted() -> None:
    rows = {"model": "m", "cohort": "c", "fold": 0, "case_id": ["a", "b"], "risk": [2.0, 1.0], "event": [True, True]}
    scores = score(pd.DataFrame({**rows, "survival_months": [3.0, 4.0]}), bootstrap=50)
    assert scores.summary["cindex_pooled"].tolist() == [1.0]
    assert scores.summary["cindex_low"].isna().all()
    assert any(note.startswith("c, m: no interval") for note in scores.notes)


def test_all_ties_leave_censoring_weighted_scores_undefined() -> None:
    """With all events and censorings at one time, Harrell's C exists but the censoring-weighted scores do not."""
    table = predicted(cohort(80)).assign(survival_months=12.0)
    table = table.loc[:, ~table.columns.str.match(r"(survival|edge)_\d")]
    scores = score(table, bootstrap=20)
    assert scores.folds["harrell_c"].between(0, 1).all()
    assert scores.folds[["uno_c", "uno_low", "auc_12", "auc_36"]].isna().all(axis=None)


def test_predictions_against_cohort_and_splits() -> None:
    data = cohort(80)
    table, splits = predicted(data), make_splits(data, SplitsConfig())
    flipped = dataclasses.replace(data, cases=data.cases.assign(event=~data.cases["event"]))
    with pytest.raises(DataError, match="80 patients have different outcomes in cohort made_up"):
        score(table, flipped, splits, bootstrap=0)
    with pytest.raises(DataError, match="1 patients are not in cohort made_up, such as p0"):
        score(table, data.subset([c for c in data.cases.index if c != "p0"]), bootstrap=0)
    leaking = [dataclasses.replace(split, train=split.train + split.test[:1]) for split in splits]
    with pytest.raises(DataError, match="1 scored patients are training patients"):
        score(table, data, leaking, bootstrap=0)
    with pytest.raises(DataError, match="fold 4 of repeat 0 is in the predictions, not in the splits"):
        score(table, data, splits[:4], bootstrap=0)
    choosing = [dataclasses.replace(s, validation=s.test[:2], test=s.test[2:]) for s in splits]
    with pytest.raises(DataError, match="fold 0: 2 scored patients chose the model"):
        score(table, data, choosing, bootstrap=0)


def test_predictions_without_outcomes_use_those_of_the_cohort() -> None:
    data = cohort(80)
    table, split = predicted(data), make_splits(data, SplitsConfig())[1]
    bare = table[table["fold"] == 1].drop(columns=["cohort", "survival_months", "event", "repeat"], errors="ignore")
    scores = score(bare, data, dataclasses.replace(split, repeat=1), bootstrap=0)
    assert scores.predictions["survival_months"].tolist() == data.cases.loc[bare["case_id"], "time_months"].tolist()
    assert scores.folds["repeat"].tolist() == [1]
    with pytest.raises(DataError, match="lacks the columns cohort, survival_months, event"):
        score(bare, bootstrap=0)
    with pytest.raises(DataError, match="1 patients are not in cohort made_up, such as nobody"):
        score(bare.assign(case_id=["nobody", *bare["case_id"][1:]]), data, bootstrap=0)


def test_flipped_polarity_is_noted_with_both_medians() -> None:
    table = predicted(cohort(200))
    late = table["survival_months"] > table["survival_months"].median()
    scores = score(table.assign(event=late), bootstrap=0)
    (note,) = [note for note in scores.notes if "median follow-up of events" in note]
    assert note.startswith("made_up: 50% of the patients and 100% of the 10 followed longest have the event")


def test_undefined_scores_are_missing_and_a_single_fold_is_noted() -> None:
    table = predicted(cohort(80))
    scores = score(table, bootstrap=0, horizons=(12.0, 9999.0))
    assert scores.folds["auc_9999"].isna().all()
    assert scores.summary["cindex_low"].isna().all()
    bare = table.loc[:, ~table.columns.str.match(r"(survival|edge)_\d")]
    assert score(bare, bootstrap=0).folds["ibs"].isna().all()
    single = score(bare.assign(fold=0), bootstrap=0)
    assert single.folds["note"].tolist() == ["censoring model from the scored patients"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,cohort,fold,case_id,survival_months,event\nm,c,0,a,3,1\n", "lacks the columns risk"),
        (
            "model,cohort,fold,case_id,risk,survival_months\nm,c,0,a,1,3\n",
            "lacks the columns event.*or, in a file, censorship",
        ),
        (
            "model,cohort,fold,case_id,risk,survival_months,event\nm,c,0,a,high,3,1\n",
            "row 2: risk is 'high', expected a finite number",
        ),
        (
            "model,cohort,fold,case_id,risk,survival_months,event,censorship\nm,c,0,a,1,3,1,1\n",
            "event and censorship contradict",
        ),
        ("model,cohort,fold,case_id,risk,survival_months,event\nm,c,0,a,,3,1\n", "risk are missing.*fold 0, case a"),
        ("model,cohort,fold,case_id,risk,survival_months,event\nm,c,0,,1,3,1\n", "case_id are missing"),
        ("model,cohort,fold,case_id,risk,survival_months,event\nm,c,0,a,1,soon,1\n", "survival_months is 'soon'"),
    ],
)
def test_invalid_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_predictions(path)
